"""Arrays to measure with, made on the device, in little more memory than they take."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

_DRAWN_TOKENS = 8192


@functools.partial(jax.jit, static_argnums=(1, 2))
def draw(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> jax.Array:
    """Standard normal; beyond some tokens (axis 1) it repeats: drawing needs no more memory."""
    batch, tokens, *rest = shape
    some = jax.random.normal(key, (batch, min(tokens, _DRAWN_TOKENS), *rest), dtype)
    repeats = (1, -(-tokens // _DRAWN_TOKENS), *[1] * len(rest))
    return jnp.tile(some, repeats)[:, :tokens]


def draw_parameters(shapes: Any, seed: int = 0, *, inputs_last: bool = False) -> Any:
    """For a tree of shapes: matrices that keep the variance of what they multiply, other ones 1.

    inputs_last: matrices are `[outputs, inputs]`, as in a model for decoding.
    """
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        tree,
        [_parameter(key, leaf.shape, leaf.dtype, inputs_last) for key, leaf in zip(keys, leaves)],
    )


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _parameter(key: jax.Array, shape: tuple[int, ...], dtype: Any, inputs_last: bool) -> jax.Array:
    if len(shape) < 2:
        return jnp.ones(shape, dtype)
    inputs = shape[-1] if inputs_last else math.prod(shape[:-1])
    return jax.random.normal(key, shape, dtype) * jnp.asarray(inputs**-0.5, dtype)
