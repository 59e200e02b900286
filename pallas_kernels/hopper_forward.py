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
from pallas_kernels.hopper import (
    ROWS,
    WARPGROUPS,
    Pipeline,
    QueryTile,
    Schedule,
    Turns,
    i32,
)
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
    query, key, value = (arrays[name] for name in ("query", "key", "value"))
    batch, q_len, heads, head_dim = query.shape
    dtype, value_dim, group = query.dtype, value.shape[-1], heads // key.shape[2]
    tile_shape, lists = settings.tiles.forward, settings.layouts.forward()
    scale = settings.exp2.scale

    def compute(schedule: Schedule, refs: Any, scratch: Any, warpgroup: Any) -> None:
        q_ref, _, _, o_ref, lse_ref = refs
        (queries, outs, lses, bad), (query_ready, decided), turns, stages = scratch
        mine = queries.at[warpgroup]
        turns, pipeline = Turns(turns), Pipeline(*stages)

        def load(tile: QueryTile) -> None:
            mgpu.copy_gmem_to_smem(
                q_ref.at[tile.batch, tile.rows(warpgroup), tile.head],
                mine,
                query_ready.at[warpgroup],
            )

        def take(tile: QueryTile, step: Any) -> tuple[QueryTile, Any]:
            mgpu.barrier_wait(query_ready.at[warpgroup])
            walk = functools.partial(_walk, tile, mine, turns, pipeline, dtype, scale, warpgroup)
            steps = tile.scalars.masked + tile.scalars.plain
            carry = walk(step, pin=True)

            def decide() -> jax.Array:
                bad.at[warpgroup][...] = jnp.where(_in_range(tile, carry, dtype), 0.0, 1.0)
                mgpu.barrier_arrive(decided)
                return _is_bad(bad, decided)

            again = _if_pinned(tile, decide)
            carry = lax.cond(again, lambda: walk(step + steps, pin=False), lambda: carry)
            more, following = schedule.after(tile)
            mgpu.commit_smem()  # all of the warpgroup have done with the query
            pl.when(more)(lambda: load(following))
            store(tile, carry)
            return following, step + jnp.where(again, steps + steps, steps)

        def store(tile: QueryTile, carry: Carry) -> None:
            out, peak, sums = carry
            seen = sums != 0  # a NaN was seen too
            whole = jnp.where(seen, sums, 1.0)
            lse = peak + jnp.where(whole == whole, log2(whole), jnp.nan)
            mgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the tile before
            outs.at[warpgroup][...] = (out / hopper.spread(whole, out)).astype(dtype)
            lses.at[warpgroup][...] = jnp.where(seen, lse, -jnp.inf)
            mgpu.commit_smem()
            rows = tile.rows(warpgroup)
            mgpu.copy_smem_to_gmem(outs.at[warpgroup], o_ref.at[tile.batch, rows, tile.head])
            mgpu.copy_smem_to_gmem(lses.at[warpgroup], lse_ref.at[tile.batch, tile.head, rows])

        load(schedule.at(lax.axis_index("program")))
        schedule.visit(take, i32(0))
        mgpu.wait_smem_to_gmem(0)

    def fetch(schedule: Schedule, refs: Any, scratch: Any) -> None:
        _, key_ref, value_ref, _, _ = refs
        (*_, bad), (_, decided), _, stages = scratch
        pipeline = Pipeline(*stages)

        def take(tile: QueryTile, step: Any) -> tuple[QueryTile, Any]:
            feed = functools.partial(pipeline.feed, tile, key_ref, value_ref, group)
            step = feed(step)
            _, following = schedule.after(tile)
            again = _if_pinned(tile, lambda: _is_bad(bad, decided))
            return following, lax.cond(again, feed, lambda step: step, step)

        schedule.visit(take, i32(0))

    out_shape = [
        jax.ShapeDtypeStruct((batch, q_len, heads, value_dim), dtype),
        jax.ShapeDtypeStruct((batch, heads, hopper.whole_tiles(q_len)), jnp.float32),
    ]
    row_numbers = mgpu.SMEM((WARPGROUPS, ROWS), jnp.float32)
    rows = [hopper.shared((WARPGROUPS, ROWS, dim), dtype) for dim in (head_dim, value_dim)]
    scratch = (
        (*rows, row_numbers, row_numbers),
        (mgpu.Barrier(num_barriers=WARPGROUPS), mgpu.Barrier(num_arrivals=WARPGROUPS)),
        mgpu.Barrier(num_arrivals=WARPGROUPS),
        Pipeline.scratch(tile_shape, lists, (head_dim, value_dim), dtype),
    )
    out, lse = hopper.call(
        "s2_attention_forward", compute, fetch, settings, lists, (query, key, value), arrays,
        list_arrays, out_shape, scratch,
    )  # fmt: skip
    return out, lse[..., :q_len]


def _walk(
    tile: QueryTile,
    query: Any,
    turns: Turns,
    pipeline: Pipeline,
    dtype: Any,
    scale: float,
    warpgroup: Any,
    begin: Any,
    pin: bool,
) -> Carry:
    """Takes in all keys of a tile, from the step `begin` on.

    pin: the peak stays as it is after the steps with masks; otherwise none is left out.
    """
    keys, value_dim = pipeline.key.shape[1], pipeline.value.shape[2]
    first_plain = begin + tile.scalars.masked
    end = first_plain + tile.scalars.plain

    def attend(step: Any, carry: Carry, pinned: bool) -> Carry:
        out, peak, sums = carry
        slot = pipeline.slot(step)

        def multiply(products: Any) -> jax.Array:
            mgpu.wgmma(products, query, pipeline.key.at[slot].transpose((1, 0)))
            turns.pass_on()
            return products[...]

        scores = pl.run_scoped(multiply, mgpu.ACC((ROWS, keys), jnp.float32))
        mgpu.barrier_arrive(pipeline.key_used.at[slot])
        if not pinned:
            scores = jnp.where(tile.mask(step - begin, warpgroup), scores, -jnp.inf)
            before, peak = peak, jnp.maximum(peak, scores.max(axis=1) * scale)
            decay = jnp.exp2(before - peak)
            out, sums = out * hopper.spread(decay, out), sums * decay
        weights = jnp.exp2(scores * scale - hopper.spread(peak, scores))
        sums += weights.sum(axis=1)
        narrow = weights.astype(dtype)
        out, peak, sums, narrow = lax.optimization_barrier((out, peak, sums, narrow))
        turns.arrive()
        mgpu.barrier_wait(pipeline.value_ready.at[slot])
        turns.wait()

        def add(sum_ref: Any) -> None:
            mgpu.wgmma(sum_ref, narrow, pipeline.value.at[slot])

            @pl.when(step + i32(1) < end)
            def _() -> None:
                mgpu.barrier_wait(pipeline.key_ready.at[pipeline.slot(step + i32(1))])

        out = pl.run_state(add)(mgpu.ACC.init(out))
        mgpu.barrier_arrive(pipeline.value_used.at[slot])
        return out, peak, sums

    @pl.when(begin < end)
    def _() -> None:
        mgpu.barrier_wait(pipeline.key_ready.at[pipeline.slot(begin)])

    turns.begin(warpgroup)
    carry: Carry = hopper.zeros(value_dim), hopper.per_row(LOWEST), hopper.per_row(0.0)
    body = functools.partial(attend, pinned=False)
    carry = lax.fori_loop(begin, first_plain if pin else end, body, carry)
    if pin:
        out, peak, sums = carry
        carry = out, jnp.where(sums > 0, peak, 0.0), sums
        body = functools.partial(attend, pinned=True)
        carry = lax.fori_loop(first_plain, end, body, carry)
    turns.end(warpgroup)
    return carry


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
