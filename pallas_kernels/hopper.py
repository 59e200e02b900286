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
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mgpu

from pallas_kernels.call import Arrays, Settings
from pallas_kernels.hopper_tiles import (
    LAYOUT,
    PROGRAM,
    ROWS,
    WARPGROUPS,
    i32,
    shared,
    spread,
)
from pallas_kernels.lowering import hide_varying
from pallas_kernels.tiles import MOSAIC_ROWS

# Registers of a thread that multiplies, and of one that fetches; all threads together have 65536.
_REGISTERS = 240, 24
_WARPGROUP = "s2_warpgroup"
Buffers = TypeVar("Buffers", bound=NamedTuple)


class Programs(Protocol):
    """Which tiles the programs of a call take."""

    @property
    def settings(self) -> Settings: ...

    @property
    def programs(self) -> int: ...

    def reading(self, refs: dict[str, Any]) -> Any:
        """The same, from what says so, by name."""


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


def row_buffers(dims: tuple[int, int], dtype: Any, segments: bool) -> tuple[Any, Any, Any, Any]:
    """For the queries of both warpgroups: rows of each of two dims, a number a row, and the ids of
    segments, or None.
    """
    rows = [shared((WARPGROUPS, ROWS, dim), dtype) for dim in dims]
    numbers, ids = (mgpu.SMEM((WARPGROUPS, ROWS), kind) for kind in (jnp.float32, jnp.int32))
    return rows[0], rows[1], numbers, ids if segments else None


def of_warpgroup(buffers: Buffers, warpgroup: Any) -> Buffers:
    """A warpgroup's own of a tuple of buffers, some of which may be None."""
    names = buffers._asdict().items()
    return buffers._replace(
        **{name: None if buffer is None else buffer.at[warpgroup] for name, buffer in names}
    )


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
    schedule: Programs,
    operands: Sequence[jax.Array],
    named: Arrays,
    out_shape: Sequence[jax.ShapeDtypeStruct],
    scratch: Any,
    registers: tuple[int, int] = _REGISTERS,
    sums: jax.Array | None = None,
) -> list[jax.Array]:
    """Runs a kernel: `compute` in two warpgroups, `fetch` in a third.

    Both are called with the schedule, what `operands` and the results are as refs, and the scratch;
    `compute` also with the number of its warpgroup. named: what the schedule reads, by name.
    registers: of a thread that computes, and of one that fetches. sums: what the kernel adds to;
    comes as a ref before all others, and back before the results.
    """
    number = len(operands) + (sums is not None)
    interpret = schedule.settings.launcher == "interpret"

    def body(refs: tuple[Any, ...], scratch: Any) -> None:
        lists_at = dict(zip(named, refs[number : number + len(named)], strict=True))
        mine = schedule.reading(lists_at)
        sides = (*refs[:number], *refs[number + len(named) :])
        warpgroup = lax.axis_index(_WARPGROUP)

        @pl.when(warpgroup < i32(WARPGROUPS))
        def _() -> None:
            if not interpret:
                mgpu.set_max_registers(registers[0], action="increase")
            compute(mine, sides, scratch, warpgroup)

        @pl.when(warpgroup == i32(WARPGROUPS))
        def _() -> None:
            if not interpret:
                mgpu.set_max_registers(registers[1], action="decrease")
            fetch(mine, sides, scratch)

    def run(sums: tuple[Any, ...], *arrays: jax.Array) -> list[jax.Array]:
        """sums: refs."""

        def kernel(*refs: Any) -> None:
            pl.run_scoped(
                lambda scratch: body((*sums, *refs), scratch), scratch, collective_axes=_WARPGROUP
            )

        kernel.__name__ = name
        return mgpu.kernel(  # type: ignore[no-any-return]
            kernel,
            out_type=list(out_shape),
            grid=(schedule.programs,),
            grid_names=(PROGRAM,),
            num_threads=WARPGROUPS + 1,
            thread_name=_WARPGROUP,
            interpret=_interpreter() if interpret else None,
            compiler_params=mgpu.CompilerParams(approx_math=True),
        )(*arrays)

    def adding(sums: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
        def state(refs: list[Any]) -> None:
            for ref, result in zip(refs[1:], run((refs[0],), *arrays), strict=True):
                ref[...] = result

        empty = [lax.empty(out.shape, out.dtype) for out in out_shape]
        return pl.run_state(state)([sums, *empty])  # type: ignore[no-any-return]

    arrays = (*operands, *named.values())
    if sums is not None:
        return hide_varying(adding)(sums, *arrays)
    return hide_varying(functools.partial(run, ()))(*arrays)


def _interpreter() -> Any:
    return mgpu.InterpretGPUParams(detect_races=True)  # type: ignore[attr-defined]  # JAX 0.10


def segment_ids(arrays: Arrays) -> tuple[jax.Array, ...]:
    """Those of queries and of keys, as copies want them; nothing where there are none."""
    return tuple(padded(arrays[name], 0) for name in ("q_ids", "kv_ids") if name in arrays)


def keys_that_count(arrays: Arrays) -> list[jax.Array]:
    """Keys and values, zeros for padding: a weight of zero would not make a NaN in it a zero."""
    return [_that_counts(arrays, name, "kv_length") for name in ("key", "value")]


def queries_that_count(arrays: Arrays) -> list[jax.Array]:
    """Queries and the gradients of their outputs, likewise."""
    return [_that_counts(arrays, name, "q_length") for name in ("query", "grad_out")]


def _that_counts(arrays: Arrays, name: str, length: str) -> jax.Array:
    array = in_eights(arrays[name])
    if length not in arrays:
        return array
    counts = jnp.arange(array.shape[1], dtype=jnp.int32)[None] < arrays[length][:, None]
    return jnp.where(counts[..., None, None], array, jnp.zeros_like(array))


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
