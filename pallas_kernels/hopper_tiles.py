"""Which tiles a program of the kernels for Hopper takes, and which keys each: see hopper.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mgpu

from pallas_kernels.block_lists import COUNT_BITS, MAX_COUNT, BlockLists
from pallas_kernels.call import Arrays, Settings
from pallas_kernels.call import operands as call_operands
from pallas_kernels.lowering import multiprocessors
from pallas_kernels.tiles import MOSAIC_ROWS
from pallas_kernels.walk import NO_SPAN, Run, Span, clip

WARPGROUPS = 2  # that multiply
ROWS = 64  # queries of a warpgroup
LAYOUT = mgpu.Layout.WGMMA  # how a warpgroup's registers hold what it multiplies
FAR = 1 << 30  # tokens, more than there are
PROGRAM = "s2_program"  # beside a mesh's own axes


def i32(number: int) -> Any:
    return jnp.int32(number)


Part = Literal["inner", "outer", "all"]
At = Callable[[int], tuple[Any, Any, Any]]
"""Of a unit of a step, by its place in it: its number, which parts of the queries see it, and
whether it exists at all."""


@dataclasses.dataclass(frozen=True)
class Steps:
    """The tiles of keys that a program takes, each one step: those with masks first.

    refs: of `BlockLists`, by name. matters: the units of the row that do, where only a part of it
    does, as `spans` says: start and stop. backwards: the runs from their last tile on.
    """

    refs: dict[str, Any]
    lists: BlockLists
    batch: Any
    row: Any
    matters: tuple[Any, Any] | None
    backwards: bool = False

    def number(self, everything: bool) -> tuple[Any, Any]:
        """How many have a mask, and how many have none. everything: all are taken with one."""

        def of_run(index: Any, totals: tuple[Any, Any]) -> tuple[Any, Any]:
            masked, plain = totals
            if everything:
                return masked + self._run(index, "all").tiles, plain
            if self.matters is not None:
                masked += self._run(index, "outer").tiles
            return masked, plain + self._run(index, "inner").tiles

        masked = self._visit_partial(lambda _, total: total + i32(1), i32(0))
        return lax.fori_loop(*self._of_row("run"), of_run, (masked, i32(0)))

    def visit_masked(self, body: Callable[[At, Any], Any], state: Any, everything: bool) -> Any:
        """`body(at, state) -> state` for each step that has a mask. everything: for all."""
        state = self._visit_partial(body, state)
        if self.matters is None and not everything:
            return state
        return self._visit_runs(body, state, "all" if everything else "outer")

    def visit_plain(self, body: Callable[[At, Any], Any], state: Any) -> Any:
        """`body(at, state) -> state` for each step that has none."""
        return self._visit_runs(body, state, "inner")

    def _visit_partial(self, body: Callable[[At, Any], Any], state: Any) -> Any:
        group, partial = self.lists.group, self.refs["partial"]
        start, stop = self._of_row("partial")

        def unit(index: Any) -> Any:
            # There is always an entry to read, though it may be another row's.
            entry = partial[jnp.maximum(jnp.minimum(index, stop - i32(1)), i32(0))]
            return lax.shift_right_logical(entry, i32(self.lists.rows)), entry, index < stop

        def some(step: Any, state: Any) -> Any:
            begin = start + step * i32(group)

            def at(place: int) -> tuple[Any, Any, Any]:
                return unit(begin + i32(place))

            if self.matters is None:
                return body(at, state)
            begin_unit, stop_unit = self.matters
            first, last = at(0)[0], at(group - 1)[0]
            matters = (last >= begin_unit) & (first < stop_unit)
            return lax.cond(matters, lambda state: body(at, state), lambda state: state, state)

        return lax.fori_loop(i32(0), _tiles(stop - start, group), some, state)

    def _visit_runs(self, body: Callable[[At, Any], Any], state: Any, part: Part) -> Any:
        seen = i32((1 << self.lists.rows) - 1), True
        start, stop = self._of_row("run")

        def of_run(index: Any, state: Any) -> Any:
            run = self._run(start + stop - i32(1) - index if self.backwards else index, part)

            def tile(i: Any, state: Any) -> Any:
                i = run.tiles - i32(1) - i if self.backwards else i
                first = run.unit(i, self.lists.group)
                return body(lambda place: (first + run.step * i32(place), *seen), state)

            return lax.fori_loop(i32(0), run.tiles, tile, state)

        return lax.fori_loop(start, stop, of_run, state)

    def _run(self, index: Any, part: Part) -> Run:
        if self.matters is None:
            first, word = self.refs["runs"][index, 0], self.refs["runs"][index, 1]
            return Run(first, lax.shift_right_logical(word, i32(COUNT_BITS)), word & i32(MAX_COUNT))
        clipped = self.refs["clipped"]
        first, step, gap_at, gap, rest = (clipped[self.batch, index, i32(n)] for n in range(5))
        if part == "outer":
            return Run(first, step, rest, gap_at, gap)
        if part == "all":
            return Run(first, step, rest + gap)
        return Run(first + gap_at * i32(self.lists.group) * step, step, gap)

    def _of_row(self, kind: Literal["run", "partial"]) -> tuple[Any, Any]:
        starts = self.refs[f"{kind}_start"]
        return starts[self.row], starts[self.row + i32(1)]


def operands(settings: Settings, lists: BlockLists, arrays: Arrays, list_arrays: Arrays) -> Arrays:
    """As `call.operands`; where there are spans, those of each row of the lists, int32
    `[batch, rows, 4]`, and what they leave of the runs.
    """
    named = call_operands(settings, lists, arrays, list_arrays)
    if "spans" in named:
        named["spans"] = spans = _spans_of_rows(settings, lists, named)
        named["clipped"] = _clipped_runs(lists, named, spans)
    return named


def _spans_of_rows(settings: Settings, lists: BlockLists, named: Arrays) -> jax.Array:
    if lists.holds_queries:
        assert settings.query_offset is not None
        return named["spans"][:, named["order"].reshape(-1) - settings.query_offset // MOSAIC_ROWS]
    parts = named["order"].reshape(-1, lists.rows)
    spans = named["spans"][:, jnp.maximum(parts, 0)]
    ends = [jnp.where(parts >= 0, spans[..., i], end) for i, end in enumerate(NO_SPAN)]
    reduce = (jnp.min, jnp.max, jnp.max, jnp.min)  # outer start and stop, inner ones
    joined = [join(end, axis=-1) for join, end in zip(reduce, ends, strict=True)]
    return jnp.stack(joined, axis=-1)


def _clipped_runs(lists: BlockLists, named: Arrays, spans: jax.Array) -> jax.Array:
    """What `spans` leaves of each run, int32 `[batch, runs, 5]`, for a program to read.

    First unit, step, the tile at which a gap begins, its tiles (those that need no mask), and the
    tiles of the rest. To clip a run takes divisions, and the warpgroup that fetches would do them
    with the others waiting for it.
    """
    runs = named["runs"]
    index = jnp.arange(runs.shape[0], dtype=jnp.int32)
    row = jnp.searchsorted(named["run_start"], index, side="right", method="scan_unrolled") - 1
    run = Run(runs[:, 0], runs[:, 1] >> COUNT_BITS, runs[:, 1] & MAX_COUNT)

    def of_entry(spans: jax.Array) -> jax.Array:
        span = Span(*spans[jnp.minimum(row, spans.shape[0] - 1)].T)
        inner, outer = (clip(run, span, part, lists.group) for part in ("inner", "outer"))
        words = outer.first, run.step, outer.gap_at, inner.tiles, outer.tiles
        return jnp.stack(words, axis=-1)

    return jax.vmap(of_entry)(spans)


class Task(NamedTuple):
    """A tile of queries, for the warpgroup that fetches: place is which 128 of the sequence."""

    batch: Any
    head: Any
    place: Any
    steps: Steps


class Told(NamedTuple):
    """What the warpgroups that multiply are told of a tile: its place, how many of its steps have a
    mask and how many none, and the round that it belongs to, negative where there are no more;
    int32.
    """

    place: Any
    masked: Any
    plain: Any
    round: Any


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which tiles a program takes, one after the other.

    So one tile's keys are on their way while another one's results are still being written. In each
    round all programs take one, in the order of their numbers or, every other round, the other way
    round: the tiles of a head come longest first, and none gets only long ones.
    refs: of the lists, by name.
    """

    refs: dict[str, Any]
    settings: Settings
    lists: BlockLists
    heads: int
    batch: int
    q_len: int
    kv_len: int

    @classmethod
    def of(cls, settings: Settings, lists: BlockLists, arrays: Arrays) -> Schedule:
        batch, q_len, heads, _ = arrays["query"].shape
        return cls({}, settings, lists, heads, batch, q_len, arrays["key"].shape[1])

    def reading(self, refs: dict[str, Any]) -> Schedule:
        return dataclasses.replace(self, refs=refs)

    @property
    def tiles(self) -> int:
        return self.lists.num_tiles * self.heads * self.batch

    @property
    def programs(self) -> int:
        return min(self.tiles, multiprocessors())

    def visit(self, body: Callable[[Any, Any], Any], state: Any) -> Any:
        """Calls `body(round, state) -> state` for each round in which this program has a tile."""
        return lax.fori_loop(i32(0), self.rounds, body, state)

    @property
    def rounds(self) -> Any:
        """In how many this program has a tile."""
        whole = i32(self.tiles // self.programs)
        return whole + jnp.where(self.has(whole), i32(1), i32(0))

    def has(self, round_: Any) -> Any:
        """Whether this program has a tile in a round."""
        return self._number(round_) < i32(self.tiles)

    def task(self, round_: Any) -> Task:
        number, head, batch = self._place(round_)
        rank = lax.rem(number, i32(self.lists.num_tiles))
        pattern = self.refs["pattern_of_head"][batch, head]
        place = self.refs["order"][pattern, rank]
        row, matters = pattern * i32(self.lists.num_tiles) + rank, None
        if "spans" in self.refs:
            matters = tuple(self.refs["spans"][batch, row, i32(end)] for end in range(2))
        return Task(batch, head, place, Steps(self.refs, self.lists, batch, row, matters))

    def tile(self, round_: Any, told: Told) -> QueryTile:
        _, head, batch = self._place(round_)

        def length(name: str, longest: int) -> Any:
            if name not in self.refs:
                return i32(longest)
            return jnp.minimum(jnp.maximum(self.refs[name][batch], i32(0)), i32(longest))

        lengths = length("q_length", self.q_len), length("kv_length", self.kv_len)
        return QueryTile(self.settings, self.lists, *lengths, head, batch, told)

    def _number(self, round_: Any) -> Any:
        """Of the tile that this program takes in a round."""
        mine, last = lax.axis_index(PROGRAM), i32(self.programs - 1)
        mine = jnp.where(lax.rem(round_, i32(2)) > i32(0), last - mine, mine)
        return round_ * i32(self.programs) + mine

    def _place(self, round_: Any) -> tuple[Any, Any, Any]:
        """Number, head and batch entry of the tile of a round."""
        number = self._number(round_)
        row = lax.div(number, i32(self.lists.num_tiles))
        return number, lax.rem(row, i32(self.heads)), lax.div(row, i32(self.heads))


@dataclasses.dataclass(frozen=True)
class QueryTile:
    """The queries that a program has at a time. q_length, kv_length: tokens that count."""

    settings: Settings
    lists: BlockLists
    q_length: Any
    kv_length: Any
    head: Any
    batch: Any
    told: Told

    def rows(self, warpgroup: Any) -> Any:
        """The queries of a warpgroup, for an index into an array."""
        assert self.settings.query_offset is not None
        return pl.ds(self._position(warpgroup) - i32(self.settings.query_offset), ROWS)

    def _position(self, warpgroup: Any) -> Any:
        """Of its first query in the sequence."""
        return self.told.place * i32(MOSAIC_ROWS) + warpgroup * i32(ROWS)

    def mask(self, keys: jax.Array, warpgroup: Any, q_ids: Any, kv_ids: Any) -> jax.Array:
        """Which of the keys of a step each query of a warpgroup sees.

        keys: as in `Pipeline.entries`, `[keys]`. q_ids, kv_ids: of segments, `[rows]` and `[keys]`;
        None where there are none.
        """
        lists, window, shape = self.lists, self.settings.window, (ROWS, keys.shape[0])
        row = mgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=LAYOUT.reduce(1))
        own = row + self._position(warpgroup)

        def of_keys(numbers: jax.Array) -> jax.Array:
            return lax.broadcast_in_dim(numbers, shape, [1])

        def of_rows(numbers: jax.Array) -> jax.Array:
            return lax.broadcast_in_dim(numbers, shape, [0])

        def limit(positions: jax.Array) -> jax.Array:
            """No key that counts lies further: lists hold `MAX_COUNT` units, so that it fits."""
            positions = jnp.minimum(jnp.maximum(positions, i32(0)), self.kv_length)
            return of_rows(positions << lists.rows)

        # Mosaic finds no layout where all rows have the same end.
        end = limit(own + (i32(1) if self.settings.causal else i32(FAR)))
        part = MOSAIC_ROWS // lists.rows
        if part >= ROWS:  # one number a key says it for all rows
            listed = (keys >> lax.div(warpgroup * i32(ROWS), i32(part))) & 1
            mask = of_keys(jnp.where(listed != 0, keys, np.iinfo(np.int32).max)) < end
        else:
            bit = jnp.left_shift(1, lax.div(row + warpgroup * i32(ROWS), i32(part)))
            mask = ((of_keys(keys) & of_rows(bit)) != 0) & (of_keys(keys) < end)
        if window is not None:
            size = i32(min(window.size, FAR))
            near = of_keys(keys) >= limit(own - size + i32(1))
            if not self.settings.causal:
                near &= of_keys(keys) < limit(own + size)
            mask = mask | (near & (of_keys(keys) < end)) if window.adds else mask & near
        if q_ids is not None:
            mask &= of_rows(q_ids) == of_keys(kv_ids)
        return mask

    def padding(self, warpgroup: Any) -> jax.Array:
        """Which of a warpgroup's queries do not count, `[rows]`."""
        row = mgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=LAYOUT.reduce(1))
        assert self.settings.query_offset is not None
        first = self._position(warpgroup) - i32(self.settings.query_offset)
        return row + first >= self.q_length


def shared(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory laid out for the tensor cores."""
    columns = 128 // jnp.dtype(dtype).itemsize
    transforms = (mgpu.TilingTransform((8, columns)), mgpu.SwizzleTransform(128))
    return mgpu.SMEM(shape, dtype, transforms=transforms)


def load_numbers(source: Any, axis: int) -> jax.Array:
    """From shared memory, a number for each row (axis 0) or column (axis 1) of a product."""
    return mgpu.load(source, layout=LAYOUT.reduce(1 - axis))  # type: ignore[call-arg]  # JAX 0.10


def spread(rows: jax.Array, like: jax.Array) -> jax.Array:
    """A number a row as an array of rows."""
    return lax.broadcast_in_dim(rows, like.shape, [0])


def _tiles(units: Any, group: int) -> Any:
    return lax.div(units + i32(group - 1), i32(group))
