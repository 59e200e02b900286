"""Rotary position embedding, in the convention of Llama: the two halves of a head are the pairs."""

from __future__ import annotations

import numbers
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from s2_jax.checks import static_number


def check_rope(head_dim: int, base: Any) -> float:
    """The base as a Python number; ValueError where no head of this size is rotated with it."""
    if head_dim % 2:
        raise ValueError(f"{head_dim=} must be even for rotary embedding, which turns pairs")
    number = static_number("rope_base", base, "it must be known when tracing")
    if not number > 0:
        raise ValueError(f"rope_base={base!r} must be positive")
    return number


def positions_from(query_offset: Any, length: int) -> Int[Array, "*batch length"]:
    """int32 positions `query_offset + arange(length)`: `[length]`, or `[batch, length]`.

    Args:
      query_offset: an int, or an int32 array `[]` or `[batch]`, possibly traced.
      length: how many positions.

    Raises:
      TypeError: an offset that is neither.
    """
    if not isinstance(query_offset, bool) and isinstance(query_offset, numbers.Integral):
        query_offset = np.int32(query_offset)
    if getattr(query_offset, "dtype", None) != np.int32:
        kind = getattr(query_offset, "dtype", type(query_offset).__name__)
        raise TypeError(f"query_offset must be an int or an int32 array, got {kind}")
    steps = jnp.arange(length, dtype=jnp.int32)
    if query_offset.ndim == 0:
        return query_offset + steps
    return query_offset[:, None] + steps[None]


def rotate(
    x: Float[Array, "*batch length heads head_dim"],
    positions: Int[Array, "*batch length"],
    *,
    base: float = 10_000.0,
) -> Float[Array, "*batch length heads head_dim"]:
    """`x` with each pair (i, i + head_dim / 2) turned by `positions * base ** (-2 i / head_dim)`.

    Args:
      x: queries or keys; any float dtype, which the result keeps.
      positions: int32, one row for all of the batch (`[length]`) or one for each of it.
      base: the slowest pair turns once in about `2 pi * base` positions.

    Angles are float32, and so is the rotation (float64 for float64). The product of a rotated
    query and a rotated key depends on the difference of their positions alone.

    Raises:
      ValueError: an odd head_dim, or a base that is not positive.

    Source: RoFormer (arXiv 2104.09864), section 3.4.2; pairs as in Llama's `rotate_half`.
    """
    cos, sin = cos_and_sin(positions, x.shape[-1], base)
    dtype = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    shape = (1,) * (x.ndim - cos.ndim - 1) + (*cos.shape[:-1], 1, cos.shape[-1])
    cos, sin = (y.astype(dtype).reshape(shape) for y in (cos, sin))
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def cos_and_sin(
    positions: Int[Array, "*batch length"], head_dim: int, base: float
) -> tuple[Float[Array, "*batch length half_dim"], Float[Array, "*batch length half_dim"]]:
    """float32, of the angles by which `rotate` turns the pairs of a head."""
    base = check_rope(head_dim, base)
    frequency = np.float32(base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim))
    angle = jnp.float32(positions)[..., None] * frequency.reshape((1,) * positions.ndim + (-1,))
    return jnp.cos(angle), jnp.sin(angle)


def rotate_from(
    x: Float[Array, "*batch length heads head_dim"], query_offset: Any, base: float | None
) -> Float[Array, "*batch length heads head_dim"]:
    """`rotate` for consecutive positions from `query_offset`; `x` itself where base is None."""
    if base is None:
        return x
    return rotate(x, positions_from(query_offset, x.shape[-3]), base=base)
