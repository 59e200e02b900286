"""Walking the block lists inside a kernel: a loop without masks, then those with.

The runs of a tile are read once, up to four at a time, and walked by one flat loop: the compiler
pipelines its loads, because no index comes from memory inside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

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
    holds_queries: bool

    @classmethod
    def of(cls, lists: BlockLists) -> ListMeta:
        return cls(**{field.name: getattr(lists, field.name) for field in dataclasses.fields(cls)})

    @property
    def tile(self) -> int:
        return self.unit * self.group

    @property
    def everyone(self) -> int:
        """The bits of a unit that all parts of the fixed tile see."""
        return (1 << self.rows) - 1


class Span(NamedTuple):
    """Units start <= u < stop matter; those of inner <= u < inner_stop need no mask."""

    start: jax.Array
    stop: jax.Array
    inner: jax.Array
    inner_stop: jax.Array


class _Run(NamedTuple):
    """What is walked of a run: `tiles` from `first` on, leaving out `gap` at `gap_at`."""

    first: jax.Array
    step: jax.Array
    tiles: jax.Array
    gap_at: Any = None
    gap: Any = None

    def unit(self, i: jax.Array, group: int) -> jax.Array:
        if self.gap_at is not None:
            i = jnp.where(i >= self.gap_at, i + self.gap, i)
        return self.first + i * (group * self.step)


def walk(
    refs: dict[str, Any],
    row: jax.Array,
    meta: ListMeta,
    span: Span | None,
    body: Callable[[jax.Array, jax.Array | None, Carry], Carry],
    carry: Carry,
    *,
    backwards: bool = False,
) -> Carry:
    """Calls `body(positions, bits, carry)` for every tile of list `row`.

    positions: int32 [tile], tokens along the walked axis. bits: None where no mask is needed;
    otherwise int32 [tile], which parts of the fixed tile see the position (positions that do not
    exist are negative, or past the end). span: what of the list matters; None: all of it.
    backwards: last tile of the runs first.
    """

    def masked(positions: jax.Array, carry: Carry) -> Carry:
        return body(positions, jnp.full((meta.tile,), meta.everyone, jnp.int32), carry)

    if meta.max_runs:
        plain = lambda positions, carry: body(positions, None, carry)  # noqa: E731
        carry = _walk_runs(refs, row, meta, span, "inner", plain, carry, backwards)
        if span is not None:
            carry = _walk_runs(refs, row, meta, span, "outer", masked, carry, backwards)
    return _walk_partial(refs, row, meta, span, body, carry)


def _walk_runs(
    refs: dict[str, Any],
    row: jax.Array,
    meta: ListMeta,
    span: Span | None,
    part: Literal["inner", "outer"],
    body: Callable[[jax.Array, Carry], Carry],
    carry: Carry,
    backwards: bool,
) -> Carry:
    start, stop = refs["run_start"][row], refs["run_start"][row + 1]

    def walk_some(begin: jax.Array, carry: Carry) -> Carry:
        slots = min(meta.max_runs, _RUNS_AT_ONCE)
        runs = [_read_run(refs["runs"], begin + k, start, stop, meta) for k in range(slots)]
        if span is not None:
            runs = [_clip(run, span, part, meta.group) for run in runs]
        ends = [runs[0].tiles]
        for run in runs[1:]:
            ends.append(ends[-1] + run.tiles)

        def visit(i: jax.Array, carry: Carry) -> Carry:
            i = ends[-1] - 1 - i if backwards else i
            unit, step = runs[0].unit(i, meta.group), runs[0].step
            for run, end in zip(runs[1:], ends[:-1], strict=True):
                unit = jnp.where(i >= end, run.unit(i - end, meta.group), unit)
                step = jnp.where(i >= end, run.step, step)
            return body(_positions(unit, step, meta), carry)

        return lax.fori_loop(0, ends[-1], visit, carry)

    if meta.max_runs <= _RUNS_AT_ONCE:
        return walk_some(start, carry)
    turns = lax.div(stop - start + (_RUNS_AT_ONCE - 1), np.int32(_RUNS_AT_ONCE))
    return lax.fori_loop(
        0, turns, lambda turn, carry: walk_some(start + turn * _RUNS_AT_ONCE, carry), carry
    )


def _walk_partial(
    refs: dict[str, Any],
    row: jax.Array,
    meta: ListMeta,
    span: Span | None,
    body: Callable[[jax.Array, jax.Array | None, Carry], Carry],
    carry: Carry,
) -> Carry:
    start, stop = refs["partial_start"][row], refs["partial_start"][row + 1]
    partial = refs["partial"]
    lane = lax.iota(jnp.int32, meta.tile)

    def visit(i: jax.Array, carry: Carry) -> Carry:
        begin = start + i * meta.group
        if meta.group == 1:
            entry = jnp.full((meta.tile,), partial[begin])
        else:
            slot = begin + lax.div(lane, np.int32(meta.unit))
            entry = plgpu.load(partial.at[slot], mask=slot < stop, other=-1)  # a negative unit
        positions = (entry >> meta.rows) * meta.unit + lax.rem(lane, np.int32(meta.unit))
        bits = entry & meta.everyone
        if span is None:
            return body(positions, bits, carry)
        first = partial[begin] >> meta.rows
        last = partial[jnp.minimum(begin + meta.group, stop) - 1] >> meta.rows
        matters = (last >= span.start) & (first < span.stop)
        return lax.cond(matters, lambda c: body(positions, bits, c), lambda c: c, carry)

    turns = lax.div(stop - start + (meta.group - 1), np.int32(meta.group))
    return lax.fori_loop(0, turns, visit, carry)


def _read_run(
    runs_ref: Any, index: jax.Array, start: jax.Array, stop: jax.Array, meta: ListMeta
) -> _Run:
    """A run; without tiles past the last one."""
    exists = index < stop
    index = jnp.where(exists, index, start)
    first, word = runs_ref[index, 0], runs_ref[index, 1]
    return _Run(first, word >> COUNT_BITS, jnp.where(exists, word & MAX_COUNT, 0))


def _clip(run: _Run, span: Span, part: Literal["inner", "outer"], group: int) -> _Run:
    """The tiles of a run whose units all lie in the inner part, or the others that matter."""
    stride = jnp.maximum(run.step * group, 1)
    reach = (group - 1) * run.step

    def tiles_before(unit: jax.Array) -> jax.Array:
        tiles = lax.div(jnp.maximum(unit - run.first, 0) + (stride - 1), stride)
        return jnp.minimum(tiles, run.tiles)

    start, stop = tiles_before(span.start - reach), tiles_before(span.stop)
    inner = jnp.maximum(tiles_before(span.inner), start)
    inner_stop = jnp.maximum(tiles_before(span.inner_stop - reach), inner)
    if part == "inner":
        return _Run(run.first + inner * stride, run.step, inner_stop - inner)
    gap = inner_stop - inner
    count = jnp.maximum(stop - start, 0) - gap
    return _Run(run.first + start * stride, run.step, count, inner - start, gap)


def _positions(unit: jax.Array, step: jax.Array, meta: ListMeta) -> jax.Array:
    lane = lax.iota(jnp.int32, meta.tile)
    if meta.group == 1:
        return unit * meta.unit + lane
    # Not // and %: the selects that mend their signs mislead Triton 3.6 about alignment.
    member, place = lax.div(lane, np.int32(meta.unit)), lax.rem(lane, np.int32(meta.unit))
    return unit * meta.unit + member * (step * meta.unit) + place
