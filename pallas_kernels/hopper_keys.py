"""Which keys a program of Hopper's dk/dv kernel has, and which queries see them: see hopper.py."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as mgpu

from pallas_kernels.block_lists import MAX_COUNT, BlockLists
from pallas_kernels.call import Arrays, Settings
from pallas_kernels.hopper_tiles import FAR, LAYOUT, PROGRAM, ROWS, Steps, i32
from pallas_kernels.lowering import multiprocessors
from pallas_kernels.tiles import MOSAIC_ROWS

_CHUNKS = 4  # of a multiprocessor's short tiles, at least; two go one by one in the end
_LARGEST_CHUNK = 8  # tiles


class Piece(NamedTuple):
    """Neighbouring keys of a warpgroup: place among its own, position in the sequence (negative
    where there are none), and how many.
    """

    place: int
    position: Any
    size: int


@dataclasses.dataclass(frozen=True)
class KeyTile:
    """The keys of one head that a program has, for some of the query heads that share it.

    refs: of the lists, by name. members: so many query heads. sums: which of their sums it is.
    kv_length: keys from here on do not count.
    """

    refs: dict[str, Any]
    settings: Settings
    lists: BlockLists
    kv_length: Any
    members: int
    batch: Any
    kv_head: Any
    sums: Any
    rank: Any

    def steps(self, member: Any) -> Steps:
        """Those that one of its query heads has in store."""
        row = self._pattern(member) * i32(self.lists.num_tiles) + self.rank
        matters = None
        if "spans" in self.refs:
            spans = self.refs["spans"]
            matters = spans[self.batch, row, i32(0)], spans[self.batch, row, i32(1)]
        # From the end, which all keys of a head have in common: programs that begin together then
        # find each other's queries in the cache.
        return Steps(self.refs, self.lists, self.batch, row, matters, backwards=True)

    def head(self, member: Any) -> Any:
        """Of all query heads, one of its own."""
        return self.sums * i32(self.members) + member

    def pieces(self, warpgroup: Any) -> list[Piece]:
        size = min(self._part, ROWS)
        pieces = []
        for place in range(0, ROWS, size):
            key = warpgroup * i32(ROWS) + i32(place)
            part = self._part_at(lax.div(key, i32(self._part)))
            position = part * i32(self._part) + lax.rem(key, i32(self._part))
            pieces.append(Piece(place, jnp.where(part < 0, i32(-FAR), position), size))
        return pieces

    @property
    def whole(self) -> Any:
        """Whether all of them exist and count."""
        parts = [self._part_at(i32(number)) for number in range(self.lists.rows)]
        last = functools.reduce(jnp.maximum, parts)
        exist = functools.reduce(jnp.minimum, parts) >= 0
        return exist & ((last + i32(1)) * i32(self._part) <= self.kv_length)

    def positions(self) -> jax.Array:
        """Of all of them, int32 `[128]`, one a thread of a warpgroup. Of keys that do not count,
        one that no query sees.
        """
        layout = mgpu.Layout.WG_STRIDED((MOSAIC_ROWS,), vec_size=1)
        lane = mgpu.broadcasted_iota(jnp.int32, (MOSAIC_ROWS,), 0, layout=layout)
        positions = lane
        for number in range(self.lists.rows):
            of_part = lane + (self._part_at(i32(number)) - i32(number)) * i32(self._part)
            here = lax.div(lane, i32(self._part)) == i32(number)
            positions = jnp.where(here, of_part, positions)
        counts = (positions >= 0) & (positions < self.kv_length)
        return jnp.where(counts, positions, i32(FAR + self.settings.q_limit))

    def mask(
        self, queries: jax.Array, positions: jax.Array, warpgroup: Any, q_ids: Any, kv_ids: Any
    ) -> jax.Array:
        """Which of the queries of a step see each key of a warpgroup, `[keys, queries]`.

        queries: as `Pipeline.entries`, `[queries]`. positions: of the keys. q_ids, kv_ids: of
        segments, `[queries]` and `[keys]`; None where there are none.
        """
        lists, window, shape = self.lists, self.settings.window, (ROWS, queries.shape[0])

        def of_queries(numbers: jax.Array) -> jax.Array:
            return lax.broadcast_in_dim(numbers, shape, [1])

        def of_keys(numbers: jax.Array) -> jax.Array:
            return lax.broadcast_in_dim(numbers, shape, [0])

        def limit(positions: jax.Array) -> jax.Array:
            positions = jnp.minimum(jnp.maximum(positions, i32(0)), i32(self.settings.q_limit))
            return of_keys(positions << lists.rows)

        # Mosaic finds no layout where all keys have the same start.
        start = limit(positions if self.settings.causal else positions - i32(FAR))
        if self._part >= ROWS:  # one number a query says it for all keys
            listed = (queries >> lax.div(warpgroup * i32(ROWS), i32(self._part))) & 1
            mask = of_queries(jnp.where(listed != 0, queries, -1)) >= start
        else:
            row = mgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=LAYOUT.reduce(1))
            bit = jnp.left_shift(1, lax.div(row + warpgroup * i32(ROWS), i32(self._part)))
            mask = ((of_queries(queries) & of_keys(bit)) != 0) & (of_queries(queries) >= start)
        if window is not None:
            size = i32(min(window.size, FAR))
            near = of_queries(queries) < limit(positions + size)
            if not self.settings.causal:
                near &= of_queries(queries) >= limit(positions - size + i32(1))
            mask = mask | (near & (of_queries(queries) >= start)) if window.adds else mask & near
        if q_ids is not None:
            mask &= of_keys(kv_ids) == of_queries(q_ids)
        return mask

    @property
    def _part(self) -> int:
        return self.lists.fixed_tile // self.lists.rows

    def _part_at(self, number: Any) -> Any:
        """Which part of the axis stands at a place of the tile; negative for none."""
        return self.refs["order"][self._pattern(i32(0)), self.rank * i32(self.lists.rows) + number]

    def _pattern(self, member: Any) -> Any:
        return self.refs["pattern_of_head"][self.batch, self.head(member)]


class Chunks(NamedTuple):
    """How programs share out the tiles of each head, the longest of which come first.

    `long` programs have one tile each; the next `several` have `size` each, and take neighbouring
    ones at a time, whose queries are then in the cache; and the `last` one each again. A program
    with several loads the next one's keys while it stores results; with one at the end, all
    multiprocessors have done at about the same time. by_rank: the long tiles come longest first,
    whatever the head; otherwise those of a head come together, and share queries in the cache.
    """

    by_rank: bool
    heads: int
    long: int
    several: int
    size: int
    last: int

    @classmethod
    def of(cls, lists: BlockLists, heads: int) -> Chunks:
        """heads: so many have such tiles, in all batch entries."""
        steps, places = _steps_of_rows(lists), multiprocessors() / heads
        long = int(np.argmax(steps <= 2 * np.median(steps)))  # before the first that is not
        # The longest one of the last head begins when those of all other heads have begun.
        by_rank = steps[0] > (steps[:long].sum() + steps[long:].sum() * heads) / multiprocessors()
        rest = len(steps) - long
        size = int(np.clip(rest / places / _CHUNKS, 1, _LARGEST_CHUNK))
        last = math.ceil(2 * size * places) if size > 1 else rest
        several = max(0, rest - last) // size
        return cls(bool(by_rank), heads, long, several, size, rest - several * size)

    @property
    def programs(self) -> int:
        return self.heads * (self.long + self.several + self.last)

    def place(self, program: Any) -> Place:
        """What a program has; its further tiles are `several` from each other."""
        starts = self.heads * self.long, self.heads * (self.long + self.several)
        first, several = program < i32(starts[0]), program < i32(starts[1])

        def choose(long: int, middle: int, last: int) -> Any:
            return jnp.where(first, i32(long), jnp.where(several, i32(middle), i32(last)))

        number = program - choose(0, *starts)
        of_head = choose(max(1, self.long), max(1, self.several), max(1, self.last))
        head, rank = lax.div(number, of_head), lax.rem(number, of_head)
        if self.by_rank:
            head = jnp.where(first, lax.rem(number, i32(self.heads)), head)
            rank = jnp.where(first, lax.div(number, i32(self.heads)), rank)
        rank += choose(0, self.long, self.long + self.several * self.size)
        return Place(head, rank, choose(1, self.size, 1))


class Place(NamedTuple):
    """Of a program: the head, of all batch entries; its first tile; and how many it has; int32."""

    head: Any
    rank: Any
    tiles: Any


def _steps_of_rows(lists: BlockLists) -> np.ndarray:
    """Of the tiles of all patterns, in the order in which they are taken: their mean."""
    counts = np.concatenate([[0], np.cumsum(np.asarray(lists.runs)[:, 1] & MAX_COUNT)])
    tiles = np.diff(counts[np.asarray(lists.run_start)])
    steps = tiles + -(-np.diff(np.asarray(lists.partial_start)) // lists.group)
    return steps.reshape(-1, lists.num_tiles).mean(axis=0)


@dataclasses.dataclass(frozen=True)
class KeySchedule:
    """Which tiles each program takes, those of a head one after the other.

    parts: into which the query heads of a key/value head are split.
    """

    refs: dict[str, Any]
    settings: Settings
    lists: BlockLists
    heads: int
    kv_heads: int
    kv_len: int
    batch: int
    parts: int
    chunks: Chunks

    @classmethod
    def of(cls, settings: Settings, lists: BlockLists, arrays: Arrays, parts: int) -> KeySchedule:
        batch, _, heads, _ = arrays["query"].shape
        _, kv_len, kv_heads, _ = arrays["key"].shape
        chunks = Chunks.of(lists, kv_heads * parts * batch)
        return cls({}, settings, lists, heads, kv_heads, kv_len, batch, parts, chunks)

    def reading(self, refs: dict[str, Any]) -> KeySchedule:
        return dataclasses.replace(self, refs=refs)

    @property
    def programs(self) -> int:
        return self.chunks.programs

    @property
    def _sums(self) -> int:
        return self.kv_heads * self.parts

    def visit(self, body: Callable[[Any, Any], Any], state: Any) -> Any:
        """Calls `body(round, state) -> state` for each tile of this program."""
        return lax.fori_loop(i32(0), self._place.tiles, body, state)

    def has(self, round_: Any) -> Any:
        """Whether this program has so many tiles that one is left for a round."""
        return round_ < self._place.tiles

    def tile(self, round_: Any) -> KeyTile:
        head, first, _ = self._place
        batch, sums = lax.div(head, i32(self._sums)), lax.rem(head, i32(self._sums))
        kv_head, members = lax.div(sums, i32(self.parts)), self.heads // self._sums
        rank = first + round_ * i32(self.chunks.several)
        kv_length = i32(self.kv_len)
        if "kv_length" in self.refs:
            kv_length = jnp.minimum(self.refs["kv_length"][batch], kv_length)
        return KeyTile(
            self.refs, self.settings, self.lists, kv_length, members, batch, kv_head, sums, rank
        )

    @property
    def _place(self) -> Place:
        return self.chunks.place(lax.axis_index(PROGRAM))
