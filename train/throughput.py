"""What a step costs in operations, and what a device could do: for the share that is used."""

from __future__ import annotations

import collections

import jax

from models import ModelConfig

# Dense bfloat16 operations a second, by the start of JAX's device kind; from NVIDIA's data sheets.
_PEAKS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L4": 121e12,
}


def attention_flops(config: ModelConfig, seq_len: int) -> float:
    """A token, forward and backward: products of queries, keys and values on visible blocks."""
    # Counted once a pattern: at 131 072 tokens that takes half a second.
    flops = sum(
        layers * pattern.flops(
            config.num_heads, seq_len, seq_len, config.num_kv_heads,
            head_dim=config.head_features, backward=backward,
        )
        for pattern, layers in collections.Counter(config.patterns()).items()
        for backward in (False, True)
    )  # fmt: skip
    return flops / seq_len


def matmul_flops(config: ModelConfig) -> float:
    """A token, forward and backward: products with parameters, the embedding's lookup left out."""
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_features
    layer = config.width * (heads + 3 * config.mlp_width)
    return 6.0 * (config.num_layers * layer + config.width * config.vocab_size)


def peak_flops(device: jax.Device) -> float | None:
    """Operations a second of a device; None where it is not known."""
    return next(
        (peak for kind, peak in _PEAKS.items() if device.device_kind.startswith(kind)), None
    )


def peak_memory(device: jax.Device) -> int | None:
    """Bytes at most in use so far; None where the device does not say."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use")
