"""The models of `benchmarks.quality`: one shape, and five kinds of attention."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from models.config import HybridConfig, ModelConfig
from s2_jax import Pattern

Name = Literal["dense", "hybrid", "s2", "homogeneous", "window"]
NAMES: tuple[Name, ...] = ("dense", "hybrid", "s2", "homogeneous", "window")
Implementation = Literal["triton", "jax_triton", "interpret", "reference"]


@dataclasses.dataclass(frozen=True)
class Shape:
    """What all models share, and the pattern of the sparse ones."""

    num_layers: int = 6
    width: int = 512
    num_heads: int = 8
    mlp_width: int = 1408
    rope_base: float = 10_000.0
    """In training."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What is computed in; parameters are float32."""
    block_size: int = 64
    local_blocks: int = 4
    vert_stride: int = 8
    dense_first: int = 0
    """Dense layers at the bottom of the hybrid."""
    dense_every: int = 4
    """The n-th layer of the hybrid, the 2n-th, ... are dense too: by default the fourth of six."""
    window: int | None = None
    """Tokens; as many visible as in S2, at the trained length, if left out."""
    implementation: Implementation | None = None
    """How attention runs; None takes the kernels on a GPU and the reference elsewhere."""

    def config(self, name: Name, *, vocab_size: int, length: int) -> ModelConfig:
        """length: that of the training, at which the window is as large as S2.

        Raises:
          ValueError: a model with such numbers cannot be, or no or every layer of the hybrid is
            dense.
        """
        hybrid = HybridConfig(
            kind=name if name in ("dense", "window") else "s2",
            dense_first=self.dense_first if name == "hybrid" else 0,
            dense_every=self.dense_every if name == "hybrid" else 0,
            block_size=self.block_size,
            local_blocks=self.local_blocks,
            vert_stride=self.vert_stride,
            homogeneous=name == "homogeneous",
            window=self._window(length) if name == "window" else None,
        )
        config = ModelConfig(
            vocab_size=vocab_size,
            num_layers=self.num_layers,
            width=self.width,
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            mlp_width=self.mlp_width,
            rope_base=self.rope_base,
            dtype=self.dtype,
            implementation=self.implementation,
            attention=hybrid,
        )
        if name == "hybrid" and not 0 < len(dense_layers(config)) < self.num_layers:
            raise ValueError(
                f"dense_first={self.dense_first!r} and dense_every={self.dense_every!r} must make "
                f"some of num_layers={self.num_layers!r} dense, and not all"
            )
        return config

    def _window(self, length: int) -> int:
        if self.window is not None:
            return self.window
        stride = HybridConfig(
            block_size=self.block_size,
            local_blocks=self.local_blocks,
            vert_stride=self.vert_stride,
        ).sparse
        return matching_window(stride, self.num_heads, length)


def dense_layers(config: ModelConfig) -> list[int]:
    """Counted from 1."""
    return [n + 1 for n in range(config.num_layers) if config.attention.is_dense(n)]


def matching_window(pattern: Pattern, heads: int, length: int) -> int:
    """Tokens of the sliding window that sees as many pairs of tokens as the pattern does.

    pattern: of whole blocks, the query's own among them.
    """
    size = pattern.block_size
    blocks = -(-length // size)
    mask = pattern.block_mask_at(num_heads=heads, q_blocks=blocks, kv_blocks=blocks)
    pairs = mask.sum() / heads * size**2 - blocks * size * (size - 1) / 2  # the future of the own
    windows = np.arange(1, blocks * size + 1)
    seen = windows * (windows + 1) / 2 + (blocks * size - windows) * windows
    return int(windows[np.abs(seen - pairs).argmin()])
