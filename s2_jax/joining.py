"""How new tokens are turned for their positions and join a cache."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple, TypeVar, cast

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.append import Token, append_over_mesh
from pallas_kernels.lowering import varying
from s2_jax.contiguous_cache import ContiguousCache
from s2_jax.evicting_cache import EvictingCache
from s2_jax.implementations import run
from s2_jax.rope import cos_and_sin, rotate_from

Cache = TypeVar("Cache", bound=ContiguousCache | EvictingCache)


class New(NamedTuple):
    """New tokens of each sequence."""

    query: Float[Array, "batch new heads head_dim"]
    key: Float[Array, "batch new kv_heads head_dim"]
    value: Float[Array, "batch new kv_heads value_dim"]

    def turned(self, offset: Any, rope_base: float | None) -> New:
        """With queries and keys turned for positions from `offset`; as they are without a base."""
        query, key = (rotate_from(x, offset, rope_base) for x in (self.query, self.key))
        return self._replace(query=query, key=key)


def join(
    new: New,
    cache: Cache,
    lengths: Int[Array, " batch"],
    kv_heads: Int[Array, " kv_heads"],
    rope_base: float | None,
    implementation: str | None,
) -> tuple[Float[Array, "batch 1 heads head_dim"], Cache]:
    """The queries of one token of each sequence, turned, and the cache with it, by one kernel.

    lengths: 1, or 0 where there is none. kv_heads: numbers of the heads that the cache holds.
    What the kernel is not for is left to XLA.
    """
    if implementation == "reference" or not _by_kernel(new, cache):
        turned = new.turned(cache.length, rope_base)
        grown = cache.append(turned.key, turned.value, lengths, kv_heads)
        return turned.query, cast(Cache, grown)
    row, table = cache.places(1, lengths, kv_heads)
    angles: tuple[Any, Any] = (None, None)
    if rope_base is not None:
        angles = cos_and_sin(cache.length, new.query.shape[-1], rope_base)

    def reference(_: Any, __: Any, key: Array, value: Array) -> tuple[Array, Array, Array]:
        turned = new.turned(cache.length, rope_base)
        held = dataclasses.replace(cache, key=key, value=value)
        after = held.append(turned.key, turned.value, lengths, kv_heads)
        return turned.query, after.key, after.value

    kernel = functools.partial(append_over_mesh, paged=cache.paged)
    operands = (Token(*new, *angles), row[..., 0], cache.key, cache.value)
    query, key, value = run(implementation, kernel, reference, *operands)
    return query, cast(Cache, cache.with_rows(key, value, cast(Any, table)))


def _by_kernel(new: New, cache: Any) -> bool:
    """Values as large as keys; and not a cache that devices share while their queries differ."""
    if new.query.shape[-1] != new.value.shape[-1]:
        return False
    return varying([new.query]) <= varying([new.key, new.value, *jax.tree.leaves(cache)])
