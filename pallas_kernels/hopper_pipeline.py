"""How the warpgroup that fetches hands tiles to those that multiply: see hopper.py."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mgpu

from pallas_kernels.block_lists import BlockLists
from pallas_kernels.hopper_tiles import (
    WARPGROUPS,
    At,
    Schedule,
    Task,
    Told,
    i32,
    load_numbers,
    shared,
)
from pallas_kernels.tiles import Tile

_NOTES = 2
_LANES = 128  # threads of a warpgroup, and keys that a step has at most


@dataclasses.dataclass(frozen=True)
class Notes:
    """What the warpgroup that fetches tells of each tile, before the others get to it."""

    words: Any
    ready: Any
    read: Any

    @classmethod
    def scratch(cls) -> tuple[Any, ...]:
        words = mgpu.SMEM((_NOTES, len(Told._fields)), jnp.int32)
        ready, read = (
            mgpu.Barrier(num_arrivals=number, num_barriers=_NOTES) for number in (1, WARPGROUPS)
        )
        return words, ready, read

    def write(self, number: Any, told: Told) -> None:
        """number: of the tile, of those that have been told of."""
        slot = lax.rem(number, i32(_NOTES))
        pl.when(number >= i32(_NOTES))(lambda: mgpu.barrier_wait(self.read.at[slot]))
        for place, word in enumerate(told):
            self.words[slot, place] = word
        mgpu.barrier_arrive(self.ready.at[slot])

    def take(self, number: Any) -> Told:
        slot = lax.rem(number, i32(_NOTES))
        mgpu.barrier_wait(self.ready.at[slot])
        told = Told(*(self.words[slot, place] for place in range(len(Told._fields))))
        mgpu.barrier_arrive(self.read.at[slot])
        return told


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Tiles of keys and values in shared memory, and what says that one is there, or done with.

    entries: of the keys of steps with a mask, int32 `[stages, 128]`: position << rows | one bit for
    each part of the queries that sees it; without bits, and further than all, where there is no
    such key. entries_ready: of those steps alone.
    """

    lists: BlockLists
    key: Any
    value: Any
    entries: Any
    entries_ready: Any
    key_ready: Any
    value_ready: Any
    key_used: Any
    value_used: Any
    ids: Any = None

    @classmethod
    def scratch(
        cls, tile: Tile, lists: BlockLists, dims: tuple[int, int], dtype: Any, segments: bool
    ) -> tuple[Any, ...]:
        copies = lists.group * (2 if segments else 1)
        entries_ready = mgpu.Barrier(num_arrivals=1, num_barriers=tile.num_stages)
        key_ready = mgpu.Barrier(num_arrivals=copies, num_barriers=tile.num_stages)
        ready = mgpu.Barrier(num_arrivals=lists.group, num_barriers=tile.num_stages)
        used = mgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=tile.num_stages)
        tiles = [shared((tile.num_stages, tile.block_kv, dim), dtype) for dim in dims]
        ids = [mgpu.SMEM((tile.num_stages, tile.block_kv), jnp.int32)] * segments
        entries = mgpu.SMEM((tile.num_stages, _LANES), jnp.int32)
        return *tiles, entries, entries_ready, key_ready, ready, used, used, *ids

    @property
    def stages(self) -> int:
        return int(self.key.shape[0])

    def ids_at(self, slot: Any) -> jax.Array | None:
        """The segment ids of the keys of a stage, int32 `[keys]`; None where there are none."""
        if self.ids is None:
            return None
        ids = load_numbers(self.ids.at[slot], axis=1)
        mgpu.commit_smem()  # read before the next copy into it, which is made by another unit
        return ids

    def after(self, slot: Any) -> Any:
        """The stage that comes after another one.

        The warpgroups that multiply count by it: what they would work out from the number of steps
        that they are told, ptxas keeps in registers of the threads, and not in those of the warp.
        """
        if self.stages == 2:
            return i32(1) - slot
        return jnp.where(slot == i32(self.stages - 1), i32(0), slot + i32(1))

    def entries_at(self, slot: Any) -> jax.Array:
        """Those of a step with a mask, int32 `[keys]`."""
        mgpu.barrier_wait(self.entries_ready.at[slot])
        return load_numbers(self.entries.at[slot, pl.ds(0, self.key.shape[1])], axis=1)

    def _write_down(self, slot: Any, units: list[tuple[Any, Any, Any]]) -> None:
        """Of a step with a mask: for each of its units number, parts that see it, and whether it
        exists.
        """
        size, rows = self.lists.unit, self.lists.rows
        lane = mgpu.broadcasted_iota(
            jnp.int32, (_LANES,), 0, layout=mgpu.Layout.WG_STRIDED((_LANES,), vec_size=1)
        )
        everyone, place_of_lane = (1 << rows) - 1, lax.div(lane, i32(size))
        nowhere = np.iinfo(np.int32).max & ~everyone
        entries = jnp.full_like(lane, nowhere)
        for place, (unit, bits, exists) in enumerate(units):
            key = lane + (unit - i32(place)) * i32(size)
            entry = (key << rows) | (bits & i32(everyone))
            here = place_of_lane == i32(place)
            entries = jnp.where(here if exists is True else here & exists, entry, entries)
        self.entries[slot] = entries
        mgpu.barrier_arrive(self.entries_ready.at[slot])

    def feed(self, task: Task, refs: KeyRefs, group: int, step: Any, all_masked: bool) -> Any:
        """Fetches what a tile takes, as soon as there is room. Returns the next step.

        all_masked: whether the tile takes every step as one with a mask.
        """
        kv_head, size = lax.div(task.head, i32(group)), self.lists.unit
        sides = (
            (refs.key, self.key, self.key_ready, self.key_used),
            (refs.value, self.value, self.value_ready, self.value_used),
        )

        def fetch(at: At, step: Any, masked: bool) -> Any:
            slot = lax.rem(step, i32(self.stages))
            units = [at(place) for place in range(self.lists.group)]
            for source, target, ready, used in sides:

                @pl.when(step >= i32(self.stages))
                def _(used: Any = used) -> None:
                    mgpu.barrier_wait(used.at[slot])

                if source is refs.key and masked:
                    self._write_down(slot, units)
                for place, (unit, _, _) in enumerate(units):
                    tokens = pl.ds(unit * i32(size), size)
                    rows = pl.ds(place * size, size)
                    mgpu.copy_gmem_to_smem(
                        source.at[task.batch, tokens, kv_head],
                        target.at[slot, rows],
                        ready.at[slot],
                    )
                    if source is refs.key and refs.ids is not None:
                        mgpu.copy_gmem_to_smem(
                            refs.ids.at[task.batch, tokens], self.ids.at[slot, rows], ready.at[slot]
                        )
            return step + i32(1)

        masked, plain = (functools.partial(fetch, masked=masked) for masked in (True, False))
        step = task.steps.visit_masked(masked, step, everything=all_masked)
        return step if all_masked else task.steps.visit_plain(plain, step)


class KeyRefs(NamedTuple):
    """Keys, values and, where there are segments, the ids of keys."""

    key: Any
    value: Any
    ids: Any = None


@dataclasses.dataclass(frozen=True)
class Fetcher:
    """The warpgroup that fetches."""

    schedule: Schedule
    keys: KeyRefs
    notes: Notes
    pipeline: Pipeline

    def take(self, number: Any, round_: Any, step: Any, all_masked: bool = False) -> Any:
        """Tells of the tile of a round, and fetches its keys. Returns the next step.

        number: of its note.
        """
        task = self.schedule.task(round_)
        steps = task.steps.number(everything=all_masked)
        self.notes.write(number, Told(task.place, *steps))
        group = self.schedule.heads // self.keys.key.shape[2]
        return self.pipeline.feed(task, self.keys, group, step, all_masked)
