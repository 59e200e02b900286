"""The forward kernel on Hopper: see hopper.py."""

from __future__ import annotations

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
from pallas_kernels.hopper import WARPGROUPS, KeyRefs, Pipeline, Turns
from pallas_kernels.hopper_tiles import ROWS, At, QueryTile, Schedule, i32, spread
from pallas_kernels.softmax import (
    GREATEST_TOTAL,
    LEAST_FLOAT16_WEIGHT,
    LEAST_TOTAL,
    LOWEST,
    log2,
)

Carry = tuple[jax.Array, jax.Array, jax.Array]
"""Output [rows, dim], largest score in log2 [rows] and sum of weights [rows], all float32."""


def forward(settings: Settings, arrays: Arrays, list_arrays: Arrays) -> tuple[jax.Array, jax.Array]:
    """As `forward.forward`."""
    query, (key, value) = arrays["query"], hopper.keys_that_count(arrays)
    batch, q_len, heads, head_dim = query.shape
    dtype, value_dim, group = query.dtype, value.shape[-1], heads // key.shape[2]
    tile_shape, lists = settings.tiles.forward, settings.layouts.forward()
    ids = hopper.segment_ids(arrays)
    segments = len(ids) > 0

    def compute(schedule: Schedule, refs: Any, scratch: Any, warpgroup: Any) -> None:
        q_ref, _, _, *id_refs, o_ref, lse_ref = refs
        (queries, outs, lses, bad, *q_ids), (query_ready, decided), turns, stages = scratch
        mine, turns, pipeline = queries.at[warpgroup], Turns(turns), Pipeline(*stages)

        def load(tile: QueryTile) -> None:
            rows, ready = tile.rows(warpgroup), query_ready.at[warpgroup]
            mgpu.copy_gmem_to_smem(q_ref.at[tile.batch, rows, tile.head], mine, ready)
            if segments:
                mgpu.copy_gmem_to_smem(
                    id_refs[0].at[tile.batch, rows], q_ids[0].at[warpgroup], ready
                )

        def take(tile: QueryTile, step: Any) -> tuple[QueryTile, Any]:
            mgpu.barrier_wait(query_ready.at[warpgroup])
            my_ids = hopper.load_numbers(q_ids[0].at[warpgroup], axis=0) if segments else None
            padding = tile.padding(warpgroup) if "q_length" in schedule.refs else None
            walk = functools.partial(
                _walk, tile, mine, my_ids, turns, pipeline, dtype, settings.exp2.scale, warpgroup
            )
            carry, step = walk(step, pin=True)

            def decide() -> jax.Array:
                good = _in_range(tile, carry, dtype)
                if padding is not None:
                    good |= padding
                bad.at[warpgroup][...] = jnp.where(good, 0.0, 1.0)
                mgpu.barrier_arrive(decided)
                return _is_bad(bad, decided)

            again = _if_pinned(tile, decide)
            carry, step = lax.cond(again, lambda: walk(step, pin=False), lambda: (carry, step))
            more, following = schedule.after(tile)
            mgpu.commit_smem()  # all of the warpgroup have done with the query
            pl.when(more)(lambda: load(following))
            store(tile, carry, padding)
            return following, step

        def store(tile: QueryTile, carry: Carry, padding: jax.Array | None) -> None:
            out, peak, sums = carry
            seen = sums != 0  # a NaN was seen too
            whole = jnp.where(seen, sums, 1.0)
            lse = peak + jnp.where(whole == whole, log2(whole), jnp.nan)
            out = out / spread(whole, out)
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

        load(schedule.first())
        schedule.visit(take, i32(0))
        mgpu.wait_smem_to_gmem(0)

    def fetch(schedule: Schedule, refs: Any, scratch: Any) -> None:
        _, key_ref, value_ref, *id_refs, _, _ = refs
        keys = KeyRefs(key_ref, value_ref, id_refs[1] if segments else None)
        (_, _, _, bad, *_), (_, decided), _, stages = scratch
        pipeline = Pipeline(*stages)

        def take(tile: QueryTile, step: Any) -> tuple[QueryTile, Any]:
            feed = functools.partial(pipeline.feed, tile, keys, group)
            step = feed(step, all_masked=False)
            _, following = schedule.after(tile)
            again = _if_pinned(tile, lambda: _is_bad(bad, decided))
            feed_again = functools.partial(feed, all_masked=True)
            return following, lax.cond(again, feed_again, lambda step: step, step)

        schedule.visit(take, i32(0))

    out_shape = [
        jax.ShapeDtypeStruct((batch, q_len, heads, value_dim), dtype),
        jax.ShapeDtypeStruct((batch, heads, hopper.whole_tiles(q_len)), jnp.float32),
    ]
    row_numbers, row_ids = (
        mgpu.SMEM((WARPGROUPS, ROWS), kind) for kind in (jnp.float32, jnp.int32)
    )
    rows = [hopper.shared((WARPGROUPS, ROWS, dim), dtype) for dim in (head_dim, value_dim)]
    scratch = (
        (*rows, row_numbers, row_numbers, *[row_ids] * segments),
        (
            mgpu.Barrier(num_arrivals=1 + segments, num_barriers=WARPGROUPS),
            mgpu.Barrier(num_arrivals=WARPGROUPS),
        ),
        mgpu.Barrier(num_arrivals=WARPGROUPS),
        Pipeline.scratch(tile_shape, lists, (head_dim, value_dim), dtype, segments),
    )
    out, lse = hopper.call(
        "s2_attention_forward", compute, fetch, settings, lists, (query, key, value, *ids), arrays,
        list_arrays, out_shape, scratch,
    )  # fmt: skip
    return out, lse[..., :q_len]


def _walk(
    tile: QueryTile,
    query: Any,
    q_ids: jax.Array | None,
    turns: Turns,
    pipeline: Pipeline,
    dtype: Any,
    scale: float,
    warpgroup: Any,
    step: Any,
    pin: bool,
) -> tuple[Carry, Any]:
    """Takes in all keys of a tile, from a step on; returns the next one too.

    pin: the peak stays as it is after the steps with masks; otherwise none is left out.
    """
    keys, value_dim = pipeline.key.shape[1], pipeline.value.shape[2]

    def wait_for_key(step: Any) -> None:
        mgpu.barrier_wait(pipeline.key_ready.at[pipeline.slot(step)])

    def attend(at: At | None, carry: Carry, step: Any, end: Any) -> Carry:
        """at: of a step with a mask; None: the peak is pinned. end: the key of the next step is
        waited for already, while the products run, if there is one before `end`.
        """
        out, peak, sums = carry
        slot = pipeline.slot(step)

        def multiply(products: Any) -> jax.Array:
            mgpu.wgmma(products, query, pipeline.key.at[slot].transpose((1, 0)))
            turns.pass_on()
            return products[...]

        scores = pl.run_scoped(multiply, mgpu.ACC((ROWS, keys), jnp.float32))
        if at is not None:
            mask = tile.mask(at, warpgroup, q_ids, pipeline.ids_at(slot))
        mgpu.barrier_arrive(pipeline.key_used.at[slot])
        if at is not None:
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
            pl.when(step + i32(1) < end)(lambda: wait_for_key(step + i32(1)))

        out = hopper.add_product(
            tile.settings, out, narrow, pipeline.value.at[slot], meanwhile=wait_for_next
        )
        mgpu.barrier_arrive(pipeline.value_used.at[slot])
        return out, peak, sums

    def masked(at: At, state: tuple[Carry, Any]) -> tuple[Carry, Any]:
        carry, step = state
        wait_for_key(step)
        return attend(at, carry, step, end=step), step + i32(1)

    turns.begin(warpgroup)
    carry: Carry = hopper.zeros(value_dim), hopper.per_row(LOWEST), hopper.per_row(0.0)
    carry, step = tile.steps.visit_masked(masked, (carry, step), everything=not pin)
    if pin:
        out, peak, sums = carry
        carry = out, jnp.where(sums > 0, peak, 0.0), sums
        end = step + tile.scalars.plain
        pl.when(step < end)(lambda: wait_for_key(step))
        body = functools.partial(attend, None, end=end)
        carry = lax.fori_loop(step, end, lambda step, carry: body(carry, step), carry)
        step = end
    turns.end(warpgroup)
    return carry, step


def _in_range(tile: QueryTile, carry: Carry, dtype: Any) -> jax.Array:
    """Of each row, whether its pinned peak was good for it, as `Softmax.out_of_range` says it."""
    out, _, sums = carry
    least: Any = LEAST_TOTAL
    if dtype == jnp.float16:
        keys = tile.scalars.plain * i32(tile.lists.unit * tile.lists.group)
        least = jnp.maximum(keys.astype(jnp.float32) * LEAST_FLOAT16_WEIGHT, LEAST_TOTAL)
    finite = (out * 0.0).sum(axis=1) == 0.0
    return (sums >= least) & (sums <= GREATEST_TOTAL) & finite


def _if_pinned(tile: QueryTile, decide: Callable[[], jax.Array]) -> jax.Array:
    """What is decided, where anything is taken in with a pinned peak. Nothing else may be decided
    upon: only a fetched key keeps the warpgroups from getting further apart than one decision.
    """
    return lax.cond(tile.scalars.plain > i32(0), decide, lambda: jnp.bool_(False))


def _is_bad(bad: Any, decided: Any) -> jax.Array:
    """Whether a row has to be taken in again, once that is decided."""
    mgpu.barrier_wait(decided)
    first, second = (
        hopper.load_numbers(bad.at[warpgroup], axis=1) for warpgroup in range(WARPGROUPS)
    )
    return (first + second).sum() > 0
