"""The forward kernel on Hopper: see hopper.py."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mgpu

from pallas_kernels import hopper
from pallas_kernels.call import Arrays, Settings
from pallas_kernels.hopper import LAYOUT, ROWS, WARPGROUPS, Pipeline, Program, Turns, i32
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
    tile, lists = settings.tiles.forward, settings.layouts.forward()
    scale = settings.exp2.scale
    keys = lists.unit * lists.group

    def compute(program: Program, refs: Any, scratch: Any, warpgroup: Any) -> None:
        q_ref, _, _, o_ref, lse_ref = refs
        (query_smem, lse_smem, bad_smem), (query_ready, decided), turns, stages = scratch
        turns, pipeline = Turns(turns), Pipeline(*stages, tile.num_stages)
        mine, numbers = query_smem.at[warpgroup], lse_smem.at[warpgroup]
        rows = program.rows(warpgroup)
        masked, plain = program.steps.masked, program.steps.plain()
        total = masked + plain
        mgpu.copy_gmem_to_smem(
            q_ref.at[program.batch, rows, program.head], mine, query_ready.at[warpgroup]
        )
        mgpu.barrier_wait(query_ready.at[warpgroup])

        def attend(step: Any, carry: Carry, begin: Any, end: Any, pinned: bool) -> Carry:
            """Takes in a tile. begin, end: numbers of the first step, and past the last. pinned:
            no step has masks, and the peak stays as it is. Otherwise any may have them.
            """
            out, peak, sums = carry
            slot = pipeline.slot(step)

            def multiply(products: Any) -> jax.Array:
                mgpu.wgmma(products, mine, pipeline.key.at[slot].transpose((1, 0)))
                turns.pass_on()
                return products[...]

            scores = pl.run_scoped(multiply, mgpu.ACC((ROWS, keys), jnp.float32))
            mgpu.barrier_arrive(pipeline.key_used.at[slot])
            if not pinned:
                scores = jnp.where(program.mask(step - begin, warpgroup), scores, -jnp.inf)
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

        def walk(begin: Any, pin: bool) -> Carry:
            """Takes in all tiles. pin: the peak is pinned after the steps with masks."""
            end = begin + total
            body = functools.partial(attend, begin=begin, end=end)

            @pl.when(total > i32(0))
            def _() -> None:
                mgpu.barrier_wait(pipeline.key_ready.at[pipeline.slot(begin)])

            turns.begin(warpgroup)
            nothing = hopper.zeros(value_dim), hopper.per_row(LOWEST), hopper.per_row(0.0)
            first_plain = begin + masked if pin else end
            carry = lax.fori_loop(
                begin, first_plain, functools.partial(body, pinned=False), nothing
            )
            if pin:
                out, peak, sums = carry
                carry = out, jnp.where(sums > 0, peak, 0.0), sums
                carry = lax.fori_loop(
                    first_plain, end, functools.partial(body, pinned=True), carry
                )
            turns.end(warpgroup)
            return carry

        def out_of_range(carry: Carry) -> jax.Array:
            """As `Softmax.out_of_range`, of both warpgroups."""
            out, _, sums = carry
            least: Any = LEAST_TOTAL
            if dtype == jnp.float16:
                tokens = (plain * i32(keys)).astype(jnp.float32)
                least = jnp.maximum(tokens * LEAST_FLOAT16_WEIGHT, LEAST_TOTAL)
            finite = (out * 0.0).sum(axis=1) == 0.0
            good = (sums >= least) & (sums <= GREATEST_TOTAL) & finite
            bad_smem.at[warpgroup][...] = jnp.where(good, 0.0, 1.0)
            mgpu.barrier_arrive(decided)
            return bad_rows(bad_smem, decided) > 0

        carry = walk(i32(0), pin=True)
        again = (plain > i32(0)) & out_of_range(carry)
        out, peak, sums = lax.cond(again, lambda: walk(total, pin=False), lambda: carry)
        seen = sums != 0  # a NaN was seen too
        whole = jnp.where(seen, sums, 1.0)
        lse = peak + jnp.where(whole == whole, log2(whole), jnp.nan)
        mine[...] = (out / hopper.spread(whole, out)).astype(dtype)
        numbers[...] = jnp.where(seen, lse, -jnp.inf)
        mgpu.commit_smem()
        hopper.store(mine, o_ref.at[program.batch, rows, program.head])
        hopper.store(numbers, lse_ref.at[program.batch, program.head, rows])
        mgpu.wait_smem_to_gmem(0)

    def fetch(program: Program, refs: Any, scratch: Any) -> None:
        _, key_ref, value_ref, _, _ = refs
        (_, _, bad_smem), (_, decided), _, stages = scratch
        pipeline = Pipeline(*stages, tile.num_stages)
        feed = functools.partial(pipeline.feed, program, key_ref, value_ref, group)
        total = feed(i32(0))
        again = (total > program.steps.masked) & (bad_rows(bad_smem, decided) > 0)

        @pl.when(again)
        def _() -> None:
            feed(total)

    out_shape = [
        jax.ShapeDtypeStruct((batch, q_len, heads, value_dim), dtype),
        jax.ShapeDtypeStruct((batch, heads, hopper.whole_tiles(q_len)), jnp.float32),
    ]
    row_numbers = mgpu.SMEM((WARPGROUPS, ROWS), jnp.float32)
    scratch = (
        (hopper.shared((WARPGROUPS, ROWS, head_dim), dtype), row_numbers, row_numbers),
        (mgpu.Barrier(num_barriers=WARPGROUPS), mgpu.Barrier(num_arrivals=WARPGROUPS)),
        mgpu.Barrier(num_arrivals=WARPGROUPS),
        Pipeline.scratch(tile, lists, (head_dim, value_dim), dtype),
    )  # fmt: skip
    out, lse = hopper.call(
        "s2_attention_forward", compute, fetch, settings, lists, (query, key, value), arrays,
        list_arrays, out_shape, scratch,
    )  # fmt: skip
    return out, lse[..., :q_len]


def bad_rows(numbers: Any, decided: Any) -> jax.Array:
    """How many rows of the program have to be taken in again, once that is decided."""
    mgpu.barrier_wait(decided)
    rows = [
        mgpu.load(numbers.at[warpgroup], layout=LAYOUT.reduce(0)) for warpgroup in range(WARPGROUPS)
    ]
    return (rows[0] + rows[1]).sum()
