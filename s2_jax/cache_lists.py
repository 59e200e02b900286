"""What a few queries see of a cache, block by block, in the form that the decode kernel reads."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.decode import MAX_ROWS, DecodeLists
from s2_jax.patterns import Pattern
from s2_jax.structure import Heads


@dataclasses.dataclass(frozen=True)
class Queries:
    """Queries that stand at `positions`, int32 `[batch, q_len]`, negative where they see nothing.

    kv_heads: int32 `[local kv heads]`, their numbers in the whole. Rows of a key/value head are its
    queries, each with all heads of the group; a program takes at most 32 of them.
    """

    pattern: Pattern
    positions: Int[Array, "batch q_len"]
    kv_heads: Int[Array, " kv_heads"]
    num_heads: int
    num_kv_heads: int

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def _programs(self) -> tuple[int, int]:
        """Programs of a key/value head, and the rows that each takes."""
        rows = self.positions.shape[1] * self.group
        return -(-rows // MAX_ROWS), min(rows, MAX_ROWS)

    def lists(
        self,
        place: Int[Array, "batch kv_heads entries"],
        block: Int[Array, "batch kv_heads entries"],
        count: Int[Array, "batch kv_heads"],
    ) -> DecodeLists:
        """The lists of every program, from what the cache of each key/value head holds.

        place: where a block is stored. block: its number, or -1 for none. count: entries in use.
        """
        rule, _ = self.pattern.token_window()
        bits = self._by_program(self._sees(rule, block), False)
        read = self._by_program(self._sees(self.pattern, block), False).any(axis=2)
        row = jnp.arange(bits.shape[2], dtype=jnp.int32)[None, None, :, None]
        bits = jnp.sum(bits.astype(jnp.int32) << row, axis=2, dtype=jnp.int32)
        programs = read.shape[1] // block.shape[1]
        place, block, count = (jnp.repeat(x, programs, axis=1) for x in (place, block, count))
        return DecodeLists(jnp.where(read, place, -1), block, bits, count)

    def sees_any(
        self, block: Int[Array, "batch kv_heads entries"]
    ) -> Bool[Array, "batch kv_heads entries"]:
        """Whether any of the queries sees any of a block."""
        return self._sees(self.pattern, block).any(axis=2)

    def pack(
        self, query: Float[Array, "batch q_len heads head_dim"]
    ) -> tuple[Float[Array, "batch programs rows head_dim"], Int[Array, "batch programs rows"]]:
        """Queries, and their positions, as programs take them."""
        batch, q_len, heads, head_dim = query.shape
        kv_heads = heads // self.group
        grouped = query.reshape(batch, q_len, kv_heads, self.group, head_dim)
        rows = jnp.moveaxis(grouped, 2, 1).reshape(batch, kv_heads, q_len * self.group, head_dim)
        position = jnp.repeat(self.positions, self.group, axis=1)[:, None]
        position = jnp.broadcast_to(position, rows.shape[:3])
        return self._by_program(rows, 0), self._by_program(position, -1)

    def unpack(
        self, rows: Float[Array, "batch programs rows *dim"]
    ) -> Float[Array, "batch q_len heads *dim"]:
        batch, q_len = self.positions.shape
        kv_heads = rows.shape[1] // self._programs[0]
        rows = rows.reshape(batch, kv_heads, -1, *rows.shape[3:])[:, :, : q_len * self.group]
        grouped = rows.reshape(batch, kv_heads, q_len, self.group, *rows.shape[3:])
        heads = kv_heads * self.group
        return jnp.moveaxis(grouped, 1, 2).reshape(batch, q_len, heads, *rows.shape[3:])

    def _sees(
        self, rule: Pattern | None, block: Int[Array, "batch kv_heads entries"]
    ) -> Bool[Array, "batch kv_heads rows entries"]:
        """Whether queries see blocks; a rule of None sees all blocks."""
        size = self.pattern.block_size
        batch, kv_heads, entries = block.shape
        held = block[:, :, None, None]
        position = self.positions[:, None, :, None, None]
        member = jnp.arange(self.group, dtype=jnp.int32)[None]
        heads = self.kv_heads[:, None] * self.group + member
        index = heads[None, :, None, :, None]
        seen: Any = position // size >= held
        if rule is not None:
            each = Heads(index, self.num_heads, self.num_kv_heads)
            seen = rule.visible(each, position // size, held)
        seen = seen & (held >= 0) & (position >= 0)
        shape = (batch, kv_heads, self.positions.shape[1], self.group, entries)
        return jnp.broadcast_to(seen, shape).reshape(batch, kv_heads, -1, entries)

    def _by_program(self, rows: Any, filling: Any) -> jax.Array:
        """`[batch, kv_heads, rows, ...]` to `[batch, programs, rows, ...]`."""
        programs, held = self._programs
        more = programs * held - rows.shape[2]
        rest = rows.ndim - 3
        padding = ((0, 0), (0, 0), (0, more), *[(0, 0)] * rest)
        rows = jnp.pad(rows, padding, constant_values=filling)
        return rows.reshape(rows.shape[0], -1, held, *rows.shape[3:])
