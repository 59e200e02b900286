"""One program inside a kernel: its tile, its lists, and which tokens count."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.call import Grid, Settings
from pallas_kernels.masks import TileMask
from pallas_kernels.rows import load_scalars
from pallas_kernels.walk import NO_SPAN, ListMeta, Span


@dataclasses.dataclass(frozen=True)
class Program:
    """What a program knows before it looks at its tile.

    refs: of `Operands`, by name. q_len, kv_len: rows of the arrays.
    """

    refs: dict[str, Any]
    meta: ListMeta
    settings: Settings
    grid: Grid
    q_len: int
    kv_len: int
    head: jax.Array
    rank: jax.Array
    batch: jax.Array

    @classmethod
    def start(
        cls,
        refs: dict[str, Any],
        meta: ListMeta,
        settings: Settings,
        grid: Grid,
        q_len: int,
        kv_len: int,
    ) -> Program:
        return cls(refs, meta, settings, grid, q_len, kv_len, *grid.program())

    @property
    def offset(self) -> Any:
        static = self.settings.query_offset
        return self.refs["offset"][self.batch] if static is None else static

    def tile_at(self, head: Any, rank: Any) -> jax.Array:
        """The query tile whose lists stand at place `rank` for a head."""
        return self.refs["order"][self.refs["pattern_of_head"][head], rank]

    def parts_at(self, head: Any, rank: Any) -> list[jax.Array]:
        """The parts of the key tile whose lists stand there; -1 for none."""
        pattern, rows = self.refs["pattern_of_head"][head], self.meta.rows
        return [self.refs["order"][pattern, rank * rows + row] for row in range(rows)]

    def row(self, head: Any, rank: Any) -> jax.Array:
        return self.refs["pattern_of_head"][head] * self.meta.num_tiles + rank

    def span(self, tile: Any) -> Span | None:
        """Units that the tile needs, the tile counted from the one that holds row 0."""
        if "spans" not in self.refs:
            return None
        return Span(*(self.refs["spans"][tile, end] for end in range(4)))

    def span_of_parts(self, parts: list[jax.Array]) -> Span | None:
        """Units that any of the parts needs, and those that all need without a mask."""
        if "spans" not in self.refs:
            return None
        ends = []
        for part in parts:
            span = self.span(jnp.maximum(part, 0))
            assert span is not None
            ends.append([jnp.where(part >= 0, *pair) for pair in zip(span, NO_SPAN, strict=True)])
        join = (jnp.minimum, jnp.maximum, jnp.maximum, jnp.minimum)
        return Span(*(functools.reduce(f, end) for f, end in zip(join, zip(*ends), strict=True)))

    def q_limits(self) -> tuple[Any, Any]:
        """First and last + 1 position of the queries that count."""
        first, last = self.offset, self.offset + self._length("q_length", self.q_len)
        if self.settings.query_offset is not None:
            return first, last
        return jnp.maximum(first, 0), jnp.minimum(last, self.settings.q_limit)

    def kv_limits(self) -> tuple[Any, Any]:
        return 0, self._length("kv_length", self.kv_len)

    def _length(self, name: str, length: int) -> Any:
        if name not in self.refs:
            return length
        return jnp.clip(self.refs[name][self.batch], 0, length)

    def ids(self, name: str, rows: jax.Array, inside: jax.Array | None) -> jax.Array | None:
        if name not in self.refs:
            return None
        return load_scalars(self.refs[name], rows, inside, 0)

    def mask(self, positions: jax.Array, ids: jax.Array | None) -> TileMask:
        part = min(positions.shape[0], self.settings.block_size)
        return TileMask(
            self.meta.holds_queries, positions, ids, part, self.meta.rows,
            self.settings.causal, self.settings.window,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class KeyTile:
    """The fixed tile of the dk/dv kernel, for the heads of a group alike.

    positions: int32 `[block_kv]`. rows: the same, or past the end where there is no key. exists:
    which there are; None: all.
    """

    span: Span | None
    positions: jax.Array
    rows: jax.Array
    exists: jax.Array | None

    @classmethod
    def of(cls, program: Program, head: Any, block_kv: int) -> KeyTile:
        parts = program.parts_at(head, program.rank)
        size, lane = block_kv // len(parts), lax.iota(jnp.int32, block_kv)
        part = jnp.full((block_kv,), parts[0])
        for place, other in enumerate(parts[1:], 1):
            part = jnp.where(lane >= place * size, other, part)
        positions = part * size + lax.rem(lane, np.int32(size))
        rows, exists = positions, None
        if not program.meta.whole:
            exists = (positions >= 0) & (positions < program.kv_len)
            rows = jnp.where(exists, positions, program.kv_len)
        return cls(program.span_of_parts(parts), positions, rows, exists)


@dataclasses.dataclass(frozen=True)
class QueryTile:
    """The fixed tile of the forward and dq kernels.

    row: of the lists. positions, rows: int32 `[block_q]`, in the sequence and in the array.
    exists: which rows do; None: all.
    """

    row: jax.Array
    span: Span | None
    positions: jax.Array
    rows: jax.Array
    exists: jax.Array | None

    @classmethod
    def of(cls, program: Program, block_q: int) -> QueryTile:
        offset, static = program.offset, program.settings.query_offset
        rank = program.rank
        if static is None:
            # A shift rounds down: also a negative offset's rows are reached, and given NaN.
            index = program.grid.rows - 1 - rank
            tile = (offset >> (block_q.bit_length() - 1)) + index
            rank = jnp.clip(tile, 0, program.meta.num_tiles - 1)
        else:
            tile = program.tile_at(program.head, rank)
            index = tile - static // block_q
        positions = tile * block_q + lax.iota(jnp.int32, block_q)
        rows, exists = positions - offset, None
        if static is None or offset % block_q or program.q_len % block_q:
            exists = (rows >= 0) & (rows < program.q_len)
            rows = jnp.where(exists, rows, program.q_len)
        return cls(program.row(program.head, rank), program.span(index), positions, rows, exists)

    def counts(self, program: Program) -> jax.Array | None:
        """Which rows are answered with more than a filling; None: all."""
        counts = self.exists
        for mask in (self._defined(program), self._unpadded(program)):
            if mask is not None:
                counts = mask if counts is None else counts & mask
        return counts

    def blank(self, program: Program, array: jax.Array, padding: float, beyond: float) -> jax.Array:
        """`array` with rows of padding, and those beyond what the lists cover, set so."""
        defined, unpadded = self._defined(program), self._unpadded(program)
        if defined is not None:
            array = jnp.where(_spread(defined, array.shape), array, beyond)
        if unpadded is not None:
            array = jnp.where(_spread(unpadded, array.shape), array, padding)
        return array

    def _defined(self, program: Program) -> jax.Array | None:
        """Rows whose positions the lists cover."""
        if program.settings.query_offset is not None:
            return None
        return (self.positions >= 0) & (self.positions < program.settings.q_limit)

    def _unpadded(self, program: Program) -> jax.Array | None:
        if "q_length" not in program.refs:
            return None
        return self.rows < program.refs["q_length"][program.batch]


def _spread(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.broadcast_to(rows if len(shape) == 1 else rows[:, None], shape)
