"""The kernel by which one token of each sequence joins a cache: one launch for all its heads.

It turns queries and keys by their positions on the way, which costs nothing more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.lowering import Launcher, call_kernel
from pallas_kernels.partition import may_be_split
from pallas_kernels.rows import load_scalars
from pallas_kernels.split import splittable
from pallas_kernels.tiles import Tile

TILE = Tile(16, 16, num_warps=1, num_stages=1)  # its sides mean nothing here


class Token(NamedTuple):
    """One new token of each sequence.

    query: `[batch, 1, heads, head_dim]`. key, value: `[batch, 1, kv_heads, head_dim]`.
    cos, sin: float32 `[batch, head_dim / 2]`, of the angles by which queries and keys are turned,
    their pairs (i, i + head_dim / 2); or None, and nothing is.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    cos: jax.Array | None
    sin: jax.Array | None


def s2_append_kernel(*refs: Any, heads: int, kv_heads: int, rows: int, turns: bool) -> None:
    """One head of one token: queries first, then keys, then values."""
    new_ref, row_ref, *angles = refs[: 4 if turns else 2]
    key_ref, value_ref = refs[-2:]
    number, row = pl.program_id(0), row_ref[...]
    size = new_ref.shape[0] // (2 if turns else 1)
    column = lax.iota(jnp.int32, pl.next_power_of_2(size))
    exists = None if column.size == size else column < size

    def load(ref: Any, start: int = 0) -> jax.Array:
        return load_scalars(ref, column + start, exists, 0.0)

    def store(ref: Any, row: Any, parts: list[jax.Array]) -> None:
        for i, part in enumerate(parts):
            target = ref.at[jnp.full(column.shape, row, jnp.int32), column + i * size]
            plgpu.store(target, part.astype(ref.dtype), mask=exists)

    plain = [load(new_ref, start) for start in range(0, new_ref.shape[0], size)]
    turned = plain
    if turns:
        cos, sin = map(load, angles)
        x, y = (part.astype(jnp.float32) for part in plain)
        turned = [x * cos - y * sin, y * cos + x * sin]

        @pl.when(number < heads)
        def _() -> None:
            store(refs[-3], 0, turned)

    is_value, kept = number >= heads + kv_heads, (row >= 0) & (row < rows)

    @pl.when((number >= heads) & ~is_value & kept)
    def _() -> None:
        store(key_ref, row, turned)

    @pl.when(is_value & kept)
    def _() -> None:
        store(value_ref, row, plain)


def append(
    token: Token,
    row: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    paged: bool,
    launcher: Launcher,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The queries, turned, and the storage with the keys, turned, and the values.

    Args:
      token: what is new.
      row: int32 `[batch, kv_heads]`, where in the storage of a head it goes; nowhere if there is no
        such row. No two sequences have the same.
      key, value: `[batch, length, kv_heads, head_dim]`, or pages that all sequences share,
        `[kv_heads, pages, block_size, head_dim]`. Their memory is used again where they are not
        needed any more.
      paged: which of these.
      launcher: as of `call_kernel`.
    """
    batch, _, kv_heads, dim = token.key.shape
    turns = token.cos is not None
    heads = token.query.shape[2] if turns else 0
    # If they were split from one product, XLA takes that, and nothing is copied.
    new = jnp.concatenate([token.query, token.key, token.value][0 if turns else 1 :], axis=2)
    shape = key.shape
    if paged:
        key, value = (x.reshape(kv_heads, -1, dim) for x in (key, value))
    rows = key.shape[1]

    def whose(first: int) -> Callable[[Any], Any]:
        """Which of the heads from `first` on a program is about, or the nearest."""
        return lambda p: jnp.clip(p - np.int32(first), 0, np.int32(kv_heads - 1))

    def storage(first: int) -> pl.BlockSpec:
        head = whose(first)
        if paged:
            return pl.BlockSpec((None, rows, dim), lambda p, b: (head(p), 0, 0))
        return pl.BlockSpec((None, rows, None, dim), lambda p, b: (b, 0, head(p), 0))

    def row_of_program(p: Any, b: Any) -> Any:
        is_value = p >= np.int32(heads + kv_heads)
        return b, jnp.where(is_value, whose(heads + kv_heads)(p), whose(heads)(p))

    angles: list[Any] = [token.cos, token.sin] if turns else []
    stores = [storage(heads), storage(heads + kv_heads)]
    query_spec = pl.BlockSpec(
        (None, 1, None, dim), lambda p, b: (b, 0, jnp.minimum(p, np.int32(heads - 1)), 0)
    )
    *query, key, value = call_kernel(
        functools.partial(
            s2_append_kernel, heads=heads, kv_heads=kv_heads, rows=rows, turns=turns
        ),
        (new, row, *angles, key, value),
        name="s2_attention_append",
        grid=(heads + 2 * kv_heads, batch),
        in_specs=[
            pl.BlockSpec((None, None, None, dim), lambda p, b: (b, 0, p, 0)),
            pl.BlockSpec((None, None), row_of_program),
            *[pl.BlockSpec((None, dim // 2), lambda p, b: (b, 0))] * len(angles),
            *stores,
        ],
        out_specs=[*[query_spec] * turns, *stores],
        out_shape=[
            *[jax.ShapeDtypeStruct(token.query.shape, token.query.dtype)] * turns,
            jax.ShapeDtypeStruct(key.shape, key.dtype),
            jax.ShapeDtypeStruct(value.shape, value.dtype),
        ],
        tile=TILE,
        launcher=launcher,
        aliases={2 + len(angles): int(turns), 3 + len(angles): 1 + turns},
    )  # fmt: skip
    return query[0] if turns else token.query, key.reshape(shape), value.reshape(shape)


_STORAGE = {True: "kv_heads pages block dim", False: "batch length kv_heads dim"}


def append_over_mesh(
    token: Token,
    row: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    paged: bool,
    launcher: Launcher,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`append`, which XLA may split as tokens and storage are split."""
    if not may_be_split():
        return append(token, row, key, value, paged=paged, launcher=launcher)
    kv_heads = token.key.shape[2]
    group = token.query.shape[2] // kv_heads
    split = _splittable(paged, launcher, kv_heads, group, token.cos is not None)
    return split(*(x for x in token if x is not None), row, key, value)


@functools.lru_cache(maxsize=64)
def _splittable(paged: bool, launcher: Launcher, kv_heads: int, group: int, turns: bool) -> Any:
    def run(*arrays: Any) -> tuple[jax.Array, ...]:
        *new, row, key, value = arrays
        token = Token(new[0], new[1], new[2], *(new[3:] if turns else (None, None)))
        return append(token, row, key, value, paged=paged, launcher=launcher)

    query, storage = "batch one heads dim", _STORAGE[paged]
    new = [query, *["batch one kv_heads dim"] * 2, *["batch half"] * 2 * turns, "batch kv_heads"]
    return splittable(
        run,
        (*new, storage, storage),
        (query, storage, storage),
        # Pages are shared by the sequences: each device has to write those of all.
        whole=("one", "dim", "half", "pages", "block", "length", *["batch"] * paged),
        members={"heads": ("kv_heads", kv_heads, group)},
    )
