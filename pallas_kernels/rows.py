"""How kernels read and write rows of an array: by position, with padding where there is none."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu


def load_rows(
    ref: Any, rows: jax.Array, dim: int, mask: jax.Array | None, head: Any = None
) -> jax.Array:
    """Rows of `ref` [length, dim'] (or of one `head` of [length, heads, dim']), zero-padded.

    mask: rows that exist; the others are zeros. Columns past dim' are zeros too.
    """
    index, inside = _cells(ref, rows, dim, mask, head)
    if inside is None:
        return ref[index]
    return plgpu.load(ref.at[index], mask=inside, other=0.0)


def store_rows(
    ref: Any, rows: jax.Array, value: jax.Array, mask: jax.Array | None, head: Any = None
) -> None:
    index, inside = _cells(ref, rows, value.shape[1], mask, head)
    if inside is None:
        ref[index] = value.astype(ref.dtype)
    else:
        plgpu.store(ref.at[index], value.astype(ref.dtype), mask=inside)


def load_scalars(
    ref: Any, rows: jax.Array, mask: jax.Array | None, other: float, head: Any = None
) -> jax.Array:
    """One number a row of `ref` [length] (or of one `head` of [heads, length])."""
    index = (rows,) if head is None else (jnp.full(rows.shape, head, jnp.int32), rows)
    if mask is None:
        return ref[index]
    return plgpu.load(ref.at[index], mask=mask, other=other)


def store_scalars(ref: Any, rows: jax.Array, value: jax.Array, mask: jax.Array | None) -> None:
    if mask is None:
        ref[rows] = value
    else:
        plgpu.store(ref.at[rows], value, mask=mask)


def _cells(
    ref: Any, rows: jax.Array, dim: int, mask: jax.Array | None, head: Any
) -> tuple[tuple[Any, ...], jax.Array | None]:
    shape = (rows.shape[0], dim)
    column = jnp.broadcast_to(lax.iota(jnp.int32, dim)[None, :], shape)
    row = jnp.broadcast_to(rows[:, None], shape)
    index = (row, column) if head is None else (row, jnp.full(shape, head, jnp.int32), column)
    inside = None if mask is None else jnp.broadcast_to(mask[:, None], shape)
    if dim != ref.shape[-1]:
        exists = column < ref.shape[-1]
        inside = exists if inside is None else inside & exists
    return index, inside
