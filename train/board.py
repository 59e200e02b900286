"""Metrics for TensorBoard, beside those of `metrics.jsonl`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import jax
import tensorboardX

from train.config import TrainConfig
from train.metrics import Record
from train.throughput import attention_flops, matmul_flops, peak_flops, peak_memory


class Board:
    """Writes events under a folder; a context manager. Steps after `start` replace older ones."""

    def __init__(self, folder: Path, config: TrainConfig, start: int, devices: int) -> None:
        self._writer = tensorboardX.SummaryWriter(str(folder), purge_step=start + 1)
        attention = attention_flops(config.model, config.seq_len)
        self._flops = attention + matmul_flops(config.model)
        self._share = attention / self._flops
        self._device = jax.local_devices()[0]
        peak = peak_flops(self._device)
        self._peak = None if peak is None else peak * devices

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def add(self, records: list[Record]) -> None:
        for record in records:
            for name, value in record.items():
                if name != "step":
                    self._writer.add_scalar(name, value, record["step"])

    def add_speed(self, step: int, tokens_a_second: float) -> None:
        """Speed, and what follows from it."""
        if not tokens_a_second:
            return
        values: dict[str, Any] = {
            "tokens_per_second": tokens_a_second,
            "attention_share_of_flops": self._share,
            "model_flops_utilization": self._peak and tokens_a_second * self._flops / self._peak,
            "peak_memory_bytes": peak_memory(self._device),
        }
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(f"speed/{name}", value, step)
