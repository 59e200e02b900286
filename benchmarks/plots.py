"""`python -m benchmarks.plots RESULT`: time over length from the attention benchmark's JSON."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.cases import FRAMEWORKS, MODES, Mode

_TITLES: dict[Mode, str] = {"forward": "forward", "train": "forward and backward"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Draws the time of every framework over the sequence length, for one pattern."""

    result: Annotated[Path, tyro.conf.Positional]
    """JSON that `python -m benchmarks.attention` wrote."""
    out: Path | None = None
    """The picture; by default beside the JSON, with the ending .png."""
    local_blocks: int = 8
    """Window of the pattern, in blocks."""
    stride: int = 16
    """Vertical stride of the pattern, in blocks."""


def series(
    rows: list[dict[str, Any]], mode: Mode, pattern: tuple[int, int]
) -> dict[str, list[tuple[int, float]]]:
    """Framework -> (tokens, ms), ascending: of this pattern, or dense."""
    points: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        wanted = pattern if FRAMEWORKS[row["framework"]].sparse else (None, None)
        if (row["local_blocks"], row["stride"]) == wanted and row[f"{mode}_ms"] is not None:
            points.setdefault(row["framework"], []).append((row["length"], row[f"{mode}_ms"]))
    return {name: sorted(points[name]) for name in FRAMEWORKS if name in points}


def draw(result: dict[str, Any], pattern: tuple[int, int]) -> Figure:
    """Both modes side by side, both axes logarithmic.

    Raises:
      ValueError: s2_jax has no time for this pattern.
    """
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    for axes, mode in zip(figure.subplots(1, 2), MODES):
        lines = series(result["rows"], mode, pattern)
        if "s2_jax" not in lines:
            raise ValueError(f"the result has no {mode} times of s2_jax for {pattern=}")
        _draw_mode(axes, mode, lines)
    heads = result["settings"]["heads"]
    figure.suptitle(
        f"{result['gpu']['name']}, bfloat16, {heads} heads; {pattern[0]} local blocks, "
        f"stride {pattern[1]}, block size {result['block_size']}"
    )
    return figure


def _draw_mode(axes: Axes, mode: Mode, lines: dict[str, list[tuple[int, float]]]) -> None:
    for name, points in lines.items():
        dense = not any(name == sparse for sparse, f in FRAMEWORKS.items() if f.sparse)
        style = "--" if dense else "-"
        axes.plot(*zip(*points), style, marker="o", label=f"{name} (dense)" if dense else name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel="tokens", ylabel="ms", title=_TITLES[mode])
    axes.legend()


def main() -> None:
    settings = tyro.cli(Settings, prog="python -m benchmarks.plots")
    try:
        result = json.loads(settings.result.read_text())
        figure = draw(result, (settings.local_blocks, settings.stride))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    figure.savefig(settings.out or settings.result.with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    main()
