"""Which parts of the fixed axis share a tile.

Query tiles hold neighbours. A key tile of dk/dv may hold any blocks, and should hold such as the
same queries see: the columns of a vertical stride, which all later queries see, apart from the
columns between, which only a window of them sees.
"""

from __future__ import annotations

import numpy as np

from s2_jax.geometry import Geometry
from s2_jax.patterns import Pattern
from s2_jax.structure import Heads

_OWN_TILES = 4  # a kind of column that fills as many tiles shares none with another kind
_MOST_DISTANCES = 60


def tile_parts(pattern: Pattern, heads: Heads, geometry: Geometry) -> np.ndarray:
    """int64 `[tiles, rows]`: the parts of `geometry.part` tokens in each tile; -1 for none."""
    first, rows = geometry.tiles.start * geometry.rows, geometry.rows
    parts = np.arange(first, first + len(geometry.tiles) * rows)
    if geometry.fixed == "q" or rows == 1 or not geometry.any_order:
        return parts.reshape(-1, rows)
    parts = parts[parts * geometry.part < geometry.fixed_range[1]]
    return _by_kind(parts, _kinds(pattern, heads, geometry, parts), rows)


def _kinds(pattern: Pattern, heads: Heads, geometry: Geometry, parts: np.ndarray) -> np.ndarray:
    """A number for each column, alike for columns that queries see from the same distances.

    Only some distances are looked at, ever fewer the longer they are: it is for speed alone.
    """
    size = geometry.block_size
    start, stop = (geometry.walk_range[0] // size, -(-geometry.walk_range[1] // size))
    column = parts * geometry.part // size
    far = max(1, stop, int(column.max()) + 1)
    distances = np.unique(np.geomspace(1, far, _MOST_DISTANCES).astype(np.int64))
    rule, _ = pattern.token_window()
    kinds = np.zeros(parts.size, dtype=np.int64)
    if rule is None:
        return kinds
    for place, distance in enumerate(distances):
        query = column + distance
        if rule.structure() is None:  # an arbitrary mask, which has edges
            query = start + (query - start) % max(1, stop - start)
        kinds |= rule.visible(heads, query, column).astype(np.int64) << place
    return kinds


def _by_kind(parts: np.ndarray, kinds: np.ndarray, rows: int) -> np.ndarray:
    order = np.argsort(kinds, kind="stable")
    starts = np.flatnonzero(np.diff(kinds[order])) + 1
    groups = np.split(parts[order], starts)
    alone = [group for group in groups if group.size >= _OWN_TILES * rows]
    rest = [group for group in groups if group.size < _OWN_TILES * rows]
    if rest:
        alone.append(np.concatenate(rest))
    filled = [np.pad(group, (0, -group.size % rows), constant_values=-1) for group in alone]
    return np.concatenate(filled).reshape(-1, rows)
