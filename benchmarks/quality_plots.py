"""Pictures of results of `benchmarks.quality`: a line a model, from least to most over seeds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.quality_models import NAMES
from benchmarks.quality_table import by_model, evaluation, evaluations

# Of an evaluation: where its values stand, and they.
Series = Callable[[dict[str, Any]], tuple[Any, Any]]


def save(data: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    loss = draw(data, _loss)
    for axes in loss.axes:
        axes.set_xscale("log", base=2)
        axes.set_xlabel("position in the row")
    loss.axes[0].set_ylabel("bits per token")
    loss.savefig(folder / "loss.png", dpi=150)
    for task in ("passkey", "recall"):
        found = draw(data, partial(_found, task))
        for axes in found.axes:
            axes.set_ylim(-0.05, 1.05)
            axes.set_xlabel("depth")
        found.axes[0].set_ylabel(f"{task} answered")
        found.savefig(folder / f"{task}.png", dpi=150)


def draw(data: dict[str, Any], series: Series) -> Figure:
    """An evaluation, a length and a rope base, in each panel."""
    all_of = evaluations(data)
    figure = Figure(figsize=(1 + 4 * len(all_of), 4), layout="constrained")
    panels = figure.subplots(1, len(all_of), sharey=True, squeeze=False)[0]
    for axes, (of, name) in zip(panels, all_of.items()):
        for model, cells in by_model(data).items():
            _line(axes, model, [series(evaluation(cell, of)) for cell in cells])
        axes.set_title(f"{name} tokens" if name.isdigit() else name.replace(",", " tokens,"))
    panels[0].legend()
    return figure


def _line(axes: Axes, model: str, seeds: list[tuple[Any, Any]]) -> None:
    at, values = seeds[0][0], np.array([values for _, values in seeds])
    color = f"C{NAMES.index(model)}"  # type: ignore[arg-type]
    axes.plot(at, values.mean(axis=0), marker="o", color=color, label=model)
    axes.fill_between(at, values.min(axis=0), values.max(axis=0), color=color, alpha=0.2)


def _loss(one: dict[str, Any]) -> tuple[Any, Any]:
    edges = np.asarray(one["loss"]["edges"], float)
    return (edges[:-1] + edges[1:]) / 2, one["loss"]["bits"]


def _found(task: str, one: dict[str, Any]) -> tuple[Any, Any]:
    return one[task]["depths"], one[task]["accuracy"]
