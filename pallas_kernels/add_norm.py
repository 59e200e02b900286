"""The kernel between two layers of a decode step: what a layer adds to a row, and the row's norm.

Row by row in one launch, where XLA needs one for the sum of squares and one for the rest.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.lowering import Launcher, call_kernel
from pallas_kernels.partition import may_be_split
from pallas_kernels.rows import load_scalars, store_scalars
from pallas_kernels.split import splittable
from pallas_kernels.tiles import Tile

TILE = Tile(16, 16, num_warps=32, num_stages=1)  # its sides mean nothing here


def s2_add_norm_kernel(
    x_ref: Any, added_ref: Any, scale_ref: Any, sum_ref: Any, normed_ref: Any, *, epsilon: float
) -> None:
    """One row."""
    parts, width = added_ref.shape
    column = lax.iota(jnp.int32, pl.next_power_of_2(width))
    exists = None if column.size == width else column < width

    def part(number: int) -> jax.Array:
        return load_scalars(added_ref, column, exists, 0.0, number)

    x = load_scalars(x_ref, column, exists, 0.0)
    scale = load_scalars(scale_ref, column, exists, 0.0)  # no load waits for the sum
    x += sum(map(part, range(1, parts)), start=part(0)).astype(x_ref.dtype)
    store_scalars(sum_ref, column, x, exists)
    x = x.astype(jnp.float32)
    mean = jnp.sum(x * x, axis=0) * np.float32(1 / width)
    normed = x * lax.rsqrt(mean + np.float32(epsilon)) * scale
    store_scalars(normed_ref, column, normed.astype(normed_ref.dtype), exists)


def add_norm(
    x: jax.Array, added: jax.Array, scale: jax.Array, *, epsilon: float, launcher: Launcher
) -> tuple[jax.Array, jax.Array]:
    """`x` plus what is added, and that divided by its root mean square, times `scale`.

    Args:
      x: `[rows, width]`.
      added: `[parts, rows, width]`, whose sum over the parts is rounded to the dtype of `x` first:
        float32, or that dtype with one part.
      scale: float32 `[width]`.
      epsilon: is added to the mean of the squares.

    Returns:
      Two arrays like `x`.
    """
    rows, width = x.shape
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    row = pl.BlockSpec((None, width), lambda r: (r, 0))
    total, normed = call_kernel(
        functools.partial(s2_add_norm_kernel, epsilon=epsilon),
        (x, added, scale),
        name="s2_add_norm",
        grid=(rows,),
        in_specs=[
            row,
            pl.BlockSpec((added.shape[0], None, width), lambda r: (0, r, 0)),
            pl.BlockSpec((width,), lambda r: (0,)),
        ],
        out_specs=[row, row],
        out_shape=[like, like],
        tile=TILE,
        launcher=launcher,
    )
    return total, normed


def add_norm_over_mesh(
    x: jax.Array, added: jax.Array, scale: jax.Array, *, epsilon: float, launcher: Launcher
) -> tuple[jax.Array, jax.Array]:
    """`add_norm`, whose rows XLA may split."""
    if not may_be_split():
        return add_norm(x, added, scale, epsilon=epsilon, launcher=launcher)
    return _splittable(epsilon, launcher)(x, added, scale)


@functools.lru_cache(maxsize=64)
def _splittable(epsilon: float, launcher: Launcher) -> Any:
    def run(x: jax.Array, added: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
        return add_norm(x, added, scale, epsilon=epsilon, launcher=launcher)

    return splittable(
        run,
        ("rows width", "parts rows width", "width"),
        ("rows width", "rows width"),
        whole=("width", "parts"),
    )
