"""Pictures of a run: its loss curve and the pattern of its sparse layers."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.figure import Figure

from models import ModelConfig
from s2_jax.plotting import plot_pattern
from train.batches import Batches
from train.metrics import Record


def save_loss_curve(path: Path, records: list[Record], data: Batches) -> None:
    """Bits per byte over steps, with what counting achieves as lines."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    losses = {record["step"]: record["loss"] for record in records if "loss" in record}
    bits = [loss / math.log(2) / data.bytes_per_token for loss in losses.values()]
    axes.plot(list(losses), bits, color="0.7", linewidth=0.8, label="training")
    evaluated = {rec["step"]: rec["validation"] for rec in records if "validation" in rec}
    axes.plot(list(evaluated), list(evaluated.values()), marker="o", label="validation")
    if (entropies := data.entropies) is not None:
        axes.axhline(entropies.unigram, color="C1", linestyle=":", label="H(x_t)")
        axes.axhline(entropies.bigram, color="C3", linestyle="--", label="H(x_t | x_(t-1))")
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=150)


def save_pattern(path: Path, model: ModelConfig, length: int) -> None:
    """What every head of the sparsest layer sees at this length."""
    densities = model.densities(length)
    sparsest = model.patterns()[densities.index(min(densities))]
    figure = plot_pattern(
        sparsest, num_heads=model.num_heads, length=length, num_kv_heads=model.num_kv_heads
    )
    figure.savefig(path, dpi=150)
