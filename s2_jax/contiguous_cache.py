"""A cache that keeps the keys and values of every token, one row for each sequence."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.decode import DecodeLists
from s2_jax.cache_checks import check_cache
from s2_jax.cache_lists import Queries
from s2_jax.patterns import Pattern


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["key", "value", "length"],
    meta_fields=["pattern", "num_heads", "num_kv_heads", "max_length"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class ContiguousCache:
    """Keys and values of all tokens, for dense attention or any other causal pattern.

    Passed to `cached_attention` and returned by it. A pytree: the arrays may be sharded by batch
    and by key/value heads.

    Attributes:
      key: `[batch, rows, kv_heads, head_dim]`, rows being max_length rounded up to whole blocks.
      value: `[batch, rows, kv_heads, value_dim]`.
      length: int32 `[batch]`, tokens that each sequence has so far.
      pattern, num_heads, num_kv_heads: of the whole call, also where heads are split.
      max_length: tokens that a sequence can have.
    """

    key: Float[Array, "batch rows kv_heads head_dim"]
    value: Float[Array, "batch rows kv_heads value_dim"]
    length: Int[Array, " batch"]
    pattern: Pattern
    num_heads: int
    num_kv_heads: int
    max_length: int

    paged = False

    @classmethod
    def create(
        cls,
        pattern: Pattern,
        *,
        batch: int,
        max_length: int,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int | None = None,
        value_dim: int | None = None,
        dtype: Any = jnp.bfloat16,
    ) -> Self:
        """An empty cache.

        Args:
          pattern: what the heads see; causal.
          batch: sequences. max_length: tokens that each can have.
          num_heads, num_kv_heads: of queries and of keys (by default as many).
          head_dim, value_dim: of keys and of values (by default the same).
          dtype: of keys and values; queries must share it.

        Raises:
          ValueError, TypeError: a pattern or numbers that do not fit, named.
        """
        sizes = check_cache(
            pattern, batch, max_length, num_heads, num_kv_heads, head_dim, value_dim, dtype
        )
        shape = (sizes.batch, sizes.blocks * pattern.block_size, sizes.num_kv_heads)
        return cls(
            key=jnp.zeros((*shape, sizes.head_dim), dtype),
            value=jnp.zeros((*shape, sizes.value_dim), dtype),
            length=jnp.zeros((sizes.batch,), jnp.int32),
            pattern=pattern,
            num_heads=sizes.num_heads,
            num_kv_heads=sizes.num_kv_heads,
            max_length=sizes.max_length,
        )

    @property
    def table(self) -> Int[Array, " batch"]:
        """What layers with the same pattern have in common."""
        return self.length

    def with_table(self, table: Any) -> Self:
        return dataclasses.replace(self, length=table)

    def emptied(self) -> Self:
        return dataclasses.replace(self, length=jnp.zeros_like(self.length))

    def append(
        self,
        key: Float[Array, "batch new kv_heads head_dim"],
        value: Float[Array, "batch new kv_heads value_dim"],
        lengths: Int[Array, " batch"],
        kv_heads: Int[Array, " kv_heads"],
    ) -> Self:
        """With the first `lengths` of the new tokens; what has no room is left out."""
        row = self._rows(key.shape[1], lengths)
        stored = write_rows(self.key, row, key), write_rows(self.value, row, value)
        return self.with_rows(*stored, self.length + lengths)

    def places(
        self, new: int, lengths: Int[Array, " batch"], kv_heads: Int[Array, " kv_heads"]
    ) -> tuple[Int[Array, "batch kv_heads new"], Int[Array, " batch"]]:
        """Which row each head takes up to `new` tokens in, and the lengths then.

        The first `lengths` have a place; each other one has a row of its own past the end.
        """
        row = self._rows(new, lengths)[:, None]
        shape = (row.shape[0], kv_heads.size, new)
        return jnp.broadcast_to(row, shape), self.length + lengths

    def with_rows(self, key: Array, value: Array, table: Int[Array, " batch"]) -> Self:
        return dataclasses.replace(self, key=key, value=value, length=table)

    def _rows(self, new: int, lengths: Array) -> Int[Array, "batch new"]:
        step = jnp.arange(new, dtype=jnp.int32)[None]
        position = self.length[:, None] + step
        fits = (step < lengths[:, None]) & (position < self.max_length)
        return jnp.where(fits, position, self.key.shape[1] + step)

    def lists(self, queries: Queries) -> DecodeLists:
        """What queries see of it: the visible blocks of each head, side by side."""
        batch, rows, kv_heads, _ = self.key.shape
        blocks = rows // self.pattern.block_size
        block = jnp.broadcast_to(jnp.arange(blocks, dtype=jnp.int32), (batch, kv_heads, blocks))
        seen = queries.sees_any(block)
        before = jnp.cumsum(seen, axis=2, dtype=jnp.int32) - seen.astype(jnp.int32)
        target = jnp.where(seen, before, blocks)

        def compressed(target: Array, block: Array) -> Array:
            return jnp.full_like(block, -1).at[target].set(block, mode="drop")

        found = jax.vmap(jax.vmap(compressed))(target, block)
        return queries.lists(found, found, jnp.sum(seen, axis=2, dtype=jnp.int32))

    def whole(
        self, key: Array, value: Array, lengths: Array, kv_heads: Array
    ) -> tuple[Array, Array]:
        """Keys and values of all tokens, the new ones too, by position."""
        both = self.append(key, value, lengths, kv_heads)
        return both.key, both.value

    def has_no_room(self, position: Int[Array, "batch new"]) -> Bool[Array, "batch new"]:
        """Whether tokens at these positions cannot be kept."""
        return position >= self.max_length

    def row(self, index: Any) -> Self:
        """The sequence `index` alone, possibly traced, as a cache of batch 1."""
        one = [
            jax.lax.dynamic_slice_in_dim(x, index, 1) for x in (self.key, self.value, self.length)
        ]
        return dataclasses.replace(self, key=one[0], value=one[1], length=one[2])

    def with_row(self, index: Any, one: Any) -> Self:
        """With the sequence `index` replaced by a cache of batch 1."""
        put = jax.lax.dynamic_update_slice_in_dim
        return dataclasses.replace(
            self,
            key=put(self.key, one.key, index, 0),
            value=put(self.value, one.value, index, 0),
            length=put(self.length, one.length, index, 0),
        )


@jax.vmap
def write_rows(
    storage: Float[Array, "rows *rest"], row: Int[Array, " new"], new: Float[Array, "new *rest"]
) -> Float[Array, "rows *rest"]:
    """Rows of each sequence replaced, no two of them the same; those past the end are left out.

    Here and elsewhere by vmap, so that a mesh which splits sequences and heads need not exchange
    anything; and with unique indices, so that a GPU need not write atomically.
    """
    return storage.at[row].set(new, mode="drop", unique_indices=True)
