"""The block lists that a kernel walks: what a layout hands over, and how it is packed.

A program owns one *fixed* tile (query tokens forward and for dq, key tokens for dk/dv) and walks
along the other axis in *units* of `unit` tokens. Units that every row of the tile sees come as
runs, arithmetic progressions that need no mask; the others come one by one with a bit for each
`rows` part of the fixed tile that sees them, and are masked.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

STEP_BITS = 14
COUNT_BITS = 31 - STEP_BITS
MAX_STEP = (1 << STEP_BITS) - 1
MAX_COUNT = (1 << COUNT_BITS) - 1


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["order", "run_start", "runs", "partial_start", "partial"],
    meta_fields=[
        "holds_queries",
        "fixed_tile",
        "num_tiles",
        "max_runs",
        "unit",
        "group",
        "rows",
        "whole",
        "together",
        "shared",
        "longest",
    ],
)
@dataclasses.dataclass(frozen=True)
class BlockLists:
    """Lists for every fixed tile of every distinct head pattern, in compressed rows.

    Rows stand in the order in which programs take them: the longest first, so that no long one
    is left for the end, unless the call needs to find them by tile.

    order: int32 [patterns, num_tiles]; which fixed tile each row is for, where they hold queries.
      Key tiles hold any blocks: int32 [patterns, num_tiles * rows], which part of the axis, of
      fixed_tile / rows tokens, stands at each place of a row's tile; -1 for none.
    run_start: int32 [patterns * num_tiles + 1]; where a row's runs start.
    runs: int32 [runs, 2]; first unit, then step << COUNT_BITS | count. A run has `count` tiles
      of `group` units, each unit `step` units after the one before.
    partial_start: int32 [patterns * num_tiles + 1]; where a row's partial units start.
    partial: int32 [partial]; unit << rows | one bit for each part of the fixed tile, ascending in
      each row. Where a token window adds to the pattern, all bits may be 0.
    holds_queries: whether fixed tiles hold queries, or keys. fixed_tile: tokens in one.
    num_tiles: rows of a pattern.
    max_runs: most runs of any row.
    unit: tokens in a unit. group: units in a walked tile. rows: parts of a fixed tile.
    whole: every part of every fixed tile exists, to its last token.
    together: rows of one head, which share what they walk in the cache, that programs side by side
      take before those of the next head; None: all of a head's. Fewer, so that the long rows of
      all heads come first.
    """

    order: Any
    run_start: Any
    runs: Any
    partial_start: Any
    partial: Any
    holds_queries: bool
    fixed_tile: int
    num_tiles: int
    max_runs: int
    unit: int
    group: int
    rows: int
    whole: bool
    together: int | None
    shared: bool
    longest: float

    @property
    def arrays(self) -> dict[str, jax.Array]:
        names = ("order", "run_start", "runs", "partial_start", "partial")
        return {name: jnp.asarray(getattr(self, name)) for name in names}
