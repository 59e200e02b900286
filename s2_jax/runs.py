"""Putting units together into runs: arithmetic progressions (first, step, count)."""

from __future__ import annotations

import numpy as np

from pallas_kernels.block_lists import MAX_STEP


class RunBuilder:
    """Collects the units of many tiles at once, each tile's in ascending order.

    Greedy: a new unit or run joins the tile's last run where it continues it, and two single
    units make a run of any step. Any set of units ends up as runs.
    """

    def __init__(self, num_tiles: int) -> None:
        self._first = np.zeros(num_tiles, dtype=np.int64)
        self._step = np.ones(num_tiles, dtype=np.int64)
        self._count = np.zeros(num_tiles, dtype=np.int64)
        self._done: list[tuple[np.ndarray, ...]] = []

    def add(self, tile: np.ndarray, first: np.ndarray, step: np.ndarray, count: np.ndarray) -> None:
        """Adds one run to each of the distinct tiles `tile`; a single unit has count 1."""
        open_first, open_step = self._first[tile], self._step[tile]
        open_count = self._count[tile]
        gap = first - (open_first + (open_count - 1) * open_step)
        joint = np.where(open_count > 1, open_step, np.where(count > 1, step, gap))
        joins = (open_count > 0) & (gap == joint) & (gap > 0) & (gap <= MAX_STEP)
        joins &= (count == 1) | (step == joint)
        self._flush(tile[~joins & (open_count > 0)])
        self._first[tile] = np.where(joins, open_first, first)
        self._step[tile] = np.where(joins, joint, step)
        self._count[tile] = np.where(joins, open_count + count, count)

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """Tiles (ascending) and int `[runs, 3]`: first, step, count; a single unit has step 1."""
        self._flush(np.flatnonzero(self._count))
        tile, first, step, count = (np.concatenate(part) for part in zip(*self._done, strict=True))
        by_tile = np.argsort(tile, kind="stable")
        runs = np.stack([first, np.where(count > 1, step, 1), count], axis=-1)
        return tile[by_tile], runs[by_tile]

    def _flush(self, tile: np.ndarray) -> None:
        self._done.append((tile, self._first[tile], self._step[tile], self._count[tile]))


def periods(rows: np.ndarray) -> np.ndarray:
    """The shortest period of each row of a bool array `[rows, width]` that divides its width."""
    width = rows.shape[1]
    shortest = np.full(rows.shape[0], width)
    for period in range(width - 1, 0, -1):
        if width % period == 0:
            folded = rows.reshape(rows.shape[0], -1, period)
            shortest[(folded == folded[:, :1]).all(axis=(1, 2))] = period
    return shortest
