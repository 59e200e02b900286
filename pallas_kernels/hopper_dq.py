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
from pallas_kernels.hopper import WARPGROUPS, KeyRefs, Notes, Pipeline
from pallas_kernels.hopper_tiles import ROWS, QueryTile, Schedule, Told, i32, spread


def dq(settings: Settings, arrays: Arrays, list_arrays: Arrays) -> tuple[jax.Array]:
    """As `backward.dq`."""
    query, grad_out = (hopper.in_eights(arrays[name]) for name in ("query", "grad_out"))
    key, value = hopper.keys_that_count(arrays)
    dtype, value_dim = query.dtype, value.shape[-1]
    heads, head_dim = query.shape[2:]
    tile_shape, lists = settings.tiles.dq, settings.layouts.dq()
    scale, group = settings.exp2.scale, heads // key.shape[2]
    keys = lists.unit * lists.group
    ids = hopper.segment_ids(arrays)
    segments = len(ids) > 0

    def compute(schedule: Schedule, refs: Any, scratch: Any, warpgroup: Any) -> None:
        q_ref, _, _, do_ref, lse_ref, delta_ref, *id_refs, dq_ref = refs
        buffers, ready, notes, stages = scratch
        notes, pipeline = Notes(*notes), Pipeline(lists, *stages)
        query, grad_out, outs, lses, deltas, *q_ids = (buffer.at[warpgroup] for buffer in buffers)

        def load(tile: QueryTile) -> None:
            rows = tile.rows(warpgroup)
            at, scalars_at = (tile.batch, rows, tile.head), (tile.batch, tile.head, rows)
            copies = [
                (q_ref.at[at], query), (do_ref.at[at], grad_out),
                (lse_ref.at[scalars_at], lses), (delta_ref.at[scalars_at], deltas),
            ]  # fmt: skip
            if segments:
                copies.append((id_refs[0].at[tile.batch, rows], q_ids[0]))
            for source, target in copies:
                mgpu.copy_gmem_to_smem(source, target, ready.at[warpgroup])

        def load_next(round_: Any) -> Told:
            told = notes.take(round_)
            load(schedule.tile(round_, told))
            return told

        def take(round_: Any, state: tuple[Told, Any]) -> tuple[Told, Any]:
            told, slot = state
            tile = schedule.tile(round_, told)
            mgpu.barrier_wait(ready.at[warpgroup])
            lse, delta, *my_ids = (
                hopper.load_numbers(numbers, axis=0) for numbers in (lses, deltas, *q_ids)
            )

            def add(_: Any, state: tuple[Any, jax.Array], masked: bool) -> tuple[Any, jax.Array]:
                slot, sums = state
                mgpu.barrier_wait(pipeline.key_ready.at[slot])
                mgpu.barrier_wait(pipeline.value_ready.at[slot])
                kv_ids = pipeline.ids_at(slot) if masked else None

                def grads_of_scores(products: Any, grad_weights: Any) -> jax.Array:
                    mgpu.wgmma(products, query, pipeline.key.at[slot].transpose((1, 0)))
                    mgpu.wgmma(grad_weights, grad_out, pipeline.value.at[slot].transpose((1, 0)))
                    scores = mgpu.wgmma_accumulator_load(products, wait_n=1)
                    if masked:
                        q_ids = my_ids[0] if segments else None
                        mask = tile.mask(pipeline.entries_at(slot), warpgroup, q_ids, kv_ids)
                        scores = jnp.where(mask, scores, -jnp.inf)
                    weights = jnp.exp2(scores * scale - spread(lse, scores))
                    weights = lax.optimization_barrier(weights)  # while the other product runs
                    grads = mgpu.wgmma_accumulator_load(grad_weights, wait_n=0)
                    return (weights * (grads - spread(delta, grads))).astype(dtype)

                products = mgpu.ACC((ROWS, keys), jnp.float32)
                grad_scores = pl.run_scoped(grads_of_scores, products, products)
                mgpu.barrier_arrive(pipeline.value_used.at[slot])

                sums = hopper.add_product(settings, sums, grad_scores, pipeline.key.at[slot])
                mgpu.barrier_arrive(pipeline.key_used.at[slot])
                return pipeline.after(slot), sums

            state = slot, hopper.zeros(head_dim)
            for number, masked in ((told.masked, True), (told.plain, False)):
                state = lax.fori_loop(i32(0), number, functools.partial(add, masked=masked), state)
            slot, sums = state
            if "q_length" in schedule.refs:
                sums = hopper.blank(sums, tile.padding(warpgroup))
            mgpu.commit_smem()  # all of the warpgroup have done with what it loaded
            following = round_ + i32(1)
            told = lax.cond(schedule.has(following), lambda: load_next(following), lambda: told)
            mgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the tile before
            outs[...] = (sums * settings.scale).astype(dtype)
            mgpu.commit_smem()
            mgpu.copy_smem_to_gmem(outs, dq_ref.at[tile.batch, tile.rows(warpgroup), tile.head])
            return told, slot

        schedule.visit(take, (load_next(i32(0)), i32(0)))
        mgpu.wait_smem_to_gmem(0)

    def fetch(schedule: Schedule, refs: Any, scratch: Any) -> None:
        _, key_ref, value_ref, _, _, _, *id_refs, _ = refs
        keys = KeyRefs(key_ref, value_ref, id_refs[1] if segments else None)
        notes, pipeline = Notes(*scratch[2]), Pipeline(lists, *scratch[3])

        def take(round_: Any, step: Any) -> Any:
            task = schedule.task(round_)
            notes.write(round_, Told(task.place, *task.steps.number(everything=False)))
            return pipeline.feed(task, keys, group, step, all_masked=False)

        schedule.visit(take, i32(0))

    row_numbers, row_ids = (
        mgpu.SMEM((WARPGROUPS, ROWS), kind) for kind in (jnp.float32, jnp.int32)
    )
    rows = [hopper.shared((WARPGROUPS, ROWS, dim), dtype) for dim in (head_dim, value_dim)]
    scratch = (
        (*rows, rows[0], row_numbers, row_numbers, *[row_ids] * segments),
        mgpu.Barrier(num_arrivals=4 + segments, num_barriers=WARPGROUPS),
        Notes.scratch(),
        Pipeline.scratch(tile_shape, lists, (head_dim, value_dim), dtype, segments),
    )
    lse, delta = hopper.padded(arrays["lse"], jnp.inf), hopper.padded(arrays["delta"], 0.0)
    [gradient] = hopper.call(
        "s2_attention_dq", compute, fetch, settings, lists,
        (query, key, value, grad_out, lse, delta, *ids), arrays, list_arrays,
        [jax.ShapeDtypeStruct(query.shape, dtype)], scratch,
    )  # fmt: skip
    return (gradient[:, : arrays["query"].shape[1]],)
