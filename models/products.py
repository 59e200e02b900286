"""Products of rows with a matrix whose own rows lie in memory as they are read: `[out, in]`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

_LONGEST_SUM, _MOST_PARTS = 8192, 8


def row_product(
    x: Float[Array, "*rows inputs"], kernel: Float[Array, "outputs inputs"], dtype: Any
) -> Float[Array, "*rows outputs"]:
    """`x @ kernel.T`, as `nnx.Linear` would with the transposed kernel.

    Args:
      x, kernel: any float dtypes; both are cast to `dtype` first.
      dtype: of the result, float32 or a smaller one. Sums are float32; the factors of many rows
        have JAX's default precision, those of one row are not rounded further.

    Raises:
      ValueError: shapes that do not fit.
    """
    inputs = x.shape[-1]
    if kernel.ndim != 2 or kernel.shape[1] != inputs:
        raise ValueError(f"kernel must be [outputs, {inputs}], got shape {kernel.shape}")
    if x.size == inputs:
        sums = row_sums(x, kernel, dtype).sum(axis=0)
        return sums.astype(dtype).reshape(*x.shape[:-1], -1)
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (1,)), ((), ())))


def row_sums(
    x: Float[Array, "*ones inputs"], kernel: Float[Array, "outputs inputs"], dtype: Any
) -> Float[Array, "parts outputs"]:
    """One row's product, in float32, whose sum over the parts is still to be taken.

    XLA reads a matrix faster in a reduction than in a product, but for rows so long that they take
    a thread block of which a multiprocessor holds few: those are summed in parts.
    """
    outputs, inputs = kernel.shape
    fits = (n for n in range(1, _MOST_PARTS + 1) if inputs % n == 0 and inputs <= n * _LONGEST_SUM)
    parts = next(fits, 1)
    x = x.astype(dtype).astype(jnp.float32).reshape(1, parts, -1)
    terms = x * kernel.astype(dtype).astype(jnp.float32).reshape(outputs, parts, -1)
    return jnp.sum(terms, axis=2).T


class RowLinear(nnx.Module):
    """`nnx.Linear` without a bias, by `row_product`.

    kernel: `[outputs, inputs]`, any float dtype. dtype: of the computation and the result; None:
    that of input and kernel together, as in `nnx.Linear`.
    """

    def __init__(self, kernel: Float[Array, "outputs inputs"], dtype: Any) -> None:
        self.kernel = nnx.Param(kernel)
        self.dtype = None if dtype is None else jnp.dtype(dtype)

    def __call__(self, x: Float[Array, "*rows inputs"]) -> Float[Array, "*rows outputs"]:
        return row_product(x, self.kernel[...], self._dtype(x))

    def sums(self, x: Float[Array, "*rows inputs"]) -> Float[Array, "parts *rows outputs"]:
        """The same before the last sums are taken, where there are any: see `row_sums`."""
        if x.size != x.shape[-1]:
            return self(x)[None]
        sums = row_sums(x, self.kernel[...], self._dtype(x))
        return sums.reshape(-1, *x.shape[:-1], sums.shape[-1])

    def _dtype(self, x: Array) -> Any:
        return self.dtype or jnp.promote_types(x.dtype, self.kernel[...].dtype)
