"""Which keys a program of Hopper's dk/dv kernel has, and which queries see them: see hopper.py."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as mgpu

from pallas_kernels.block_lists import BlockLists
from pallas_kernels.call import Arrays, Settings
from pallas_kernels.hopper_tiles import FAR, LAYOUT, ROWS, Rounds, Steps, i32
from pallas_kernels.tiles import MOSAIC_ROWS


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
    """

    refs: dict[str, Any]
    settings: Settings
    lists: BlockLists
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
        return Steps(self.refs, self.lists, self.batch, row, matters)

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

    def positions(self) -> jax.Array:
        """Of all of them, int32 `[128]`, one a thread of a warpgroup."""
        layout = mgpu.Layout.WG_STRIDED((MOSAIC_ROWS,), vec_size=1)
        lane = mgpu.broadcasted_iota(jnp.int32, (MOSAIC_ROWS,), 0, layout=layout)
        positions = lane
        for number in range(self.lists.rows):
            of_part = lane + (self._part_at(i32(number)) - i32(number)) * i32(self._part)
            here = lax.div(lane, i32(self._part)) == i32(number)
            positions = jnp.where(here, of_part, positions)
        return positions

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


@dataclasses.dataclass(frozen=True)
class KeySchedule(Rounds):
    """Which tiles each program takes: the longest of all heads first.

    parts: into which the query heads of a key/value head are split.
    """

    refs: dict[str, Any]
    settings: Settings
    lists: BlockLists
    heads: int
    kv_heads: int
    batch: int
    parts: int

    @classmethod
    def of(cls, settings: Settings, lists: BlockLists, arrays: Arrays, parts: int) -> KeySchedule:
        batch, _, heads, _ = arrays["query"].shape
        return cls({}, settings, lists, heads, arrays["key"].shape[2], batch, parts)

    def reading(self, refs: dict[str, Any]) -> KeySchedule:
        return dataclasses.replace(self, refs=refs)

    @property
    def tiles(self) -> int:
        return self.lists.num_tiles * self._sums * self.batch

    @property
    def _sums(self) -> int:
        return self.kv_heads * self.parts

    def tile(self, round_: Any) -> KeyTile:
        number, heads = self.number(round_), i32(self._sums * self.batch)
        rank, number = lax.div(number, heads), lax.rem(number, heads)
        batch, sums = lax.div(number, i32(self._sums)), lax.rem(number, i32(self._sums))
        kv_head, members = lax.div(sums, i32(self.parts)), self.heads // self._sums
        return KeyTile(self.refs, self.settings, self.lists, members, batch, kv_head, sums, rank)
