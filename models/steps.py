"""The compiled steps of generation: a prompt joins a row of the cache; all rows go on."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from models.cache import ModelCache
from models.sampling import Sampling

NO_TOKEN = -2  # where the logits are no numbers


class Rows(NamedTuple):
    """The sequences that are being decoded, one a row.

    token: int32 `[rows]`, the last one, which the cache does not hold yet. left: int32 `[rows]`,
    tokens still to come; 0 for a row that is free. request: int32 `[rows]`, the number of the
    prompt, of which the random numbers depend.
    """

    token: Int[Array, " rows"]
    left: Int[Array, " rows"]
    request: Int[Array, " rows"]


@functools.partial(jax.jit, donate_argnums=0)
def give_pages(cache: ModelCache, row: Any, pages: Int[Array, " slots"]) -> ModelCache:
    return cache.with_pages(row, pages)


@functools.partial(
    jax.jit, static_argnames=("graphdef", "sampling", "first"), donate_argnames="cache"
)
def take_in(
    params: Any,
    cache: ModelCache,
    tokens: Int[Array, "1 chunk"],
    length: Int[Array, ""],
    row: Int[Array, ""],
    key: Array,
    request: Int[Array, ""],
    *,
    graphdef: Any,
    sampling: Sampling,
    first: bool,
) -> tuple[Int[Array, ""], ModelCache]:
    """A chunk of a prompt joins a row; the token that follows, and the cache."""
    model = nnx.merge(graphdef, params)
    x, one = model.extend(tokens, cache.row(row), lengths=length[None], first=first)
    last = jax.lax.dynamic_slice_in_dim(x, length - 1, 1, axis=1)
    token = _draw(key, request[None], one.length, model.logits(last)[:, 0], sampling)
    return token[0], cache.with_row(row, one)


@functools.partial(
    jax.jit, static_argnames=("graphdef", "sampling", "steps"), donate_argnames=("cache", "rows")
)
def decode_steps(
    params: Any,
    cache: ModelCache,
    rows: Rows,
    key: Array,
    stops: Int[Array, " stops"],
    *,
    graphdef: Any,
    sampling: Sampling,
    steps: int,
) -> tuple[Int[Array, "steps rows"], Rows, ModelCache]:
    """Up to `steps` tokens of every row that is not free; -1 where there is none."""
    model = nnx.merge(graphdef, params)

    def add_token(step: Array, state: tuple[Any, ...]) -> tuple[Any, ...]:
        produced, rows, cache = state
        active = rows.left > 0
        x, cache = model.extend(rows.token[:, None], cache, lengths=active.astype(jnp.int32))
        token = _draw(key, rows.request, cache.length, model.logits(x)[:, 0], sampling)
        ended = jnp.any(token[:, None] == stops[None], axis=1) | (token == NO_TOKEN)
        left = jnp.where(active & ~ended, rows.left - 1, 0)
        produced = produced.at[step].set(jnp.where(active, token, -1))
        return produced, Rows(token, left, rows.request), cache

    # As many turns as there can be: asking the GPU before each whether there is to be another would
    # let it wait.
    produced = jnp.full((steps, rows.token.size), -1, jnp.int32)
    return jax.lax.fori_loop(0, steps, add_token, (produced, rows, cache))


def _draw(key: Array, request: Array, position: Array, logits: Array, sampling: Sampling) -> Array:
    """The next token of every row, from random numbers of its request and its position; -2 where
    the logits are no numbers.
    """
    of_request = jax.vmap(jax.random.fold_in, (None, 0))(key, request)
    keys = jax.vmap(jax.random.fold_in)(of_request, position)
    return jnp.where(jnp.isnan(logits).any(axis=-1), NO_TOKEN, sampling.draw(keys, logits))
