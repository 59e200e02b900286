"""The programs of one decode step on one cache, whole and in parts, and calls of them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.filled_caches import lists_of, queries_of, table_after, visible_bytes, with_random
from benchmarks.jax_timing import Run, calls
from benchmarks.programs import Lower, Program
from benchmarks.random_arrays import draw
from pallas_kernels.decode import DecodeSettings, DecodeTile, decode
from s2_jax import ContiguousCache, EvictingCache, Pattern, cached_attention
from s2_jax.decode_reference import reference_decode
from s2_jax.implementations import LAUNCHERS
from s2_jax.joining import New, join

Kind = Literal["evicting", "contiguous"]
_CLASSES: dict[Kind, Any] = {"evicting": EvictingCache, "contiguous": ContiguousCache}
_L2_BYTES = 50 << 20
_TIMES_L2, _MOST_COPIES = 8, 16


@dataclasses.dataclass(frozen=True)
class Shape:
    """The last of `length` tokens comes, in every sequence of a batch; bfloat16."""

    kind: Kind
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    length: int

    def make(self, pattern: Pattern) -> Any:
        """An empty cache."""
        return _CLASSES[self.kind].create(
            pattern, batch=self.batch, max_length=self.length, num_heads=self.heads,
            num_kv_heads=self.kv_heads, head_dim=self.head_dim,
        )  # fmt: skip

    @property
    def full_bytes(self) -> int:
        """Of the keys and values of all tokens."""
        return self.batch * self.length * self.kv_heads * self.head_dim * 2 * 2


def copies_for(visible: int) -> int:
    """How many caches calls take in turn, so that none finds its own in the cache of the GPU: in a
    model, other layers come between."""
    return max(1, min(_MOST_COPIES, -(-_TIMES_L2 * _L2_BYTES // visible)))


class Job(NamedTuple):
    """A program, and what it takes. storage: it reads key and value, which come first, or uses them
    up and returns them first, or takes neither."""

    lower: Lower
    arguments: tuple[Any, ...]
    storage: Literal["read", "used up", "not taken"]


class Storage:
    """Keys and values, several times over, which calls take in turn."""

    def __init__(self, like: Any, copies: int) -> None:
        drawn = [with_random(like, seed) for seed in range(copies)]
        self._pairs = [(cache.key, cache.value) for cache in drawn]
        self._turn = 0

    def run(self, program: Program, job: Job) -> Run:
        """Calls of a job's program. The first raises FloatingPointError if its last result is not
        finite."""
        checked = False

        def once() -> Any:
            nonlocal checked
            self._turn = (self._turn + 1) % len(self._pairs)
            stored = () if job.storage == "not taken" else self._pairs[self._turn]
            results = program.run(*stored, *job.arguments)
            if job.storage == "used up":
                self._pairs[self._turn] = results[0], results[1]
                results = results[2:]
            if not checked:
                if not bool(jnp.isfinite(jax.tree.leaves(results)[-1]).all()):
                    raise FloatingPointError("results that are not finite")
                checked = True
            return results

        return calls(once)


class Step:
    """One new token a sequence under one pattern: its arguments, and the programs that take them.

    like: the cache in shapes. visible: bytes of keys and values that the queries see.
    """

    def __init__(self, shape: Shape, pattern: Pattern) -> None:
        make = functools.partial(shape.make, pattern)
        self.like: Any = jax.eval_shape(make)
        self.before, after = (table_after(make, n) for n in (shape.length - 1, shape.length))
        heads = (shape.heads, shape.kv_heads, shape.kv_heads)
        self.new = tuple(
            draw(jax.random.key(i), (shape.batch, 1, n, shape.head_dim))
            for i, n in enumerate(heads)
        )
        at_end = self.like.with_table(after)
        self.visible, self.lists = visible_bytes(at_end), lists_of(at_end)
        self.lengths = jnp.full((shape.batch,), shape.length, jnp.int32)
        self.rows, self.position = queries_of(at_end).pack(self.new[0])

    def _job(self, function: Any, arguments: tuple[Any, ...], storage: Any) -> Job:
        stored = () if storage == "not taken" else (self.like.key, self.like.value)
        donated = (0, 1) if storage == "used up" else ()
        program = jax.jit(function, donate_argnums=donated)
        return Job(lambda: program.lower(*stored, *arguments), arguments, storage)

    def _cache(self, key: jax.Array, value: jax.Array, table: Any) -> Any:
        return dataclasses.replace(self.like, key=key, value=value).with_table(table)

    def attend(self, implementation: str) -> Job:
        """The whole of `cached_attention`."""

        def attend(key: jax.Array, value: jax.Array, table: Any, new: Any) -> Any:
            cache = self._cache(key, value, table)
            query, *both = new
            options: Any = {"implementation": implementation}
            out, grown = cached_attention(query, both[0], both[1], cache, **options)
            return grown.key, grown.value, grown.table, out

        return self._job(attend, (self.before, self.new), "used up")

    def append(self, implementation: str) -> Job:
        """The new token's way into the cache."""

        def append(key: jax.Array, value: jax.Array, table: Any, new: Any) -> Any:
            cache = self._cache(key, value, table)
            lengths = jnp.ones_like(cache.length)
            heads = jnp.arange(cache.num_kv_heads, dtype=jnp.int32)
            _, grown = join(New(*new), cache, lengths, heads, None, implementation)
            return grown.key, grown.value, grown.table

        return self._job(append, (self.before, self.new), "used up")

    def list_building(self) -> Job:
        """The lists, from the table alone."""

        def lists(table: Any) -> Any:
            held = self.like.with_table(table)
            return held.lists(queries_of(held))

        return self._job(lists, (self.before,), "not taken")

    def decode(self, implementation: str, tile: DecodeTile | None = None) -> Job:
        """The kernel with lists that are there, and the putting together of its parts."""
        pattern = self.like.pattern
        settings = DecodeSettings(
            scale=self.new[0].shape[-1] ** -0.5,
            block_size=pattern.block_size,
            paged=self.like.paged,
            window=pattern.token_window()[1],
            launcher=LAUNCHERS.get(implementation, "pallas"),
            tile=tile,
        )
        function = reference_decode if implementation == "reference" else decode

        def alone(key: jax.Array, value: jax.Array, rows: Any, position: Any, lists: Any) -> Any:
            return function(settings, rows, key, value, position, lists)[0]

        return self._job(alone, (self.rows, self.position, self.lists), "read")

    def cudnn(self) -> Job:
        """JAX's own attention by cuDNN, to all that a contiguous cache holds."""

        def attend(key: jax.Array, value: jax.Array, query: Any, lengths: Any) -> Any:
            return jax.nn.dot_product_attention(
                query, key, value, key_value_seq_lengths=lengths, implementation="cudnn"
            )

        return self._job(attend, (self.new[0], self.lengths), "read")
