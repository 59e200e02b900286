"""What Hopper's kernels that hold keys and walk queries share: see hopper.py.

A program has 128 keys of a head at a time, 64 a warpgroup. Before a tile's sums are stored, the
next tile's keys are on their way to where they were.
"""

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
from pallas_kernels.hopper_keys import KeySchedule, KeyTile, Piece
from pallas_kernels.hopper_pipeline import Notes, Pipeline
from pallas_kernels.hopper_tiles import ROWS, WARPGROUPS, Told, i32, load_numbers, shared
from pallas_kernels.tiles import MOSAIC_ROWS, Tile

_COLUMNS = 32  # of sums in float32 that are stored at a time


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
    """keys_ready, values_ready: of each warpgroup. lse, delta: of the queries of each stage.

    grads: what makes the gradient of queries; None where that is another kernel's.
    """

    keys: Keys
    keys_ready: Any
    values_ready: Any
    notes: Any
    stages: Any
    lse: Any
    delta: Any
    grads: Any

    @classmethod
    def of(
        cls, tile: Tile, lists: BlockLists, dims: tuple[int, int], dtype: Any, out_dtype: Any,
        segments: bool, grads: Any = None,
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
            Pipeline.scratch(
                tile.num_stages, lists, dims, dtype, segments, (1, 1 + (grads is not None))
            ),
            numbers,
            numbers,
            grads,
        )


@dataclasses.dataclass(frozen=True)
class KeyHolder:
    """A warpgroup that multiplies keys and values with the queries that see them.

    tile: the one that it is at, the first one for `run`.
    """

    schedule: KeySchedule
    warpgroup: Any
    refs: Refs
    scratch: Scratch
    pipeline: Pipeline
    tile: KeyTile

    def run(self, place: Any) -> None:
        """All tiles, from the first one on. place: as `_add` counts it, of the first step."""
        self._load_keys()
        self._load_values()
        told = Notes(*self.scratch.notes).take(i32(0))
        self.schedule.visit(
            lambda round_, state: self._at(round_)._take(round_, state), (told, place)
        )

    def _add(
        self, masked: Any, number: Any, state: tuple[Any, jax.Array, jax.Array]
    ) -> tuple[Any, jax.Array, jax.Array]:
        """Takes in the queries of a step. masked: how many steps have a mask, the first ones.

        state: the place of the step, and the two sums. Returns those of the next one.
        """
        raise NotImplementedError

    def _release_keys(self, told: Told) -> None:
        """Waits until nobody else reads them."""

    def _at(self, round_: Any) -> KeyHolder:
        return dataclasses.replace(self, tile=self.schedule.tile(round_))

    def _take(self, round_: Any, state: tuple[Told, Any]) -> tuple[Told, Any]:
        told, place = state
        mgpu.barrier_wait(self.scratch.keys_ready.at[self.warpgroup])
        mgpu.barrier_wait(self.scratch.values_ready.at[self.warpgroup])
        dims = (ref.shape[-1] for ref in (self.refs.key, self.refs.value))
        state = place, *(hopper.zeros(dim) for dim in dims)
        add = functools.partial(self._add, told.masked)
        place, *grads = lax.fori_loop(i32(0), told.masked + told.plain, add, state)
        scales = self.tile.settings.scale, 2.0 ** -raised(self.refs.key.dtype)
        grads = [grad * scale for grad, scale in zip(grads, scales, strict=True)]
        if "kv_length" in self.tile.refs:
            beyond = self._positions() >= self.tile.kv_length
            grads = [hopper.blank(grad, beyond) for grad in grads]
        mgpu.commit_smem()  # all of the warpgroup have done with its keys
        following = round_ + i32(1)
        more, after = self.schedule.has(following), self._at(following)

        @pl.when(more)
        def _() -> None:
            self._release_keys(told)
            after._load_keys()

        self._store(*grads)
        pl.when(more)(after._load_values)
        notes = Notes(*self.scratch.notes)
        return lax.cond(more, lambda: notes.take(following), lambda: told), place

    def _load_keys(self) -> None:
        keys, ready = self.scratch.keys, self.scratch.keys_ready.at[self.warpgroup]
        keys.positions[self.warpgroup] = self.tile.positions()
        mgpu.commit_smem()
        batch, head = self.tile.batch, self.tile.kv_head
        for piece, tokens in self._pieces():
            rows = self.warpgroup, pl.ds(piece.place, piece.size)
            mgpu.copy_gmem_to_smem(self.refs.key.at[batch, tokens, head], keys.key.at[rows], ready)
            if self.refs.ids:
                tokens = pl.ds(jnp.maximum(piece.position, i32(0)), piece.size)
                ids = self.refs.ids[1].at[batch, tokens]
                mgpu.copy_gmem_to_smem(ids, keys.ids.at[rows], ready)

    def _load_values(self) -> None:
        value, ready = self.scratch.keys.value, self.scratch.values_ready.at[self.warpgroup]
        for piece, tokens in self._pieces():
            source = self.refs.value.at[self.tile.batch, tokens, self.tile.kv_head]
            rows = value.at[self.warpgroup, pl.ds(piece.place, piece.size)]
            mgpu.copy_gmem_to_smem(source, rows, ready)

    def _pieces(self) -> list[tuple[Piece, Any]]:
        """With the tokens of each, zeros from beyond the end where there are none."""
        beyond = i32(self.refs.key.shape[1])
        return [
            (piece, pl.ds(jnp.where(piece.position < 0, beyond, piece.position), piece.size))
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


def raised(dtype: Any) -> int:
    """Of weights, the power of two that they are multiplied by: in float16, those of long rows
    would have few digits, which gradients of keys are made from.
    """
    return 14 if dtype == jnp.float16 else 0


def numbers_of(source: Any, slot: Any, part: Any, like: jax.Array) -> jax.Array:
    """A number for each of some queries of a stage, as an array of keys."""
    return lax.broadcast_in_dim(load_numbers(source.at[slot, part], axis=1), like.shape, [1])
