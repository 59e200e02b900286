"""What the kernels for Hopper share: lowered by Pallas' Mosaic GPU backend, not by Triton.

A program has 128 queries of a head. One warpgroup fetches tiles of keys and values into shared
memory, as the block lists name them; two take 64 queries each, and take turns at the tensor cores:
one multiplies while the other makes weights of its scores (FlashAttention-3, arXiv 2407.08608,
section 3.1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mgpu

from pallas_kernels.block_lists import COUNT_BITS, MAX_COUNT, BlockLists
from pallas_kernels.call import Arrays, Settings
from pallas_kernels.lowering import vary_alike
from pallas_kernels.tiles import Tile

WARPGROUPS, ROWS = 2, 64
LAYOUT = mgpu.Layout.WGMMA  # how a warpgroup's registers hold what it multiplies
_LIST_NAMES = ("order", "run_start", "runs", "partial_start", "partial")
# Registers of a thread that multiplies, and of one that fetches; all threads together have 65536.
_MANY_REGISTERS, _FEW_REGISTERS = 240, 24


def i32(number: int) -> Any:
    return jnp.int32(number)


@dataclasses.dataclass(frozen=True)
class Steps:
    """The tiles of keys that a program takes, each one step: those with masks first.

    refs: of `BlockLists`, by name.
    """

    refs: dict[str, Any]
    lists: BlockLists
    row: Any

    @property
    def masked(self) -> jax.Array:
        """How many steps have masks."""
        start, stop = self._partial()
        group = self.lists.group
        return lax.div(stop - start + i32(group - 1), i32(group))

    def plain(self) -> jax.Array:
        """How many have none."""
        start, stop = self._runs()
        runs = self.refs["runs"]
        return lax.fori_loop(
            start, stop, lambda run, total: total + (runs[run, 1] & i32(MAX_COUNT)), i32(0)
        )

    def entry(self, step: Any, place: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """A unit of a masked step: its number, which parts of the queries see it, and whether it
        exists; otherwise it is another one.
        """
        start, stop = self._partial()
        index = start + step * i32(self.lists.group) + i32(place)
        # There is always an entry to read, though it may be another row's.
        entry = self.refs["partial"][jnp.maximum(jnp.minimum(index, stop - i32(1)), i32(0))]
        return lax.shift_right_logical(entry, i32(self.lists.rows)), entry, index < stop

    def visit(self, first: Any, body: Callable[[Any, list[Any]], None]) -> jax.Array:
        """Calls `body(step, units)` for each, counted from `first` on. Returns the next number."""
        places = range(self.lists.group)

        def masked(step: Any, none: None) -> None:
            body(first + step, [self.entry(step, place)[0] for place in places])

        def run(index: Any, number: Any) -> Any:
            unit, word = self.refs["runs"][index, 0], self.refs["runs"][index, 1]
            gap, count = lax.shift_right_logical(word, i32(COUNT_BITS)), word & i32(MAX_COUNT)

            def plain(i: Any, none: None) -> None:
                begin = unit + i * gap * i32(self.lists.group)
                body(number + i, [begin + gap * i32(place) for place in places])

            lax.fori_loop(i32(0), count, plain, None)
            return number + count

        lax.fori_loop(i32(0), self.masked, masked, None)
        return lax.fori_loop(*self._runs(), run, first + self.masked)

    def _runs(self) -> tuple[Any, Any]:
        return self.refs["run_start"][self.row], self.refs["run_start"][self.row + i32(1)]

    def _partial(self) -> tuple[Any, Any]:
        return self.refs["partial_start"][self.row], self.refs["partial_start"][self.row + i32(1)]


@dataclasses.dataclass(frozen=True)
class Program:
    """One program.

    first_row, position: of its first query in the array and in the sequence.
    """

    settings: Settings
    lists: BlockLists
    kv_len: int
    head: Any
    batch: Any
    steps: Steps
    first_row: Any
    position: Any

    @classmethod
    def start(
        cls, refs: dict[str, Any], settings: Settings, lists: BlockLists, kv_len: int
    ) -> Program:
        rank, head, batch = (lax.axis_index(name) for name in ("rank", "heads", "batch"))
        pattern = refs["pattern_of_head"][batch, head]
        offset = settings.query_offset
        assert offset is not None
        position = refs["order"][pattern, rank] * i32(WARPGROUPS * ROWS)
        steps = Steps(refs, lists, pattern * i32(lists.num_tiles) + rank)
        first_row = position - i32(offset)
        return cls(settings, lists, kv_len, head, batch, steps, first_row, position)

    def rows(self, warpgroup: Any) -> Any:
        """The queries of a warpgroup, for an index into an array."""
        return pl.ds(self.first_row + warpgroup * i32(ROWS), ROWS)

    def mask(self, step: Any, warpgroup: Any) -> jax.Array:
        """Which of its keys each query of a warpgroup sees in a step: all where it has no mask."""
        lists, window = self.lists, self.settings.window
        shape = (ROWS, lists.unit * lists.group)
        row, column = (
            mgpu.broadcasted_iota(jnp.int32, shape, axis, layout=LAYOUT) for axis in (0, 1)
        )
        query = row + (self.position + warpgroup * i32(ROWS))
        part = lax.div(warpgroup * i32(ROWS * lists.rows), i32(WARPGROUPS * ROWS))
        mask = row < jnp.where(step < self.steps.masked, i32(0), i32(ROWS))
        for place in range(lists.group):
            unit, bits, exists = self.steps.entry(step, place)
            key = column + (unit - i32(place)) * i32(lists.unit)
            listed = lax.rem(lax.shift_right_logical(bits, part), i32(2)) > i32(0)
            end = jnp.where(exists, i32(self.kv_len), i32(0))
            inside = (column >= i32(place * lists.unit)) & (column < i32((place + 1) * lists.unit))
            inside &= key < end
            if window is None or not window.adds:
                inside &= key < jnp.where(listed, i32(self.kv_len), i32(0))
            if window is not None:
                near = query - key < i32(window.size)
                if window.adds or not self.settings.causal:
                    near &= key - query < i32(window.size)
                if window.adds:
                    near |= key < jnp.where(listed, i32(self.kv_len), i32(0))
                inside &= near
            if self.settings.causal:
                inside &= key <= query
            mask |= inside
        return mask


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Tiles of keys and values in shared memory, and what says that one is there, or done with."""

    key: Any
    value: Any
    key_ready: Any
    value_ready: Any
    key_used: Any
    value_used: Any
    stages: int

    @classmethod
    def scratch(
        cls, tile: Tile, lists: BlockLists, dims: tuple[int, int], dtype: Any
    ) -> tuple[Any, ...]:
        ready = mgpu.Barrier(num_arrivals=lists.group, num_barriers=tile.num_stages)
        used = mgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=tile.num_stages)
        tiles = [shared((tile.num_stages, tile.block_kv, dim), dtype) for dim in dims]
        return *tiles, ready, ready, used, used

    def slot(self, step: Any) -> Any:
        return lax.rem(step, i32(self.stages))

    def feed(
        self, program: Program, key_ref: Any, value_ref: Any, group: int, first: Any
    ) -> jax.Array:
        """Fetches what a program takes, as soon as there is room. Returns the next step."""
        kv_head, size = lax.div(program.head, i32(group)), program.lists.unit
        sides = (
            (key_ref, self.key, self.key_ready, self.key_used),
            (value_ref, self.value, self.value_ready, self.value_used),
        )

        def fetch(step: Any, units: list[Any]) -> None:
            slot = self.slot(step)
            for source, target, ready, used in sides:

                @pl.when(step >= i32(self.stages))
                def _(used: Any = used) -> None:
                    mgpu.barrier_wait(used.at[slot])

                for place, unit in enumerate(units):
                    tokens = pl.ds(unit * i32(size), size)
                    rows = pl.ds(place * size, size)
                    mgpu.copy_gmem_to_smem(
                        source.at[program.batch, tokens, kv_head],
                        target.at[slot, rows],
                        ready.at[slot],
                    )

        return program.steps.visit(first, fetch)


@dataclasses.dataclass(frozen=True)
class Turns:
    """Two warpgroups that take turns at the tensor cores. barrier: None, and they do not."""

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


def zeros(columns: int) -> jax.Array:
    return mgpu.layout_cast(jnp.full((ROWS, columns), 0, jnp.float32), LAYOUT)


def per_row(number: float) -> jax.Array:
    return mgpu.layout_cast(jnp.full((ROWS,), number, jnp.float32), LAYOUT.reduce(1))


def spread(rows: jax.Array, like: jax.Array) -> jax.Array:
    """A number a row as an array of rows."""
    return lax.broadcast_in_dim(rows, like.shape, [0])


def store(source: Any, target: Any) -> None:
    """From shared memory to an array. Rows past its end are left out."""
    mgpu.copy_smem_to_gmem(source, target)


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

    Both are called with a program, what `operands` and the results are as refs, and the scratch;
    `compute` also with the number of its warpgroup.
    """
    batch, _, heads, _ = arrays["query"].shape
    kv_len = arrays["key"].shape[1]
    named = {name: list_arrays[name] for name in _LIST_NAMES}
    named["pattern_of_head"] = arrays["pattern_of_head"]
    flat = vary_alike([*operands, *named.values()])
    varying = jax.typeof(flat[0]).manual_axis_type
    number = len(operands)

    def body(refs: tuple[Any, ...], scratch: Any) -> None:
        lists_at = dict(zip(named, refs[number : number + len(named)], strict=True))
        program = Program.start(lists_at, settings, lists, kv_len)
        sides = (*refs[:number], *refs[number + len(named) :])
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < i32(WARPGROUPS))
        def _() -> None:
            mgpu.set_max_registers(_MANY_REGISTERS, action="increase")
            compute(program, sides, scratch, warpgroup)

        @pl.when(warpgroup == i32(WARPGROUPS))
        def _() -> None:
            mgpu.set_max_registers(_FEW_REGISTERS, action="decrease")
            fetch(program, sides, scratch)

    def kernel(*refs: Any) -> None:
        pl.run_scoped(lambda scratch: body(refs, scratch), scratch, collective_axes="warpgroup")

    kernel.__name__ = name
    results = mgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct(out.shape, out.dtype, manual_axis_type=varying)
            for out in out_shape
        ],
        grid=(lists.num_tiles, heads, batch),
        grid_names=("rank", "heads", "batch"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=mgpu.CompilerParams(approx_math=True),
    )(*flat)
    return list(vary_alike(results))


def whole_tiles(rows: int) -> int:
    """Rows with those that fill up the last tile."""
    tile = WARPGROUPS * ROWS
    return -(-rows // tile) * tile


def padded(scalars: jax.Array, value: float) -> jax.Array:
    """float32 `[batch, heads, q_len]` so long that every tile lies in it, as a copy wants it."""
    rows = scalars.shape[-1]
    return jnp.pad(
        scalars, ((0, 0), (0, 0), (0, whole_tiles(rows) - rows)), constant_values=np.float32(value)
    )
