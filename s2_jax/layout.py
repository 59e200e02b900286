"""Pattern + lengths + tiles -> the block lists that a kernel walks.

NumPy only, cached by value. A structured pattern is read interval by interval: between two edges
of its rule it is periodic, so one period tells all. An arbitrary mask is read row by row, a
bounded number of rows at a time. Either way runs are put together in `runs.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Iterator
from typing import Literal

import numpy as np

from pallas_kernels.block_lists import COUNT_BITS, MAX_COUNT, MAX_STEP, BlockLists
from pallas_kernels.tiles import Tile, TileConfig
from s2_jax.patterns import Pattern
from s2_jax.runs import RunBuilder, periods
from s2_jax.structure import Heads, Structure

_EVALUATED_AT_ONCE = 1 << 22
_FEW_UNITS = 64
_PROGRAMS_AT_ONCE = 264  # two on each multiprocessor of an H100


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Lengths and tiles, in tokens. Queries are at `q_start <= position < q_stop`.

    fixed: the axis that a program owns a tile of; it walks along the other.
    longest_first: order rows by work; otherwise by tile.
    """

    fixed: Literal["q", "kv"]
    fixed_tile: int
    walk_tile: int
    block_size: int
    q_start: int
    q_stop: int
    kv_len: int
    longest_first: bool = True

    @property
    def fixed_range(self) -> tuple[int, int]:
        return (self.q_start, self.q_stop) if self.fixed == "q" else (0, self.kv_len)

    @property
    def walk_range(self) -> tuple[int, int]:
        return (0, self.kv_len) if self.fixed == "q" else (self.q_start, self.q_stop)

    @property
    def unit(self) -> int:
        return min(self.block_size, self.walk_tile)

    @property
    def part(self) -> int:
        """Tokens in the part of a fixed tile that shares a pattern row."""
        return min(self.block_size, self.fixed_tile)

    @property
    def rows(self) -> int:
        return self.fixed_tile // self.part

    @property
    def tiles(self) -> range:
        start, stop = self.fixed_range
        return range(start // self.fixed_tile, -(-stop // self.fixed_tile))

    @property
    def units(self) -> range:
        start, stop = self.walk_range
        return range(start // self.unit, -(-stop // self.unit))


@dataclasses.dataclass(frozen=True)
class PatternLayouts:
    """The block lists of a call's three kernels, each built when it is first asked for."""

    pattern: Pattern
    num_heads: int
    num_kv_heads: int
    q_start: int
    q_stop: int
    kv_len: int
    tiles: TileConfig
    traced_offset: bool = False

    def forward(self) -> BlockLists:
        return self._lists("q", self.tiles.forward)

    def dq(self) -> BlockLists:
        return self._lists("q", self.tiles.dq)

    def dkv(self) -> BlockLists:
        return self._lists("kv", self.tiles.dkv)

    def _lists(self, fixed: Literal["q", "kv"], tile: Tile) -> BlockLists:
        sizes = (tile.block_q, tile.block_kv) if fixed == "q" else (tile.block_kv, tile.block_q)
        if fixed == "q":  # a traced offset finds its rows by tile
            longest_first = not self.traced_offset
        else:  # a program takes the rows of all heads of a group, which must be the same tile
            keys = self.pattern.head_keys(self.num_heads, self.num_kv_heads)
            group = self.num_heads // self.num_kv_heads
            longest_first = all(
                len(set(keys[start : start + group])) == 1 for start in range(0, len(keys), group)
            )
        geometry = Geometry(
            fixed, *sizes, self.pattern.block_size, self.q_start, self.q_stop, self.kv_len,
            longest_first,
        )  # fmt: skip
        return block_lists(self.pattern, self.num_heads, self.num_kv_heads, geometry)


def number_patterns(keys: tuple[Hashable, ...]) -> tuple[int, ...]:
    """For each head, which of the distinct patterns it has, numbered by first appearance."""
    distinct = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return tuple(distinct[key] for key in keys)


@functools.lru_cache(maxsize=128)
def block_lists(
    pattern: Pattern, num_heads: int, num_kv_heads: int, geometry: Geometry
) -> BlockLists:
    """The lists of every distinct head pattern, in the order of `number_patterns`."""
    if geometry.units.stop > MAX_COUNT:
        raise ValueError(
            f"{geometry.walk_range[1]} tokens in units of {geometry.unit} are more than "
            f"{MAX_COUNT} units; use larger blocks"
        )
    keys = pattern.head_keys(num_heads, num_kv_heads)
    per_pattern = [
        _lists_of_head(
            pattern, Heads(np.asarray(keys.index(key)), num_heads, num_kv_heads), geometry
        )
        for key in dict.fromkeys(keys)
    ]
    lists = _pack(per_pattern, geometry)
    for array in lists:
        array.flags.writeable = False
    order, run_start, runs, partial_start, partial = lists
    return BlockLists(
        order=order,
        run_start=run_start,
        runs=runs,
        partial_start=partial_start,
        partial=partial,
        num_tiles=len(geometry.tiles),
        max_runs=int(np.diff(run_start).max(initial=0)),
        unit=geometry.unit,
        group=geometry.walk_tile // geometry.unit,
        rows=geometry.rows,
        heads_first=_long_rows_matter(run_start, runs, len(keys)),
    )


def _long_rows_matter(run_start: np.ndarray, runs: np.ndarray, num_heads: int) -> bool:
    """Whether the longest row is a large part of what a GPU's programs do one after another."""
    row_work = np.add.reduceat(np.append(runs[:, 1] & MAX_COUNT, 0), run_start[:-1])
    row_work[np.diff(run_start) == 0] = 0
    one_after_another = row_work.mean() * (run_start.size - 1) * num_heads / _PROGRAMS_AT_ONCE
    return bool(row_work.max(initial=0) > one_after_another / 4)


@dataclasses.dataclass
class _HeadLists:
    """Of one pattern; `*_tile` are indices into `geometry.tiles`, ascending."""

    run_tile: np.ndarray
    runs: np.ndarray  # [runs, 3]: first, step, count, in units
    partial_tile: np.ndarray
    partial: np.ndarray  # [partial, 2]: unit, bits


def _lists_of_head(pattern: Pattern, heads: Heads, geometry: Geometry) -> _HeadLists:
    structure = pattern.structure()
    if structure is not None and len(geometry.units) > _FEW_UNITS:
        period = structure.kv_period if geometry.fixed == "q" else structure.q_period
        period *= geometry.block_size // geometry.unit
        if period <= min(MAX_STEP, len(geometry.units)):
            return _by_intervals(pattern, heads, geometry, structure, period)
    return _by_rows(pattern, heads, geometry)


def _by_rows(pattern: Pattern, heads: Heads, geometry: Geometry) -> _HeadLists:
    """Looks at every unit of every tile."""
    num_units = len(geometry.units)
    at_once = max(1, _EVALUATED_AT_ONCE // max(1, num_units * geometry.rows))
    units = np.array(geometry.units)[None]
    chunks = []
    for tiles in _chunks(geometry.tiles, at_once):
        seen = _Seen(pattern, heads, geometry, tiles, units)
        runs = RunBuilder(tiles.size)
        rows, columns = np.nonzero(seen.full)
        rank = np.arange(rows.size) - np.searchsorted(rows, rows)
        by_rank = np.argsort(rank, kind="stable")
        ends = np.cumsum(np.bincount(rank)) if rows.size else ()
        for start, end in zip((0, *ends[:-1]), ends, strict=False):
            now = by_rank[start:end]
            one = np.ones(now.size, dtype=np.int64)
            runs.add(rows[now], units[0, columns[now]], one, one)
        rows, columns = np.nonzero(seen.some & ~seen.full)
        partial = np.stack([units[0, columns], seen.bits[rows, columns]], axis=-1)
        chunks.append((tiles[0] - geometry.tiles.start, runs.finish(), rows, partial))
    return _join(chunks)


def _by_intervals(
    pattern: Pattern, heads: Heads, geometry: Geometry, structure: Structure, period: int
) -> _HeadLists:
    """Looks at one period in every interval between edges."""
    at_once = max(1, _EVALUATED_AT_ONCE // (period * geometry.rows))
    chunks = []
    for tiles in _chunks(geometry.tiles, at_once):
        runs = RunBuilder(tiles.size)
        partial_tile, partial = [], []
        bounds = _bounds(structure, pattern.causal, geometry, tiles)
        for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
            length = stop - start
            for low, high in ((1, min(2, period)), (min(2, period) + 1, None)):
                chosen = (length >= low) & (length <= high if high else True)
                index = np.flatnonzero(chosen)
                if not index.size:
                    continue
                width = min(period, int(length[index].max()))
                units = start[index, None] + np.arange(width)
                seen = _Seen(pattern, heads, geometry, tiles[index], units)
                inside = units < stop[index, None]
                full, some = seen.full & inside, seen.some & inside
                _add_full(runs, index, start[index], length[index], full, period)
                rows, columns = np.nonzero(some & ~full)
                expand = _repeats(length[index][rows], columns, width, period)
                rows, columns = np.repeat(rows, expand), np.repeat(columns, expand)
                ends = np.cumsum(expand)
                again = np.arange(rows.size) - np.repeat(ends - expand, expand)
                unit = units[rows, columns] + again * period
                partial_tile.append(index[rows])
                partial.append(np.stack([unit, seen.bits[rows, columns]], axis=-1))
        tile = np.concatenate(partial_tile) if partial_tile else np.zeros(0, dtype=np.int64)
        entry = np.concatenate(partial) if partial else np.zeros((0, 2), dtype=np.int64)
        order = np.lexsort((entry[:, 0], tile))
        chunk = (tiles[0] - geometry.tiles.start, runs.finish(), tile[order], entry[order])
        chunks.append(chunk)
    return _join(chunks)


def _add_full(
    runs: RunBuilder,
    index: np.ndarray,
    start: np.ndarray,
    length: np.ndarray,
    full: np.ndarray,
    period: int,
) -> None:
    """Adds what `full` says of one period of every interval, with the shortest period it has."""
    wide = np.where(length > full.shape[1], periods(full), full.shape[1])
    for step in np.unique(wide):
        members = np.flatnonzero(wide == step)
        for residue in range(step):
            rows = members[full[members, residue]]
            if rows.size:
                repeats = _repeats(length[rows], np.full(rows.size, residue), step, step)
                repeats = np.where(length[rows] > full.shape[1], repeats, 1)
                steps = np.full(rows.size, step)
                runs.add(index[rows], start[rows] + residue, steps, repeats)


def _repeats(length: np.ndarray, column: np.ndarray, width: int, period: int) -> np.ndarray:
    """How often column `column` of a period occurs in an interval."""
    return np.where(length > width, -(-(length - column) // period), 1)


def _bounds(
    structure: Structure, causal: bool, geometry: Geometry, tiles: np.ndarray
) -> list[np.ndarray]:
    """Units at which the rule, causality or the end of the row may change things, ascending."""
    unit, per_block = geometry.unit, geometry.block_size // geometry.unit
    starts = tiles * geometry.fixed_tile
    bounds = []
    for row in range(geometry.rows):
        block = (starts + row * geometry.part) // geometry.block_size
        for edge in structure.edges:
            position = block - edge + 1 if geometry.fixed == "q" else block + edge
            bounds.append(position * per_block)
    if geometry.fixed == "q":
        bounds += [np.full(tiles.size, edge * per_block) for edge in structure.kv_edges]
    if causal:
        low = np.maximum(starts, geometry.fixed_range[0])
        high = np.minimum(starts + geometry.fixed_tile, geometry.fixed_range[1]) - 1
        if geometry.fixed == "q":
            bounds += [(low + 1) // unit, high // unit + 1]
        else:
            bounds += [low // unit, -(-high // unit)]
    walk_start, walk_stop = geometry.walk_range
    ends = {geometry.units.start, geometry.units.stop, -(-walk_start // unit), walk_stop // unit}
    bounds += [np.full(tiles.size, end) for end in ends]
    clipped = np.clip(np.stack(bounds), geometry.units.start, geometry.units.stop)
    return list(np.sort(clipped, axis=0))


class _Seen:
    """What tiles see of units: `full` by all of the tile, `some` by any, `bits` by which part."""

    def __init__(
        self,
        pattern: Pattern,
        heads: Heads,
        geometry: Geometry,
        tiles: np.ndarray,
        units: np.ndarray,
    ) -> None:
        size = geometry.block_size
        starts = tiles[:, None] * geometry.fixed_tile
        fixed_start, fixed_stop = geometry.fixed_range
        walk_start, walk_stop = geometry.walk_range
        block = units * geometry.unit // size
        full = np.ones(np.broadcast_shapes(starts.shape, units.shape), dtype=bool)
        bits = np.zeros(full.shape, dtype=np.int64)
        for row in range(geometry.rows):
            begin = starts + row * geometry.part
            q, kv = (begin // size, block) if geometry.fixed == "q" else (block, begin // size)
            counts = (begin < fixed_stop) & (begin + geometry.part > fixed_start)
            sees = pattern.visible(heads, q, kv)
            full &= sees | ~counts
            bits |= (sees & counts).astype(np.int64) << row
        first, last = units * geometry.unit, (units + 1) * geometry.unit - 1
        full &= (first >= walk_start) & (last < walk_stop)
        reached = (last >= walk_start) & (first < walk_stop)
        if pattern.causal:
            low = np.maximum(starts, fixed_start)
            high = np.minimum(starts + geometry.fixed_tile, fixed_stop) - 1
            if geometry.fixed == "q":
                full &= last <= low
                reached = reached & (first <= high)
            else:
                full &= first >= high
                reached = reached & (last >= low)
        self.bits = np.where(reached, bits, 0)
        self.some = self.bits != 0
        self.full = full & self.some


def _chunks(tiles: range, size: int) -> Iterator[np.ndarray]:
    for start in range(tiles.start, tiles.stop, size):
        yield np.arange(start, min(start + size, tiles.stop))


def _join(chunks: list) -> _HeadLists:
    runs = [(tile + base, run) for base, (tile, run), _, _ in chunks]
    partial = [(tile + base, entry) for base, _, tile, entry in chunks]
    none = np.zeros(0, dtype=np.int64)
    return _HeadLists(
        np.concatenate([none, *(tile for tile, _ in runs)]),
        np.concatenate([none.reshape(0, 3), *(run for _, run in runs)]),
        np.concatenate([none, *(tile for tile, _ in partial)]),
        np.concatenate([none.reshape(0, 2), *(entry for _, entry in partial)]),
    )


def _pack(heads: list[_HeadLists], geometry: Geometry) -> tuple[np.ndarray, ...]:
    orders, run_counts, runs, partial_counts, partials = [], [], [], [], []
    for head in heads:
        order, *lists = _pack_head(head, geometry)
        orders.append(order)
        for whole, part in zip((run_counts, runs, partial_counts, partials), lists, strict=True):
            whole.append(part)
    return (
        np.array(orders, dtype=np.int32).reshape(len(heads), len(geometry.tiles)),
        _starts(run_counts),
        np.concatenate([*runs, np.zeros((1, 2))]).astype(np.int32),
        _starts(partial_counts),
        np.concatenate([*partials, np.zeros(1)]).astype(np.int32),
    )


def _pack_head(head: _HeadLists, geometry: Geometry) -> tuple[np.ndarray, ...]:
    """Tile of each row, runs of each row, runs, partial units of each row, partial units."""
    group, num_tiles = geometry.walk_tile // geometry.unit, len(geometry.tiles)
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
    if geometry.longest_first:
        work = np.bincount(tile, weights=count, minlength=num_tiles) + -(-partial_count // group)
        order = order[::-1][np.argsort(-work[::-1], kind="stable")]
    row = np.empty(num_tiles, dtype=np.int64)
    row[order] = np.arange(num_tiles)
    run_order = np.argsort(row[tile], kind="stable")
    partial_order = np.lexsort((unit, row[partial_tile]))
    return (
        order + geometry.tiles.start,
        run_count[order],
        runs[run_order],
        partial_count[order],
        (unit << geometry.rows | bits)[partial_order],
    )


def _starts(counts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int32)
