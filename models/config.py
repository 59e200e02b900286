"""What a model is: frozen numbers that check themselves, and one pattern per layer."""

from __future__ import annotations

import dataclasses
from typing import Literal

import s2_jax
from s2_jax import Pattern


@dataclasses.dataclass(frozen=True)
class HybridConfig:
    """Which layers are dense, and what the heads of the others see."""

    dense_first: int = 1
    """That many layers at the bottom are dense."""
    dense_every: int = 0
    """The n-th layer, the 2n-th, ... are dense too (counted from 1); 0 for none."""
    block_size: int = 64
    """Tokens per block, the unit in which a pattern selects: 16, 32, 64 or 128."""
    local_blocks: int = 4
    """The last key blocks that every head sees, the query's own block included."""
    vert_stride: int = 8
    """Of the earlier key blocks, every head sees one in so many, each head its own."""
    heads: Literal["kv", "query"] = "kv"
    """Whether key/value heads have a pattern each, or query heads."""

    def __post_init__(self) -> None:
        for name in ("dense_first", "dense_every"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"{name}={value!r} must be 0 or more")
        _ = self.sparse, self.dense  # the library checks the rest

    @property
    def sparse(self) -> Pattern:
        return s2_jax.local_stride(
            self.local_blocks, self.vert_stride, block_size=self.block_size, heads=self.heads
        )

    @property
    def dense(self) -> Pattern:
        return s2_jax.dense(block_size=self.block_size)

    def is_dense(self, layer: int) -> bool:
        every = self.dense_every
        return layer < self.dense_first or (every > 0 and (layer + 1) % every == 0)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder-only transformer."""

    vocab_size: int = 256
    """Number of tokens; the 256 bytes by default."""
    num_layers: int = 4
    """Attention and MLP pairs."""
    width: int = 128
    """Features of the residual stream."""
    num_heads: int = 4
    """Query heads; each has width / num_heads features."""
    num_kv_heads: int = 4
    """Key/value heads; fewer than num_heads for grouped-query attention."""
    mlp_width: int = 384
    """Hidden features of the gated MLP."""
    rope_base: float = 10_000.0
    """Base of the rotary position embedding."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What is computed in; the parameters are float32."""
    implementation: Literal["triton", "jax_triton", "interpret", "reference"] | None = None
    """How attention runs; None takes the GPU kernels on a GPU and the reference elsewhere."""
    remat: bool = False
    """Recompute every layer in the backward pass: less memory, a third more work."""
    attention: HybridConfig = HybridConfig()
    """Dense layers and S2 layers."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_layers", "width", "num_heads", "num_kv_heads", "mlp_width"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value!r} must be positive")
        width, num_heads, num_kv_heads = self.width, self.num_heads, self.num_kv_heads
        if num_heads % num_kv_heads:
            raise ValueError(f"{num_heads=} must be a multiple of {num_kv_heads=}")
        if width % num_heads or (width // num_heads) % 2:
            raise ValueError(
                f"{width=} must be an even multiple of {num_heads=} (RoPE turns pairs)"
            )
        if self.rope_base <= 1:
            raise ValueError(f"rope_base={self.rope_base!r} must be greater than 1")

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    def patterns(self) -> tuple[Pattern, ...]:
        """One pattern per layer, from the bottom up."""
        hybrid = self.attention
        return tuple(
            hybrid.dense if hybrid.is_dense(layer) else hybrid.sparse
            for layer in range(self.num_layers)
        )

    def densities(self, length: int) -> tuple[float, ...]:
        """Per layer, the share of the causally possible blocks that is computed at this length."""
        return tuple(
            pattern.density(self.num_heads, length, length, self.num_kv_heads)
            for pattern in self.patterns()
        )
