"""From logits to the next token."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models.checks import check_integer, check_number


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token every time."""
    top_k: int | None = None
    """Only the k likeliest tokens."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability: at least one."""

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature)
        check_number("top_p", self.top_p)
        if self.top_k is not None:
            check_integer("top_k", self.top_k)
        if not (self.temperature == 0 or 1e-6 <= self.temperature < math.inf):
            raise ValueError(f"temperature={self.temperature!r} must be 0, or 1e-6 or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k!r} must be positive")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p!r} must be above 0 and at most 1")

    def draw(self, keys: Array, logits: Float[Array, "batch vocab"]) -> Int[Array, " batch"]:
        """int32 tokens; one key a row, so that a row does not depend on the others."""
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        kept = self._kept(logits / self.temperature)
        return jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)

    def _kept(self, logits: Float[Array, "batch vocab"]) -> Float[Array, "batch vocab"]:
        """The logits, -inf where a token is left out. Equal logits stay or go together."""
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = jax.lax.top_k(logits, self.top_k)[0][:, -1:]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        if self.top_p < 1:
            falling = jnp.sort(logits, axis=-1, descending=True)
            share = jax.nn.softmax(falling, axis=-1)
            before = jnp.cumsum(share, axis=-1) - share
            last = jnp.sum(before < self.top_p, axis=-1, keepdims=True) - 1
            least = jnp.take_along_axis(falling, last, axis=-1)
            logits = jnp.where(logits < least, -jnp.inf, logits)
        return logits
