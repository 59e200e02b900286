"""Models by name, from one that a laptop trains to the usual shapes up to 7B."""

from __future__ import annotations

from models.config import HybridConfig, ModelConfig

_SMALL_BLOCKS = HybridConfig(dense_first=1, block_size=16, local_blocks=2, vert_stride=4)
_SHORT_CONTEXT = HybridConfig(local_blocks=4, vert_stride=8)
_LONG_CONTEXT = HybridConfig(dense_first=2, block_size=64, local_blocks=16, vert_stride=16)
_PHI3_SMALL = HybridConfig(
    dense_first=0,
    dense_every=2,
    block_size=64,
    local_blocks=16,
    vert_stride=8,
    heads="query",
    head_offset=1,
    head_step=1,
)

PRESETS: dict[str, ModelConfig] = {
    "demo": ModelConfig(attention=_SMALL_BLOCKS),
    "125m": ModelConfig(
        num_layers=12,
        width=768,
        num_heads=12,
        num_kv_heads=12,
        mlp_width=2048,
        dtype="bfloat16",
        attention=_SHORT_CONTEXT,
    ),
    "350m": ModelConfig(
        num_layers=24,
        width=1024,
        num_heads=16,
        num_kv_heads=16,
        mlp_width=2816,
        dtype="bfloat16",
        attention=_SHORT_CONTEXT,
    ),
    "1.3b": ModelConfig(
        num_layers=24,
        width=2048,
        num_heads=16,
        num_kv_heads=16,
        mlp_width=5504,
        dtype="bfloat16",
        remat="attention",
        attention=_LONG_CONTEXT,
    ),
    "7b": ModelConfig(
        num_layers=32,
        width=4096,
        num_heads=32,
        num_kv_heads=32,
        mlp_width=11008,
        dtype="bfloat16",
        remat="attention",
        attention=_LONG_CONTEXT,
    ),
    # What its heads see, and the shape; the scale of its scores, its MLP and its norms differ.
    "phi3-small-attention": ModelConfig(
        num_layers=32,
        width=4096,
        num_heads=32,
        num_kv_heads=8,
        mlp_width=14336,
        rope_base=1_000_000.0,
        dtype="bfloat16",
        remat="attention",
        attention=_PHI3_SMALL,
    ),
}
