"""Pictures of patterns: what each head sees, and what the heads see together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from s2_jax.patterns import Pattern
from s2_jax.structure import at_least_one, integer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADS_SHOWN = 8
COLUMNS = 5

_VISIBLE = "#1f6f8b"
_HIDDEN = "#e9eef0"
_IMPOSSIBLE = "#ffffff"
_FEW_HEADS, _ALL_HEADS = "#a5d3d6", "#0b3948"


def plot_pattern(
    pattern: Pattern,
    *,
    num_heads: int,
    length: int,
    num_kv_heads: int | None = None,
    kv_length: int | None = None,
    heads: Sequence[int] | None = None,
) -> Figure:
    """Draws heads side by side, and last how many of all heads see each block.

    Rows are query blocks and columns key blocks, block (0, 0) top left. A block is dark where it
    is visible, pale where the pattern hides it, and blank where causality forbids it.

    Args:
      pattern: what to draw.
      num_heads: query heads of the call.
      length: query tokens, from position 0.
      num_kv_heads: key/value heads, by default `num_heads`.
      kv_length: key tokens, by default `length`.
      heads: the query heads to draw; by default the first 8. The last panel counts all heads.

    Returns:
      A `matplotlib.figure.Figure` of its own, outside pyplot: `figure.savefig("heads.png")`.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: a head that does not exist, no blocks to draw, or heads and lengths that the
        pattern does not fit.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_pattern needs matplotlib: pip install 's2-jax[plot]'") from error

    if not isinstance(pattern, Pattern):
        raise TypeError(f"pattern must be a pattern, got {type(pattern).__name__}")
    num_heads, length = at_least_one("num_heads", num_heads), at_least_one("length", length)
    kv_length = length if kv_length is None else at_least_one("kv_length", kv_length)
    heads = tuple(range(min(num_heads, HEADS_SHOWN)) if heads is None else heads)
    heads = tuple(integer("heads", head) for head in heads)
    if not heads or not all(0 <= head < num_heads for head in heads):
        raise ValueError(f"{heads=} must name at least one of the {num_heads} heads, from 0")
    q_blocks, kv_blocks = (-(-tokens // pattern.block_size) for tokens in (length, kv_length))
    mask = pattern.block_mask_at(
        num_heads=num_heads, q_blocks=q_blocks, kv_blocks=kv_blocks, num_kv_heads=num_kv_heads
    )
    possible = np.ones((q_blocks, kv_blocks), dtype=bool)
    if pattern.causal:
        possible = np.tri(q_blocks, kv_blocks, dtype=bool)

    columns = min(len(heads) + 1, COLUMNS)
    rows = -(-(len(heads) + 1) // columns)
    height = 2.3 * min(max(q_blocks / kv_blocks, 0.4), 1.5) + 0.3
    figure = Figure(figsize=(2.3 * columns + 0.8, height * rows + 0.6), dpi=150)
    figure.set_layout_engine("constrained", h_pad=0.07, w_pad=0.05)
    panels = [figure.add_subplot(rows, columns, number + 1) for number in range(len(heads) + 1)]
    for panel, head in zip(panels, heads):
        _draw_head(panel, mask[head], possible, f"head {head}")
    mesh = _draw_coverage(panels[-1], mask, possible)
    for number, panel in enumerate(panels):
        _draw_axes(panel, q_blocks, kv_blocks, first=number % columns == 0)
    _draw_legends(figure, panels, mesh, num_heads, pattern)
    return figure


def _draw_head(panel: Any, seen: np.ndarray, possible: np.ndarray, title: str) -> None:
    from matplotlib.colors import ListedColormap

    kinds = np.where(possible, np.where(seen, 2, 1), 0)
    colours = ListedColormap([_IMPOSSIBLE, _HIDDEN, _VISIBLE])
    _mesh(panel, kinds, cmap=colours, vmin=0, vmax=2)
    panel.set_title(f"{title}\n{_share(seen, possible)} of blocks", fontsize=8)


def _draw_coverage(panel: Any, mask: np.ndarray, possible: np.ndarray) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    shades = LinearSegmentedColormap.from_list("heads", [_FEW_HEADS, _ALL_HEADS])
    colours = shades.with_extremes(under=_HIDDEN)
    count = np.ma.masked_array(mask.sum(axis=0), mask=~possible)
    mesh = _mesh(panel, count, cmap=colours, vmin=1, vmax=max(len(mask), 2))
    heads = f"all {len(mask)} heads" if len(mask) > 1 else "the one head"
    panel.set_title(f"{heads}\n{_share(np.any(mask, axis=0), possible)} of blocks", fontsize=8)
    return mesh


def _draw_legends(
    figure: Any, panels: list[Any], mesh: Any, num_heads: int, pattern: Pattern
) -> None:
    from matplotlib.patches import Patch

    figure.supylabel("query blocks", fontsize=8)
    if num_heads > 1:
        rows = panels[0].get_gridspec().nrows
        bar = figure.colorbar(mesh, ax=panels, shrink=0.7, aspect=16 * rows, ticks=[1, num_heads])
        bar.set_label("heads that see the block", fontsize=7, labelpad=2)
        bar.ax.tick_params(labelsize=7, length=0)
        bar.outline.set_visible(False)
    kinds = [(_VISIBLE, "visible"), (_HIDDEN, "not visible")]
    if pattern.causal:
        kinds.append((_IMPOSSIBLE, "after the query"))
    patches = [Patch(facecolor=colour, edgecolor="#b5c0c4", label=kind) for colour, kind in kinds]
    figure.legend(
        handles=patches,
        title=f"key blocks of {pattern.block_size} tokens",
        title_fontsize=8,
        loc="outside lower center",
        ncols=len(patches),
        fontsize=7,
        frameon=False,
        handlelength=1,
        handleheight=1,
    )


def _mesh(panel: Any, values: np.ndarray, **colours: Any) -> Any:
    """One square a block, with gaps between them while they are large enough."""
    gaps = max(values.shape) <= 40
    return panel.pcolormesh(
        values, edgecolors="white" if gaps else "none", linewidth=0.5 if gaps else 0, **colours
    )


def _draw_axes(panel: Any, q_blocks: int, kv_blocks: int, *, first: bool) -> None:
    panel.set_aspect("equal")
    panel.set_xlim(0, kv_blocks)
    panel.set_ylim(q_blocks, 0)
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0, labelsize=7)
    panel.set_xticks([0.5, kv_blocks - 0.5], ["0", str(kv_blocks - 1)])
    panel.set_yticks([0.5, q_blocks - 0.5], ["0", str(q_blocks - 1)] if first else ["", ""])


def _share(seen: np.ndarray, possible: np.ndarray) -> str:
    return f"{seen.sum() / possible.sum():.0%}"
