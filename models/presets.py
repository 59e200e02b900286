"""Models by name, from one that a laptop trains to the usual shapes of 1.3B and 7B."""

from __future__ import annotations

from models.config import HybridConfig, ModelConfig

_SMALL_BLOCKS = HybridConfig(dense_first=1, block_size=16, local_blocks=2, vert_stride=4)
_LONG_CONTEXT = HybridConfig(dense_first=2, block_size=64, local_blocks=16, vert_stride=16)

PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(attention=_SMALL_BLOCKS),
    "small": ModelConfig(
        num_layers=12,
        width=768,
        num_heads=12,
        num_kv_heads=12,
        mlp_width=2048,
        dtype="bfloat16",
        attention=HybridConfig(local_blocks=4, vert_stride=8),
    ),
    "1.3b": ModelConfig(
        num_layers=24,
        width=2048,
        num_heads=16,
        num_kv_heads=16,
        mlp_width=5504,
        dtype="bfloat16",
        remat=True,
        attention=_LONG_CONTEXT,
    ),
    "7b": ModelConfig(
        num_layers=32,
        width=4096,
        num_heads=32,
        num_kv_heads=32,
        mlp_width=11008,
        dtype="bfloat16",
        remat=True,
        attention=_LONG_CONTEXT,
    ),
}
