"""Caches as they are after many tokens, without any having been taken in: random keys and values.

The tables are those that appending as many tokens gives; of that call nothing else is computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from benchmarks.random_arrays import draw
from models.cache import ModelCache
from models.config import ModelConfig
from pallas_kernels.decode import DecodeLists
from s2_jax import ContiguousCache, EvictingCache
from s2_jax.cache_lists import Queries

AnyCache = ContiguousCache | EvictingCache
Cache = TypeVar("Cache", bound=AnyCache)


def filled_model(config: ModelConfig, batch: int, max_length: int, length: int) -> ModelCache:
    """The caches of all layers after `length` tokens."""

    def make() -> ModelCache:
        return ModelCache.create(config, batch=batch, max_length=max_length)

    def tables() -> tuple[Any, ...]:
        cache = make()
        firsts = [cache.table_of_layer.index(number) for number in range(len(cache.tables))]
        return tuple(_advanced(cache[first], length) for first in firsts)

    like = jax.eval_shape(make)
    layers = tuple(with_random(layer, seed) for seed, layer in enumerate(like.layers))
    return ModelCache(layers, jax.jit(tables)(), like.table_of_layer)


def with_random(like: Cache, seed: int) -> Cache:
    """With keys and values drawn anew; `like` may hold shapes."""
    keys = jax.random.split(jax.random.key(seed))
    key, value = (
        draw(k, x.shape, jnp.dtype(x.dtype)) for k, x in zip(keys, (like.key, like.value))
    )
    return dataclasses.replace(like, key=key, value=value)


def table_after(make: Callable[[], Any], length: int) -> Any:
    """The table of the empty cache that `make` gives, after `length` tokens of every sequence."""
    return jax.jit(lambda: _advanced(make(), length))()


def _advanced(cache: Any, length: int) -> Any:
    batch, heads = cache.length.shape[0], cache.num_kv_heads
    key, value = (
        jnp.zeros((batch, length, heads, x.shape[-1]), x.dtype) for x in (cache.key, cache.value)
    )
    lengths = jnp.full((batch,), length, jnp.int32)
    return cache.append(key, value, lengths, jnp.arange(heads, dtype=jnp.int32)).table


def queries_of(cache: AnyCache) -> Queries:
    """One query of each sequence, at its last token."""
    position = cache.length[:, None] - 1
    heads = jnp.arange(cache.num_kv_heads, dtype=jnp.int32)
    return Queries(cache.pattern, position, heads, cache.num_heads, cache.num_kv_heads)


def lists_of(cache: AnyCache) -> DecodeLists:
    """What these queries see; only shapes of keys and values are needed."""

    def lists(table: Any) -> DecodeLists:
        held = cache.with_table(table)
        return held.lists(queries_of(held))

    return jax.jit(lists)(cache.table)


def visible_bytes(cache: AnyCache) -> int:
    """Of the keys and values that these queries see, in whole blocks, each read once."""
    width = cache.key.shape[-1] + cache.value.shape[-1]
    blocks = int(_count(lists_of(cache)))
    return blocks * cache.pattern.block_size * width * jnp.dtype(cache.key.dtype).itemsize


@jax.jit
def _count(lists: DecodeLists) -> jax.Array:
    entry = jnp.arange(lists.place.shape[-1], dtype=jnp.int32)[None, None]
    used = entry < lists.used[..., None]
    return ((lists.place >= 0) & used).sum(dtype=jnp.int32)
