"""How the warpgroup that fetches hands tiles to those that multiply: see hopper.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

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
    Steps,
    Task,
    Told,
    i32,
    load_numbers,
    shared,
)

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


class Side(NamedTuple):
    """Half of what a step brings, with barriers of its own.

    copies: what to copy, as `tokens -> source`, and where to, `[stages, tokens, ...]`.
    """

    copies: tuple[tuple[Callable[[Any], Any], Any], ...]
    ready: Any
    used: Any


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Tiles of keys and values in shared memory, and what says that one is there, or done with.

    Of queries and their gradients, in the kernel that walks those.
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
        cls,
        stages: int,
        lists: BlockLists,
        dims: tuple[int, int],
        dtype: Any,
        segments: bool,
        numbers: tuple[int, int] = (0, 0),
    ) -> tuple[Any, ...]:
        """numbers: how many arrays of one number a token come with each of the two."""
        group, tokens = lists.group, lists.group * lists.unit
        entries_ready = mgpu.Barrier(num_arrivals=1, num_barriers=stages)
        key_ready, value_ready = (
            mgpu.Barrier(num_arrivals=group * copies, num_barriers=stages)
            for copies in (1 + numbers[0] + segments, 1 + numbers[1])
        )
        used = mgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages)
        tiles = [shared((stages, tokens, dim), dtype) for dim in dims]
        ids = [mgpu.SMEM((stages, tokens), jnp.int32)] * segments
        entries = mgpu.SMEM((stages, _LANES), jnp.int32)
        return *tiles, entries, entries_ready, key_ready, value_ready, used, used, *ids

    @property
    def stages(self) -> int:
        return int(self.key.shape[0])

    def ids_at(self, slot: Any, tokens: Any = ...) -> jax.Array | None:
        """The segment ids of the keys of a stage, int32 `[keys]`; None where there are none."""
        if self.ids is None:
            return None
        ids = load_numbers(self.ids.at[slot, tokens], axis=1)
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
        return self.some_entries(slot, pl.ds(0, self.key.shape[1]))

    def some_entries(self, slot: Any, tokens: Any) -> jax.Array:
        """The same, once they are there, of some keys."""
        return load_numbers(self.entries.at[slot, tokens], axis=1)

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

    def feed(
        self, steps: Steps, sides: tuple[Side, Side], step: Any, part: Literal["masked", "plain"],
        everything: bool = False, origin: int = 0,
    ) -> Any:  # fmt: skip
        """Fetches what a tile takes, as soon as there is room. Returns the next step.

        part: of the steps. everything: all of them have a mask. origin: position of row 0.
        """

        def fetch(at: At, step: Any) -> Any:
            self.fetch(self.units(at), sides, step, masked=part == "masked", origin=origin)
            return step + i32(1)

        if part == "masked":
            return steps.visit_masked(fetch, step, everything=everything)
        return steps.visit_plain(fetch, step)

    def units(self, at: At) -> list[tuple[Any, Any, Any]]:
        return [at(place) for place in range(self.lists.group)]

    def fetch(
        self, units: list[tuple[Any, Any, Any]], sides: tuple[Side, Side], step: Any,
        masked: Any, origin: int,
    ) -> None:  # fmt: skip
        """Fetches what a step takes, as soon as there is room. units: as `At` says of each. masked:
        whether it has a mask.
        """
        slot = lax.rem(step, i32(self.stages))
        for side in sides:

            @pl.when(step >= i32(self.stages))
            def _(used: Any = side.used) -> None:
                mgpu.barrier_wait(used.at[slot])

            if side is sides[0] and masked is not False:
                pl.when(masked)(lambda: self._write_down(slot, units))
            for place, (unit, _, _) in enumerate(units):
                tokens, rows = self.tokens(unit, origin), self.rows(place)
                for source, target in side.copies:
                    mgpu.copy_gmem_to_smem(
                        source(tokens), target.at[slot, rows], side.ready.at[slot]
                    )

    def tokens(self, unit: Any, origin: int) -> Any:
        """Those of a unit, of the array whose row 0 has the position `origin`."""
        first = unit * i32(self.lists.unit)
        return pl.ds(first - i32(origin) if origin else first, self.lists.unit)

    def rows(self, place: int) -> Any:
        """Where the unit at a place stands in a stage."""
        return pl.ds(place * self.lists.unit, self.lists.unit)


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
        self.notes.write(number, Told(task.place, *steps, round_))
        sides = self._sides(task)
        step = self.pipeline.feed(task.steps, sides, step, "masked", everything=all_masked)
        if all_masked:
            return step
        return self.pipeline.feed(task.steps, sides, step, "plain")

    def _sides(self, task: Task) -> tuple[Side, Side]:
        keys, pipeline = self.keys, self.pipeline
        kv_head = lax.div(task.head, i32(self.schedule.heads // keys.key.shape[2]))

        def of_head(source: Any) -> Callable[[Any], Any]:
            return lambda tokens: source.at[task.batch, tokens, kv_head]

        copies = [(of_head(keys.key), pipeline.key)]
        if keys.ids is not None:
            copies.append((lambda tokens: keys.ids.at[task.batch, tokens], pipeline.ids))
        return (
            Side(tuple(copies), pipeline.key_ready, pipeline.key_used),
            Side(
                ((of_head(keys.value), pipeline.value),), pipeline.value_ready, pipeline.value_used
            ),
        )
