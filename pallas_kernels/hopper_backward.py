"""One backward kernel for Hopper that makes all three gradients: see hopper.py.

Five products a step instead of the seven of two kernels. A program has 128 keys and takes 64
queries a step. The warpgroups that multiply hand the gradients of scores to the one that fetches,
which makes the gradient of the queries of them. Many programs add to that of a query, in any
order: as int32, on a scale of each query's own, so that all orders give the same bits.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mgpu

from pallas_kernels import hopper, hopper_dkv
from pallas_kernels.call import Arrays, Settings
from pallas_kernels.hopper_holder import KeyHolder, Refs, Scratch, numbers_of, raised
from pallas_kernels.hopper_keys import KeySchedule, KeyTile
from pallas_kernels.hopper_pipeline import Notes, Pipeline, Side
from pallas_kernels.hopper_ptx import product, rounded
from pallas_kernels.hopper_tiles import (
    ROWS,
    WARPGROUPS,
    At,
    Told,
    i32,
    load_numbers,
    operands,
    shared,
    spread,
)

_REGISTERS = 208, 88
_COLUMNS = 64  # of the gradient of queries that are made at a time
_LARGEST = 2.0**30
_LEAST_BOUND = 2.0**-90  # its inverse is a number still


class Grads(NamedTuple):
    """What makes the gradient of queries. scores: `[slots, warpgroups, keys, queries]`, gradients.

    scale: of the queries of each stage. sums: some columns, int32. keys_used: the program has made
    the last gradient of queries of its tile.
    """

    scores: Any
    ready: Any
    used: Any
    scale: Any
    sums: Any
    keys_used: Any

    @classmethod
    def scratch(cls, stages: int, dim: int, dtype: Any) -> Grads:
        return cls(
            shared((stages, WARPGROUPS, ROWS, ROWS), dtype),
            mgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
            mgpu.Barrier(num_arrivals=1, num_barriers=stages),
            mgpu.SMEM((stages, ROWS), jnp.float32),
            shared((ROWS, min(_COLUMNS, dim)), jnp.int32),
            mgpu.Barrier(num_arrivals=1, num_barriers=1),
        )


def backward(
    settings: Settings,
    arrays: Arrays,
    list_arrays: Arrays,
    out_shape: list[jax.ShapeDtypeStruct],
) -> Sequence[jax.Array]:
    """The gradients of query, key and value; arguments as of `backward._dkv`."""
    query, grad_out = hopper.queries_that_count(arrays)
    key, value = hopper.keys_that_count(arrays)
    ids, lists, tile = hopper.segment_ids(arrays), settings.layouts.dkv(), settings.tiles.dkv
    scratch = Scratch.of(
        tile, lists, (key.shape[-1], value.shape[-1]), key.dtype, out_shape[0].dtype, len(ids) > 0,
        Grads.scratch(tile.num_stages, query.shape[-1], key.dtype),
    )  # fmt: skip
    bound = _bound(key, value, grad_out, arrays["delta"], query.shape[2])
    scale = hopper.padded(_LARGEST / bound, 0.0)
    # Weights come out so many times as large as the LSE is less.
    lse = hopper.padded(arrays["lse"] - raised(key.dtype), jnp.inf)
    delta = hopper.padded(arrays["delta"], 0.0)
    (batch, kv_len, heads, _), kv_heads = out_shape[0].shape, key.shape[2]
    schedule = KeySchedule.of(settings, lists, arrays, heads // kv_heads)
    shape = query.shape
    if settings.launcher == "interpret":  # which cannot add: each tile has a place of its own
        shape = (lists.num_tiles, *shape)
    sums, *grads = hopper.call(
        "s2_attention_backward", _compute, _fetch, schedule,
        (query, key, value, grad_out, lse, delta, scale, *ids),
        operands(settings, lists, arrays, list_arrays),
        [
            jax.ShapeDtypeStruct((batch, key.shape[1], *out.shape[2:]), out.dtype)
            for out in out_shape
        ],
        scratch, _REGISTERS, jnp.zeros(shape, jnp.int32),
    )  # fmt: skip
    if settings.launcher == "interpret":
        sums = sums.sum(axis=0)
    unit = jnp.swapaxes(bound, 1, 2)[..., None] * (settings.scale / _LARGEST)
    q_len = arrays["query"].shape[1]
    grad_query = (sums[:, :q_len].astype(jnp.float32) * unit).astype(query.dtype)
    return [grad_query, *(grad[:, :kv_len] for grad in grads)]


def _bound(
    key: jax.Array, value: jax.Array, grad_out: jax.Array, delta: jax.Array, heads: int
) -> jax.Array:
    """No part of a query's gradient is larger, but for its scale; float32 `[batch, heads, q_len]`.

    A weight's gradient is at most |grad_out| |value|, and weights add up to 1. Where a key or value
    is not finite, nor are those of all queries of its head.
    """

    def norm(array: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.sum(jnp.square(array.astype(jnp.float32)), axis=-1))

    largest_key = jnp.max(jnp.abs(key), axis=(1, 3)).astype(jnp.float32)
    of_keys = jnp.stack([largest_key, jnp.max(norm(value), axis=1)])
    of_keys = jnp.repeat(of_keys, heads // key.shape[2], axis=2)[..., None]  # [2, batch, heads, 1]
    rows = jnp.swapaxes(norm(grad_out), 1, 2)[..., : delta.shape[-1]]
    return jnp.maximum(of_keys[0] * (rows * of_keys[1] + jnp.abs(delta)), _LEAST_BOUND)


def _split(refs: tuple[Any, ...]) -> tuple[Any, Any, Refs]:
    """The sums, scales and the rest."""
    sums, query, key, value, grad_out, lse, delta, scale, *rest = refs
    return sums, scale, Refs.of((query, key, value, grad_out, lse, delta, *rest))


def _fetch(schedule: KeySchedule, refs: tuple[Any, ...], scratch: Scratch) -> None:
    sums, scale, rest = _split(refs)
    pipeline = Pipeline(schedule.lists, *scratch.stages)
    fetcher = Fetcher(schedule, rest, scratch, pipeline, sums, scale)
    for stage in range(pipeline.stages):
        mgpu.barrier_arrive(scratch.grads.used.at[i32(stage)])
    schedule.visit(fetcher.take, i32(0))
    mgpu.wait_smem_to_gmem(0)


def _compute(
    schedule: KeySchedule, refs: tuple[Any, ...], scratch: Scratch, warpgroup: Any
) -> None:
    _, _, rest = _split(refs)
    pipeline = Pipeline(schedule.lists, *scratch.stages)
    tile = schedule.tile(i32(0))
    Multiplier(schedule, warpgroup, rest, scratch, pipeline, tile).run(i32(0))


class Fetched(NamedTuple):
    """Of a step whose gradient of queries is still to be made: the head, and the units, negative
    where there is none; int32.
    """

    head: Any
    units: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Fetcher(hopper_dkv.Fetcher):
    """The warpgroup that fetches queries, and makes their gradient."""

    sums: Any
    scale: Any

    def take(self, round_: Any, step: Any) -> Any:
        """Tells of the tile of a round, and fetches what sees it. Returns the next step."""
        tile = self.schedule.tile(round_)
        everything = ~tile.whole
        masked, plain = self.number(tile)
        more = jnp.where(everything, plain, i32(0))
        masked, plain = masked + more, plain - more
        Notes(*self.scratch.notes).write(round_, Told(i32(0), masked, plain, round_))
        origin = self.schedule.settings.query_offset
        assert origin is not None
        first = step
        state = step, Fetched(i32(0), (i32(-1),) * tile.lists.group)

        def add(step: Any, last: Fetched) -> None:
            """Of the step before this one."""
            pl.when(step > first)(lambda: self._add(tile, step - i32(1), last, origin))

        def feed(member: Any, state: Any, part: str, masked: Any) -> Any:
            sides, steps = self._sides(tile, member), tile.steps(member)

            def one(at: At, state: Any) -> Any:
                step, last = state
                units = self.pipeline.units(at)
                self.pipeline.fetch(units, sides, step, masked, origin)
                add(step, last)
                kept = (u if e is True else jnp.where(e, u, i32(-1)) for u, _, e in units)
                return step + i32(1), Fetched(tile.head(member), tuple(kept))

            if part == "masked":
                return steps.visit_masked(one, state, everything=False)
            return steps.visit_plain(one, state)

        for part, mask in ("masked", True), ("plain", everything):
            body = functools.partial(feed, part=part, masked=mask)
            state = hopper_dkv.of_group(tile, body, state)
        step, _ = state
        add(*state)
        follows = self.schedule.has(round_ + i32(1)) & (step > first)
        pl.when(follows)(lambda: mgpu.barrier_arrive(self.scratch.grads.keys_used.at[i32(0)]))
        return step

    def _add(self, tile: KeyTile, step: Any, fetched: Fetched, origin: int) -> None:
        """Makes the gradient of a step's queries of those of its scores."""
        grads, interpreted = self.scratch.grads, self.schedule.settings.launcher == "interpret"
        stage = lax.rem(step, i32(self.pipeline.stages))
        mgpu.barrier_wait(grads.ready.at[stage])
        scale = load_numbers(grads.scale.at[stage], axis=0)
        dim, columns = self.refs.query.shape[-1], grads.sums.shape[-1]
        for start in range(0, dim, columns):

            def multiply(products: Any, start: int = start) -> jax.Array:
                for warpgroup in range(WARPGROUPS):
                    key = self.scratch.keys.key.at[warpgroup, :, pl.ds(start, columns)]
                    scores = grads.scores.at[stage, warpgroup]
                    mgpu.wgmma(products, scores.transpose((1, 0)), key)
                return products[...]

            found = pl.run_scoped(multiply, mgpu.ACC((ROWS, columns), jnp.float32))
            if start + columns == dim:
                mgpu.barrier_arrive(grads.used.at[stage])
            found = rounded(found, spread(scale, found), interpreted)
            mgpu.wait_smem_to_gmem(0, wait_read_only=True)
            grads.sums[...] = found
            mgpu.commit_smem()
            for place, unit in enumerate(fetched.units):

                @pl.when(unit >= i32(0))
                def _(place: int = place, unit: Any = unit, start: int = start) -> None:
                    tokens, rows = self.pipeline.tokens(unit, origin), self.pipeline.rows(place)
                    at = tile.batch, tokens, fetched.head, pl.ds(start, columns)
                    if interpreted:
                        mgpu.copy_smem_to_gmem(grads.sums.at[rows], self.sums.at[tile.rank, *at])
                    else:
                        target = self.sums.at[at]
                        mgpu.copy_smem_to_gmem(grads.sums.at[rows], target, reduction_op="add")

    def _sides(self, tile: KeyTile, member: Any) -> tuple[Side, Side]:
        queries, values = super()._sides(tile, member)
        head, batch = tile.head(member), tile.batch
        scale = (lambda tokens: self.scale.at[batch, head, tokens]), self.scratch.grads.scale
        return queries, values._replace(copies=(*values.copies, scale))


@dataclasses.dataclass(frozen=True)
class Multiplier(KeyHolder):
    """See `KeyHolder`. The place of a step is that of its stage."""

    def _release_keys(self, told: Told) -> None:
        used = self.scratch.grads.keys_used.at[i32(0)]
        pl.when(told.masked + told.plain > i32(0))(lambda: mgpu.barrier_wait(used))

    def _add(
        self, masked: Any, number: Any, state: tuple[Any, jax.Array, jax.Array]
    ) -> tuple[Any, jax.Array, jax.Array]:
        pipeline, grads, (stage, *sums) = self.pipeline, self.scratch.grads, state
        settings = self.tile.settings
        interpreted = settings.launcher == "interpret"
        mine = lax.optimization_barrier(self.warpgroup)  # see hopper_dkv.py
        mgpu.barrier_wait(pipeline.key_ready.at[stage])
        key, value = self.scratch.keys.key.at[mine], self.scratch.keys.value.at[mine]

        def multiply(products: Any) -> jax.Array:
            mgpu.wgmma(products, key, pipeline.key.at[stage].transpose((1, 0)))
            return products[...]

        queries = pipeline.key.shape[1]
        scores = pl.run_scoped(multiply, mgpu.ACC((ROWS, queries), jnp.float32))
        blank = functools.partial(self._blank, stage, mine)
        scores = lax.cond(number < masked, blank, lambda scores: scores, scores)
        lse = numbers_of(self.scratch.lse, stage, pl.ds(0, queries), scores)
        weights = jnp.exp2(scores * settings.exp2.scale - lse).astype(self.refs.key.dtype)
        mgpu.barrier_wait(pipeline.value_ready.at[stage])

        def hand_over(made: jax.Array) -> None:
            mgpu.barrier_wait(grads.used.at[stage])
            grads.scores.at[stage, mine][...] = made
            mgpu.commit_smem()
            mgpu.barrier_arrive(grads.ready.at[stage])

        grad_out = pipeline.value.at[stage]
        delta = numbers_of(self.scratch.delta, stage, pl.ds(0, queries), scores)
        if interpreted:

            def of_products(products: Any) -> jax.Array:
                mgpu.wgmma(products, value, grad_out.transpose((1, 0)))
                return self._grads(weights, products[...] - delta)

            made = pl.run_scoped(of_products, mgpu.ACC((ROWS, queries), jnp.float32))
            hand_over(made)
            pairs = (made, pipeline.key), (weights, pipeline.value)
            sums = [
                hopper.add_product(settings, one, a, b.at[stage])
                for one, (a, b) in zip(sums, pairs, strict=True)
            ]
        else:

            def add_all(refs: Any) -> None:
                grad_key, grad_value, products = refs
                mgpu.wgmma(products, value, grad_out.transpose((1, 0)))
                mgpu.wgmma(grad_value, weights, grad_out)
                hand_over(self._grads(weights, mgpu.wgmma_accumulator_load(products, wait_n=1)))
                mgpu.wgmma(grad_key, grads.scores.at[stage, mine], pipeline.key.at[stage])

            *sums, _ = pl.run_state(add_all)(tuple(map(mgpu.ACC.init, (*sums, -delta))))
        mgpu.barrier_arrive(pipeline.value_used.at[stage])
        mgpu.barrier_arrive(pipeline.key_used.at[stage])
        return pipeline.after(stage), *sums

    def _grads(self, weights: jax.Array, made: jax.Array) -> jax.Array:
        """Gradients of scores."""
        power = raised(weights.dtype)
        if self.tile.settings.launcher == "interpret":
            return (weights.astype(jnp.float32) * 2.0**-power * made).astype(weights.dtype)
        return product(weights, made, power)

    def _blank(self, stage: Any, warpgroup: Any, scores: jax.Array) -> jax.Array:
        """Scores of a step with a mask."""
        pipeline, kv_ids = self.pipeline, None
        if pipeline.ids is not None:
            kv_ids = load_numbers(self.scratch.keys.ids.at[warpgroup], axis=0)
        entries, q_ids = pipeline.entries_at(stage), pipeline.ids_at(stage)
        mask = self.tile.mask(entries, self._positions(), warpgroup, q_ids, kv_ids)
        return jnp.where(mask, scores, -jnp.inf)
