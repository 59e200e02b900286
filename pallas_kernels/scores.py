"""From products of queries and keys to scores, and from scores to weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.lowering import Launcher
from pallas_kernels.softmax import LOG2_E, Exp2


class Scoring:
    """What the settings of every kernel know of its scores.

    scale: of the products. soft_cap: caps scores smoothly, where given.
    """

    scale: float
    soft_cap: float | None
    launcher: Launcher

    @property
    def exp2(self) -> Exp2:
        """What makes weights of `scores()`."""
        scale = self.scale if self.soft_cap is None else self.soft_cap
        return Exp2(scale * LOG2_E, native=self.launcher != "interpret")

    def scores(self, products: jax.Array) -> jax.Array:
        """Products of queries and keys, or their tanh where scores are capped."""
        if self.soft_cap is None:
            return products
        return jnp.tanh(products * (self.scale / self.soft_cap))

    def slope(self, scores: jax.Array) -> jax.Array | None:
        """The derivative of `scores()` by what it caps; None where it caps nothing."""
        return None if self.soft_cap is None else 1.0 - scores * scores
