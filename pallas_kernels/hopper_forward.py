"""The forward kernel on Hopper: see hopper.py."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mgpu

from pallas_kernels import hopper
from pallas_kernels.call import Arrays, Settings
from pallas_kernels.hopper import WARPGROUPS, KeyRefs, Notes, Pipeline, Turns
from pallas_kernels.hopper_tiles import ROWS, QueryTile, Schedule, Told, i32, spread
from pallas_kernels.softmax import (
    GREATEST_TOTAL,
    LEAST_FLOAT16_WEIGHT,
    LEAST_TOTAL,
    LOWEST,
    log2,
)

_FLAGS = 4096  # a program of an H100 takes 1986 tiles of 32 rows of 1048576 tokens
Carry = tuple[jax.Array, jax.Array, jax.Array]
"""Output [rows, dim], largest score in log2 [rows] and sum of weights [rows], all float32."""


def forward(settings: Settings, arrays: Arrays, list_arrays: Arrays) -> tuple[jax.Array, jax.Array]:
    """As `forward.forward`."""
    batch, q_len, heads, head_dim = arrays["query"].shape
    query, (key, value) = hopper.in_eights(arrays["query"]), hopper.keys_that_count(arrays)
    dtype, value_dim, group = query.dtype, value.shape[-1], heads // key.shape[2]
    tile_shape, lists = settings.tiles.forward, settings.layouts.forward()
    ids = hopper.segment_ids(arrays)
    segments = len(ids) > 0

    def compute(schedule: Schedule, refs: Any, scratch: Any, warpgroup: Any) -> None:
        q_ref, _, _, *id_refs, o_ref, lse_ref = refs
        (queries, outs, lses, bad, *q_ids), flags, (query_ready, decided), turns, *rest = scratch
        mine, flags, turns = queries.at[warpgroup], Flags(flags), Turns(turns)
        notes, pipeline = Notes(*rest[0]), Pipeline(lists, *rest[1])

        def load(tile: QueryTile) -> None:
            rows, ready = tile.rows(warpgroup), query_ready.at[warpgroup]
            mgpu.copy_gmem_to_smem(q_ref.at[tile.batch, rows, tile.head], mine, ready)
            if segments:
                mgpu.copy_gmem_to_smem(
                    id_refs[0].at[tile.batch, rows], q_ids[0].at[warpgroup], ready
                )

        def load_next(number: Any, round_: Any) -> Told:
            told = notes.take(number)
            load(schedule.tile(round_, told))
            return told

        def walk(tile: QueryTile, slot: Any, pin: bool) -> tuple[Carry, Any, jax.Array | None]:
            mgpu.barrier_wait(query_ready.at[warpgroup])
            my_ids = hopper.load_numbers(q_ids[0].at[warpgroup], axis=0) if segments else None
            padding = tile.padding(warpgroup) if "q_length" in schedule.refs else None
            scale = settings.exp2.scale
            carry, slot = _walk(
                tile, mine, my_ids, turns, pipeline, dtype, scale, warpgroup, slot, pin
            )
            return carry, slot, padding

        def take(round_: Any, state: tuple[Told, Any]) -> tuple[Told, Any]:
            told, slot = state
            tile = schedule.tile(round_, told)
            carry, slot, padding = walk(tile, slot, pin=True)
            good = _in_range(tile, carry, dtype)
            if padding is not None:
                good |= padding
            bad.at[warpgroup][...] = jnp.where(good, 0.0, 1.0)
            mgpu.commit_smem()  # all of the warpgroup have done with the query
            following = round_ + i32(1)
            told = lax.cond(
                schedule.has(following), lambda: load_next(following, following), lambda: told
            )
            number_bad = hopper.load_numbers(bad.at[warpgroup], axis=1).sum()
            flags.set(warpgroup, round_, (number_bad > 0) & (tile.told.plain > i32(0)))
            store(tile, carry, padding)
            return told, slot

        def take_again(round_: Any, state: tuple[Any, Any]) -> tuple[Any, Any]:
            number, slot = state
            told = load_next(number, round_)
            tile = schedule.tile(round_, told)
            carry, slot, padding = walk(tile, slot, pin=False)
            store(tile, carry, padding)
            mgpu.commit_smem()  # all of the warpgroup have done with the query
            return number + i32(1), slot

        def store(tile: QueryTile, carry: Carry, padding: jax.Array | None) -> None:
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
            outs.at[warpgroup][...] = out.astype(dtype)
            lses.at[warpgroup][...] = lse
            mgpu.commit_smem()
            rows = tile.rows(warpgroup)
            mgpu.copy_smem_to_gmem(outs.at[warpgroup], o_ref.at[tile.batch, rows, tile.head])
            mgpu.copy_smem_to_gmem(lses.at[warpgroup], lse_ref.at[tile.batch, tile.head, rows])

        first = load_next(i32(0), i32(0))
        _, slot = schedule.visit(take, (first, i32(0)))
        # Results that may be written again are written: no test would notice if they were not.
        mgpu.wait_smem_to_gmem(0)
        mgpu.barrier_arrive(decided)
        mgpu.barrier_wait(decided)
        flags.visit(schedule, take_again, (schedule.rounds, slot))
        mgpu.wait_smem_to_gmem(0)

    def fetch(schedule: Schedule, refs: Any, scratch: Any) -> None:
        _, key_ref, value_ref, *id_refs, _, _ = refs
        keys = KeyRefs(key_ref, value_ref, id_refs[1] if segments else None)
        _, flags, (_, decided), _, *rest = scratch
        notes, pipeline = Notes(*rest[0]), Pipeline(lists, *rest[1])

        def take(round_: Any, state: tuple[Any, Any], again: bool) -> tuple[Any, Any]:
            number, step = state
            task = schedule.task(round_)
            notes.write(number, Told(task.place, *task.steps.number(everything=again)))
            step = pipeline.feed(task, keys, group, step, all_masked=again)
            return number + i32(1), step

        state = schedule.visit(functools.partial(take, again=False), (i32(0), i32(0)))
        mgpu.barrier_wait(decided)
        Flags(flags).visit(schedule, functools.partial(take, again=True), state)

    out_shape = [
        jax.ShapeDtypeStruct((*query.shape[:3], value_dim), dtype),
        jax.ShapeDtypeStruct((batch, heads, hopper.whole_tiles(q_len)), jnp.float32),
    ]
    row_numbers, row_ids = (
        mgpu.SMEM((WARPGROUPS, ROWS), kind) for kind in (jnp.float32, jnp.int32)
    )
    rows = [hopper.shared((WARPGROUPS, ROWS, dim), dtype) for dim in (head_dim, value_dim)]
    scratch = (
        (*rows, row_numbers, row_numbers, *[row_ids] * segments),
        Flags.scratch(),
        (
            mgpu.Barrier(num_arrivals=1 + segments, num_barriers=WARPGROUPS),
            mgpu.Barrier(num_arrivals=WARPGROUPS),
        ),
        mgpu.Barrier(num_arrivals=WARPGROUPS),
        Notes.scratch(),
        Pipeline.scratch(tile_shape, lists, (head_dim, value_dim), dtype, segments),
    )
    out, lse = hopper.call(
        "s2_attention_forward", compute, fetch, settings, lists, (query, key, value, *ids), arrays,
        list_arrays, out_shape, scratch,
    )  # fmt: skip
    return out[:, :q_len], lse[..., :q_len]


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


def _walk(
    tile: QueryTile,
    query: Any,
    q_ids: jax.Array | None,
    turns: Turns,
    pipeline: Pipeline,
    dtype: Any,
    scale: float,
    warpgroup: Any,
    slot: Any,
    pin: bool,
) -> tuple[Carry, Any]:
    """Takes in all keys of a tile, from a stage on; returns the one after the last too.

    pin: the peak stays as it is after the steps with masks; otherwise none is left out.
    """
    keys, value_dim = pipeline.key.shape[1], pipeline.value.shape[2]

    def wait_for_key(slot: Any) -> None:
        mgpu.barrier_wait(pipeline.key_ready.at[slot])

    def attend(slot: Any, carry: Carry, masked: bool, more: Any) -> tuple[Any, Carry]:
        """masked: with a mask; otherwise the peak is pinned. more: whether the key of the next step
        is waited for already, while the products run.
        """
        out, peak, sums = carry
        following = pipeline.after(slot)

        def multiply(products: Any) -> jax.Array:
            mgpu.wgmma(products, query, pipeline.key.at[slot].transpose((1, 0)))
            turns.pass_on()
            return products[...]

        scores = pl.run_scoped(multiply, mgpu.ACC((ROWS, keys), jnp.float32))
        if masked:
            mask = tile.mask(pipeline.entries_at(slot), warpgroup, q_ids, pipeline.ids_at(slot))
        mgpu.barrier_arrive(pipeline.key_used.at[slot])
        if masked:
            scores = jnp.where(mask, scores, -jnp.inf)
            before, peak = peak, jnp.maximum(peak, scores.max(axis=1) * scale)
            decay = jnp.exp2(before - peak)
            out, sums = out * spread(decay, out), sums * decay
        weights = jnp.exp2(scores * scale - spread(peak, scores))
        sums += weights.sum(axis=1)
        narrow = weights.astype(dtype)
        out, peak, sums, narrow = lax.optimization_barrier((out, peak, sums, narrow))
        turns.arrive()
        mgpu.barrier_wait(pipeline.value_ready.at[slot])
        turns.wait()

        def wait_for_next() -> None:
            pl.when(more)(lambda: wait_for_key(following))

        out = hopper.add_product(
            tile.settings, out, narrow, pipeline.value.at[slot], meanwhile=wait_for_next
        )
        mgpu.barrier_arrive(pipeline.value_used.at[slot])
        return following, (out, peak, sums)

    def attend_masked(_: Any, state: tuple[Any, Carry]) -> tuple[Any, Carry]:
        slot, carry = state
        wait_for_key(slot)
        return attend(slot, carry, masked=True, more=False)

    def attend_plain(number: Any, state: tuple[Any, Carry]) -> tuple[Any, Carry]:
        slot, carry = state
        return attend(slot, carry, masked=False, more=number + i32(1) < plain)

    turns.begin(warpgroup)
    carry: Carry = hopper.zeros(value_dim), hopper.per_row(LOWEST), hopper.per_row(0.0)
    plain = tile.told.plain
    slot, carry = lax.fori_loop(i32(0), tile.told.masked, attend_masked, (slot, carry))
    if pin:
        out, peak, sums = carry
        carry = out, jnp.where(sums > 0, peak, 0.0), sums
        pl.when(plain > i32(0))(lambda: wait_for_key(slot))
        slot, carry = lax.fori_loop(i32(0), plain, attend_plain, (slot, carry))
    turns.end(warpgroup)
    return carry, slot


def _in_range(tile: QueryTile, carry: Carry, dtype: Any) -> jax.Array:
    """Of each row, whether its pinned peak was good for it, as `Softmax.out_of_range` says it."""
    out, _, sums = carry
    least: Any = LEAST_TOTAL
    if dtype == jnp.float16:
        keys = tile.told.plain * i32(tile.lists.unit * tile.lists.group)
        least = jnp.maximum(keys.astype(jnp.float32) * LEAST_FLOAT16_WEIGHT, LEAST_TOTAL)
    finite = (out * 0.0).sum(axis=1) == 0.0
    return (sums >= least) & (sums <= GREATEST_TOTAL) & finite
