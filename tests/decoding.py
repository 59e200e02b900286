"""Sequences that come to a cache in pieces, with NaN wherever nothing may be read."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

import s2_jax
from s2_jax import ContiguousCache, EvictingCache
from tests.calls import AttentionCall, assert_as_good_as

CACHES = {"contiguous": ContiguousCache, "evicting": EvictingCache}
# Pieces are padded to one of these, so that two programs serve all lengths. Up to 16 tokens go to
# the decode kernel, more to the kernels for long rows.
WIDTHS = (16, 48)
Piece = int | tuple[int, ...]


def make_cache(kind: str, call: AttentionCall, **changes: Any) -> Any:
    """An empty cache for all tokens of a call."""
    sizes = {
        "batch": call.batch, "max_length": call.q_len, "num_heads": call.heads,
        "num_kv_heads": call.kv_heads, "head_dim": call.head_dim, "value_dim": call.value_dim,
        "dtype": call.dtype,
    }  # fmt: skip
    return CACHES[kind].create(call.whole_pattern, **(sizes | changes))


@functools.lru_cache(maxsize=128)
def program(scale: float | None, soft_cap: float | None, implementation: str | None, first: bool):
    """`cached_attention` under `jit`: query, key, value, cache, lengths -> output, cache."""

    @jax.jit
    def run(query, key, value, cache, lengths):
        return s2_jax.cached_attention(
            query, key, value, cache, lengths=lengths, first=first, scale=scale,
            logits_soft_cap=soft_cap, implementation=implementation,
        )  # fmt: skip

    return run


def feed(
    call: AttentionCall,
    cache: Any,
    pieces: Sequence[Piece],
    implementation: str | None,
    *,
    first: bool = False,
    poison: bool = True,
    place: Callable[[np.ndarray], Any] = np.asarray,
    **changes: np.ndarray,
) -> tuple[np.ndarray, Any]:
    """The tokens of a call go on from where the cache is; all outputs, and the cache then.

    pieces: how many come at a time, in each sequence or in all. first: with the first piece, what
    the cache held is dropped. poison: there is NaN in the padding of pieces and, before each, in
    all of the cache that no later query sees. place: makes what a call takes of NumPy's arrays.
    changes: of inputs. What did not come gives zeros.
    """
    inputs = {name: (call.inputs() | changes)[name] for name in ("query", "key", "value")}
    out = np.zeros((*inputs["query"].shape[:3], inputs["value"].shape[3]), call.dtype)
    at = np.zeros(call.batch, int) if first else np.array(cache.length)
    one_by_one = all(np.max(piece) == 1 for piece in pieces)
    for number, piece in enumerate(pieces):
        counts = np.broadcast_to(np.asarray(piece, np.int32), (call.batch,))
        width = 1 if one_by_one else next(width for width in WIDTHS if width >= counts.max())
        tokens = []
        for array in inputs.values():
            padded = np.full((call.batch, width, *array.shape[2:]), np.nan if poison else 0.0)
            for row, (start, count) in enumerate(zip(at, counts)):
                padded[row, :count] = array[row, start : start + count]
            tokens.append(padded.astype(call.dtype))
        cache = jax.tree.map(place, poisoned(cache)) if poison else cache
        run = program(call.scale, call.soft_cap, implementation, first and number == 0)
        found, cache = run(*map(place, tokens), cache, place(counts))
        found = np.asarray(found)
        for row, (start, count) in enumerate(zip(at, counts)):
            out[row, start : start + count] = found[row, :count]
            assert not found[row, count:].any(), "padding gives zeros"
        at = at + counts
        np.testing.assert_array_equal(cache.length, at)
    return out, cache


def poisoned(cache: Any) -> Any:
    """With NaN wherever no query that is still to come may look."""
    find = _rows_in_use if isinstance(cache, ContiguousCache) else _pages_in_use
    used, nothing = find(cache), np.asarray(np.nan, cache.key.dtype)
    key, value = (np.where(used, array, nothing) for array in (cache.key, cache.value))
    return dataclasses.replace(cache, key=key, value=value)


def _rows_in_use(cache: ContiguousCache) -> np.ndarray:
    row = np.arange(cache.key.shape[1])
    return (row < np.minimum(cache.length, cache.max_length)[:, None])[:, :, None, None]


def _pages_in_use(cache: EvictingCache) -> np.ndarray:
    """By the pattern's mask alone, whatever the plan of the pages says."""
    size = cache.pattern.block_size
    seen = seen_by_kv_head(cache.pattern, cache.num_heads, cache.num_kv_heads, cache.max_length)
    page, block, length = (np.asarray(x) for x in jax.tree.leaves(cache.table))
    used = np.zeros((*cache.key.shape[:3], 1), bool)
    for sequence, head, slot in np.argwhere(block >= 0):
        held, where, end = block[sequence, head, slot], page[sequence, slot], length[sequence]
        if where >= 0 and seen[head, end // size :, held].any():
            used[head, where, : max(0, min(end, cache.max_length) - held * size)] = True
    return used


@functools.lru_cache(maxsize=64)
def seen_by_kv_head(
    pattern: s2_jax.Pattern, num_heads: int, num_kv_heads: int, length: int
) -> np.ndarray:
    """bool `[num_kv_heads, blocks, blocks]`: whether any head of the group sees a block."""
    blocks = -(-length // pattern.block_size)
    mask = pattern.block_mask_at(
        num_heads=num_heads, num_kv_heads=num_kv_heads, q_blocks=blocks, kv_blocks=blocks
    )
    return mask.reshape(num_kv_heads, -1, blocks, blocks).any(axis=1)


def assert_one_forward(out: np.ndarray, call: AttentionCall, lengths: Any = None) -> None:
    """The outputs are as good as one full forward by the reference (the rule of tests/calls.py).

    lengths: tokens that came, where not all did.
    """
    reference, oracle = full_forward(call)
    lengths = np.full(call.batch, call.q_len) if lengths is None else np.asarray(lengths)
    came = (np.arange(call.q_len) < lengths[:, None])[:, :, None, None]
    got, reference, oracle = (
        {"out": np.where(came, np.asarray(array, np.float64), 0)}
        for array in (out, reference, oracle)
    )
    assert_as_good_as(got, reference, oracle, call.dtype)


@functools.lru_cache(maxsize=64)
def full_forward(call: AttentionCall) -> tuple[np.ndarray, np.ndarray]:
    """The output by the reference in the call's dtype, and in float64 by the dense oracle."""
    inputs = call.inputs()

    @jax.jit
    def attend(query, key, value):
        return call.attend("reference", query, key, value, 0, {})[0]

    out = attend(*(inputs[name] for name in ("query", "key", "value")))
    return np.asarray(out), call.oracle()["out"]
