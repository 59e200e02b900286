"""The mask of a tile that not every token sees, written once for all kernels."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@dataclasses.dataclass(frozen=True)
class Window:
    """Exact tokens: q - k < size (|q - k| where not causal).

    adds: what the window sees is visible besides the pattern; otherwise only what both see is.
    """

    size: int
    adds: bool


@dataclasses.dataclass(frozen=True)
class TileMask:
    """Masks of a program's fixed tile, which holds queries or keys, against tokens it walks.

    positions, ids: int32 `[fixed]`; ids of segments, None where there are none. parts: pattern
    rows in the tile, of `part` tokens each.
    """

    holds_queries: bool
    positions: jax.Array
    ids: jax.Array | None
    part: int
    parts: int
    causal: bool
    window: Window | None

    def __call__(
        self, positions: jax.Array, bits: jax.Array, inside: jax.Array, ids: jax.Array | None
    ) -> jax.Array:
        """bool `[fixed, walked]`; all arguments `[walked]`.

        bits: one for each part of the fixed tile that sees the position. inside: the position
        exists and counts.
        """
        fixed, walked = self.positions[:, None], positions[None, :]
        shape = (self.positions.shape[0], positions.shape[0])
        if self.parts > 1:
            which = lax.div(lax.iota(jnp.int32, shape[0]), np.int32(self.part))
            mask = ((bits[None, :] >> which[:, None]) & 1) != 0
        else:
            mask = jnp.broadcast_to((bits != 0)[None, :], shape)
        distance = fixed - walked if self.holds_queries else walked - fixed
        if self.window is not None:
            near = distance < self.window.size
            if not self.causal:
                near &= distance > -self.window.size
            mask = mask | near if self.window.adds else mask & near
        if self.causal:
            mask &= distance >= 0
        if self.ids is not None and ids is not None:
            mask &= self.ids[:, None] == ids[None, :]
        return mask & jnp.broadcast_to(inside[None, :], shape)
