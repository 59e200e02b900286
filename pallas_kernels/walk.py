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

from pallas_kernels.block_lists import COUNT_BITS, MAX_COUNT, BlockLists

Carry = TypeVar("Carry")
MaskedBody = Callable[["Turn", jax.Array | None, Carry], Carry]
Part = Literal["inner", "outer"]
_RUNS_AT_ONCE = 4


@dataclasses.dataclass(frozen=True)
class ListMeta:
    """The static part of `BlockLists`, for a kernel; `tile` is tokens in a walked tile."""

    num_tiles: int
    max_runs: int
    unit: int
    group: int
    rows: int
    whole: bool
    holds_queries: bool
    shared: bool

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

    start: Any
    stop: Any
    inner: Any
    inner_stop: Any


NO_SPAN = Span(*(np.int32(end) for end in (2**30, 0, 0, 2**30)))
"""One that adds nothing where several are joined."""


class Turn(NamedTuple):
    """A tile that one turn of a loop takes: int32 `[tile]` positions along the walked axis.

    exists: None, or False where the tiles do not fill the turn. Its positions are then those of
    another tile, whose weights must be made zeros. member: which of the heads that share the list.
    """

    positions: jax.Array
    exists: jax.Array | None = None
    member: jax.Array | int = 0


class Run(NamedTuple):
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


@dataclasses.dataclass(frozen=True)
class Walk:
    """The list of one row, for a kernel to walk.

    refs: of `BlockLists`, by name. span: what of the row matters; None: all of it. backwards:
    last tile of the runs first. members: heads that walk it, tile by tile one after the other, in
    the same loop: one around it would take registers.
    """

    refs: dict[str, Any]
    row: Any
    meta: ListMeta
    span: Span | None
    backwards: bool = False
    members: int = 1

    def plain(
        self, body: Callable[[list[Turn], Carry], Carry], carry: Carry, unroll: int = 1
    ) -> tuple[Carry, jax.Array]:
        """Calls `body(turns, carry)` for the tiles that need no mask, `unroll` at a time.

        Returns the carry and how many tiles there were.
        """
        return self._runs("inner", body, carry, unroll)

    def masked(self, body: MaskedBody[Carry], carry: Carry) -> Carry:
        """Calls `body(turn, bits, carry)` for every other tile.

        bits: None where no mask is needed after all; otherwise int32 [tile], which parts of the
        fixed tile see the position (positions that do not exist are negative, or past the end).
        """
        if self.span is not None:
            carry, _ = self._runs("outer", self._one_by_one(body), carry)
        return self._partial(body, carry)

    def everything(self, body: MaskedBody[Carry], carry: Carry) -> Carry:
        """The same for all tiles."""
        span = self.span
        if span is not None:
            none = jnp.int32(0)
            span = span._replace(inner=none, inner_stop=none)
        walk = dataclasses.replace(self, span=span)
        part: Part = "inner" if span is None else "outer"
        carry, _ = walk._runs(part, walk._one_by_one(body), carry)
        return walk._partial(body, carry)

    def _one_by_one(self, body: MaskedBody[Carry]) -> Callable[[list[Turn], Carry], Carry]:
        bits = None
        if self.span is not None:
            bits = jnp.full((self.meta.tile,), self.meta.everyone, jnp.int32)
        return lambda turns, carry: body(turns[0], bits, carry)

    def _runs(
        self,
        part: Part,
        body: Callable[[list[Turn], Carry], Carry],
        carry: Carry,
        unroll: int = 1,
    ) -> tuple[Carry, jax.Array]:
        meta, none = self.meta, jnp.int32(0)
        if not meta.max_runs:
            return carry, none
        start, stop = self.refs["run_start"][self.row], self.refs["run_start"][self.row + 1]

        def walk_some(begin: jax.Array, state: tuple[Carry, jax.Array]) -> tuple[Carry, jax.Array]:
            carry, taken = state
            slots = min(meta.max_runs, _RUNS_AT_ONCE)
            runs = [
                _read_run(self.refs["runs"], begin + k, start, stop, meta) for k in range(slots)
            ]
            if self.span is not None:
                runs = [clip(run, self.span, part, meta.group) for run in runs]
            ends = [runs[0].tiles]
            for run in runs[1:]:
                ends.append(ends[-1] + run.tiles)

            def turn(i: jax.Array, exists: jax.Array | None) -> Turn:
                i, member = self._of_member(i)
                i = ends[-1] - 1 - i if self.backwards else i
                unit, step = runs[0].unit(i, meta.group), runs[0].step
                for run, end in zip(runs[1:], ends[:-1], strict=True):
                    unit = jnp.where(i >= end, run.unit(i - end, meta.group), unit)
                    step = jnp.where(i >= end, run.step, step)
                return Turn(_positions(unit, step, meta), exists, member)

            number = ends[-1] * self.members

            def visit(i: jax.Array, carry: Carry) -> Carry:
                first = i * unroll
                turns = [turn(first, None)]
                for place in range(1, unroll):
                    exists = first + place < number
                    turns.append(turn(jnp.where(exists, first + place, first), exists))
                return body(turns, carry)

            carry = lax.fori_loop(0, _turns(number, unroll), visit, carry)
            return carry, taken + ends[-1]

        if meta.max_runs <= _RUNS_AT_ONCE:
            return walk_some(start, (carry, none))
        return lax.fori_loop(
            0,
            _turns(stop - start, _RUNS_AT_ONCE),
            lambda turn, state: walk_some(start + turn * _RUNS_AT_ONCE, state),
            (carry, none),
        )

    def _partial(self, body: MaskedBody[Carry], carry: Carry) -> Carry:
        meta, span, partial = self.meta, self.span, self.refs["partial"]
        starts = self.refs["partial_start"]
        start, stop = starts[self.row], starts[self.row + 1]
        lane = lax.iota(jnp.int32, meta.tile)

        def visit(i: jax.Array, carry: Carry) -> Carry:
            i, member = self._of_member(i)
            begin = start + i * meta.group
            entry = _entries(partial, begin, stop, lane, meta)
            positions = (entry >> meta.rows) * meta.unit + lax.rem(lane, np.int32(meta.unit))
            bits, turn = entry & meta.everyone, Turn(positions, member=member)
            if span is None:
                return body(turn, bits, carry)
            first = partial[begin] >> meta.rows
            last = partial[jnp.minimum(begin + meta.group, stop) - 1] >> meta.rows
            matters = (last >= span.start) & (first < span.stop)
            return lax.cond(matters, lambda c: body(turn, bits, c), lambda c: c, carry)

        number = _turns(stop - start, meta.group) * self.members
        return lax.fori_loop(0, number, visit, carry)

    def _of_member(self, i: jax.Array) -> tuple[jax.Array, jax.Array | int]:
        """The tile and the member of a turn."""
        if self.members == 1:
            return i, 0
        members = np.int32(self.members)
        return lax.div(i, members), lax.rem(i, members)


def _turns(number: jax.Array, at_once: int) -> jax.Array:
    return number if at_once == 1 else lax.div(number + (at_once - 1), np.int32(at_once))


def _entries(
    partial: Any, begin: jax.Array, stop: jax.Array, lane: jax.Array, meta: ListMeta
) -> jax.Array:
    """int32 [tile]: the entry that each position of a tile belongs to; past the end a negative one.

    One number a unit is loaded, and a lane selects its own: a load of a vector, in a loop that is
    pipelined, has been compiled wrongly (Triton 3.6).
    """
    if meta.group == 1:
        return jnp.full((meta.tile,), partial[begin])
    member = lax.div(lane, np.int32(meta.unit))
    entry = jnp.full((meta.tile,), -1, jnp.int32)
    for place in range(meta.group):
        exists = begin + place < stop
        number = jnp.where(exists, partial[jnp.where(exists, begin + place, begin)], -1)
        entry = jnp.where(member == place, number, entry)
    return entry


def _read_run(
    runs_ref: Any, index: jax.Array, start: jax.Array, stop: jax.Array, meta: ListMeta
) -> Run:
    """A run; without tiles past the last one."""
    exists = index < stop
    index = jnp.where(exists, index, start)
    first, word = runs_ref[index, 0], runs_ref[index, 1]
    return Run(first, word >> COUNT_BITS, jnp.where(exists, word & MAX_COUNT, 0))


def clip(run: Run, span: Span, part: Part, group: int) -> Run:
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
        return Run(run.first + inner * stride, run.step, inner_stop - inner)
    gap = inner_stop - inner
    count = jnp.maximum(stop - start, 0) - gap
    return Run(run.first + start * stride, run.step, count, inner - start, gap)


def _positions(unit: jax.Array, step: jax.Array, meta: ListMeta) -> jax.Array:
    lane = lax.iota(jnp.int32, meta.tile)
    if meta.group == 1:
        return unit * meta.unit + lane
    # Not // and %: the selects that mend their signs mislead Triton 3.6 about alignment.
    member, place = lax.div(lane, np.int32(meta.unit)), lax.rem(lane, np.int32(meta.unit))
    return unit * meta.unit + member * (step * meta.unit) + place
