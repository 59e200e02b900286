"""Which heads a rule is asked about, what a layout may know of it, and checks of its numbers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import numpy as np

HeadKind = Literal["kv", "query"]
_TOO_LARGE = 1 << 24  # so that sums and products of a few stay in int32


def integer(name: str, value: Any) -> int:
    """`value`, which must be an integer that can be hashed: no array, no bool."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be an integer")
    if abs(int(value)) >= _TOO_LARGE:
        raise ValueError(f"{name}={value} must be below {_TOO_LARGE} in size")
    return int(value)


def at_least_one(name: str, value: Any) -> int:
    if integer(name, value) < 1:
        raise ValueError(f"{name}={value} must be at least 1")
    return int(value)


def boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be True or False")
    return value


@dataclasses.dataclass(frozen=True)
class Heads:
    """Query heads `index` (any integer array, NumPy or JAX) out of `num_heads`."""

    index: Any
    num_heads: int
    num_kv_heads: int

    def count(self, kind: HeadKind) -> int:
        return self.num_kv_heads if kind == "kv" else self.num_heads

    def pattern_head(self, kind: HeadKind) -> Any:
        group = self.num_heads // self.num_kv_heads
        return self.index // group if kind == "kv" else self.index


@dataclasses.dataclass(frozen=True)
class Structure:
    """Where a rule can change: between two edges it is periodic, which lets a layout skip ahead.

    edges: distances d = query block - key block, such that d - 1 and d may be ruled differently.
    kv_edges: key blocks j, such that j - 1 and j may be ruled differently.
    q_period, kv_period: between edges, the rule depends on the block only modulo these.
    """

    edges: frozenset[int] = frozenset()
    kv_edges: frozenset[int] = frozenset()
    q_period: int = 1
    kv_period: int = 1

    def merge(self, other: Structure) -> Structure:
        return Structure(
            self.edges | other.edges,
            self.kv_edges | other.kv_edges,
            math.lcm(self.q_period, other.q_period),
            math.lcm(self.kv_period, other.kv_period),
        )
