"""Runs and partial units of all heads, packed into the arrays that kernels read."""

from __future__ import annotations

import dataclasses

import numpy as np

from pallas_kernels.block_lists import COUNT_BITS, BlockLists
from s2_jax.geometry import Geometry

_PROGRAMS_AT_ONCE = 264  # two on each multiprocessor of an H100
_LATE_ROW, _VERY_LATE_ROW, _TOGETHER = 1 / 10, 1 / 2, 64


@dataclasses.dataclass
class HeadLists:
    """The lists of one pattern; `*_tile` are indices into `parts`, ascending."""

    parts: np.ndarray  # [tiles, rows]: what each tile holds, in parts of `geometry.part` tokens
    run_tile: np.ndarray
    runs: np.ndarray  # [runs, 3]: first, step, count, in units
    partial_tile: np.ndarray
    partial: np.ndarray  # [partial, 2]: unit, bits


def pack(heads: list[HeadLists], geometry: Geometry) -> BlockLists:
    """The lists of all distinct patterns in one, read-only."""
    packed = [_pack_head(head, geometry) for head in heads]
    orders, run_counts, runs, partial_counts, partials = zip(*packed, strict=True)
    parts, rows = np.array(orders, dtype=np.int32), geometry.rows
    longest = _longest(heads)
    length = geometry.fixed_range[1]
    lists = BlockLists(
        order=parts[..., 0] // rows if geometry.fixed == "q" else parts.reshape(len(heads), -1),
        run_start=_starts(run_counts),
        # One entry more than is used: there is always one to read.
        runs=np.concatenate([*runs, np.zeros((1, 2))]).astype(np.int32),
        partial_start=_starts(partial_counts),
        partial=np.concatenate([*partials, np.zeros(1)]).astype(np.int32),
        holds_queries=geometry.fixed == "q",
        fixed_tile=geometry.fixed_tile,
        num_tiles=parts.shape[1],
        max_runs=max(int(counts.max(initial=0)) for counts in run_counts),
        unit=geometry.unit,
        group=geometry.walk_tile // geometry.unit,
        rows=rows,
        whole=bool(parts.min() >= 0 and (parts.max() + 1) * geometry.part <= length),
        together=_together(longest / geometry.heads),
        shared=geometry.fixed == "kv" and geometry.any_order,
        longest=longest,
    )
    for array in (lists.order, lists.run_start, lists.runs, lists.partial_start, lists.partial):
        array.flags.writeable = False
    return lists


def _together(longest: float) -> int | None:
    """How many rows of a head stand side by side.

    longest: row, as a share of all work that a program's place does. Begun late, it would end long
    after everything else: very long ones are begun one by one, longest first, whatever the head.
    But one by one, each head's walk far apart from each other, and find nothing in the cache that
    others have loaded; less long ones are begun by many of a head.
    """
    if longest <= _LATE_ROW:
        return None
    return _TOGETHER if longest <= _VERY_LATE_ROW else 1


def _longest(heads: list[HeadLists]) -> float:
    """The longest row, as a share of what a GPU's programs do one after another for one head."""
    work = [
        np.bincount(head.run_tile, head.runs[:, 2], minlength=len(head.parts)) for head in heads
    ]
    in_turn = np.mean(work) * len(work[0]) / _PROGRAMS_AT_ONCE
    return float(np.max(work) / in_turn) if in_turn else 0.0


def _pack_head(head: HeadLists, geometry: Geometry) -> tuple[np.ndarray, ...]:
    """Parts of each row, runs of each row, runs, partial units of each row, partial units."""
    group, num_tiles = geometry.walk_tile // geometry.unit, len(head.parts)
    tile, (first, step, count) = head.run_tile, head.runs.T
    # What is left of a run after whole tiles is walked with the partial units.
    left = count % group
    rest = np.arange(left.sum()) - np.repeat(np.cumsum(left) - left, left)
    spare = np.repeat(first + (count - left) * step, left) + rest * np.repeat(step, left)
    partial_tile = np.concatenate([head.partial_tile, np.repeat(tile, left)])
    unit = np.concatenate([head.partial[:, 0], spare])
    bits = np.concatenate([head.partial[:, 1], np.full(spare.size, (1 << geometry.rows) - 1)])
    kept = count >= group
    tile, first, step, count = tile[kept], first[kept], step[kept], count[kept] // group
    runs = np.stack([first, step << COUNT_BITS | count], axis=-1)

    run_count = np.bincount(tile, minlength=num_tiles)
    partial_count = np.bincount(partial_tile, minlength=num_tiles)
    order = np.arange(num_tiles)
    if geometry.any_order:
        work = np.bincount(tile, weights=count, minlength=num_tiles) + -(-partial_count // group)
        order = order[::-1][np.argsort(-work[::-1], kind="stable")]
    row = np.empty(num_tiles, dtype=np.int64)
    row[order] = np.arange(num_tiles)
    run_order = np.argsort(row[tile], kind="stable")
    partial_order = np.lexsort((unit, row[partial_tile]))
    return (
        head.parts[order],
        run_count[order],
        runs[run_order],
        partial_count[order],
        (unit << geometry.rows | bits)[partial_order],
    )


def _starts(counts: tuple[np.ndarray, ...]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int32)
