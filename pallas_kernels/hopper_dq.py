"""The dq kernel on Hopper: see hopper.py."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mgpu

from pallas_kernels import hopper
from pallas_kernels.block_lists import BlockLists
from pallas_kernels.call import Arrays, Settings
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
    shared,
    spread,
)
from pallas_kernels.tiles import Tile

_COLUMNS = 64  # of gradients that are stored at a time, where wide steps leave no room for more


def dq(settings: Settings, arrays: Arrays, list_arrays: Arrays) -> tuple[jax.Array]:
    """As `backward.dq`."""
    query, grad_out = (hopper.in_eights(arrays[name]) for name in ("query", "grad_out"))
    key, value = hopper.keys_that_count(arrays)
    ids, lists = hopper.segment_ids(arrays), settings.layouts.dq()
    assert settings.tiles.dq is not None
    scratch = Scratch.of(
        settings.tiles.dq, lists, (query.shape[-1], value.shape[-1]), query.dtype, len(ids) > 0
    )
    lse, delta = hopper.padded(arrays["lse"], jnp.inf), hopper.padded(arrays["delta"], 0.0)
    [gradient] = hopper.call(
        "s2_attention_dq", _compute, _fetch, Schedule.of(settings, lists, arrays),
        (query, key, value, grad_out, lse, delta, *ids),
        operands(settings, lists, arrays, list_arrays),
        [jax.ShapeDtypeStruct(query.shape, query.dtype)], scratch,
    )  # fmt: skip
    return (gradient[:, : arrays["query"].shape[1]],)


class Refs(NamedTuple):
    """Operands and the result. ids: of queries and of keys, or nothing."""

    query: Any
    key: Any
    value: Any
    grad_out: Any
    lse: Any
    delta: Any
    ids: tuple[Any, ...]
    grad: Any

    @classmethod
    def of(cls, refs: tuple[Any, ...]) -> Refs:
        query, key, value, grad_out, lse, delta, *ids, grad = refs
        return cls(query, key, value, grad_out, lse, delta, tuple(ids), grad)


class Rows(NamedTuple):
    """The queries of a tile in shared memory, `[64, ...]` of each warpgroup.

    ids: of segments; None where there are none.
    """

    query: Any
    grad_out: Any
    grad: Any
    lse: Any
    delta: Any
    ids: Any


class Scratch(NamedTuple):
    """ready: the rows of each warpgroup."""

    rows: Rows
    ready: Any
    notes: Any
    stages: Any

    @classmethod
    def of(
        cls, tile: Tile, lists: BlockLists, dims: tuple[int, int], dtype: Any, segments: bool
    ) -> Scratch:
        query, value, numbers, ids = hopper.row_buffers(dims, dtype, segments)
        columns = dims[0] if tile.block_kv == 64 else min(dims[0], _COLUMNS)
        grad = shared((WARPGROUPS, ROWS, columns), dtype)
        return cls(
            Rows(query, value, grad, numbers, numbers, ids),
            mgpu.Barrier(num_arrivals=4 + segments, num_barriers=WARPGROUPS),
            Notes.scratch(),
            Pipeline.scratch(tile.num_stages, lists, dims, dtype, segments),
        )


def _fetch(schedule: Schedule, refs: tuple[Any, ...], scratch: Scratch) -> None:
    found = Refs.of(refs)
    keys = KeyRefs(found.key, found.value, *found.ids[1:])
    notes, pipeline = Notes(*scratch.notes), Pipeline(schedule.lists, *scratch.stages)
    fetcher = Fetcher(schedule, keys, notes, pipeline)
    schedule.visit(lambda round_, step: fetcher.take(round_, round_, step), i32(0))


def _compute(schedule: Schedule, refs: tuple[Any, ...], scratch: Scratch, warpgroup: Any) -> None:
    Multiplier(
        schedule, warpgroup, Refs.of(refs), hopper.of_warpgroup(scratch.rows, warpgroup),
        scratch.ready.at[warpgroup], Notes(*scratch.notes),
        Pipeline(schedule.lists, *scratch.stages),
    ).run()  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Multiplier:
    """A warpgroup that multiplies. mine, ready: its own of the scratch."""

    schedule: Schedule
    warpgroup: Any
    refs: Refs
    mine: Rows
    ready: Any
    notes: Notes
    pipeline: Pipeline

    def run(self) -> None:
        self.schedule.visit(self._take, (self._load_next(i32(0)), i32(0)))
        mgpu.wait_smem_to_gmem(0)

    def _load_next(self, round_: Any) -> Told:
        """Asks for what a tile has a number or more of for each query."""
        refs, mine, told = self.refs, self.mine, self.notes.take(round_)
        tile = self.schedule.tile(round_, told)
        rows = tile.rows(self.warpgroup)
        at, scalars_at = (tile.batch, rows, tile.head), (tile.batch, tile.head, rows)
        copies = [
            (refs.query.at[at], mine.query), (refs.grad_out.at[at], mine.grad_out),
            (refs.lse.at[scalars_at], mine.lse), (refs.delta.at[scalars_at], mine.delta),
        ]  # fmt: skip
        if refs.ids:
            copies.append((refs.ids[0].at[tile.batch, rows], mine.ids))
        for source, target in copies:
            mgpu.copy_gmem_to_smem(source, target, self.ready)
        return told

    def _take(self, round_: Any, state: tuple[Told, Any]) -> tuple[Told, Any]:
        schedule, mine, (told, slot) = self.schedule, self.mine, state
        tile = schedule.tile(round_, told)
        mgpu.barrier_wait(self.ready)
        loaded = (mine.lse, mine.delta, mine.ids) if self.refs.ids else (mine.lse, mine.delta)
        numbers = [load_numbers(one, axis=0) for one in loaded]
        state = slot, hopper.zeros(mine.query.shape[-1])
        for steps, masked in ((told.masked, True), (told.plain, False)):
            add = functools.partial(self._add, tile, numbers, masked)
            state = lax.fori_loop(i32(0), steps, add, state)
        slot, sums = state
        if "q_length" in schedule.refs:
            sums = hopper.blank(sums, tile.padding(self.warpgroup))
        mgpu.commit_smem()  # all of the warpgroup have done with what it loaded
        following = round_ + i32(1)
        told = lax.cond(schedule.has(following), lambda: self._load_next(following), lambda: told)
        sums = (sums * schedule.settings.scale).astype(self.refs.grad.dtype)
        columns = mine.grad.shape[-1]
        for start in range(0, sums.shape[1], columns):
            mgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of those before
            mine.grad[...] = sums[:, start : start + columns]
            mgpu.commit_smem()
            at = tile.batch, tile.rows(self.warpgroup), tile.head, pl.ds(start, columns)
            mgpu.copy_smem_to_gmem(mine.grad, self.refs.grad.at[at])
        return told, slot

    def _add(
        self, tile: QueryTile, numbers: list[jax.Array], masked: bool, _: Any,
        state: tuple[Any, jax.Array],
    ) -> tuple[Any, jax.Array]:  # fmt: skip
        """Takes in the keys of a stage. numbers: LSE, delta and, if there are any, ids of rows."""
        pipeline, settings, (slot, sums) = self.pipeline, self.schedule.settings, state
        lse, delta, *q_ids = numbers
        mgpu.barrier_wait(pipeline.key_ready.at[slot])
        mgpu.barrier_wait(pipeline.value_ready.at[slot])
        kv_ids = pipeline.ids_at(slot) if masked else None

        def grads_of_scores(products: Any, grad_weights: Any) -> jax.Array:
            mgpu.wgmma(products, self.mine.query, pipeline.key.at[slot].transpose((1, 0)))
            mgpu.wgmma(grad_weights, self.mine.grad_out, pipeline.value.at[slot].transpose((1, 0)))
            scores = mgpu.wgmma_accumulator_load(products, wait_n=1)
            if masked:
                entries, ids = pipeline.entries_at(slot), q_ids[0] if q_ids else None
                mask = tile.mask(entries, self.warpgroup, ids, kv_ids)
                scores = jnp.where(mask, scores, -jnp.inf)
            weights = jnp.exp2(scores * settings.exp2.scale - spread(lse, scores))
            weights = lax.optimization_barrier(weights)  # while the other product runs
            grads = mgpu.wgmma_accumulator_load(grad_weights, wait_n=0)
            return (weights * (grads - spread(delta, grads))).astype(self.refs.grad.dtype)

        products = mgpu.ACC((ROWS, pipeline.key.shape[1]), jnp.float32)
        grad_scores = pl.run_scoped(grads_of_scores, products, products)
        mgpu.barrier_arrive(pipeline.value_used.at[slot])
        sums = hopper.add_product(settings, sums, grad_scores, pipeline.key.at[slot])
        mgpu.barrier_arrive(pipeline.key_used.at[slot])
        return pipeline.after(slot), sums
