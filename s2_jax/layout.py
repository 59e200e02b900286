"""Pattern + lengths + tiles -> the block lists that a kernel walks.

NumPy only, cached by value. A structured pattern is read interval by interval: between two edges
of its rule it is periodic, so one period tells all. An arbitrary mask is read row by row, a
bounded number of rows at a time. Either way runs are put together in `runs.py` and packed in
`packing.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Hashable, Iterator
from typing import Literal

import numpy as np

from pallas_kernels.block_lists import MAX_COUNT, MAX_STEP, BlockLists
from pallas_kernels.masks import Window
from pallas_kernels.tiles import Tile, TileConfig
from s2_jax.gather import tile_parts
from s2_jax.geometry import Geometry
from s2_jax.packing import HeadLists, pack
from s2_jax.patterns import Pattern
from s2_jax.runs import RunBuilder, periods
from s2_jax.structure import Heads, Structure

_EVALUATED_AT_ONCE = 1 << 22
_FEW_UNITS = 64


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
        assert self.tiles.dq is not None
        return self._lists("q", self.tiles.dq)

    def dkv(self) -> BlockLists:
        return self._lists("kv", self.tiles.dkv)

    def _lists(self, fixed: Literal["q", "kv"], tile: Tile) -> BlockLists:
        sizes = (tile.block_q, tile.block_kv) if fixed == "q" else (tile.block_kv, tile.block_q)
        if fixed == "q":  # a traced offset finds its rows by tile
            any_order = not self.traced_offset
        else:  # a program takes the rows of all heads of a group, which must be the same tile
            any_order = groups_share(self.pattern, self.num_heads, self.num_kv_heads)
        geometry = Geometry(
            fixed, *sizes, self.pattern.block_size, self.q_start, self.q_stop, self.kv_len,
            any_order, self.num_heads if fixed == "q" else self.num_kv_heads,
        )  # fmt: skip
        return block_lists(self.pattern, self.num_heads, self.num_kv_heads, geometry)


def number_patterns(keys: tuple[Hashable, ...]) -> tuple[int, ...]:
    """For each head, which of the distinct patterns it has, numbered by first appearance."""
    distinct = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return tuple(distinct[key] for key in keys)


def groups_share(pattern: Pattern, num_heads: int, num_kv_heads: int) -> bool:
    """Whether the query heads of each key/value head see the same."""
    keys, group = pattern.head_keys(num_heads, num_kv_heads), num_heads // num_kv_heads
    return all(len(set(keys[i : i + group])) == 1 for i in range(0, len(keys), group))


def gathers_keys(pattern: Pattern, num_heads: int, num_kv_heads: int) -> bool:
    """Whether many columns are seen alike, and key tiles may hold them in any order."""
    rule, _ = pattern.token_window()
    alike = rule is None or rule.structure() is not None
    return alike and groups_share(pattern, num_heads, num_kv_heads)


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
    distinct = [
        Heads(np.asarray(keys.index(key)), num_heads, num_kv_heads) for key in dict.fromkeys(keys)
    ]
    parts = [tile_parts(pattern, heads, geometry) for heads in distinct]
    most = max(map(len, parts))
    parts = [np.pad(p, ((0, most - len(p)), (0, 0)), constant_values=-1) for p in parts]
    lists = [_lists_of_head(pattern, heads, geometry, p) for heads, p in zip(distinct, parts)]
    return pack(lists, geometry)


def _lists_of_head(
    pattern: Pattern, heads: Heads, geometry: Geometry, parts: np.ndarray
) -> HeadLists:
    structure = pattern.structure()
    if structure is not None and len(geometry.units) > _FEW_UNITS:
        period = structure.kv_period if geometry.fixed == "q" else structure.q_period
        period *= geometry.block_size // geometry.unit
        if period <= min(MAX_STEP, len(geometry.units)):
            return _by_intervals(pattern, heads, geometry, parts, structure, period)
    return _by_rows(pattern, heads, geometry, parts)


def _by_rows(pattern: Pattern, heads: Heads, geometry: Geometry, parts: np.ndarray) -> HeadLists:
    """Looks at every unit of every tile."""
    num_units = len(geometry.units)
    at_once = max(1, _EVALUATED_AT_ONCE // max(1, num_units * geometry.rows))
    units = np.array(geometry.units)[None]
    chunks = []
    for base, begins in _chunks(parts * geometry.part, at_once):
        seen = _Seen(pattern, heads, geometry, begins, units)
        runs = RunBuilder(len(begins))
        rows, columns = _nonzero(seen.full)
        rank = np.arange(rows.size) - np.searchsorted(rows, rows)
        by_rank = np.argsort(rank, kind="stable")
        ends = np.cumsum(np.bincount(rank)) if rows.size else ()
        for start, end in zip((0, *ends[:-1]), ends, strict=False):
            now = by_rank[start:end]
            one = np.ones(now.size, dtype=np.int64)
            runs.add(rows[now], units[0, columns[now]], one, one)
        rows, columns = _nonzero(seen.some & ~seen.full)
        partial = np.stack([units[0, columns], seen.bits[rows, columns]], axis=-1)
        chunks.append((base, runs.finish(), rows, partial))
    return _join(chunks, parts)


def _by_intervals(
    pattern: Pattern,
    heads: Heads,
    geometry: Geometry,
    parts: np.ndarray,
    structure: Structure,
    period: int,
) -> HeadLists:
    """Looks at one period in every interval between edges."""
    at_once = max(1, _EVALUATED_AT_ONCE // (period * geometry.rows))
    chunks = []
    for base, begins in _chunks(parts * geometry.part, at_once):
        runs = RunBuilder(len(begins))
        partial_tile, partial = [], []
        window = pattern.token_window()[1]
        bounds = _bounds(structure, pattern.causal, window, geometry, begins)
        for start, stop in itertools.pairwise(bounds):
            length = stop - start
            for low, high in ((1, min(2, period)), (min(2, period) + 1, None)):
                chosen = (length >= low) & (length <= high if high else True)
                index = np.flatnonzero(chosen)
                if not index.size:
                    continue
                width = min(period, int(length[index].max()))
                units = start[index, None] + np.arange(width)
                seen = _Seen(pattern, heads, geometry, begins[index], units)
                inside = units < stop[index, None]
                full, some = seen.full & inside, seen.some & inside
                _add_full(runs, index, start[index], length[index], full, period)
                rows, columns = _nonzero(some & ~full)
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
        chunks.append((base, runs.finish(), tile[order], entry[order]))
    return _join(chunks, parts)


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
    structure: Structure,
    causal: bool,
    window: Window | None,
    geometry: Geometry,
    begins: np.ndarray,
) -> list[np.ndarray]:
    """Units at which the rule, causality or the end of the row may change things, ascending.

    begins: first token of each part, `[tiles, rows]`.
    """
    unit, per_block = geometry.unit, geometry.block_size // geometry.unit
    tiles = len(begins)
    bounds = []
    for begin in begins.T:
        block = begin // geometry.block_size
        for edge in structure.edges:
            position = block - edge + 1 if geometry.fixed == "q" else block + edge
            bounds.append(position * per_block)
    if geometry.fixed == "q":
        bounds += [np.full(tiles, edge * per_block) for edge in structure.kv_edges]
    if causal:
        low, high = _first_and_last(geometry, begins)
        if geometry.fixed == "q":
            bounds += [(low + 1) // unit, high // unit + 1]
        else:
            bounds += [low // unit, -(-high // unit)]
    if window is not None:
        for begin in begins.T:
            low = np.maximum(begin, geometry.fixed_range[0])
            high = np.minimum(begin + geometry.part, geometry.fixed_range[1]) - 1
            bounds += [(high - window.size) // unit + 1, (low - window.size + 1) // unit]
            bounds += [(low + window.size) // unit, -(-(high + window.size) // unit)]
    walk_start, walk_stop = geometry.walk_range
    ends = {geometry.units.start, geometry.units.stop, -(-walk_start // unit), walk_stop // unit}
    bounds += [np.full(tiles, end) for end in ends]
    clipped = np.clip(np.stack(bounds), geometry.units.start, geometry.units.stop)
    return list(np.sort(clipped, axis=0))


def _first_and_last(geometry: Geometry, begins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each tile that exist; of a tile without any, the first comes after the last."""
    start, stop = geometry.fixed_range
    low = np.where(begins < 0, stop, np.maximum(begins, start)).min(axis=1)
    return low, np.minimum(begins.max(axis=1) + geometry.part, stop) - 1


class _Seen:
    """What tiles see of units: `full` by all of the tile, `some` by any, `bits` by which part."""

    def __init__(
        self,
        pattern: Pattern,
        heads: Heads,
        geometry: Geometry,
        begins: np.ndarray,
        units: np.ndarray,
    ) -> None:
        size, causal = geometry.block_size, pattern.causal
        rule, window = pattern.token_window()
        fixed_start, fixed_stop = geometry.fixed_range
        walk_start, walk_stop = geometry.walk_range
        block = units * geometry.unit // size
        first, last = units * geometry.unit, (units + 1) * geometry.unit - 1
        shape = np.broadcast_shapes((len(begins), 1), units.shape)
        fulls, somes, masks = [], [], []  # of each row
        for row in range(geometry.rows):
            begin = begins[:, row, None]
            q, kv = (begin // size, block) if geometry.fixed == "q" else (block, begin // size)
            counts = (begin < fixed_stop) & (begin + geometry.part > fixed_start)
            sees = np.ones(shape, bool) if rule is None else rule.visible(heads, q, kv)
            all_see = any_sees = seen = np.broadcast_to(sees, shape)
            if window is not None:
                low = np.maximum(begin, fixed_start)
                high = np.minimum(begin + geometry.part, fixed_stop) - 1
                queries, keys = ((low, high), (first, last))
                if geometry.fixed == "kv":
                    queries, keys = keys, queries
                whole, part = _in_window(window, causal, queries, keys)
                join = np.logical_or if window.adds else np.logical_and
                all_see, any_sees = join(sees, whole), join(sees, part)
                seen = sees & any_sees
            if not counts.all():
                all_see, any_sees, seen = all_see | ~counts, any_sees & counts, seen & counts
            fulls.append(all_see)
            somes.append(any_sees)
            masks.append(seen.view(np.uint8) << np.uint8(row) if row else seen.view(np.uint8))
        full = functools.reduce(np.logical_and, fulls)
        some = functools.reduce(np.logical_or, somes)
        bits = functools.reduce(np.bitwise_or, masks)
        full = full & ((first >= walk_start) & (last < walk_stop))
        reached = (last >= walk_start) & (first < walk_stop)
        if causal:
            low, high = (ends[:, None] for ends in _first_and_last(geometry, begins))
            if geometry.fixed == "q":
                full &= last <= low
                reached = reached & (first <= high)
            else:
                full &= first >= high
                reached = reached & (last >= low)
        self.bits = np.where(reached, bits, np.uint8(0))
        self.some = some & reached
        self.full = full & self.some


def _in_window(
    window: Window,
    causal: bool,
    queries: tuple[np.ndarray, np.ndarray],
    keys: tuple[np.ndarray, np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Whether all, and whether any, of the pairs lie in it; arguments are first and last tokens."""
    far, near = queries[1] - keys[0], queries[0] - keys[1]
    whole, part = far < window.size, near < window.size
    if not causal:
        whole &= -near < window.size
        part &= -far < window.size
    return whole, part


def _nonzero(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`np.nonzero`, several times as fast."""
    flat = np.flatnonzero(mask)
    rows = flat // max(1, mask.shape[1])
    return rows, flat - rows * mask.shape[1]


def _chunks(begins: np.ndarray, size: int) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(begins), size):
        yield start, begins[start : start + size]


def _join(chunks: list, parts: np.ndarray) -> HeadLists:
    runs = [(tile + base, run) for base, (tile, run), _, _ in chunks]
    partial = [(tile + base, entry) for base, _, tile, entry in chunks]
    none = np.zeros(0, dtype=np.int64)
    return HeadLists(
        parts,
        np.concatenate([none, *(tile for tile, _ in runs)]),
        np.concatenate([none.reshape(0, 3), *(run for _, run in runs)]),
        np.concatenate([none, *(tile for tile, _ in partial)]),
        np.concatenate([none.reshape(0, 2), *(entry for _, entry in partial)]),
    )
