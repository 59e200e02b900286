"""What a run says before it starts and leaves behind when it ends."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from models import ModelConfig, generate
from train.config import TrainConfig
from train.data import Data
from train.entropy import Entropies
from train.folder import RunFolder, write_text
from train.metrics import read_metrics
from train.plots import save_loss_curve, save_pattern
from train.step import TrainState

_PROMPT = b"import "


@dataclasses.dataclass(frozen=True)
class Report:
    """A finished run: its files, its last validation loss in bits per byte, a sample."""

    folder: RunFolder
    validation: float
    entropies: Entropies
    sample: str

    def show(self, console: Console) -> None:
        _print(console, "", "sample", self.sample, "")
        _print(console, f"validation  {self.entropies.compare(self.validation)}")
        _print(console, f"run folder  {self.folder.root}")


def introduce(
    config: TrainConfig, data: Data, state: TrainState, folder: RunFolder, console: Console
) -> None:
    corpus, model = data.corpus, config.model
    skipped = f"; {len(corpus.skipped)} skipped (not UTF-8)" if corpus.skipped else ""
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    devices = jax.local_device_count() if config.parallel == "pmap" else 1
    _print(
        console,
        f"run folder  {folder.root}",
        f"data        {corpus.num_files} files, {len(corpus.train):,} bytes to train on, "
        f"{len(corpus.validation):,} to validate with{skipped}",
        f"model       {parameters:,} parameters, {model.num_layers} layers",
        f"devices     {devices} x {jax.devices()[0].device_kind}, {config.parallel}",
        *(
            f"layer {layer}     {_kind(model, layer)}, skips {1 - density:.1%} of "
            f"the blocks that causality leaves"
            for layer, density in enumerate(model.densities(config.seq_len))
        ),
    )


def _kind(model: ModelConfig, layer: int) -> str:
    if model.attention.is_dense(layer):
        return "dense"
    return {"s2": "S2"}.get(model.attention.kind, model.attention.kind)


def write_report(
    config: TrainConfig, graphdef: Any, state: TrainState, data: Data, folder: RunFolder
) -> Report:
    """Generates the sample and draws the pictures; `state` is the last one, on the host."""
    tokens = generate(
        graphdef,
        jax.device_put(state.params),
        jnp.asarray(list(_PROMPT), jnp.int32),
        jax.random.wrap_key_data(jnp.asarray(state.key)),
        window=config.seq_len,
        length=config.report.sample_bytes,
        temperature=config.report.temperature,
    )
    sample = bytes(tokens.tolist()).decode("utf-8", errors="replace")
    write_text(folder.sample, sample)
    records = read_metrics(folder.metrics)
    save_loss_curve(folder.loss_curve, records, data.entropies)
    save_pattern(folder.pattern, config.model, config.seq_len)
    validation = [record["validation"] for record in records if "validation" in record][-1]
    return Report(folder, validation, data.entropies, sample)


def _print(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
