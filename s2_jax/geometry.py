"""The lengths and tiles that block lists are made for."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Lengths and tiles, in tokens. Queries are at `q_start <= position < q_stop`.

    fixed: the axis that a program owns a tile of; it walks along the other.
    any_order: tiles may stand in any order, and key tiles hold any parts; otherwise a kernel finds
    tiles by their place.
    heads: programs side by side along the heads: query heads, or key/value heads where fixed="kv".
    """

    fixed: Literal["q", "kv"]
    fixed_tile: int
    walk_tile: int
    block_size: int
    q_start: int
    q_stop: int
    kv_len: int
    any_order: bool = True
    heads: int = 1

    @property
    def fixed_range(self) -> tuple[int, int]:
        return (self.q_start, self.q_stop) if self.fixed == "q" else (0, self.kv_len)

    @property
    def walk_range(self) -> tuple[int, int]:
        return (0, self.kv_len) if self.fixed == "q" else (self.q_start, self.q_stop)

    @property
    def unit(self) -> int:
        return min(self.block_size, self.walk_tile)

    @property
    def part(self) -> int:
        """Tokens in the part of a fixed tile that shares a pattern row."""
        return min(self.block_size, self.fixed_tile)

    @property
    def rows(self) -> int:
        return self.fixed_tile // self.part

    @property
    def tiles(self) -> range:
        start, stop = self.fixed_range
        return range(start // self.fixed_tile, -(-stop // self.fixed_tile))

    @property
    def units(self) -> range:
        start, stop = self.walk_range
        return range(start // self.unit, -(-stop // self.unit))
