"""Sampling: one full forward pass over a fixed window per token."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int


def generate(
    graphdef: Any,
    params: Any,
    prompt: Int[Array, " prompt"],
    key: Array,
    *,
    window: int,
    length: int,
    temperature: float = 1.0,
) -> Int[Array, " prompt+length"]:
    """The prompt, int32, and `length` tokens sampled after it.

    `graphdef, params = nnx.split(model, nnx.Param)`. The model sees the last `window` tokens at
    most. Temperature 0 takes the likeliest token every time.

    Raises:
        ValueError: prompt empty or not one row, window or length not positive, temperature < 0.
    """
    prompt = jnp.asarray(prompt, jnp.int32)
    if prompt.ndim != 1 or prompt.shape[0] < 1:
        raise ValueError(f"{prompt.shape=} must be (length,), with at least one token")
    if window < 1 or length < 1:
        raise ValueError(f"{window=} and {length=} must be positive")
    if temperature < 0:
        raise ValueError(f"{temperature=} must be 0 or more")
    return _generate(
        params,
        prompt,
        key,
        jnp.float32(temperature),
        graphdef=graphdef,
        window=window,
        length=length,
    )


@partial(jax.jit, static_argnames=("graphdef", "window", "length"))
def _generate(
    params: Any,
    prompt: Int[Array, " prompt"],
    key: Array,
    temperature: Float[Array, ""],
    *,
    graphdef: Any,
    window: int,
    length: int,
) -> Int[Array, " prompt+length"]:
    model = nnx.merge(graphdef, params)
    total = prompt.shape[0] + length
    row = jnp.zeros((max(total, window),), jnp.int32).at[: prompt.shape[0]].set(prompt)

    def add_token(position: Array, row: Int[Array, " total"]) -> Int[Array, " total"]:
        start = jnp.maximum(position - window, 0)  # what lies beyond `position` is not seen
        seen = jax.lax.dynamic_slice(row, (start,), (window,))
        logits = model(seen[None])[0, position - 1 - start]
        token = _sample(jax.random.fold_in(key, position), logits, temperature)
        return row.at[position].set(token)

    return jax.lax.fori_loop(prompt.shape[0], total, add_token, row)[:total]


def _sample(
    key: Array, logits: Float[Array, " v"], temperature: Float[Array, ""]
) -> Int[Array, ""]:
    scaled = logits / jnp.maximum(temperature, 1e-6)
    sampled = jax.random.categorical(key, scaled)
    return jnp.where(temperature > 0, sampled, jnp.argmax(logits)).astype(jnp.int32)
