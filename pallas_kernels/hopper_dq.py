"""The dq kernel on Hopper: see hopper.py."""

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
from pallas_kernels.hopper import LAYOUT, ROWS, WARPGROUPS, Pipeline, Program


def dq(settings: Settings, arrays: Arrays, list_arrays: Arrays) -> tuple[jax.Array]:
    """As `backward.dq`."""
    query, key, value, grad_out = (arrays[name] for name in ("query", "key", "value", "grad_out"))
    dtype, value_dim = query.dtype, value.shape[-1]
    heads, head_dim = query.shape[2:]
    tile, lists = settings.tiles.dq, settings.layouts.dq()
    scale, group = settings.exp2.scale, heads // key.shape[2]
    keys = lists.unit * lists.group

    def compute(program: Program, refs: Any, scratch: Any, warpgroup: Any) -> None:
        q_ref, _, _, do_ref, lse_ref, delta_ref, dq_ref = refs
        buffers, ready, stages = scratch
        pipeline = Pipeline(*stages, tile.num_stages)
        rows = program.rows(warpgroup)
        at = program.batch, rows, program.head
        scalars_at = program.batch, program.head, rows
        mine = [buffer.at[warpgroup] for buffer in buffers]
        sources = (q_ref.at[at], do_ref.at[at], lse_ref.at[scalars_at], delta_ref.at[scalars_at])
        for source, target in zip(sources, mine, strict=True):
            mgpu.copy_gmem_to_smem(source, target, ready.at[warpgroup])
        mgpu.barrier_wait(ready.at[warpgroup])
        query, grad_out = mine[:2]
        lse, delta = (mgpu.load(numbers, layout=LAYOUT.reduce(1)) for numbers in mine[2:])

        def add(step: Any, sums: jax.Array, masked: bool) -> jax.Array:
            slot = pipeline.slot(step)
            mgpu.barrier_wait(pipeline.key_ready.at[slot])
            mgpu.barrier_wait(pipeline.value_ready.at[slot])

            def grads_of_scores(products: Any, grad_weights: Any) -> jax.Array:
                mgpu.wgmma(products, query, pipeline.key.at[slot].transpose((1, 0)))
                mgpu.wgmma(grad_weights, grad_out, pipeline.value.at[slot].transpose((1, 0)))
                scores = mgpu.wgmma_accumulator_load(products, wait_n=1)
                if masked:
                    scores = jnp.where(program.mask(step, warpgroup), scores, -jnp.inf)
                weights = jnp.exp2(scores * scale - hopper.spread(lse, scores))
                weights = lax.optimization_barrier(weights)  # made while the other product runs
                grads = mgpu.wgmma_accumulator_load(grad_weights, wait_n=0)
                return (weights * (grads - hopper.spread(delta, grads))).astype(dtype)

            products = mgpu.ACC((ROWS, keys), jnp.float32)
            grad_scores = pl.run_scoped(grads_of_scores, products, products)
            mgpu.barrier_arrive(pipeline.value_used.at[slot])
            sums = pl.run_state(
                lambda sum_ref: mgpu.wgmma(sum_ref, grad_scores, pipeline.key.at[slot])
            )(mgpu.ACC.init(sums))
            mgpu.barrier_arrive(pipeline.key_used.at[slot])
            return sums

        masked = program.steps.masked
        sums = hopper.zeros(head_dim)
        sums = lax.fori_loop(jnp.int32(0), masked, functools.partial(add, masked=True), sums)
        stop = masked + program.steps.plain()
        sums = lax.fori_loop(masked, stop, functools.partial(add, masked=False), sums)
        query[...] = (sums * settings.scale).astype(dtype)
        mgpu.commit_smem()
        hopper.store(query, dq_ref.at[at])
        mgpu.wait_smem_to_gmem(0)

    def fetch(program: Program, refs: Any, scratch: Any) -> None:
        _, key_ref, value_ref, *_ = refs
        Pipeline(*scratch[2], tile.num_stages).feed(
            program, key_ref, value_ref, group, jnp.int32(0)
        )

    row_numbers = mgpu.SMEM((WARPGROUPS, ROWS), jnp.float32)
    rows = [hopper.shared((WARPGROUPS, ROWS, dim), dtype) for dim in (head_dim, value_dim)]
    scratch = (
        (*rows, row_numbers, row_numbers),
        mgpu.Barrier(num_arrivals=4, num_barriers=WARPGROUPS),
        Pipeline.scratch(tile, lists, (head_dim, value_dim), dtype),
    )
    lse, delta = hopper.padded(arrays["lse"], jnp.inf), hopper.padded(arrays["delta"], 0.0)
    [gradient] = hopper.call(
        "s2_attention_dq", compute, fetch, settings, lists,
        (query, key, value, grad_out, lse, delta), arrays, list_arrays,
        [jax.ShapeDtypeStruct(query.shape, dtype)], scratch,
    )  # fmt: skip
    return (gradient,)
