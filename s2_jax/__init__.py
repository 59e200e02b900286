"""S2-Attention for JAX: every head attends to its own shard of the context."""

from pallas_kernels.tiles import Tile, TileConfig
from s2_jax.adapter import attention_fn
from s2_jax.attention import s2_attention
from s2_jax.block_mask import block_mask
from s2_jax.patterns import Pattern, per_head
from s2_jax.pieces import (
    dense,
    dilated_stride,
    local,
    local_stride,
    sink,
    token_window,
    vertical_stride,
)
from s2_jax.plotting import plot_pattern

__all__ = [
    "Pattern",
    "Tile",
    "TileConfig",
    "attention_fn",
    "block_mask",
    "dense",
    "dilated_stride",
    "local",
    "local_stride",
    "per_head",
    "plot_pattern",
    "s2_attention",
    "sink",
    "token_window",
    "vertical_stride",
]
