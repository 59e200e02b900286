"""What the kernels for Hopper share: lowered by Pallas' Mosaic GPU backend, not by Triton.

A program has 128 queries of a head at a time, and a multiprocessor for itself. One warpgroup
fetches tiles of keys and values into shared memory, as the block lists name them; two take 64
queries each. The one alone reads the lists, ahead of the others, which it tells what they need:
they would wait for each number with the tensor cores idle. In the forward pass the two take turns
at the tensor cores: one multiplies while the other makes weights of its scores (FlashAttention-3,
arXiv 2407.08608, section 3.1).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mgpu

from pallas_kernels.block_lists import BlockLists
from pallas_kernels.call import Arrays, Settings
from pallas_kernels.hopper_tiles import (
    LAYOUT,
    PROGRAM,
    ROWS,
    At,
    Schedule,
    Task,
    Told,
    i32,
    spread,
)
from pallas_kernels.hopper_tiles import operands as list_operands
from pallas_kernels.lowering import hide_varying
from pallas_kernels.tiles import MOSAIC_ROWS, Tile

WARPGROUPS = 2
# Registers of a thread that multiplies, and of one that fetches; all threads together have 65536.
_MANY_REGISTERS, _FEW_REGISTERS = 240, 24
_WARPGROUP = "s2_warpgroup"
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
class Turns:
    """Two warpgroups that take turns at the tensor cores."""

    barrier: Any

    def begin(self, warpgroup: Any) -> None:
        pl.when(warpgroup == i32(1))(self.pass_on)

    def end(self, warpgroup: Any) -> None:
        pl.when(warpgroup == i32(0))(self.pass_on)

    def pass_on(self) -> None:
        """Lets the other one multiply, and waits until it has."""
        self.arrive()
        self.wait()

    def arrive(self) -> None:
        mgpu.barrier_arrive(self.barrier)

    def wait(self) -> None:
        mgpu.barrier_wait(self.barrier)


def shared(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory laid out for the tensor cores."""
    transforms = (mgpu.TilingTransform((8, 64)), mgpu.SwizzleTransform(128))
    return mgpu.SMEM(shape, dtype, transforms=transforms)


def load_numbers(source: Any, axis: int) -> jax.Array:
    """From shared memory, a number for each row (axis 0) or column (axis 1) of a product."""
    return mgpu.load(source, layout=LAYOUT.reduce(1 - axis))  # type: ignore[call-arg]  # JAX 0.10


def zeros(columns: int) -> jax.Array:
    return mgpu.layout_cast(jnp.full((ROWS, columns), 0, jnp.float32), LAYOUT)


def per_row(number: float) -> jax.Array:
    return mgpu.layout_cast(jnp.full((ROWS,), number, jnp.float32), LAYOUT.reduce(1))


def add_product(
    settings: Settings,
    sums: jax.Array,
    a: jax.Array,
    b: Any,
    meanwhile: Callable[[], None] = lambda: None,
) -> jax.Array:
    """sums + a @ b, of registers and shared memory. meanwhile: what else to do while it is made."""
    if settings.launcher == "interpret":
        meanwhile()
        values = b[...]
        mgpu.commit_smem()  # read otherwise than the tensor cores do: before copies overwrite it
        return sums + jnp.dot(a, values, preferred_element_type=jnp.float32)

    def multiply(sum_ref: Any) -> None:
        mgpu.wgmma(sum_ref, a, b)
        meanwhile()

    added: jax.Array = pl.run_state(multiply)(mgpu.ACC.init(sums))
    return added


def blank(rows: jax.Array, which: jax.Array) -> jax.Array:
    """Rows, but for some zeros."""
    some = spread(jnp.where(which, 1.0, 0.0), rows)  # Mosaic spreads no bools
    return jnp.where(some > 0, 0.0, rows)


def call(
    name: str,
    compute: Callable[..., None],
    fetch: Callable[..., None],
    settings: Settings,
    lists: BlockLists,
    operands: Sequence[jax.Array],
    arrays: Arrays,
    list_arrays: Arrays,
    out_shape: Sequence[jax.ShapeDtypeStruct],
    scratch: Any,
) -> list[jax.Array]:
    """Runs a kernel: `compute` in two warpgroups, `fetch` in a third.

    Both are called with the schedule, what `operands` and the results are as refs, and the scratch;
    `compute` also with the number of its warpgroup.
    """
    batch, q_len, heads, _ = arrays["query"].shape
    named = list_operands(settings, lists, arrays, list_arrays)
    number, interpret = len(operands), settings.launcher == "interpret"
    schedule = Schedule({}, settings, lists, heads, batch, q_len, arrays["key"].shape[1])

    def body(refs: tuple[Any, ...], scratch: Any) -> None:
        lists_at = dict(zip(named, refs[number : number + len(named)], strict=True))
        mine = dataclasses.replace(schedule, refs=lists_at)
        sides = (*refs[:number], *refs[number + len(named) :])
        warpgroup = lax.axis_index(_WARPGROUP)

        @pl.when(warpgroup < i32(WARPGROUPS))
        def _() -> None:
            if not interpret:
                mgpu.set_max_registers(_MANY_REGISTERS, action="increase")
            compute(mine, sides, scratch, warpgroup)

        @pl.when(warpgroup == i32(WARPGROUPS))
        def _() -> None:
            if not interpret:
                mgpu.set_max_registers(_FEW_REGISTERS, action="decrease")
            fetch(mine, sides, scratch)

    def kernel(*refs: Any) -> None:
        pl.run_scoped(lambda scratch: body(refs, scratch), scratch, collective_axes=_WARPGROUP)

    kernel.__name__ = name
    run = mgpu.kernel(
        kernel,
        out_type=list(out_shape),
        grid=(schedule.programs,),
        grid_names=(PROGRAM,),
        num_threads=WARPGROUPS + 1,
        thread_name=_WARPGROUP,
        interpret=_interpreter() if interpret else None,
        compiler_params=mgpu.CompilerParams(approx_math=True),
    )
    return hide_varying(run)(*operands, *named.values())


def _interpreter() -> Any:
    return mgpu.InterpretGPUParams(detect_races=True)  # type: ignore[attr-defined]  # JAX 0.10


def segment_ids(arrays: Arrays) -> tuple[jax.Array, ...]:
    """Those of queries and of keys, as copies want them; nothing where there are none."""
    return tuple(padded(arrays[name], 0) for name in ("q_ids", "kv_ids") if name in arrays)


def keys_that_count(arrays: Arrays) -> tuple[jax.Array, jax.Array]:
    """Keys and values, zeros for padding: a weight of zero would not make a NaN in it a zero."""
    key, value = (in_eights(arrays[name]) for name in ("key", "value"))
    if "kv_length" not in arrays:
        return key, value
    counts = jnp.arange(key.shape[1], dtype=jnp.int32)[None] < arrays["kv_length"][:, None]
    key, value = (jnp.where(counts[..., None, None], x, jnp.zeros_like(x)) for x in (key, value))
    return key, value


def in_eights(array: jax.Array) -> jax.Array:
    """`[batch, tokens, ...]` with so many more that tokens are a multiple of 8: copies of rows in
    shared memory's layout want it. No query is told to see them.
    """
    more = -array.shape[1] % 8
    return jnp.pad(array, [(0, 0), (0, more)] + [(0, 0)] * (array.ndim - 2)) if more else array


def whole_tiles(rows: int) -> int:
    """Rows with those that fill up the last tile."""
    return -(-rows // MOSAIC_ROWS) * MOSAIC_ROWS


def padded(rows: jax.Array, value: float) -> jax.Array:
    """`[..., tokens]` so long that every tile lies in it: a copy of one row runs into the next."""
    more = whole_tiles(rows.shape[-1]) - rows.shape[-1]
    widths = [(0, 0)] * (rows.ndim - 1) + [(0, more)]
    return jnp.pad(rows, widths, constant_values=np.asarray(value, rows.dtype))
