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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mgpu

from pallas_kernels import hopper
from pallas_kernels.block_lists import BlockLists
from pallas_kernels.call import Arrays, Settings
from pallas_kernels.hopper_keys import KeySchedule, KeyTile, Piece
from pallas_kernels.hopper_pipeline import Notes, Pipeline, Side
from pallas_kernels.hopper_ptx import product
from pallas_kernels.hopper_tiles import (
    ROWS,
    WARPGROUPS,
    Told,
    i32,
    load_numbers,
    operands,
    shared,
)
from pallas_kernels.tiles import MOSAIC_ROWS, Tile

_HALVES = 2  # of the queries of a step
_COLUMNS = 32  # of sums in float32 that are stored at a time


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
    lse = hopper.padded(arrays["lse"] - _raised(key.dtype), jnp.inf)
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


class Refs(NamedTuple):
    """Operands and results. ids: of queries and of keys, or nothing."""

    query: Any
    key: Any
    value: Any
    grad_out: Any
    lse: Any
    delta: Any
    ids: tuple[Any, ...]
    grad_key: Any
    grad_value: Any

    @classmethod
    def of(cls, refs: tuple[Any, ...]) -> Refs:
        query, key, value, grad_out, lse, delta, *ids, grad_key, grad_value = refs
        return cls(query, key, value, grad_out, lse, delta, tuple(ids), grad_key, grad_value)


class Keys(NamedTuple):
    """A program's keys in shared memory, `[64, ...]` of each warpgroup, or what becomes of them.

    positions: int32, as `KeyTile.positions`. ids: of segments; None where there are none. columns:
    some of the sums in float32, where those of a head are in several; otherwise None.
    """

    key: Any
    value: Any
    positions: Any
    ids: Any
    columns: Any


class Scratch(NamedTuple):
    """keys_ready, values_ready: of each warpgroup. lse, delta: of the queries of each stage."""

    keys: Keys
    keys_ready: Any
    values_ready: Any
    notes: Any
    stages: Any
    lse: Any
    delta: Any

    @classmethod
    def of(
        cls, tile: Tile, lists: BlockLists, dims: tuple[int, int], dtype: Any, out_dtype: Any,
        segments: bool,
    ) -> Scratch:  # fmt: skip
        key, value = (shared((WARPGROUPS, ROWS, dim), dtype) for dim in dims)
        columns = shared((WARPGROUPS, ROWS, _COLUMNS), out_dtype) if out_dtype != dtype else None
        positions = mgpu.SMEM((WARPGROUPS, MOSAIC_ROWS), jnp.int32)
        ids = mgpu.SMEM((WARPGROUPS, ROWS), jnp.int32) if segments else None
        pieces = max(1, ROWS * lists.rows // lists.fixed_tile)
        numbers = mgpu.SMEM((tile.num_stages, tile.block_q), jnp.float32)
        return cls(
            Keys(key, value, positions, ids, columns),
            mgpu.Barrier(num_arrivals=pieces * (1 + segments), num_barriers=WARPGROUPS),
            mgpu.Barrier(num_arrivals=pieces, num_barriers=WARPGROUPS),
            Notes.scratch(),
            Pipeline.scratch(tile.num_stages, lists, dims, dtype, segments, numbers=1),
            numbers,
            numbers,
        )


def _fetch(schedule: KeySchedule, refs: tuple[Any, ...], scratch: Scratch) -> None:
    fetcher = Fetcher(schedule, Refs.of(refs), scratch, Pipeline(schedule.lists, *scratch.stages))
    schedule.visit(fetcher.take, i32(0))


def _compute(
    schedule: KeySchedule, refs: tuple[Any, ...], scratch: Scratch, warpgroup: Any
) -> None:
    pipeline = Pipeline(schedule.lists, *scratch.stages)
    Multiplier(schedule, warpgroup, Refs.of(refs), scratch, pipeline, schedule.tile(i32(0))).run()


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

        def of_group(body: Callable[[Any, Any], Any], state: Any) -> Any:
            return lax.fori_loop(i32(0), i32(tile.members), body, state)

        def count(member: Any, totals: tuple[Any, Any]) -> tuple[Any, Any]:
            masked, plain = tile.steps(member).number(everything=False)
            return totals[0] + masked, totals[1] + plain

        masked, plain = of_group(count, (i32(0), i32(0)))
        Notes(*self.scratch.notes).write(round_, Told(i32(0), masked, plain, round_))
        origin = self.schedule.settings.query_offset
        assert origin is not None
        for part in ("masked", "plain"):

            def feed(member: Any, step: Any, part: Any = part) -> Any:
                sides = self._sides(tile, member)
                return self.pipeline.feed(tile.steps(member), sides, step, part, origin=origin)

            step = of_group(feed, step)
        return step

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
class Multiplier:
    """A warpgroup that multiplies. tile: the one that it is at, the first one for `run`."""

    schedule: KeySchedule
    warpgroup: Any
    refs: Refs
    scratch: Scratch
    pipeline: Pipeline
    tile: KeyTile

    def run(self) -> None:
        """All tiles, from the first one on."""
        self._load_keys()
        self._load_values()
        told = Notes(*self.scratch.notes).take(i32(0))
        self.schedule.visit(
            lambda round_, state: self._at(round_)._take(round_, state), (told, i32(0))
        )

    def _at(self, round_: Any) -> Multiplier:
        return dataclasses.replace(self, tile=self.schedule.tile(round_))

    def _take(self, round_: Any, state: tuple[Told, Any]) -> tuple[Told, Any]:
        told, slot = state
        mgpu.barrier_wait(self.scratch.keys_ready.at[self.warpgroup])
        mgpu.barrier_wait(self.scratch.values_ready.at[self.warpgroup])
        dims = (ref.shape[-1] for ref in (self.refs.key, self.refs.value))
        state = slot, *(hopper.zeros(dim) for dim in dims)
        add = functools.partial(self._add, told.masked)
        slot, *grads = lax.fori_loop(i32(0), told.masked + told.plain, add, state)
        scales = self.tile.settings.scale, 2.0 ** -_raised(self.refs.key.dtype)
        grads = [grad * scale for grad, scale in zip(grads, scales, strict=True)]
        if "kv_length" in self.tile.refs:
            beyond = self._positions() >= self.tile.refs["kv_length"][self.tile.batch]
            grads = [hopper.blank(grad, beyond) for grad in grads]
        mgpu.commit_smem()  # all of the warpgroup have done with its keys
        following = round_ + i32(1)
        more, after = self.schedule.has(following), self._at(following)
        pl.when(more)(after._load_keys)
        self._store(*grads)
        pl.when(more)(after._load_values)
        notes = Notes(*self.scratch.notes)
        return lax.cond(more, lambda: notes.take(following), lambda: told), slot

    def _load_keys(self) -> None:
        keys, ready = self.scratch.keys, self.scratch.keys_ready.at[self.warpgroup]
        keys.positions[self.warpgroup] = self.tile.positions()
        mgpu.commit_smem()
        batch, head = self.tile.batch, self.tile.kv_head
        for piece, tokens in self._pieces():
            copies = [(self.refs.key.at[batch, tokens, head], keys.key)]
            if self.refs.ids:
                copies.append((self.refs.ids[1].at[batch, tokens], keys.ids))
            for source, target in copies:
                rows = target.at[self.warpgroup, pl.ds(piece.place, piece.size)]
                mgpu.copy_gmem_to_smem(source, rows, ready)

    def _load_values(self) -> None:
        value, ready = self.scratch.keys.value, self.scratch.values_ready.at[self.warpgroup]
        for piece, tokens in self._pieces():
            source = self.refs.value.at[self.tile.batch, tokens, self.tile.kv_head]
            rows = value.at[self.warpgroup, pl.ds(piece.place, piece.size)]
            mgpu.copy_gmem_to_smem(source, rows, ready)

    def _pieces(self) -> list[tuple[Piece, Any]]:
        """With the tokens of each, those of some other where there are none."""
        return [
            (piece, pl.ds(jnp.maximum(piece.position, i32(0)), piece.size))
            for piece in self.tile.pieces(self.warpgroup)
        ]

    def _store(self, grad_key: jax.Array, grad_value: jax.Array) -> None:
        """Where values were, one after the other: the next keys are on their way."""
        keys = self.scratch.keys
        buffer = keys.value if keys.columns is None else keys.columns
        columns = buffer.shape[-1]
        for grad, ref in ((grad_value, self.refs.grad_value), (grad_key, self.refs.grad_key)):
            for start in range(0, grad.shape[1], columns):
                some = grad[:, start : start + columns].astype(buffer.dtype)
                buffer.at[self.warpgroup][...] = some
                mgpu.commit_smem()
                self._copy(buffer, ref, start)
                mgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _copy(self, buffer: Any, ref: Any, first: int) -> None:
        """Columns of a gradient, from one on, to where they belong."""
        columns = pl.ds(first, buffer.shape[-1])
        for piece in self.tile.pieces(self.warpgroup):

            @pl.when(piece.position >= i32(0))
            def _(piece: Any = piece) -> None:
                tokens = pl.ds(piece.position, piece.size)
                target = ref.at[self.tile.batch, tokens, self.tile.sums, columns]
                rows = self.warpgroup, pl.ds(piece.place, piece.size)
                mgpu.copy_smem_to_gmem(buffer.at[rows], target)

    def _positions(self) -> jax.Array:
        mine = self.warpgroup, pl.ds(self.warpgroup * i32(ROWS), ROWS)
        return load_numbers(self.scratch.keys.positions.at[mine], axis=0)

    def _add(
        self, masked: Any, number: Any, state: tuple[Any, jax.Array, jax.Array]
    ) -> tuple[Any, jax.Array, jax.Array]:
        """Takes in the queries of a stage. masked: how many steps have a mask, the first ones."""
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
            lse = _numbers(self.scratch.lse, slot, part, halves[number])
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
                grads -= _numbers(self.scratch.delta, slot, part, grads)
                raised = _raised(some.dtype)
                if interpreted:
                    return (some.astype(jnp.float32) * 2.0**-raised * grads).astype(some.dtype)
                return product(some, grads, raised)

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


def _raised(dtype: Any) -> int:
    """Of weights, the power of two that they are multiplied by: in float16, those of long rows
    would have few digits, which gradients of keys are made from.
    """
    return 14 if dtype == jnp.float16 else 0


def _halves(queries: int) -> list[slice]:
    half = queries // _HALVES
    return [slice(start, start + half) for start in range(0, queries, half)]


def _parts(queries: int) -> list[Any]:
    """The halves, as indices into shared memory."""
    return [pl.ds(half.start, half.stop - half.start) for half in _halves(queries)]


def _numbers(source: Any, slot: Any, part: Any, like: jax.Array) -> jax.Array:
    """A number for each of some queries of a stage, as an array of keys."""
    return lax.broadcast_in_dim(load_numbers(source.at[slot, part], axis=1), like.shape, [1])
