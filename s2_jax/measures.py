"""What can be said of a pattern before anything is computed with it.

All measures take lengths in tokens, with query 0 at position 0.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from s2_jax.structure import Heads, at_least_one, boolean, integer

if TYPE_CHECKING:
    from s2_jax.patterns import Pattern

_BLOCKS_AT_ONCE = 1 << 24


def block_mask_at(
    pattern: Pattern, num_heads: int, q_blocks: int, kv_blocks: int, num_kv_heads: int | None
) -> np.ndarray:
    for name, blocks in (("q_blocks", q_blocks), ("kv_blocks", kv_blocks)):
        if integer(name, blocks) < 0:
            raise ValueError(f"{name}={blocks} must not be negative")
    num_heads, q_blocks, kv_blocks, num_kv_heads = _integers(
        num_heads, q_blocks, kv_blocks, num_kv_heads
    )
    mask = np.empty((num_heads, q_blocks, kv_blocks), dtype=bool)
    groups = _unique_heads(pattern, num_heads, num_kv_heads, q_blocks, kv_blocks)
    for key, rows, seen in _evaluate(pattern, groups, num_heads, num_kv_heads, q_blocks, kv_blocks):
        mask[np.asarray(groups[key])[:, None], rows] = seen
    return mask


def density(
    pattern: Pattern, num_heads: int, q_len: int, kv_len: int, num_kv_heads: int | None
) -> float:
    num_heads, q_len, kv_len, num_kv_heads = _integers(num_heads, q_len, kv_len, num_kv_heads)
    q_blocks, kv_blocks = _blocks(pattern, q_len), _blocks(pattern, kv_len)
    possible = q_blocks * kv_blocks
    if pattern.causal:
        possible = int(np.minimum(np.arange(1, q_blocks + 1), kv_blocks).sum())
    visible = _visible_blocks(pattern, num_heads, num_kv_heads, q_blocks, kv_blocks)
    return visible / (possible * num_heads) if possible else 0.0


def flops(
    pattern: Pattern,
    num_heads: int,
    q_len: int,
    kv_len: int,
    num_kv_heads: int | None,
    *,
    head_dim: int,
    backward: bool,
) -> int:
    num_heads, q_len, kv_len, num_kv_heads = _integers(num_heads, q_len, kv_len, num_kv_heads)
    q_blocks, kv_blocks = _blocks(pattern, q_len), _blocks(pattern, kv_len)
    visible = _visible_blocks(pattern, num_heads, num_kv_heads, q_blocks, kv_blocks)
    head_dim = at_least_one("head_dim", head_dim)
    matmuls = 5 if boolean("backward", backward) else 2
    return visible * matmuls * 2 * pattern.block_size**2 * head_dim


def coverage(
    pattern: Pattern, num_heads: int, q_len: int, kv_len: int, num_kv_heads: int | None
) -> float:
    num_heads, q_len, kv_len, num_kv_heads = _integers(num_heads, q_len, kv_len, num_kv_heads)
    if not q_len or not kv_len:
        return 0.0
    last = _last_row(pattern, num_heads, q_len, kv_len, num_kv_heads)
    possible = last.shape[1]
    if pattern.causal:
        possible = min(possible, _blocks(pattern, q_len))
    return int(last.any(axis=0).sum()) / possible


def kv_footprint(
    pattern: Pattern, num_heads: int, q_len: int, kv_len: int, num_kv_heads: int | None
) -> np.ndarray:
    num_heads, q_len, kv_len, num_kv_heads = _integers(num_heads, q_len, kv_len, num_kv_heads)
    kv_heads = _kv_heads(num_heads, num_kv_heads)
    if not is_kv_efficient(pattern, num_heads, q_len, kv_len, num_kv_heads):
        return np.full(kv_heads, kv_len)
    if not q_len or not kv_len:
        return np.zeros(kv_heads, dtype=np.int64)
    last = _last_row(pattern, num_heads, q_len, kv_len, num_kv_heads)
    kept = last.reshape(kv_heads, -1, last.shape[1]).any(axis=1)
    size = np.full(last.shape[1], pattern.block_size)
    size[-1] = kv_len - pattern.block_size * (last.shape[1] - 1)
    return kept @ size


def is_kv_efficient(
    pattern: Pattern, num_heads: int, q_len: int, kv_len: int, num_kv_heads: int | None
) -> bool:
    """Judged for each key/value head: a block is kept while any query head of the group sees it."""
    num_heads, q_len, kv_len, num_kv_heads = _integers(num_heads, q_len, kv_len, num_kv_heads)
    q_blocks, kv_blocks = _blocks(pattern, q_len), _blocks(pattern, kv_len)
    kv_heads = _kv_heads(num_heads, num_kv_heads)
    keys = _keys(pattern, num_heads, num_kv_heads, q_blocks, kv_blocks)
    group = num_heads // kv_heads
    sets = {frozenset(keys[h * group : (h + 1) * group]) for h in range(kv_heads)}
    columns = max(1, _BLOCKS_AT_ONCE // max(1, q_blocks))
    for members in sets:
        for start in range(0, kv_blocks, columns):
            kv = np.arange(start, min(start + columns, kv_blocks))
            seen = np.zeros((q_blocks, kv.size), dtype=bool)
            for key in members:
                heads = Heads(np.asarray(keys.index(key)), num_heads, kv_heads)
                seen |= pattern.visible(heads, np.arange(q_blocks)[:, None], kv[None])
            later = np.arange(1, q_blocks)[:, None] > kv
            if (seen[1:] & ~seen[:-1] & later).any():
                return False
    return True


def _integers(
    num_heads: int, q_len: int, kv_len: int, num_kv_heads: int | None
) -> tuple[int, int, int, int | None]:
    """The same as Python's integers: NumPy's would overflow."""
    kv_heads = None if num_kv_heads is None else at_least_one("num_kv_heads", num_kv_heads)
    lengths = integer("length", q_len), integer("length", kv_len)
    return at_least_one("num_heads", num_heads), *lengths, kv_heads


def _blocks(pattern: Pattern, length: int) -> int:
    if integer("length", length) < 0:
        raise ValueError(f"{length=} must not be negative")
    return math.ceil(length / pattern.block_size)


def _kv_heads(num_heads: int, num_kv_heads: int | None) -> int:
    at_least_one("num_heads", num_heads)
    if num_kv_heads is None:
        return num_heads
    if num_heads % at_least_one("num_kv_heads", num_kv_heads):
        raise ValueError(f"{num_heads=} must be a multiple of {num_kv_heads=}")
    return num_kv_heads


def _keys(
    pattern: Pattern, num_heads: int, num_kv_heads: int | None, q_blocks: int, kv_blocks: int
) -> list:
    kv_heads = _kv_heads(num_heads, num_kv_heads)
    pattern.check(num_heads, kv_heads, q_blocks, kv_blocks)
    return list(pattern.head_keys(num_heads, kv_heads))


def _unique_heads(
    pattern: Pattern, num_heads: int, num_kv_heads: int | None, q_blocks: int, kv_blocks: int
) -> dict:
    """Key of a head's rule -> the heads that share it."""
    groups: dict = {}
    for head, key in enumerate(_keys(pattern, num_heads, num_kv_heads, q_blocks, kv_blocks)):
        groups.setdefault(key, []).append(head)
    return groups


def _evaluate(pattern, groups, num_heads, num_kv_heads, q_blocks, kv_blocks):  # type: ignore
    """Yields (key, rows, visible blocks) a bounded number of rows at a time."""
    step = max(1, _BLOCKS_AT_ONCE // max(1, kv_blocks))
    kv = np.arange(kv_blocks)[None]
    for key, members in groups.items():
        heads = Heads(np.asarray(members[0]), num_heads, _kv_heads(num_heads, num_kv_heads))
        for start in range(0, q_blocks, step):
            rows = np.arange(start, min(start + step, q_blocks))
            seen = pattern.visible(heads, rows[:, None], kv)
            yield key, rows, np.broadcast_to(seen, (rows.size, kv_blocks))


def _visible_blocks(
    pattern: Pattern, num_heads: int, num_kv_heads: int | None, q_blocks: int, kv_blocks: int
) -> int:
    groups = _unique_heads(pattern, num_heads, num_kv_heads, q_blocks, kv_blocks)
    parts = _evaluate(pattern, groups, num_heads, num_kv_heads, q_blocks, kv_blocks)
    return sum(len(groups[key]) * int(seen.sum()) for key, _, seen in parts)


def _last_row(
    pattern: Pattern, num_heads: int, q_len: int, kv_len: int, num_kv_heads: int | None
) -> np.ndarray:
    q_blocks, kv_blocks = _blocks(pattern, q_len), _blocks(pattern, kv_len)
    _keys(pattern, num_heads, num_kv_heads, q_blocks, kv_blocks)
    heads = Heads(np.arange(num_heads)[:, None], num_heads, _kv_heads(num_heads, num_kv_heads))
    seen = pattern.visible(heads, np.asarray(q_blocks - 1), np.arange(kv_blocks)[None])
    return np.broadcast_to(seen, (num_heads, kv_blocks))
