"""The dk/dv kernel on Hopper: see hopper.py.

A program has 128 keys of a head at a time, 64 a warpgroup, and takes 128 queries a step. Its sums
fill more than half of the registers, and ptxas waits for each product by itself where the rest does
not do: weights are kept as what the products take, gradients of scores made for half of the queries
at a time, and masks in a branch of the one loop.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mgpu

from pallas_kernels import hopper
from pallas_kernels.call import Arrays, Settings
from pallas_kernels.hopper_holder import KeyHolder, Refs, Scratch, numbers_of, raised
from pallas_kernels.hopper_keys import KeySchedule, KeyTile
from pallas_kernels.hopper_pipeline import Notes, Pipeline, Side
from pallas_kernels.hopper_ptx import product
from pallas_kernels.hopper_tiles import ROWS, Told, i32, load_numbers, operands

_HALVES = 2  # of the queries of a step


def dkv(
    settings: Settings,
    arrays: Arrays,
    list_arrays: Arrays,
    out_shape: list[jax.ShapeDtypeStruct],
) -> Sequence[jax.Array]:
    """As `backward._dkv`."""
    query, grad_out = hopper.queries_that_count(arrays)
    key, value = (hopper.in_eights(arrays[name]) for name in ("key", "value"))
    ids, lists = hopper.segment_ids(arrays), settings.layouts.dkv()
    scratch = Scratch.of(
        settings.tiles.dkv, lists, (key.shape[-1], value.shape[-1]), key.dtype,
        out_shape[0].dtype, len(ids) > 0,
    )  # fmt: skip
    # Weights come out so many times as large as the LSE is less.
    lse = hopper.padded(arrays["lse"] - raised(key.dtype), jnp.inf)
    delta = hopper.padded(arrays["delta"], 0.0)
    (batch, kv_len, sums, _), kv_heads = out_shape[0].shape, key.shape[2]
    grads = hopper.call(
        "s2_attention_dkv", _compute, _fetch,
        KeySchedule.of(settings, lists, arrays, sums // kv_heads),
        (query, key, value, grad_out, lse, delta, *ids),
        operands(settings, lists, arrays, list_arrays),
        [
            jax.ShapeDtypeStruct((batch, key.shape[1], *out.shape[2:]), out.dtype)
            for out in out_shape
        ],
        scratch,
    )  # fmt: skip
    return [grad[:, :kv_len] for grad in grads]


def _fetch(schedule: KeySchedule, refs: tuple[Any, ...], scratch: Scratch) -> None:
    fetcher = Fetcher(schedule, Refs.of(refs), scratch, Pipeline(schedule.lists, *scratch.stages))
    schedule.visit(fetcher.take, i32(0))


def _compute(
    schedule: KeySchedule, refs: tuple[Any, ...], scratch: Scratch, warpgroup: Any
) -> None:
    pipeline = Pipeline(schedule.lists, *scratch.stages)
    Multiplier(schedule, warpgroup, Refs.of(refs), scratch, pipeline, schedule.tile(i32(0))).run(
        i32(0)
    )


@dataclasses.dataclass(frozen=True)
class Fetcher:
    """The warpgroup that fetches queries."""

    schedule: KeySchedule
    refs: Refs
    scratch: Scratch
    pipeline: Pipeline

    def take(self, round_: Any, step: Any) -> Any:
        """Tells of the tile of a round, and fetches what sees it. Returns the next step."""
        tile = self.schedule.tile(round_)
        Notes(*self.scratch.notes).write(round_, Told(i32(0), *self.number(tile), round_))
        origin = self.schedule.settings.query_offset
        assert origin is not None
        for part in ("masked", "plain"):

            def feed(member: Any, step: Any, part: Any = part) -> Any:
                sides = self._sides(tile, member)
                return self.pipeline.feed(tile.steps(member), sides, step, part, origin=origin)

            step = of_group(tile, feed, step)
        return step

    def number(self, tile: KeyTile) -> tuple[Any, Any]:
        """How many steps of a tile have a mask, and how many have none."""

        def count(member: Any, totals: tuple[Any, Any]) -> tuple[Any, Any]:
            masked, plain = tile.steps(member).number(everything=False)
            return totals[0] + masked, totals[1] + plain

        return of_group(tile, count, (i32(0), i32(0)))

    def _sides(self, tile: KeyTile, member: Any) -> tuple[Side, Side]:
        head, batch = tile.head(member), tile.batch
        refs, scratch, pipeline = self.refs, self.scratch, self.pipeline

        def rows(source: Any) -> Callable[[Any], Any]:
            return lambda tokens: source.at[batch, tokens, head]

        def numbers(source: Any) -> Callable[[Any], Any]:
            return lambda tokens: source.at[batch, head, tokens]

        queries = [(rows(refs.query), pipeline.key), (numbers(refs.lse), scratch.lse)]
        if refs.ids:
            queries.append((lambda tokens: refs.ids[0].at[batch, tokens], pipeline.ids))
        grads = (rows(refs.grad_out), pipeline.value), (numbers(refs.delta), scratch.delta)
        return (
            Side(tuple(queries), pipeline.key_ready, pipeline.key_used),
            Side(grads, pipeline.value_ready, pipeline.value_used),
        )


@dataclasses.dataclass(frozen=True)
class Multiplier(KeyHolder):
    """See `KeyHolder`. The place of a step is the slot of its stage."""

    def _add(
        self, masked: Any, number: Any, state: tuple[Any, jax.Array, jax.Array]
    ) -> tuple[Any, jax.Array, jax.Array]:
        pipeline, (slot, *sums) = self.pipeline, state
        # What addresses of keys are made of seems new in each turn. Otherwise all of them, which no
        # turn changes, are kept in registers.
        mine = lax.optimization_barrier(self.warpgroup)
        mgpu.barrier_wait(pipeline.key_ready.at[slot])
        key, value = self.scratch.keys.key.at[mine], self.scratch.keys.value.at[mine]

        def multiply(products: Any) -> jax.Array:
            mgpu.wgmma(products, key, pipeline.key.at[slot].transpose((1, 0)))
            return products[...]

        queries = pipeline.key.shape[1]
        scores = pl.run_scoped(multiply, mgpu.ACC((ROWS, queries), jnp.float32))
        halves = [scores[:, columns] for columns in _halves(queries)]
        blank = functools.partial(self._blank, slot, mine)
        halves = lax.cond(number < masked, blank, lambda halves: halves, halves)
        weights = self._weights(slot, halves)
        mgpu.barrier_wait(pipeline.value_ready.at[slot])
        sums = self._accumulate(slot, value, weights, sums)
        # What was loaded from the stage (LSE, delta) has been used, and needs no fence before
        # copies overwrite it. The interpreter has those of its own products.
        mgpu.barrier_arrive(pipeline.value_used.at[slot])
        mgpu.barrier_arrive(pipeline.key_used.at[slot])
        return pipeline.after(slot), *sums

    def _blank(self, slot: Any, warpgroup: Any, halves: list[jax.Array]) -> list[jax.Array]:
        """Scores of a step with a mask, for each half of the queries."""
        pipeline, kv_ids = self.pipeline, None
        if pipeline.ids is not None:
            kv_ids = load_numbers(self.scratch.keys.ids.at[warpgroup], axis=0)
        mgpu.barrier_wait(pipeline.entries_ready.at[slot])
        blanked = []
        for scores, part in zip(halves, _parts(pipeline.key.shape[1]), strict=True):
            entries, q_ids = pipeline.some_entries(slot, part), pipeline.ids_at(slot, part)
            mask = self.tile.mask(entries, self._positions(), warpgroup, q_ids, kv_ids)
            # One after the other, for fewer registers.
            scores, slot = lax.optimization_barrier((jnp.where(mask, scores, -jnp.inf), slot))
            blanked.append(scores)
        return blanked

    def _weights(self, slot: Any, halves: list[jax.Array]) -> list[jax.Array]:
        """Of each half of the queries. One after the other, for fewer registers."""
        weights: list[jax.Array] = []
        for number, part in enumerate(_parts(self.pipeline.key.shape[1])):
            lse = numbers_of(self.scratch.lse, slot, part, halves[number])
            exponents = halves[number] * self.tile.settings.exp2.scale - lse
            weights.append(jnp.exp2(exponents).astype(self.refs.key.dtype))
            rest = tuple(halves[number + 1 :])
            weights[-1], *halves[number + 1 :] = lax.optimization_barrier((weights[-1], *rest))
        return weights

    def _accumulate(
        self, slot: Any, value: Any, weights: list[jax.Array], sums: list[jax.Array]
    ) -> list[jax.Array]:
        """The gradients of keys, not scaled, and of values with those of a stage."""
        pipeline, settings = self.pipeline, self.tile.settings
        parts = _parts(pipeline.key.shape[1])
        interpreted = settings.launcher == "interpret"

        def grad_scores(number: int, add: Callable[[jax.Array, Any], None]) -> jax.Array:
            """add: products of a register and of shared memory to the gradients of values."""
            some, part = weights[number], parts[number]
            grad_out = pipeline.value.at[slot, part]

            def of_products(products: Any) -> jax.Array:
                mgpu.wgmma(products, value, grad_out.transpose((1, 0)))
                add(some, grad_out)
                grads = mgpu.wgmma_accumulator_load(products, wait_n=0 if interpreted else 1)
                grads -= numbers_of(self.scratch.delta, slot, part, grads)
                power = raised(some.dtype)
                if interpreted:
                    return (some.astype(jnp.float32) * 2.0**-power * grads).astype(some.dtype)
                return product(some, grads, power)

            return pl.run_scoped(of_products, mgpu.ACC((ROWS, some.shape[1]), jnp.float32))

        if interpreted:
            for number, part in enumerate(parts):
                grads = grad_scores(number, lambda *_: None)
                pairs = (grads, pipeline.key), (weights[number], pipeline.value)
                sums = [
                    hopper.add_product(settings, one, a, b.at[slot, part])
                    for one, (a, b) in zip(sums, pairs, strict=True)
                ]
            return sums

        def add_all(refs: Any) -> None:
            grad_key, grad_value = refs
            for number, part in enumerate(parts):
                grads = grad_scores(number, functools.partial(mgpu.wgmma, grad_value))
                mgpu.wgmma(grad_key, grads, pipeline.key.at[slot, part])

        return list(pl.run_state(add_all)(tuple(map(mgpu.ACC.init, sums))))


def of_group(tile: KeyTile, body: Callable[[Any, Any], Any], state: Any) -> Any:
    """`body(member, state) -> state` for each query head that a tile is for."""
    return lax.fori_loop(i32(0), i32(tile.members), body, state)


def _halves(queries: int) -> list[slice]:
    half = queries // _HALVES
    return [slice(start, start + half) for start in range(0, queries, half)]


def _parts(queries: int) -> list[Any]:
    """The halves, as indices into shared memory."""
    return [pl.ds(half.start, half.stop - half.start) for half in _halves(queries)]
