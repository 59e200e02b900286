"""The forward kernel on Hopper: see hopper.py."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mgpu

from pallas_kernels import hopper
from pallas_kernels.block_lists import BlockLists
from pallas_kernels.call import Arrays, Settings
from pallas_kernels.hopper import Turns
from pallas_kernels.hopper_pipeline import Fetcher, KeyRefs, Notes, Pipeline
from pallas_kernels.hopper_tiles import (
    ROWS,
    WARPGROUPS,
    QueryTile,
    Schedule,
    Told,
    i32,
    load_numbers,
    operands,
    spread,
)
from pallas_kernels.softmax import (
    GREATEST_TOTAL,
    LEAST_FLOAT16_WEIGHT,
    LEAST_TOTAL,
    LOWEST,
    log2,
)
from pallas_kernels.tiles import Tile

_FLAGS = 4096  # a program of an H100 takes 1986 tiles of 32 rows of 1048576 tokens
Carry = tuple[jax.Array, jax.Array, jax.Array]
"""Output [rows, dim], largest score in log2 [rows] and sum of weights [rows], all float32."""


def forward(settings: Settings, arrays: Arrays, list_arrays: Arrays) -> tuple[jax.Array, jax.Array]:
    """As `forward.forward`."""
    batch, q_len, heads, head_dim = arrays["query"].shape
    query, (key, value) = hopper.in_eights(arrays["query"]), hopper.keys_that_count(arrays)
    ids, lists, value_dim = hopper.segment_ids(arrays), settings.layouts.forward(), value.shape[-1]
    scratch = Scratch.of(
        settings.tiles.forward, lists, (head_dim, value_dim), query.dtype, len(ids) > 0
    )
    out_shape = [
        jax.ShapeDtypeStruct((*query.shape[:3], value_dim), query.dtype),
        jax.ShapeDtypeStruct((batch, heads, hopper.whole_tiles(q_len)), jnp.float32),
    ]
    out, lse = hopper.call(
        "s2_attention_forward", _compute, _fetch, Schedule.of(settings, lists, arrays),
        (query, key, value, *ids), operands(settings, lists, arrays, list_arrays),
        out_shape, scratch,
    )  # fmt: skip
    return out[:, :q_len], lse[..., :q_len]


class Refs(NamedTuple):
    """Operands and results. ids: of queries and of keys, or nothing."""

    query: Any
    key: Any
    value: Any
    ids: tuple[Any, ...]
    out: Any
    lse: Any

    @classmethod
    def of(cls, refs: tuple[Any, ...]) -> Refs:
        query, key, value, *ids, out, lse = refs
        return cls(query, key, value, tuple(ids), out, lse)


class Rows(NamedTuple):
    """The queries of a tile in shared memory, `[64, ...]` of each warpgroup.

    bad: 1.0 where a row has left the range. ids: of segments; None where there are none.
    """

    query: Any
    out: Any
    lse: Any
    bad: Any
    ids: Any


class Scratch(NamedTuple):
    """query_ready: of each warpgroup. decided: all flags are there."""

    rows: Rows
    flags: Any
    query_ready: Any
    decided: Any
    turns: Any
    notes: Any
    stages: Any

    @classmethod
    def of(
        cls, tile: Tile, lists: BlockLists, dims: tuple[int, int], dtype: Any, segments: bool
    ) -> Scratch:
        query, out, numbers, ids = hopper.row_buffers(dims, dtype, segments)
        return cls(
            Rows(query, out, numbers, numbers, ids),
            Flags.scratch(),
            mgpu.Barrier(num_arrivals=1 + segments, num_barriers=WARPGROUPS),
            mgpu.Barrier(num_arrivals=WARPGROUPS),
            mgpu.Barrier(num_arrivals=WARPGROUPS),
            Notes.scratch(),
            Pipeline.scratch(tile.num_stages, lists, dims, dtype, segments),
        )


def _fetch(schedule: Schedule, refs: tuple[Any, ...], scratch: Scratch) -> None:
    found = Refs.of(refs)
    keys = KeyRefs(found.key, found.value, *found.ids[1:])
    notes, pipeline = Notes(*scratch.notes), Pipeline(schedule.lists, *scratch.stages)
    fetcher = Fetcher(schedule, keys, notes, pipeline)

    def take(round_: Any, state: tuple[Any, Any], again: bool) -> tuple[Any, Any]:
        number, step = state
        step = fetcher.take(number, round_, step, all_masked=again)
        return number + i32(1), step

    state = schedule.visit(functools.partial(take, again=False), (i32(0), i32(0)))
    mgpu.barrier_wait(scratch.decided)
    number, _ = Flags(scratch.flags).visit(schedule, functools.partial(take, again=True), state)
    notes.write(number, Told(*(i32(0),) * 3, i32(-1)))


def _compute(schedule: Schedule, refs: tuple[Any, ...], scratch: Scratch, warpgroup: Any) -> None:
    Multiplier(
        schedule, warpgroup, Refs.of(refs), scratch, hopper.of_warpgroup(scratch.rows, warpgroup),
        Turns(scratch.turns), Notes(*scratch.notes), Pipeline(schedule.lists, *scratch.stages),
    ).run()  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Multiplier:
    """A warpgroup that multiplies. mine: its own rows of the scratch."""

    schedule: Schedule
    warpgroup: Any
    refs: Refs
    scratch: Scratch
    mine: Rows
    turns: Turns
    notes: Notes
    pipeline: Pipeline

    def run(self) -> None:
        state = i32(0), self._load_next(i32(0)), i32(0)
        lax.while_loop(lambda state: state[1].round >= i32(0), self._take, state)
        mgpu.wait_smem_to_gmem(0)

    def _take(self, state: tuple[Any, Told, Any]) -> tuple[Any, Told, Any]:
        """Takes the tile that a note tells of: its number, what it says and the next stage."""
        number, told, slot = state
        tile = self.schedule.tile(told.round, told)
        carry, slot, padding = self._walk(tile, slot)
        good = _in_range(tile, carry, self.refs.out.dtype)
        if padding is not None:
            good |= padding
        self.mine.bad[...] = jnp.where(good, 0.0, 1.0)
        mgpu.commit_smem()  # all of the warpgroup have done with the query
        rounds = self.schedule.rounds
        again = number >= rounds

        @pl.when(jnp.logical_not(again))
        def _() -> None:
            number_bad = load_numbers(self.mine.bad, axis=1).sum()
            bad = (number_bad > 0) & (told.plain > i32(0))
            Flags(self.scratch.flags).set(self.warpgroup, told.round, bad)

        pl.when(number == rounds - i32(1))(lambda: mgpu.barrier_arrive(self.scratch.decided))
        following = self._load_next(number + i32(1))
        self._store(tile, carry, padding, again)
        return number + i32(1), following, slot

    def _load_next(self, number: Any) -> Told:
        """Asks for the queries of the tile that a note tells of, if it does of any."""
        told = self.notes.take(number)

        @pl.when(told.round >= i32(0))
        def _() -> None:
            tile = self.schedule.tile(told.round, told)
            rows, ready = tile.rows(self.warpgroup), self.scratch.query_ready.at[self.warpgroup]
            query = self.refs.query.at[tile.batch, rows, tile.head]
            mgpu.copy_gmem_to_smem(query, self.mine.query, ready)
            if self.refs.ids:
                ids = self.refs.ids[0].at[tile.batch, rows]
                mgpu.copy_gmem_to_smem(ids, self.mine.ids, ready)

        return told

    def _store(self, tile: QueryTile, carry: Carry, padding: jax.Array | None, again: Any) -> None:
        out, peak, sums = carry
        seen = sums != 0  # a NaN was seen too
        whole = jnp.where(seen, sums, 1.0)
        lse = peak + jnp.where(whole == whole, log2(whole), jnp.nan)
        out = out * spread(1.0 / whole, out)  # a division a row, not one an element
        lse = jnp.where(seen, lse, -jnp.inf)
        if padding is not None:
            lse = jnp.where(padding, -jnp.inf, lse)
            out = hopper.blank(out, padding)
        mgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the tile before
        # Results that are written again are written: no test would notice if they were not.
        pl.when(again)(lambda: mgpu.wait_smem_to_gmem(0))
        self.mine.out[...] = out.astype(self.refs.out.dtype)
        self.mine.lse[...] = lse
        mgpu.commit_smem()
        rows = tile.rows(self.warpgroup)
        out_at, lse_at = (tile.batch, rows, tile.head), (tile.batch, tile.head, rows)
        mgpu.copy_smem_to_gmem(self.mine.out, self.refs.out.at[out_at])
        mgpu.copy_smem_to_gmem(self.mine.lse, self.refs.lse.at[lse_at])

    def _walk(self, tile: QueryTile, slot: Any) -> tuple[Carry, Any, jax.Array | None]:
        """Takes in all keys of a tile, from a stage on.

        The peak stays as it is after the steps with masks, which are all where it is taken again.

        Returns:
          Sums; the stage after the last; which rows do not count, None where all do.
        """
        mgpu.barrier_wait(self.scratch.query_ready.at[self.warpgroup])
        ids = load_numbers(self.mine.ids, axis=0) if self.refs.ids else None
        padding = tile.padding(self.warpgroup) if "q_length" in self.schedule.refs else None

        def attend_masked(_: Any, state: tuple[Any, Carry]) -> tuple[Any, Carry]:
            slot, carry = state
            self._wait_for_key(slot)
            return self._attend(tile, ids, slot, carry, masked=True, more=False)

        def attend_plain(number: Any, state: tuple[Any, Carry]) -> tuple[Any, Carry]:
            more = number + i32(1) < plain
            return self._attend(tile, ids, *state, masked=False, more=more)

        self.turns.begin(self.warpgroup)
        zeros = hopper.zeros(self.pipeline.value.shape[2])
        carry: Carry = zeros, hopper.per_row(LOWEST), hopper.per_row(0.0)
        plain = tile.told.plain
        slot, carry = lax.fori_loop(i32(0), tile.told.masked, attend_masked, (slot, carry))
        out, peak, sums = carry
        carry = out, jnp.where(sums > 0, peak, 0.0), sums
        pl.when(plain > i32(0))(lambda: self._wait_for_key(slot))
        slot, carry = lax.fori_loop(i32(0), plain, attend_plain, (slot, carry))
        self.turns.end(self.warpgroup)
        return carry, slot, padding

    def _wait_for_key(self, slot: Any) -> None:
        mgpu.barrier_wait(self.pipeline.key_ready.at[slot])

    def _attend(
        self, tile: QueryTile, q_ids: Any, slot: Any, carry: Carry, masked: bool, more: Any
    ) -> tuple[Any, Carry]:
        """Takes in the keys of a stage, and returns the next one.

        masked: with a mask; otherwise the peak is pinned. more: whether the key of the next step
        is waited for already, while the products run.
        """
        pipeline, turns, settings = self.pipeline, self.turns, self.schedule.settings
        (out, peak, sums), scale = carry, settings.exp2.scale
        following = pipeline.after(slot)

        def multiply(products: Any) -> jax.Array:
            mgpu.wgmma(products, self.mine.query, pipeline.key.at[slot].transpose((1, 0)))
            turns.pass_on()
            return products[...]

        keys = pipeline.key.shape[1]
        scores = pl.run_scoped(multiply, mgpu.ACC((ROWS, keys), jnp.float32))
        if masked:
            mask = tile.mask(
                pipeline.entries_at(slot), self.warpgroup, q_ids, pipeline.ids_at(slot)
            )
        mgpu.barrier_arrive(pipeline.key_used.at[slot])
        if masked:
            scores = jnp.where(mask, scores, -jnp.inf)
            before, peak = peak, jnp.maximum(peak, scores.max(axis=1) * scale)
            decay = jnp.exp2(before - peak)
            out, sums = out * spread(decay, out), sums * decay
        weights = jnp.exp2(scores * scale - spread(peak, scores))
        sums += weights.sum(axis=1)
        narrow = weights.astype(self.refs.out.dtype)
        out, peak, sums, narrow = lax.optimization_barrier((out, peak, sums, narrow))
        turns.arrive()
        mgpu.barrier_wait(pipeline.value_ready.at[slot])
        turns.wait()

        def wait_for_next() -> None:
            pl.when(more)(lambda: self._wait_for_key(following))

        out = hopper.add_product(
            settings, out, narrow, pipeline.value.at[slot], meanwhile=wait_for_next
        )
        mgpu.barrier_arrive(pipeline.value_used.at[slot])
        return following, (out, peak, sums)


@dataclasses.dataclass(frozen=True)
class Flags:
    """Whether a row of a warpgroup's tile left the range, by the round that the tile was taken in.

    A bit each. Rounds `_FLAGS` apart share one: a tile that is taken again for nothing comes out as
    well, but for its last bits.
    """

    words: Any

    @staticmethod
    def scratch() -> Any:
        return mgpu.SMEM((WARPGROUPS, -(-_FLAGS // 32)), jnp.int32)

    def set(self, warpgroup: Any, round_: Any, bad: jax.Array) -> None:
        place, bit = self._place(round_)
        first = (bit == i32(0)) & (round_ < i32(_FLAGS))
        before = jnp.where(first, i32(0), self.words[warpgroup, place])
        word = lax.shift_left(jnp.where(bad, i32(1), i32(0)), bit)
        self.words[warpgroup, place] = before | word

    def visit(self, schedule: Schedule, body: Callable[[Any, Any], Any], state: Any) -> Any:
        """Calls `body(round, state) -> state` for each round that has to be taken again."""

        def one(round_: Any, state: Any) -> Any:
            place, bit = self._place(round_)
            words = self.words[0, place] | self.words[1, place]
            bad = lax.rem(lax.shift_right_logical(words, bit), i32(2)) != i32(0)
            return lax.cond(bad, lambda s: body(round_, s), lambda s: s, state)

        return schedule.visit(one, state)

    @staticmethod
    def _place(round_: Any) -> tuple[Any, Any]:
        """Word and bit."""
        flag = lax.rem(round_, i32(_FLAGS))
        return lax.div(flag, i32(32)), lax.rem(flag, i32(32))


def _in_range(tile: QueryTile, carry: Carry, dtype: Any) -> jax.Array:
    """Of each row, whether its pinned peak was good for it, as `Softmax.out_of_range` says it."""
    out, _, sums = carry
    least: Any = LEAST_TOTAL
    if dtype == jnp.float16:
        keys = tile.told.plain * i32(tile.lists.unit * tile.lists.group)
        least = jnp.maximum(keys.astype(jnp.float32) * LEAST_FLOAT16_WEIGHT, LEAST_TOTAL)
    finite = (out * 0.0).sum(axis=1) == 0.0
    return (sums >= least) & (sums <= GREATEST_TOTAL) & finite
