"""What caches and calls with a cache accept."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from s2_jax.checks import check_float_dtype
from s2_jax.patterns import Pattern
from s2_jax.structure import at_least_one


class CacheSizes(NamedTuple):
    """Python's integers; NumPy's would promote what they meet. blocks: of a whole row."""

    batch: int
    max_length: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    blocks: int


def check_cache(
    pattern: Any,
    batch: Any,
    max_length: Any,
    num_heads: Any,
    num_kv_heads: Any,
    head_dim: Any,
    value_dim: Any,
    dtype: Any,
) -> CacheSizes:
    """The numbers of a cache; raises ValueError or TypeError where they do not fit."""
    if not isinstance(pattern, Pattern):
        raise TypeError(
            f"pattern must be a pattern such as s2_jax.local_stride(16, 8), "
            f"got {type(pattern).__name__}"
        )
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    value_dim = head_dim if value_dim is None else value_dim
    given = {
        "batch": batch,
        "max_length": max_length,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "value_dim": value_dim,
    }
    numbers = {name: at_least_one(name, number) for name, number in given.items()}
    num_heads, num_kv_heads = numbers["num_heads"], numbers["num_kv_heads"]
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads=} must be a multiple of {num_kv_heads=}")
    if not pattern.causal:
        raise ValueError("a cache needs a causal pattern, got one with causal=False")
    check_float_dtype("dtype", dtype)
    if jnp.dtype(dtype) == jnp.float64 and not jax.config.read("jax_enable_x64"):
        raise TypeError("dtype is float64, which JAX would cast to float32: enable jax_enable_x64")
    blocks = math.ceil(numbers["max_length"] / pattern.block_size)
    pattern.check(num_heads, num_kv_heads, blocks, blocks)
    return CacheSizes(**numbers, blocks=blocks)


def check_new(cache: Any, query: jax.Array, key: jax.Array, value: jax.Array, shards: int) -> None:
    """Raises ValueError or TypeError where new tokens do not fit the cache."""
    batch = cache.length.shape[0]
    for name, array, stored in (("key", key, cache.key), ("value", value, cache.value)):
        heads, dim = stored.shape[0 if cache.paged else 2], stored.shape[-1]
        if array.shape[0] != batch or array.shape[2:] != (heads, dim):
            raise ValueError(
                f"{name} must be [{batch}, new tokens, {heads}, {dim}] to fit the cache, "
                f"got shape {array.shape}"
            )
        if array.dtype != stored.dtype:
            raise TypeError(f"{name} is {array.dtype}, but the cache holds {stored.dtype}")
    found = (query.shape[2] * shards, key.shape[2] * shards)
    if found != (cache.num_heads, cache.num_kv_heads):
        raise ValueError(
            f"the cache is one of {cache.num_heads} query heads and {cache.num_kv_heads} key/value "
            f"heads, got {found[0]} and {found[1]}"
        )
    if query.shape[1] != key.shape[1]:
        raise ValueError(
            f"query and key must be of the same new tokens, got {query.shape[1]} and {key.shape[1]}"
        )


def check_cache_of(cache: Any, pattern: Pattern, num_heads: int, num_kv_heads: int) -> None:
    """Raises TypeError or ValueError where a cache is none, or for another pattern or heads."""
    if not hasattr(cache, "pattern"):
        raise TypeError(
            f"cache must be a ContiguousCache or an EvictingCache, got {type(cache).__name__}"
        )
    for name, mine in (
        ("pattern", pattern),
        ("num_heads", num_heads),
        ("num_kv_heads", num_kv_heads),
    ):
        held = getattr(cache, name, None)
        if held != mine:
            raise ValueError(f"the cache was made for {name}={held!r}, not for {mine!r}")
