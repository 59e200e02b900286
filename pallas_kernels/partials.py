"""How much each part of the keys has in the whole, by the log-sum-exps of the parts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def part_weights(lses: Float[Array, "parts *rest"]) -> tuple[Array, Array]:
    """The share of each part in a query's whole, and the LSE of the whole."""
    peak = jnp.max(lses, axis=0, initial=-jnp.inf)
    finite = jax.lax.stop_gradient(jnp.where(jnp.isneginf(peak), 0.0, peak))
    weights = jnp.exp(lses - finite[None])
    total = jnp.sum(weights, axis=0)
    seen = total != 0  # a NaN was seen too
    total = jnp.where(seen, total, 1.0)
    return weights / total[None], jnp.where(seen, finite + jnp.log(total), -jnp.inf)
