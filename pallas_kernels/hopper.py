"""What the kernels for Hopper share: lowered by Pallas' Mosaic GPU backend, not by Triton.

A program has 128 queries of a head at a time, and a multiprocessor for itself. One warpgroup
fetches tiles of keys and values into shared memory, as the block lists name them; two take 64
queries each. In the forward pass they take turns at the tensor cores: one multiplies while the
other makes weights of its scores (FlashAttention-3, arXiv 2407.08608, section 3.1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mgpu

from pallas_kernels.block_lists import COUNT_BITS, MAX_COUNT, BlockLists
from pallas_kernels.call import Arrays, Settings
from pallas_kernels.lowering import multiprocessors, vary_alike
from pallas_kernels.tiles import MOSAIC_ROWS, Tile

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
        """How many have masks."""
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


class Scalars(NamedTuple):
    """What of a tile comes from memory, or is made of it; int32.

    number: of the tile. row: of its lists. place: which 128 queries of the sequence it has. masked,
    plain: how many steps with masks and without.
    """

    number: Any
    row: Any
    place: Any
    masked: Any
    plain: Any


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which tiles a program takes, one after the other: each as many further as there are programs.

    So one tile's keys are on their way while another one's results are still being written.
    refs: of the lists, by name.
    """

    refs: dict[str, Any]
    settings: Settings
    lists: BlockLists
    heads: int
    batch: int
    kv_len: int

    @property
    def tiles(self) -> int:
        return self.lists.num_tiles * self.heads * self.batch

    @property
    def programs(self) -> int:
        return min(self.tiles, multiprocessors())

    def at(self, number: Any) -> QueryTile:
        """A tile by its number; any tile for a number past the end."""
        number = jnp.minimum(number, i32(self.tiles - 1))
        head, batch = self._head(number), self._batch(number)
        rank = lax.rem(number, i32(self.lists.num_tiles))
        pattern = self.refs["pattern_of_head"][batch, head]
        place = self.refs["order"][pattern, rank]
        steps = Steps(self.refs, self.lists, pattern * i32(self.lists.num_tiles) + rank)
        return self._tile(Scalars(number, steps.row, place, steps.masked, steps.plain()))

    def after(self, tile: QueryTile) -> tuple[Any, QueryTile]:
        """Whether the program takes another tile after this one, and that tile."""
        number = tile.scalars.number + i32(self.programs)
        return number < i32(self.tiles), self.at(number)

    def visit(self, body: Callable[[QueryTile, Any], tuple[QueryTile, Any]], step: Any) -> None:
        """Calls `body(tile, step) -> (next tile, step)` for each tile of this program."""
        mine = lax.axis_index("program")
        count = lax.div(i32(self.tiles + self.programs - 1) - mine, i32(self.programs))

        def one(_: Any, carry: tuple[Scalars, Any]) -> tuple[Scalars, Any]:
            following, step = body(self._tile(carry[0]), carry[1])
            return following.scalars, step

        lax.fori_loop(i32(0), count, one, (self.at(mine).scalars, step))

    def _tile(self, scalars: Scalars) -> QueryTile:
        return QueryTile(
            self.settings, self.lists, self.kv_len, self._head(scalars.number),
            self._batch(scalars.number), Steps(self.refs, self.lists, scalars.row), scalars,
        )  # fmt: skip

    def _head(self, number: Any) -> Any:
        return lax.rem(lax.div(number, i32(self.lists.num_tiles)), i32(self.heads))

    def _batch(self, number: Any) -> Any:
        return lax.div(number, i32(self.lists.num_tiles * self.heads))


@dataclasses.dataclass(frozen=True)
class QueryTile:
    """The queries that a program has at a time."""

    settings: Settings
    lists: BlockLists
    kv_len: int
    head: Any
    batch: Any
    steps: Steps
    scalars: Scalars

    def rows(self, warpgroup: Any) -> Any:
        """The queries of a warpgroup, for an index into an array."""
        assert self.settings.query_offset is not None
        return pl.ds(self._position(warpgroup) - i32(self.settings.query_offset), ROWS)

    def _position(self, warpgroup: Any) -> Any:
        """Of its first query in the sequence."""
        return self.scalars.place * i32(MOSAIC_ROWS) + warpgroup * i32(ROWS)

    def mask(self, step: Any, warpgroup: Any) -> jax.Array:
        """Which of its keys each query of a warpgroup sees in a step: all where it has no mask."""
        lists, window = self.lists, self.settings.window
        shape = (ROWS, lists.unit * lists.group)
        row, column = (
            mgpu.broadcasted_iota(jnp.int32, shape, axis, layout=LAYOUT) for axis in (0, 1)
        )
        query = row + self._position(warpgroup)
        part = lax.div(warpgroup * i32(ROWS * lists.rows), i32(MOSAIC_ROWS))
        mask = row < jnp.where(step < self.scalars.masked, i32(0), i32(ROWS))
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

    @classmethod
    def scratch(
        cls, tile: Tile, lists: BlockLists, dims: tuple[int, int], dtype: Any
    ) -> tuple[Any, ...]:
        ready = mgpu.Barrier(num_arrivals=lists.group, num_barriers=tile.num_stages)
        used = mgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=tile.num_stages)
        tiles = [shared((tile.num_stages, tile.block_kv, dim), dtype) for dim in dims]
        return *tiles, ready, ready, used, used

    @property
    def stages(self) -> int:
        return int(self.key.shape[0])

    def slot(self, step: Any) -> Any:
        return lax.rem(step, i32(self.stages))

    def feed(
        self, tile: QueryTile, key_ref: Any, value_ref: Any, group: int, first: Any
    ) -> jax.Array:
        """Fetches what a tile takes, as soon as there is room. Returns the next step."""
        kv_head, size = lax.div(tile.head, i32(group)), tile.lists.unit
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
                        source.at[tile.batch, tokens, kv_head],
                        target.at[slot, rows],
                        ready.at[slot],
                    )

        return tile.steps.visit(first, fetch)


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


def load_numbers(source: Any, axis: int) -> jax.Array:
    """From shared memory, a number for each row (axis 0) or column (axis 1) of a product."""
    return mgpu.load(source, layout=LAYOUT.reduce(1 - axis))  # type: ignore[call-arg]  # JAX 0.10


def zeros(columns: int) -> jax.Array:
    return mgpu.layout_cast(jnp.full((ROWS, columns), 0, jnp.float32), LAYOUT)


def per_row(number: float) -> jax.Array:
    return mgpu.layout_cast(jnp.full((ROWS,), number, jnp.float32), LAYOUT.reduce(1))


def spread(rows: jax.Array, like: jax.Array) -> jax.Array:
    """A number a row as an array of rows."""
    return lax.broadcast_in_dim(rows, like.shape, [0])


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
    batch, _, heads, _ = arrays["query"].shape
    named = {name: list_arrays[name] for name in _LIST_NAMES}
    named["pattern_of_head"] = arrays["pattern_of_head"]
    flat = vary_alike([*operands, *named.values()])
    number = len(operands)
    schedule = Schedule({}, settings, lists, heads, batch, arrays["key"].shape[1])

    def body(refs: tuple[Any, ...], scratch: Any) -> None:
        lists_at = dict(zip(named, refs[number : number + len(named)], strict=True))
        mine = dataclasses.replace(schedule, refs=lists_at)
        sides = (*refs[:number], *refs[number + len(named) :])
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < i32(WARPGROUPS))
        def _() -> None:
            mgpu.set_max_registers(_MANY_REGISTERS, action="increase")
            compute(mine, sides, scratch, warpgroup)

        @pl.when(warpgroup == i32(WARPGROUPS))
        def _() -> None:
            mgpu.set_max_registers(_FEW_REGISTERS, action="decrease")
            fetch(mine, sides, scratch)

    def kernel(*refs: Any) -> None:
        pl.run_scoped(lambda scratch: body(refs, scratch), scratch, collective_axes="warpgroup")

    kernel.__name__ = name
    results = mgpu.kernel(
        kernel,
        out_type=list(out_shape),
        grid=(schedule.programs,),
        grid_names=("program",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=mgpu.CompilerParams(approx_math=True),
    )(*flat)
    return list(results)


def whole_tiles(rows: int) -> int:
    """Rows with those that fill up the last tile."""
    return -(-rows // MOSAIC_ROWS) * MOSAIC_ROWS


def padded(scalars: jax.Array, value: float) -> jax.Array:
    """float32 `[batch, heads, q_len]` so long that every tile lies in it, as a copy wants it."""
    rows = scalars.shape[-1]
    return jnp.pad(
        scalars, ((0, 0), (0, 0), (0, whole_tiles(rows) - rows)), constant_values=np.float32(value)
    )
