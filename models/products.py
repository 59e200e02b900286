"""Products of rows with a matrix whose own rows lie in memory as they are read: `[out, in]`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


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
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    if x.size == inputs:
        # One row: XLA reads a matrix faster in a reduction than in a product.
        terms = x.astype(jnp.float32).reshape(1, inputs) * kernel.astype(jnp.float32)
        return jnp.sum(terms, axis=1).astype(dtype).reshape(*x.shape[:-1], -1)
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (1,)), ((), ())))


class RowLinear(nnx.Module):
    """`nnx.Linear` without a bias, by `row_product`.

    kernel: `[outputs, inputs]`, any float dtype. dtype: of the computation and the result; None:
    that of input and kernel together, as in `nnx.Linear`.
    """

    def __init__(self, kernel: Float[Array, "outputs inputs"], dtype: Any) -> None:
        self.kernel = nnx.Param(kernel)
        self.dtype = None if dtype is None else jnp.dtype(dtype)

    def __call__(self, x: Float[Array, "*rows inputs"]) -> Float[Array, "*rows outputs"]:
        kernel = self.kernel[...]
        return row_product(x, kernel, self.dtype or jnp.promote_types(x.dtype, kernel.dtype))
