"""What the three kernels share on their way in: static settings, operands and their specs."""

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
from pallas_kernels.masks import Window
from pallas_kernels.scores import Scoring
from pallas_kernels.spans import Axis, spans
from pallas_kernels.tiles import TileConfig

Arrays = dict[str, jax.Array]


class Layouts(Protocol):
    """Where the block lists come from; hashable, compared by value."""

    def forward(self) -> BlockLists: ...
    def dq(self) -> BlockLists: ...
    def dkv(self) -> BlockLists: ...


@dataclasses.dataclass(frozen=True)
class Settings(Scoring):
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
    soft_cap: float | None = None
    window: Window | None = None


def operands(settings: Settings, lists: BlockLists, arrays: Arrays, list_arrays: Arrays) -> Arrays:
    """What a kernel takes besides queries, keys, values and their gradients, by name."""
    names = ("pattern_of_head", "offset", "q_ids", "kv_ids", "q_length", "kv_length")
    named = list_arrays | {name: arrays[name] for name in names if name in arrays}
    walks_traced = settings.query_offset is None and not lists.holds_queries
    if walks_traced or not named.keys().isdisjoint(("q_ids", "q_length", "kv_length")):
        q_axis, kv_axis = _axes(settings, arrays)
        fixed, walked = (q_axis, kv_axis) if lists.holds_queries else (kv_axis, q_axis)
        size = lists.fixed_tile if lists.holds_queries else lists.fixed_tile // lists.rows
        named["spans"] = spans(fixed, size, walked, lists.unit)
    return named


def operand_specs(named: Arrays, grid: Grid) -> list[pl.BlockSpec]:
    by_batch = ("spans", "q_ids", "kv_ids", "pattern_of_head")
    return [
        grid.by_batch(array.shape) if name in by_batch else _whole(array)
        for name, array in named.items()
    ]


def _axes(settings: Settings, arrays: Arrays) -> tuple[Axis, Axis]:
    """Queries and keys, and which of them count."""
    offset, q_len, kv_len = arrays["offset"], arrays["query"].shape[1], arrays["key"].shape[1]
    origin = offset
    if settings.query_offset is not None:
        origin = jnp.full_like(offset, settings.query_offset)
    zero = jnp.zeros_like(offset)
    rows = jnp.clip(arrays["q_length"], 0, q_len) if "q_length" in arrays else zero + q_len
    last = jnp.minimum(origin + rows, settings.q_limit)
    queries = Axis(q_len, origin, jnp.maximum(origin, 0), last, arrays.get("q_ids"))
    rows = jnp.clip(arrays["kv_length"], 0, kv_len) if "kv_length" in arrays else zero + kv_len
    return queries, Axis(kv_len, zero, zero, rows, arrays.get("kv_ids"))


@dataclasses.dataclass(frozen=True)
class Grid:
    """One program for each head, row of the lists and batch entry.

    together: rows of one head that programs which run side by side take before those of the next
    head; None: all of them.
    """

    heads: int
    rows: int
    batch: int
    together: int | None

    @property
    def shape(self) -> tuple[int, int, int]:
        if self.together is None:
            return self.rows, self.heads, self.batch
        if self.together == 1:
            return self.heads, self.rows, self.batch
        return self.heads * self.rows, 1, self.batch

    def program(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Head, rank of the row and batch entry of this program."""
        return (*self._place(pl.program_id(0), pl.program_id(1)), pl.program_id(2))

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

    def by_batch(self, shape: tuple[int, ...]) -> pl.BlockSpec:
        """All of an entry of `[batch, ...]`."""
        return self._spec((None, *shape[1:]), lambda h, b: (b, *[0] * len(shape[1:])))

    def _spec(self, shape: tuple[Any, ...], index: Callable[[Any, Any], Any]) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda i, j, b: index(self._place(i, j)[0], b))

    def _place(self, i: Any, j: Any) -> tuple[Any, Any]:
        """Head and rank of the row of a program."""
        if self.together is None:
            return j, i
        if self.together == 1:
            return i, j
        programs = np.int32(self.heads * self.together)
        group = lax.div(i, programs)
        size: Any = np.int32(self.together)
        first = group * self.together
        if self.rows % self.together:  # the last group has fewer
            size = jnp.minimum(self.rows - first, size)
        within = i - group * programs
        return lax.div(within, size), first + lax.rem(within, size)


def padded_dim(dim: int) -> int:
    """Tensor dims are powers of two in Triton, and at least 16 in its matrix products."""
    return max(16, 1 << (dim - 1).bit_length())


def num_query_tiles(settings: Settings, lists: BlockLists, q_len: int) -> int:
    """Programs along the queries: a traced offset may straddle one tile more."""
    if settings.query_offset is not None:
        return lists.num_tiles
    return -(-q_len // lists.fixed_tile) + 1


def _whole(array: Any) -> pl.BlockSpec:
    """A spec that hands the whole array to every program."""
    zeros = (0,) * np.ndim(array)
    return pl.BlockSpec(np.shape(array), lambda *_: zeros)
