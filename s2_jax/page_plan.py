"""Where a key/value head keeps the blocks that it can still see: decided once for all sequences.

A pattern says when a block is seen last, so that the slots of a head can be handed out ahead of
time: a block takes a slot that is free when it begins, and gives it back when no query sees it
any more. All sequences share the plan; what differs is how far along it they are.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import math

import numpy as np

from s2_jax.patterns import Pattern
from s2_jax.structure import Heads

_CELLS_AT_ONCE = 1 << 24


@dataclasses.dataclass(frozen=True, eq=False)
class PagePlan:
    """The slots of every key/value head.

    slot_of_block: int32 `[plans, blocks]`, -1 where no query sees the block. last_of_block: the
    same for the last query block that sees it. plan_of_head: int32 `[num_kv_heads]`.
    slots_by_block: int32 `[blocks + 1]`, slots that the head with the most has needed once so many
    blocks have begun.
    """

    slot_of_block: np.ndarray
    last_of_block: np.ndarray
    plan_of_head: np.ndarray
    slots_by_block: np.ndarray

    @property
    def blocks(self) -> int:
        return self.slot_of_block.shape[1]

    @property
    def slots(self) -> int:
        """At least one, so that no array is empty where no query sees anything."""
        return max(1, int(self.slots_by_block[-1]))


@functools.lru_cache(maxsize=64)
def plan_pages(pattern: Pattern, num_heads: int, num_kv_heads: int, blocks: int) -> PagePlan:
    """The plan for rows of up to `blocks` blocks.

    A block keeps its slot for one block longer than it is seen: the queries of one call may lie on
    both sides of a block's end.

    Raises:
      ValueError: the pattern is not causal, does not fit the heads, or is not KV-efficient.
    """
    if not pattern.causal:
        raise ValueError("a cache needs a causal pattern, got one with causal=False")
    pattern.check(num_heads, num_kv_heads, blocks, blocks)
    keys, group = pattern.head_keys(num_heads, num_kv_heads), num_heads // num_kv_heads
    members: dict[frozenset, list[int]] = {}
    for head in range(num_kv_heads):
        members.setdefault(frozenset(keys[head * group : (head + 1) * group]), []).append(head)
    plan_of_head = np.zeros(num_kv_heads, np.int32)
    slots, lasts, needed = [], [], []
    for number, heads in enumerate(members.values()):
        plan_of_head[heads] = number
        queries = np.arange(heads[0] * group, (heads[0] + 1) * group)
        last = _last_seen(pattern, Heads(queries, num_heads, num_kv_heads), blocks)
        slot_of_block, used = _hand_out(last)
        slots.append(slot_of_block)
        lasts.append(last.astype(np.int32))
        needed.append(used)
    return PagePlan(np.stack(slots), np.stack(lasts), plan_of_head, np.max(needed, axis=0))


def _last_seen(pattern: Pattern, heads: Heads, blocks: int) -> np.ndarray:
    """The last query block that sees each key block, int `[blocks]`; -1 where none does."""
    like = _same_rule(pattern, blocks)
    columns = np.unique(like)
    last = np.full(blocks, -1)
    step = max(1, _CELLS_AT_ONCE // max(1, blocks * heads.index.size))
    each = dataclasses.replace(heads, index=heads.index[:, None, None])
    rows = np.arange(blocks)[:, None]
    for start in range(0, columns.size, step):
        some = columns[start : start + step]
        shown = np.asarray(pattern.visible(each, rows, some))
        shown = np.broadcast_to(shown, (heads.index.size, blocks, some.size))
        seen = np.logical_or.reduce(shown, axis=0)
        again = seen[1:] & ~seen[:-1] & (rows[1:] > some)
        if again.any():
            row, column = (int(x[0]) for x in np.nonzero(again))
            raise ValueError(
                f"the pattern is not KV-efficient, so that nothing can be evicted: key/value head "
                f"{int(heads.index[0]) * heads.num_kv_heads // heads.num_heads} does not see key "
                f"block {some[column]} from query block {row}, but does from {row + 1}"
            )
        last[some] = np.where(seen.any(axis=0), blocks - 1 - np.argmax(seen[::-1], axis=0), -1)
    reach = last[like] - like
    ends = np.where(last[like] == blocks - 1, blocks - 1, np.arange(blocks) + reach)
    return np.where(last[like] < 0, -1, np.minimum(ends, blocks - 1))


def _same_rule(pattern: Pattern, blocks: int) -> np.ndarray:
    """For each key block, the first that is ruled like it, as far as the row goes."""
    structure, each = pattern.structure(), np.arange(blocks)
    if structure is None:
        return each
    period = math.lcm(structure.q_period, structure.kv_period)
    edges = np.asarray([0, *sorted(edge for edge in structure.kv_edges if 0 < edge < blocks)])
    begin = edges[np.searchsorted(edges, each, side="right") - 1]
    return begin + (each - begin) % period


def _hand_out(last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slots for blocks that are seen last at `last`, and how many are in use block by block."""
    blocks = last.size
    slot_of_block, used = np.full(blocks, -1, np.int32), np.zeros(blocks + 1, np.int32)
    leaving: list[list[int]] = [[] for _ in range(blocks + 2)]
    free: list[int] = []
    for block, end in enumerate(last):
        for slot in leaving[block]:
            heapq.heappush(free, slot)
        used[block + 1] = used[block]
        if end < block:
            continue
        if free:
            slot = heapq.heappop(free)
        else:
            slot, used[block + 1] = int(used[block]), used[block] + 1
        slot_of_block[block] = slot
        leaving[min(int(end) + 2, blocks + 1)].append(slot)
    return slot_of_block, used
