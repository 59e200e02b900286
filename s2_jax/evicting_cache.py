"""A cache that keeps, for every head, only the blocks that the head can still see."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.decode import DecodeLists
from s2_jax.cache_checks import check_cache
from s2_jax.cache_lists import Queries
from s2_jax.checks import is_array
from s2_jax.contiguous_cache import write_rows
from s2_jax.page_plan import PagePlan, plan_pages
from s2_jax.patterns import Pattern
from s2_jax.structure import at_least_one


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["page", "block", "length"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True, eq=False)
class PageTable:
    """Which page a slot of a sequence is, and which block it holds.

    page: int32 `[batch, slots]`, -1 where the sequence has none. The same number for every head,
      each of which has pages of its own. block: int32 `[batch, kv_heads, slots]`, -1 where nothing
      is held; a block stays until another takes its slot. length: int32 `[batch]`, tokens so far.
    """

    page: Int[Array, "batch slots"]
    block: Int[Array, "batch kv_heads slots"]
    length: Int[Array, " batch"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["key", "value", "table"],
    meta_fields=["pattern", "num_heads", "num_kv_heads", "max_length"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class EvictingCache:
    """Keys and values that are still seen: about `local_blocks + length / vert_stride` blocks.

    Passed to `cached_attention` and returned by it. The pages belong to no sequence until the table
    gives them to one, so that sequences of different lengths can share them. A pytree; key and
    value may be sharded by key/value heads, their first axis, together with `table.block`.

    Attributes:
      key: `[kv_heads, pages, block_size, head_dim]`.
      value: `[kv_heads, pages, block_size, value_dim]`.
      table: where every sequence keeps what.
      pattern, num_heads, num_kv_heads: of the whole call, also where heads are split.
      max_length: tokens that a sequence can have.
    """

    key: Float[Array, "kv_heads pages block_size head_dim"]
    value: Float[Array, "kv_heads pages block_size value_dim"]
    table: PageTable
    pattern: Pattern
    num_heads: int
    num_kv_heads: int
    max_length: int

    paged = True

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
        num_pages: int | None = None,
    ) -> Self:
        """An empty cache.

        Args:
          pattern: what the heads see; causal and KV-efficient.
          batch: sequences. max_length: tokens that each can have.
          num_heads, num_kv_heads: of queries and of keys (by default as many).
          head_dim, value_dim: of keys and of values (by default the same).
          dtype: of keys and values; queries must share it.
          num_pages: pages of a head, for all sequences. By default every sequence has as many as
            max_length needs; where a number is given, none has any before `with_pages`.

        Raises:
          ValueError: a pattern that is not KV-efficient (the message says where it drops a block
            and wants it back), or numbers that do not fit, named. TypeError: wrong kinds.
        """
        sizes = check_cache(
            pattern, batch, max_length, num_heads, num_kv_heads, head_dim, value_dim, dtype
        )
        slots = plan_pages(pattern, sizes.num_heads, sizes.num_kv_heads, sizes.blocks).slots
        pages = sizes.batch * slots
        page = np.arange(pages, dtype=np.int32).reshape(sizes.batch, slots)
        if num_pages is not None:
            pages = at_least_one("num_pages", num_pages)
            page = np.full_like(page, -1)
        shape = (sizes.num_kv_heads, pages, pattern.block_size)
        return cls(
            key=jnp.zeros((*shape, sizes.head_dim), dtype),
            value=jnp.zeros((*shape, sizes.value_dim), dtype),
            table=PageTable(
                jnp.asarray(page),
                jnp.full((sizes.batch, sizes.num_kv_heads, slots), -1, jnp.int32),
                jnp.zeros((sizes.batch,), jnp.int32),
            ),
            pattern=pattern,
            num_heads=sizes.num_heads,
            num_kv_heads=sizes.num_kv_heads,
            max_length=sizes.max_length,
        )

    @staticmethod
    def slots_for(pattern: Pattern, num_heads: int, num_kv_heads: int, max_length: int) -> int:
        """Pages that a sequence of `max_length` tokens takes of each head.

        Raises:
          ValueError: the pattern is not causal, does not fit the heads, or is not KV-efficient.
        """
        at_least_one("max_length", max_length)
        if at_least_one("num_heads", num_heads) % at_least_one("num_kv_heads", num_kv_heads):
            raise ValueError(f"{num_heads=} must be a multiple of {num_kv_heads=}")
        blocks = -(-max_length // pattern.block_size)
        return plan_pages(pattern, num_heads, num_kv_heads, blocks).slots

    @property
    def length(self) -> Int[Array, " batch"]:
        """Tokens that each sequence has so far."""
        return self.table.length

    def with_table(self, table: Any) -> Self:
        return dataclasses.replace(self, table=table)

    def pages_needed(self, length: int) -> int:
        """Pages that a sequence of `length` tokens takes of each head."""
        blocks = min(-(-length // self.pattern.block_size), self._plan.blocks)
        return int(self._plan.slots_by_block[blocks])

    def with_pages(self, index: Any, pages: Int[Array, " slots"]) -> Self:
        """With an empty sequence `index`, possibly traced, that has these pages, padded by -1.

        No other sequence may have any of them: that is for the caller to keep track of.

        Raises:
          ValueError, TypeError: pages of another shape or dtype; where they are known, one that
            does not exist, or a sequence that does not.
        """
        slots = self.table.page.shape[1]
        if not is_array(pages) or pages.dtype != jnp.int32:
            found = pages.dtype if is_array(pages) else type(pages).__name__
            raise TypeError(f"pages must be an int32 array, got {found}")
        if pages.shape != (slots,):
            raise ValueError(f"pages must have shape ({slots},), got {pages.shape}")
        number, batch = self.key.shape[1], self.table.page.shape[0]
        if not isinstance(pages, jax.core.Tracer) and np.asarray(pages).max(initial=0) >= number:
            raise ValueError(f"pages must be below {number}, got {np.asarray(pages)}")
        if isinstance(index, (int, np.integer)) and not 0 <= index < batch:
            raise ValueError(f"{index=} must be a sequence from 0 to below {batch}")
        pages = jnp.where((pages >= 0) & (pages < number), pages, -1)
        table = PageTable(
            self.table.page.at[index].set(pages),
            self.table.block.at[index].set(-1),
            self.table.length.at[index].set(0),
        )
        return self.with_table(table)

    def emptied(self) -> Self:
        table = self.table
        return self.with_table(
            PageTable(table.page, jnp.full_like(table.block, -1), jnp.zeros_like(table.length))
        )

    def append(
        self,
        key: Float[Array, "batch new kv_heads head_dim"],
        value: Float[Array, "batch new kv_heads value_dim"],
        lengths: Int[Array, " batch"],
        kv_heads: Int[Array, " kv_heads"],
    ) -> Self:
        """With the first `lengths` of the new tokens; what has no room is left out.

        New blocks take the slots that the plan gives them, and so evict what was there.
        """
        row, table = self.places(key.shape[1], lengths, kv_heads)

        # By vmap, so that a mesh which splits the heads need not exchange anything.
        @functools.partial(jax.vmap, in_axes=(0, 1, 2))
        def write(pages: Array, row: Array, new: Array) -> Array:
            rows = pages.reshape(-1, pages.shape[-1])
            return rows.at[row].set(new, mode="drop", unique_indices=True).reshape(pages.shape)

        return self.with_rows(write(self.key, row, key), write(self.value, row, value), table)

    def places(
        self, new: int, lengths: Int[Array, " batch"], kv_heads: Int[Array, " kv_heads"]
    ) -> tuple[Int[Array, "batch kv_heads new"], PageTable]:
        """Which row of all its pages each head takes up to `new` tokens in, and the table then.

        The first `lengths` have a place; each other one has a row of its own past the end.
        """
        table = self._advanced(new, lengths, kv_heads)
        step = jnp.arange(new, dtype=jnp.int32)[None]
        position = self.length[:, None] + step
        size, pages = self.pattern.block_size, self.key.shape[1]
        page = self._page_of(table, position // size, kv_heads)
        fits = (step < lengths[:, None]) & (position < self.max_length)
        nowhere = pages * size + jnp.arange(position.size, dtype=jnp.int32)
        row = page * size + (position % size)[:, None]
        nowhere = nowhere.reshape(position.shape)[:, None]
        return jnp.where(fits[:, None] & (page >= 0), row, nowhere), table

    def with_rows(self, key: Array, value: Array, table: PageTable) -> Self:
        return dataclasses.replace(self, key=key, value=value, table=table)

    def lists(self, queries: Queries) -> DecodeLists:
        """What queries see of it: every slot in use, the lowest first."""
        table = self.table
        place = jnp.broadcast_to(table.page[:, None], table.block.shape)
        block = jnp.where(place >= 0, table.block, -1)
        used = jnp.sum(table.block >= 0, axis=2, dtype=jnp.int32)
        return queries.lists(place, block, used)

    def whole(
        self, key: Array, value: Array, lengths: Array, kv_heads: Array
    ) -> tuple[Array, Array]:
        """Keys and values by position, the new ones too; zeros for what has been evicted."""
        size, blocks = self.pattern.block_size, self._plan.blocks
        batch = self.length.shape[0]
        each = jnp.broadcast_to(jnp.arange(blocks, dtype=jnp.int32), (batch, blocks))
        # A block stays in the table until another takes its slot, seen or not.
        last = jnp.asarray(self._plan.last_of_block)[jnp.asarray(self._plan.plan_of_head)[kv_heads]]
        seen = last[None] >= (self.length // size)[:, None, None]
        page = jnp.where(seen, self._page_of(self.table, each, kv_heads), -1)
        step = jnp.arange(key.shape[1], dtype=jnp.int32)[None]
        position = self.length[:, None] + step
        fits = (step < lengths[:, None]) & (position < self.max_length)
        row = jnp.where(fits, position, blocks * size + step)

        def by_position(pages: Array, new: Array) -> Array:
            held = jax.vmap(lambda pages, page: pages[page], (0, 1), 1)(pages, page)
            held = jnp.where((page >= 0)[..., None, None], held, 0)
            held = jnp.moveaxis(held, 1, 3).reshape(batch, blocks * size, *new.shape[2:])
            return write_rows(held, row, new)

        return by_position(self.key, key), by_position(self.value, value)

    def has_no_room(self, position: Int[Array, "batch new"]) -> Bool[Array, "batch new"]:
        """Whether tokens at these positions cannot be kept, for want of pages or altogether."""
        plan, size = self._plan, self.pattern.block_size
        begun = jnp.clip(position // size + 1, 0, plan.blocks)
        pages = jnp.sum(self.table.page >= 0, axis=1, dtype=jnp.int32)[:, None]
        return (position >= self.max_length) | (jnp.asarray(plan.slots_by_block)[begun] > pages)

    def row(self, index: Any) -> Self:
        """The sequence `index` alone, possibly traced, as a cache of batch 1 with all pages."""
        take = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=index, slice_size=1)
        return self.with_table(jax.tree.map(take, self.table))

    def with_row(self, index: Any, one: Any) -> Self:
        """With the sequence `index`, and the pages, replaced by those of a cache of batch 1."""
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=index, axis=0)
        return one.with_table(jax.tree.map(put, self.table, one.table))

    @property
    def _plan(self) -> PagePlan:
        blocks = -(-self.max_length // self.pattern.block_size)
        return plan_pages(self.pattern, self.num_heads, self.num_kv_heads, blocks)

    def _slots(self, block: Array, kv_heads: Array) -> Array:
        """Slots of blocks `[batch, n]` for each head, `[batch, kv_heads, n]`; -1 for none."""
        plan = self._plan
        number = jnp.asarray(plan.plan_of_head)[kv_heads][None, :, None]
        held = jnp.clip(block, 0, plan.blocks - 1)[:, None]
        slot = jnp.asarray(plan.slot_of_block)[number, held]
        return jnp.where(((block >= 0) & (block < plan.blocks))[:, None], slot, -1)

    def _page_of(self, table: PageTable, block: Array, kv_heads: Array) -> Array:
        """Pages that hold blocks `[batch, n]`, `[batch, kv_heads, n]`; -1 where none does."""
        slot = self._slots(block, kv_heads)
        there = jnp.maximum(slot, 0)
        held = jnp.take_along_axis(table.block, there, axis=2) == block[:, None]
        page = jax.vmap(lambda page, there: page[there])(table.page, there)
        return jnp.where(held & (slot >= 0), page, -1)

    def _advanced(self, new: int, lengths: Array, kv_heads: Array) -> PageTable:
        """The table once `lengths` of up to `new` tokens have come."""
        size, table = self.pattern.block_size, self.table
        begun, end = -(-table.length // size), -(-(table.length + lengths) // size)
        block = begun[:, None] + jnp.arange(-(-new // size), dtype=jnp.int32)[None]
        slot = self._slots(block, kv_heads)
        slot = jnp.where((slot >= 0) & (block < end[:, None])[:, None], slot, table.page.shape[1])

        def newer(held: Array, slot: Array, block: Array) -> Array:
            return held.at[slot].max(block, mode="drop")

        held = jax.vmap(jax.vmap(newer, (0, 0, None)))(table.block, slot, block)
        return PageTable(table.page, held, table.length + lengths)
