"""The mask of a tile that not every token sees, written once for all kernels."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_FAR = 1 << 30


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
        bits = jnp.where(inside, bits, 0)
        # One number a token is widened and compared, never a bool: those Triton packs into bytes.
        ones = jnp.full(self.positions.shape, 1)
        if self.parts > 1:
            ones <<= lax.div(lax.iota(jnp.int32, ones.size), np.int32(self.part))
        mask = (bits[None, :] & ones[:, None]) != 0
        if self.window is not None:
            mask = self._with_window(mask, positions, inside)
        if self.causal:
            fixed, walked = self.positions[:, None], positions[None, :]
            mask &= fixed >= walked if self.holds_queries else walked >= fixed
        if self.ids is not None and ids is not None:
            mask &= self.ids[:, None] == ids[None, :]
        return mask

    def _with_window(self, mask: jax.Array, positions: jax.Array, inside: jax.Array) -> jax.Array:
        assert self.window is not None
        # What does not exist is nowhere near.
        walked = jnp.where(inside, positions, _FAR) if self.window.adds else positions
        distance = self.positions[:, None] - walked[None, :]
        if not self.holds_queries:
            distance = -distance
        near = distance < self.window.size
        if self.window.adds or not self.causal:
            near &= distance > -self.window.size
        return mask | near if self.window.adds else mask & near
