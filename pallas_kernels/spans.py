"""Which units of the walked axis a fixed tile needs, where that is known only at run time.

Lengths, segments and a traced offset leave of every list the part between two units, and of that
a part where no token needs a mask. Both are found for all tiles at once, before the kernel runs,
from a few numbers a tile: what lies outside is skipped, not computed and masked.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_INT32 = np.iinfo(np.int32)


class Axis(NamedTuple):
    """The tokens of one axis.

    length: rows of the array. origin: int32 `[batch]`, position of row 0. first, last: int32
    `[batch]`; positions first <= p < last count. ids: int32 `[batch, length]` or None.
    """

    length: int
    origin: jax.Array
    first: jax.Array
    last: jax.Array
    ids: jax.Array | None


class _Cells(NamedTuple):
    """Cells of `size` tokens, `[batch, cells]` each; cell 0 holds row 0.

    some, every: whether any, all of the tokens count. low, high: smallest and largest id that
    counts; low2, high2: the same of those strictly between.
    """

    some: jax.Array
    every: jax.Array
    low: Any
    high: Any
    low2: Any
    high2: Any

    @classmethod
    def of(cls, axis: Axis, size: int) -> _Cells:
        number = -(-axis.length // size) + 1
        base = (axis.origin // size) * size
        position = base[:, None] + jnp.arange(number * size, dtype=jnp.int32)[None]
        counts = (position >= axis.first[:, None]) & (position < axis.last[:, None])
        shape = (*counts.shape[:1], number, size)
        counts = counts.reshape(shape)
        some, every = counts.any(axis=-1), counts.all(axis=-1)
        if axis.ids is None:
            return cls(some, every, None, None, None, None)
        row = jnp.clip(position - axis.origin[:, None], 0, axis.length - 1)
        ids = jnp.take_along_axis(axis.ids, row, axis=1).reshape(shape)

        def ends(counts: jax.Array) -> tuple[jax.Array, jax.Array]:
            low = jnp.min(jnp.where(counts, ids, _INT32.max), axis=-1)
            return low, jnp.max(jnp.where(counts, ids, _INT32.min), axis=-1)

        low, high = ends(counts)
        between = counts & (ids > low[..., None]) & (ids < high[..., None])
        return cls(some, every, low, high, *ends(between))

    def holds(self, number: jax.Array) -> jax.Array:
        """Whether an id may be among them; certain where a cell has at most two."""
        between = (self.low2 <= number) & (number <= self.high2)
        return (number == self.low) | (number == self.high) | between

    def expand(self, axis: int) -> _Cells:
        return jax.tree.map(lambda x: jnp.expand_dims(x, axis), self)


def spans(fixed: Axis, tile: int, walked: Axis, unit: int) -> jax.Array:
    """int32 `[batch, tiles, 4]`: outer start and stop, inner start and stop.

    Units outside of outer match nothing; those inside of inner match every token, in every row
    of the tile that counts. Tile i is the i-th from the one that holds row 0 of the fixed axis;
    units are absolute.
    """
    tiles, units = _Cells.of(fixed, tile).expand(2), _Cells.of(walked, unit).expand(1)
    meet, match = tiles.some & units.some, tiles.some & units.every
    if tiles.low is not None:
        meet &= (
            units.holds(tiles.low) | units.holds(tiles.high)
            | tiles.holds(units.low) | tiles.holds(units.high)
            | ((tiles.low2 <= units.high2) & (units.low2 <= tiles.high2))
        )  # fmt: skip
        match &= (tiles.low == tiles.high) & (units.low == units.high) & (tiles.low == units.low)
    number = units.some.shape[-1]
    index = jnp.arange(number, dtype=jnp.int32)[None, None]
    start = jnp.min(jnp.where(meet, index, number), axis=-1)
    stop = jnp.max(jnp.where(meet, index + 1, 0), axis=-1)
    inner = jnp.min(jnp.where(match, index, number), axis=-1)
    after = (index >= inner[..., None]) & ~match
    inner_stop = jnp.min(jnp.where(after, index, number), axis=-1)
    # Where there is nothing, both ends are the same: nothing is walked.
    start = jnp.minimum(start, stop)
    inner, inner_stop = jnp.minimum(inner, stop), jnp.minimum(inner_stop, stop)
    base = (walked.origin // unit)[:, None, None]
    return jnp.stack([start, stop, inner, inner_stop], axis=-1).astype(jnp.int32) + base
