"""Walking the block lists inside a kernel: a loop without masks, then one with.

The runs of a tile are read once, up to four at a time, and walked by one flat loop: the compiler
pipelines its loads, because no index comes from memory inside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.block_lists import COUNT_BITS, MAX_COUNT, BlockLists

Carry = TypeVar("Carry")
_RUNS_AT_ONCE = 4


@dataclasses.dataclass(frozen=True)
class ListMeta:
    """The static part of `BlockLists`, for a kernel; `tile` is tokens in a walked tile."""

    num_tiles: int
    max_runs: int
    unit: int
    group: int
    rows: int

    @classmethod
    def of(cls, lists: BlockLists) -> ListMeta:
        return cls(**{field.name: getattr(lists, field.name) for field in dataclasses.fields(cls)})

    @property
    def tile(self) -> int:
        return self.unit * self.group


def walk_runs(
    run_start_ref: Any,
    runs_ref: Any,
    row: jax.Array,
    meta: ListMeta,
    body: Callable[[jax.Array, Carry], Carry],
    carry: Carry,
    *,
    window: tuple[jax.Array, jax.Array] | None = None,
    backwards: bool = False,
) -> Carry:
    """Calls `body(positions, carry)` for every tile of the runs of list `row`.

    positions: int32 [tile], ascending tokens along the walked axis. window: first and last + 1
    unit that count; tiles outside of it are left out. backwards: last tile first.
    """
    if not meta.max_runs:
        return carry
    start, stop = run_start_ref[row], run_start_ref[row + 1]

    def walk_some(begin: jax.Array, carry: Carry) -> Carry:
        slots = min(meta.max_runs, _RUNS_AT_ONCE)
        runs = [_read_run(runs_ref, begin + k, start, stop, meta, window) for k in range(slots)]
        ends = [runs[0][2]]
        for _, _, count in runs[1:]:
            ends.append(ends[-1] + count)

        def visit(i: jax.Array, carry: Carry) -> Carry:
            i = ends[-1] - 1 - i if backwards else i
            first, step, _ = runs[0]
            unit = first + i * (meta.group * step)
            for (first, next_step, _), end in zip(runs[1:], ends[:-1], strict=True):
                unit = jnp.where(i >= end, first + (i - end) * (meta.group * next_step), unit)
                step = jnp.where(i >= end, next_step, step)
            return body(_positions(unit, step, meta), carry)

        return lax.fori_loop(0, ends[-1], visit, carry)

    if meta.max_runs <= _RUNS_AT_ONCE:
        return walk_some(start, carry)
    turns = lax.div(stop - start + (_RUNS_AT_ONCE - 1), np.int32(_RUNS_AT_ONCE))
    return lax.fori_loop(
        0, turns, lambda turn, carry: walk_some(start + turn * _RUNS_AT_ONCE, carry), carry
    )


def walk_partial(
    partial_start_ref: Any,
    partial_ref: Any,
    row: jax.Array,
    meta: ListMeta,
    body: Callable[[jax.Array, jax.Array, Carry], Carry],
    carry: Carry,
) -> Carry:
    """Calls `body(positions, bits, carry)` for every tile of the partial units of list `row`.

    bits: int32 [tile], which parts of the fixed tile see the position; 0 where there is none.
    """
    start, stop = partial_start_ref[row], partial_start_ref[row + 1]
    lane = lax.iota(jnp.int32, meta.tile)
    everyone = (1 << meta.rows) - 1

    def visit(i: jax.Array, carry: Carry) -> Carry:
        if meta.group == 1:
            entry = jnp.full((meta.tile,), partial_ref[start + i])
        else:
            slot = start + i * meta.group + lane // meta.unit
            entry = plgpu.load(partial_ref.at[slot], mask=slot < stop, other=0)
        positions = (entry >> meta.rows) * meta.unit + lane % meta.unit
        return body(positions, entry & everyone, carry)

    turns = lax.div(stop - start + (meta.group - 1), np.int32(meta.group))
    return lax.fori_loop(0, turns, visit, carry)


def _read_run(
    runs_ref: Any,
    index: jax.Array,
    start: jax.Array,
    stop: jax.Array,
    meta: ListMeta,
    window: tuple[jax.Array, jax.Array] | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """First unit, step and tiles of a run; no tiles past the last run."""
    exists = index < stop
    index = jnp.where(exists, index, start)
    first, word = runs_ref[index, 0], runs_ref[index, 1]
    step = word >> COUNT_BITS
    count = jnp.where(exists, word & MAX_COUNT, 0)
    if window is None:
        return first, step, count
    stride = jnp.maximum(step * meta.group, 1)
    skipped = lax.div(jnp.maximum(window[0] - first, 0), stride)
    kept = lax.div(jnp.maximum(window[1] - first + stride - 1, 0), stride)
    kept = jnp.maximum(jnp.minimum(kept, count) - skipped, 0)
    return first + skipped * meta.group * step, step, kept


def _positions(unit: jax.Array, step: jax.Array, meta: ListMeta) -> jax.Array:
    lane = lax.iota(jnp.int32, meta.tile)
    if meta.group == 1:
        return unit * meta.unit + lane
    return unit * meta.unit + (lane // meta.unit) * (step * meta.unit) + lane % meta.unit
