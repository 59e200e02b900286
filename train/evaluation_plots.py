"""Pictures of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure


def save_loss_by_position(path: Path, losses: dict[int, dict[str, Any]], trained: int) -> None:
    """Bits per token over the position, both growing by doubling, a line for each length."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for length, loss in losses.items():
        edges = np.asarray(loss["edges"], float)
        axes.plot((edges[:-1] + edges[1:]) / 2, loss["bits"], marker="o", label=f"{length} tokens")
    axes.axvline(trained, color="0.6", linestyle=":", label="trained length")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="position in the row", ylabel="bits per token")
    axes.legend()
    figure.savefig(path, dpi=150)


def save_heat_map(path: Path, task: str, found: dict[int, dict[str, Any]], trained: int) -> None:
    """Accuracy over length and depth."""
    lengths = list(found)
    depths = found[lengths[0]]["depths"]
    shares = np.array([found[length]["accuracy"] for length in lengths]).T
    figure = Figure(
        figsize=(1.5 + 1.2 * len(lengths), 1.5 + 0.5 * len(depths)), layout="constrained"
    )
    axes = figure.add_subplot()
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        axes.text(column, row, f"{share:.0%}", ha="center", va="center")
    names = [f"{n}\n(trained)" if n == trained else str(n) for n in lengths]
    axes.set_xticks(range(len(lengths)), names)
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set(xlabel="tokens", ylabel="depth", title=task)
    figure.colorbar(image, label="answered")
    figure.savefig(path, dpi=150)
