"""`python -m benchmarks.inference`: a model with random weights takes in prompts and generates.

Attention is S2 in all layers, S2 with two dense layers at the bottom, or dense; all else is the
same. A prompt's time is that to its first token. Tokens come from the generator's own loop, with
caches that are filled at random, and are compared with the time that a copy of the bytes that a
step reads (weights, visible keys and values) takes. Dense attention of one layer is also timed
alone, by cuDNN and by PyTorch's FlashAttention-2 (in a process of its own, which comes first), so
that what a prompt would take with the latter can be derived.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from benchmarks.bandwidth import measure_bandwidth
from benchmarks.inference_cells import Asked, attention_rows, fa2_rows, plan
from benchmarks.inference_table import table
from benchmarks.programs import compile_all, memory_limit
from benchmarks.random_arrays import draw_parameters
from benchmarks.record import Record, read_settings
from benchmarks.report import number
from benchmarks.serving import Served
from models.config import HybridConfig, ModelConfig
from models.presets import PRESETS

Attention = Literal["s2", "hybrid", "dense"]
Part = Literal["attention", "prefill", "decode"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """A preset's shape with other attention: local_stride(local_blocks, vert_stride)."""

    preset: str = "7b"
    vocab_size: int = 32000
    models: tuple[Attention, ...] = ("s2", "hybrid", "dense")
    parts: tuple[Part, ...] = ("attention", "prefill", "decode")
    lengths: tuple[int, ...] = (32768, 131072)
    """Of prompts."""
    decode_length: int = 131072
    """Tokens of a sequence at the end of what is timed. Where not even one fits, the most that
    do."""
    batches: tuple[int, ...] = (1, 4)
    largest: bool = True
    """Also the largest batch that fits."""
    local_blocks: int = 8
    vert_stride: int = 16
    block_size: int = 64
    dense_first: int = 2
    """Dense layers of the hybrid."""
    dense_implementation: Literal["cudnn", "kernels"] = "cudnn"
    """How dense layers attend, to prompts and in decoding."""
    implementation: Literal["triton", "jax_triton", "interpret", "reference"] | None = None
    """How all else attends."""
    steps: int = 32
    """Tokens of a loop."""
    rounds: int = 3
    cell_s: float = 30
    """Seconds after which a cell gets no further round, but two."""
    memory_gb: float | None = None
    """What may be used; by default what JAX says."""
    copy_bytes: int = 2 << 30
    """Of the array whose copy says what memory can do."""
    budget_s: float = 540
    """Seconds after which no further cell is begun."""
    platform: Literal["gpu", "cpu"] = "gpu"
    out: Path = Path("runs/inference.json")
    """Where the result goes; the log of PyTorch's process goes beside it."""

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset={self.preset!r} must be one of {', '.join(PRESETS)}")
        for name in ("models", "parts", "lengths", "batches"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one")
        for name in ("lengths", "batches"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be positive")
        for name in ("decode_length", "steps", "rounds"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value!r} must be positive")
        _ = self.config("s2")  # the model checks the rest

    def config(self, attention: Attention) -> ModelConfig:
        hybrid = HybridConfig(
            kind="dense" if attention == "dense" else "s2",
            dense_first=self.dense_first if attention == "hybrid" else 0,
            block_size=self.block_size,
            local_blocks=self.local_blocks,
            vert_stride=self.vert_stride,
        )
        return dataclasses.replace(
            PRESETS[self.preset],
            vocab_size=self.vocab_size,
            dtype="bfloat16",
            param_dtype="bfloat16",
            implementation=self.implementation,
            dense_implementation="cudnn" if self.dense_implementation == "cudnn" else None,
            remat="none",
            attention=hybrid,
        )


def run(settings: Settings) -> Record:
    """Measures everything; the file is complete up to the last cell."""
    begin, attention = time.perf_counter(), "attention" in settings.parts
    lengths = settings.lengths if attention else ()
    logs = settings.out.with_suffix("")
    status, rows = fa2_rows(settings.config("dense"), lengths, settings.rounds, logs)
    record = Record(settings, begin, ("part", "batch", "length"))
    record.data["peers"] = {"torch": status}
    record.data["bandwidth"] = measure_bandwidth(settings.copy_bytes, settings.rounds)
    for row in rows:
        _add(record, row)
    for length in lengths:
        for row in attention_rows(settings.config("hybrid"), length, settings.rounds):
            _add(record, row)
    leaves: list[jax.Array] = []
    for name in settings.models:
        served = Served.of(settings.config(name))
        limit = memory_limit() if settings.memory_gb is None else int(settings.memory_gb * 1e9)
        asked = Asked(settings.lengths, settings.decode_length, settings.batches, settings.largest)
        cells = [cell for cell in plan(served, asked, limit) if cell.part in settings.parts]
        if not cells or record.spent(name):
            continue
        # Shapes are the same in all models.
        leaves = leaves or jax.tree.leaves(draw_parameters(served.shapes, inputs_last=True))
        params = jax.tree.unflatten(jax.tree.structure(served.shapes), leaves)
        jobs = {c: c.lower(served, settings.steps) for c in cells if c.why_not is None}
        programs = compile_all(jobs)
        for cell in cells:
            if record.spent(f"{name} {cell}"):
                continue
            row = cell.measure(served, params, programs.pop(cell, cell.why_not), settings)
            _add(record, {"model": name} | row)
            gc.collect()
    return record


def _add(record: Record, row: dict[str, Any]) -> None:
    """With the time of a copy of the bytes that are read."""
    if (size := row.get("read_bytes")) is not None:
        bound = size / record.data["bandwidth"]["copy_gb_s"] / 1e6
        row |= {"bound_ms": bound, "share": row["ms"] and bound / row["ms"]}
    if row["part"] == "prefill":
        row["with_fa2_ms"] = _with_fa2(row, record.data["rows"])
    what = f"{row['part']} {row.get('model', '')} {row['way']} {row['batch']} x {row['length']}"
    record.add(row, f"{what}: {row['error'] or number(row['ms']) + ' ms'}")


def _with_fa2(row: dict[str, Any], rows: list[dict[str, Any]]) -> float | None:
    """Derived: a prompt's time, were its dense layers as fast as FlashAttention-2 alone is."""
    alone = {
        one["way"]: one["ms"] for one in rows
        if one["part"] == "attention" and one["length"] == row["length"]
    }  # fmt: skip
    ms, fa2, cudnn = row["ms"], alone.get("torch FA2"), alone.get("dense")
    if ms is None or fa2 is None or cudnn is None:
        return None
    return ms + row["dense_layers"] * (fa2 - cudnn)


def main(arguments: Sequence[str] | None = None) -> None:
    record = run(read_settings(Settings, "python -m benchmarks.inference", arguments))
    print("\n".join([table(record.data), *record.closing()]))


if __name__ == "__main__":
    main()
