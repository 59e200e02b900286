"""What the three kernels share on their way in: static settings and operand specs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.block_lists import BlockLists
from pallas_kernels.lowering import Launcher
from pallas_kernels.tiles import TileConfig
from pallas_kernels.walk import ListMeta


class Layouts(Protocol):
    """Where the block lists come from; hashable, compared by value."""

    def forward(self) -> BlockLists: ...
    def dq(self) -> BlockLists: ...
    def dkv(self) -> BlockLists: ...


@dataclasses.dataclass(frozen=True)
class Settings:
    """The static side of a call.

    query_offset: position of query 0, or None where it is an array that comes with the call.
    q_limit: query positions from here on have no lists, and give NaN.
    """

    layouts: Layouts
    tiles: TileConfig
    scale: float
    causal: bool
    block_size: int
    query_offset: int | None
    q_limit: int
    launcher: Launcher = "pallas"


class Operands(tuple):
    """The list arrays and per-call scalars, in the order in which every kernel takes them."""

    SIZE = 7

    @classmethod
    def of(cls, lists: BlockLists, pattern_of_head: jax.Array, offset: jax.Array) -> Operands:
        arrays = (lists.order, lists.run_start, lists.runs, lists.partial_start, lists.partial)
        return cls((*map(jnp.asarray, arrays), pattern_of_head, offset))


class ListRefs:
    """The same inside a kernel, with the questions that a program asks first."""

    def __init__(self, refs: tuple[Any, ...], meta: ListMeta, settings: Settings, batch: Any):
        self.order, self.run_start, self.runs, self.partial_start, self.partial = refs[:5]
        self._pattern_of_head, self._offset = refs[5:]
        self.meta = meta
        self._settings, self._batch = settings, batch

    def offset(self) -> Any:
        static = self._settings.query_offset
        return self._offset[self._batch] if static is None else static

    def tile_at(self, head: Any, rank: Any) -> jax.Array:
        """The fixed tile whose lists stand at place `rank` for a head."""
        return self.order[self._pattern_of_head[head], rank]

    def row(self, head: Any, rank: Any) -> jax.Array:
        return self._pattern_of_head[head] * self.meta.num_tiles + rank


@dataclasses.dataclass(frozen=True)
class Grid:
    """One program for each head, row of the lists and batch entry.

    heads_first: programs that run side by side share a row instead of a head.
    """

    heads: int
    rows: int
    batch: int
    heads_first: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        return (*self._ordered(self.heads, self.rows), self.batch)

    def program(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Head, rank of the row and batch entry of this program."""
        return (*self._ordered(pl.program_id(0), pl.program_id(1)), pl.program_id(2))

    def by_head(self, length: int, dim: int, group: int = 1) -> pl.BlockSpec:
        """All of a head's rows of `[batch, length, heads, dim]`; `group` heads share one."""
        return self._spec(
            (None, length, None, dim), lambda h, b: (b, 0, lax.div(h, np.int32(group)), 0)
        )

    def by_group(self, length: int, dim: int, group: int) -> pl.BlockSpec:
        """The same of the `group` heads that belong to this program's head."""
        return self._spec((None, length, group, dim), lambda h, b: (b, 0, h, 0))

    def scalars(self, length: int) -> pl.BlockSpec:
        """A head's row of `[batch, heads, length]`."""
        return self._spec((None, None, length), lambda h, b: (b, h, 0))

    def group_scalars(self, length: int, group: int) -> pl.BlockSpec:
        return self._spec((None, group, length), lambda h, b: (b, h, 0))

    def _spec(self, shape: tuple[Any, ...], index: Callable[[Any, Any], Any]) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda i, j, b: index(self._ordered(i, j)[0], b))

    def _ordered(self, a: Any, b: Any) -> tuple[Any, Any]:
        return (a, b) if self.heads_first else (b, a)


def padded_dim(dim: int) -> int:
    """Tensor dims are powers of two in Triton, and at least 16 in its matrix products."""
    return max(16, 1 << (dim - 1).bit_length())


def query_rows(
    settings: Settings, refs: ListRefs, head: Any, rank: Any, grid: Grid, block_q: int, q_len: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """List row, query positions [block_q], array rows and which of them exist (None: all)."""
    offset, meta = refs.offset(), refs.meta
    lane = lax.iota(jnp.int32, block_q)
    if settings.query_offset is None:
        # A shift rounds down: also a negative offset's rows are reached, and given NaN.
        first = offset >> (block_q.bit_length() - 1)
        tile = first + (grid.rows - 1 - rank)
        rank = jnp.clip(tile, 0, meta.num_tiles - 1)
    else:
        tile = refs.tile_at(head, rank)
    positions = tile * block_q + lane
    rows = positions - offset
    exists = None
    if settings.query_offset is None or offset % block_q or q_len % block_q:
        exists = (rows >= 0) & (rows < q_len)
        rows = jnp.where(exists, rows, q_len)
    return refs.row(head, rank), positions, rows, exists


def num_query_tiles(settings: Settings, lists: BlockLists, block_q: int, q_len: int) -> int:
    """Programs along the queries: a traced offset may straddle one tile more."""
    return lists.num_tiles if settings.query_offset is not None else -(-q_len // block_q) + 1


def whole(array: Any) -> pl.BlockSpec:
    """A spec that hands the whole array to every program."""
    zeros = (0,) * np.ndim(array)
    return pl.BlockSpec(np.shape(array), lambda *_: zeros)
