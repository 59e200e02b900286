"""`python -m benchmarks.plots RESULT...`: pictures from the attention benchmark's JSON.

Time over length, and beside it (`-share`) the share of the theoretical speed-up over
FlashAttention-2, where the result has that framework.
"""

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
from benchmarks.rows import pattern_key, shares

_TITLES: dict[Mode, str] = {"forward": "forward", "train": "forward and backward"}
_PAPER: dict[tuple[int, ...], float] = {
    (64, 8, 16): 8.79 / 14,
    (64, 8, 32): 15.87 / 26,
    (64, 8, 64): 25.3 / 42,
}
"""Speed-up over FlashAttention-2 at 131 072 tokens that arXiv 2407.17678 reports, over the
theoretical one, by block size, local blocks and stride."""
_PAPER_LENGTH = 131072


@dataclasses.dataclass(frozen=True)
class Settings:
    """Draws the time of every framework over the sequence length, for one pattern, and shares."""

    results: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """JSON that `python -m benchmarks.attention` wrote; of several, the rows are put together."""
    out: Path | None = None
    """The picture; by default beside the first JSON, with the ending .png."""
    local_blocks: int = 8
    """Window of the pattern, in blocks."""
    stride: int = 16
    """Vertical stride of the pattern, in blocks."""


def load(paths: tuple[Path, ...]) -> dict[str, Any]:
    """The first result, with the rows of all."""
    results = [json.loads(path.read_text()) for path in paths]
    return results[0] | {"rows": [row for result in results for row in result["rows"]]}


def series(
    rows: list[dict[str, Any]], mode: Mode, pattern: tuple[int, int]
) -> dict[str, list[tuple[int, float]]]:
    """Framework -> (tokens, ms), ascending: of the suite "main", this pattern or dense."""
    points: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        wanted = pattern if FRAMEWORKS[row["framework"]].sparse else (None, None)
        fits = row["suite"] == "main" and (row["local_blocks"], row["stride"]) == wanted
        if fits and row[f"{mode}_ms"] is not None:
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
    row = next(row for row in result["rows"] if row["suite"] == "main")
    figure.suptitle(
        f"{result['gpu']['name']}, bfloat16, {row['heads']} heads; {pattern[0]} local blocks, "
        f"stride {pattern[1]}, block size {row['block_size']}"
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


def share_bars(rows: list[dict[str, Any]], mode: Mode) -> dict[str, dict[tuple[int, ...], float]]:
    """Framework -> pattern -> share, at the paper's length and patterns; the paper first."""
    bars: dict[str, dict[tuple[int, ...], float]] = {"paper": _PAPER}
    for index, share in shares(rows, mode).items():
        row, key = rows[index], pattern_key(rows[index])
        fits = row["head_dim"] == 128 and row["heads"] == row["kv_heads"]
        if fits and row["length"] == _PAPER_LENGTH and key in _PAPER:
            bars.setdefault(row["framework"], {})[key] = share
    return bars


def draw_shares(result: dict[str, Any]) -> Figure | None:
    """Bars for each of the paper's patterns; None where there is nothing beside the paper's."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    for axes, mode in zip(figure.subplots(1, 2, sharey=True), MODES):
        bars = share_bars(result["rows"], mode)
        if len(bars) == 1:
            return None
        width = 0.8 / len(bars)
        for number, (label, of) in enumerate(bars.items()):
            shift = (number - len(bars) / 2 + 0.5) * width
            at = [i + shift for i, key in enumerate(_PAPER) if key in of]
            heights = [of[key] for key in _PAPER if key in of]
            axes.bar(at, heights, width, label=label, color=None if number else "lightgray")
        axes.set_xticks(range(len(_PAPER)), [f"stride {stride}" for *_, stride in _PAPER])
        axes.set_xlim(-0.5, len(_PAPER) - 0.5)
        axes.axhline(1, color="black", linewidth=0.5)
        axes.set(ylabel="share", title=_TITLES[mode])
        axes.set_ylim(top=1.35 * axes.get_ylim()[1])
        axes.legend(fontsize="small", ncols=3, loc="upper center")
    figure.suptitle(
        f"{result['gpu']['name']}, {_PAPER_LENGTH} tokens: share of the theoretical speed-up "
        "over FlashAttention-2"
    )
    return figure


def main() -> None:
    settings = tyro.cli(Settings, prog="python -m benchmarks.plots")
    try:
        if not settings.results:
            raise ValueError("name at least one result")
        result = load(settings.results)
        bars = draw_shares(result)
        # The paper's own suite has one length.
        lengths = bars is None or any(row["suite"] == "main" for row in result["rows"])
        figure = draw(result, (settings.local_blocks, settings.stride)) if lengths else None
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    out = settings.out or settings.results[0].with_suffix(".png")
    if figure is not None:
        figure.savefig(out, dpi=150)
    if bars is not None:
        bars.savefig(out.with_stem(f"{out.stem}-share"), dpi=150)


if __name__ == "__main__":
    main()
