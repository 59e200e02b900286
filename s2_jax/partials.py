"""Attention over parts of the keys, put together by the log-sum-exps of the parts."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.partials import part_weights
from s2_jax.checks import check_float_array, check_not_truncated


def combine_partials(
    outs: Float[Array, "parts batch q_len heads value_dim"],
    lses: Float[Array, "parts batch heads q_len"],
) -> tuple[Float[Array, "batch q_len heads value_dim"], Float[Array, "batch heads q_len"]]:
    """Attention over all keys, from attention over disjoint parts of them.

    As when each device of a mesh holds a part of the keys: every device attends to its own
    (`s2_attention(..., return_lse=True)`), and the results are gathered and combined.

    Args:
      outs: outputs of the parts, any float dtype, which the result keeps.
      lses: their natural-log log-sum-exps, float32; -inf where a query saw nothing.

    Returns:
      Output and LSE over all parts. A query that saw nothing in any part gives zeros and -inf.
      Differentiable in both arguments.

    Raises:
      ValueError: shapes that do not fit each other. TypeError: wrong kinds.
    """
    for name, array in (("outs", outs), ("lses", lses)):
        check_float_array(name, array)
        check_not_truncated(name, array)
    if outs.ndim != 5 or lses.ndim != 4 or outs.shape[:4] != _swapped(lses.shape):
        raise ValueError(
            "outs must be [parts, batch, q_len, heads, value_dim] and lses "
            f"[parts, batch, heads, q_len], got shapes {outs.shape} and {lses.shape}"
        )
    dtype = jnp.float64 if jnp.float64 in (outs.dtype, lses.dtype) else jnp.float32
    weights, lse = part_weights(lses.astype(dtype))
    weights = jnp.swapaxes(weights, 2, 3)[..., None]
    return jnp.sum(weights * outs.astype(dtype), axis=0).astype(outs.dtype), lse


def _swapped(shape: tuple[int, ...]) -> tuple[int, ...]:
    parts, batch, heads, q_len = shape
    return parts, batch, q_len, heads
