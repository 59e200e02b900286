"""What a run says before it starts and leaves behind when it ends."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.console import Console

from models import Generator, GeneratorConfig, ModelConfig, Sampling
from train.batches import Batches
from train.config import TrainConfig
from train.entropy import Entropies
from train.folder import RunFolder, write_text
from train.metrics import read_metrics
from train.plots import save_loss_curve, save_pattern
from train.step import TrainState

_PROMPT = "import "


@dataclasses.dataclass(frozen=True)
class Report:
    """A finished run: its files, its last validation loss in bits per byte, a sample."""

    folder: RunFolder
    validation: float
    entropies: Entropies | None
    sample: str

    def show(self, console: Console) -> None:
        _print(console, "", "sample", self.sample, "")
        _print(console, f"validation  {describe(self.validation, self.entropies)}")
        _print(console, f"run folder  {self.folder.root}")


def describe(bits: float, entropies: Entropies | None) -> str:
    """Bits per byte, with what counting achieves where that is known."""
    return f"{bits:.3f} bits/byte" if entropies is None else entropies.compare(bits)


def introduce(
    config: TrainConfig, data: Batches, state: TrainState, folder: RunFolder, console: Console
) -> None:
    model = config.model
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    mesh = config.mesh
    devices, how = jax.local_device_count(), "pmap"
    if config.parallel == "jit":
        devices, how = mesh.size, "jit"
        if devices > 1:
            how = f"jit over data {mesh.data} x fsdp {mesh.fsdp} x tensor {mesh.tensor}"
    _print(
        console,
        f"run folder  {folder.root}",
        f"data        {data.description}",
        f"model       {parameters:,} parameters, {model.num_layers} layers",
        f"devices     {devices} x {jax.devices()[0].device_kind}, {how}",
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
    config: TrainConfig, graphdef: Any, state: TrainState, data: Batches, folder: RunFolder
) -> Report:
    """Generates the sample and draws the pictures; `state` is the last one, on the host."""
    sample = _PROMPT + data.tokenizer.decode(np.asarray(_write_on(config, graphdef, state, data)))
    write_text(folder.sample, sample)
    records = read_metrics(folder.metrics)
    save_loss_curve(folder.loss_curve, records, data)
    save_pattern(folder.pattern, config.model, config.seq_len)
    validation = [record["validation"] for record in records if "validation" in record][-1]
    return Report(folder, validation, data.entropies, sample)


def _write_on(config: TrainConfig, graphdef: Any, state: TrainState, data: Batches) -> list[int]:
    prompt, report = data.tokenizer.encode([_PROMPT])[0].tolist(), config.report
    settings = GeneratorConfig(max_length=len(prompt) + report.sample_bytes, rows=1, steps=64)
    model = nnx.merge(graphdef, jax.device_put(state.params))
    [written] = Generator(config.model, model, settings).generate(
        [prompt],
        max_tokens=report.sample_bytes,
        sampling=Sampling(temperature=report.temperature),
        seed=config.seed,
    )
    return written.tokens


def _print(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
