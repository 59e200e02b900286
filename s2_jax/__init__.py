"""S2-Attention for JAX: every head attends to its own shard of the context."""

from pallas_kernels.tiles import Tile, TileConfig
from s2_jax.adapter import attention_fn
from s2_jax.attention import s2_attention
from s2_jax.block_mask import block_mask
from s2_jax.cached_attention import cached_attention
from s2_jax.contiguous_cache import ContiguousCache
from s2_jax.evicting_cache import EvictingCache
from s2_jax.partials import combine_partials
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
    "ContiguousCache",
    "EvictingCache",
    "Pattern",
    "Tile",
    "TileConfig",
    "attention_fn",
    "block_mask",
    "cached_attention",
    "combine_partials",
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
