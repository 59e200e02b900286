"""Small calls for NVIDIA's checkers to watch: `python -m tests.sanitize_calls NAME IMPLEMENTATION`.

Forward and backward of one call, or steps of decoding, in this process. `tests/sanitize.py` runs
them all. The inputs lie in allocations of PyTorch's, one each: JAX takes memory from the driver in
large pieces, inside which no checker sees where an array ends.
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

import s2_jax
from pallas_kernels.lowering import call_kernel
from s2_jax import Tile, TileConfig
from tests.calls import RESULTS, AttentionCall
from tests.decoding import feed, make_cache

PLANTED_FAULT = "planted-fault"
_S2_16 = s2_jax.local_stride(2, 3, block_size=16)
_S2_64 = s2_jax.local_stride(1, 3, block_size=64)
_MASK = np.random.default_rng(7).random((2, 14, 14)) < 0.3


def _all(tile: Tile) -> TileConfig:
    return TileConfig(forward=tile, dq=tile, dkv=tile)


# Pipelined loops, whose copies may race. A tile of 64 gathers four blocks of 16.
_MERGE_AND_GATHER = _all(Tile(64, 64, num_warps=4, num_stages=2))
_GATHER = _all(Tile(32, 32, num_warps=4, num_stages=3))
_KEY_TILES_OF_128 = TileConfig(
    forward=Tile(128, 128, num_warps=8, num_stages=2),
    dq=Tile(64, 64, num_warps=4, num_stages=2),
    dkv=Tile(64, 128, num_warps=8, num_stages=4),
)


def _call(pattern=_S2_16, length=203, tiles=_MERGE_AND_GATHER, **changes) -> AttentionCall:
    sizes = {"q_len": length, "kv_len": length, "head_dim": 32, "dtype": "bfloat16"}
    return AttentionCall(pattern, tiles=tiles, **(sizes | changes))


CALLS = {
    "several-tiles": _call(_S2_64, 301, None, head_dim=64),
    "merge-and-gather": _call(),
    "gathered-key-tiles": _call(_S2_64, 517, _KEY_TILES_OF_128),
    "traced-offset": _call(q_len=71, kv_len=149, batch=2, query_offset=(5, 78), tiles=_GATHER),
    "block-mask": _call(s2_jax.block_mask(_MASK, block_size=16), q_len=211, kv_len=199),
    "packed": _call(segments="padded", batch=2),
    "lengths": _call(
        q_len=83, batch=2, query_offset=(45, 120), query_lengths=(20, 83), kv_lengths=(65, 203)
    ),
    "window": _call(s2_jax.sink(1, block_size=16), window=50, tiles=_GATHER),
    "soft-cap": _call(soft_cap=30.0, segments="packed"),
    "value-dim": _call(_S2_64, tiles=None, head_dim=64, value_dim=32),
    "head-dim-80": _call(_S2_64, tiles=None, head_dim=80),
    "float32": _call(length=101, tiles=None, dtype="float32"),
    "large-scores": _call(_S2_64, 301, None, head_dim=64, scale=30.0),
}
# Several blocks of 16 a turn, some of which there are not; 32 rows a program, padded values.
DECODED = {
    "decode-pages": ("evicting", _call(heads=6, kv_heads=2, batch=2)),
    "decode-rows": ("contiguous", _call(_S2_64, head_dim=80, value_dim=40, heads=37)),
}


def read_past_the_end(implementation: str) -> jax.Array:
    """A kernel that reads what lies behind an array of 64 numbers."""

    def kernel(in_ref, out_ref):
        out_ref[...] = in_ref[pl.ds(64 * (pl.program_id(0) + 1), 64)]

    whole = pl.BlockSpec((64,), lambda i: (0,))

    def run(array):
        [out] = call_kernel(
            kernel, [array], name="s2_attention_planted_fault", grid=(1,), in_specs=[whole],
            out_specs=[whole], out_shape=[jax.ShapeDtypeStruct((64,), jnp.float32)],
            tile=Tile(64, 64),
            launcher="jax_triton" if implementation == "jax_triton" else "pallas",
        )  # fmt: skip
        return out

    return jax.jit(run)(apart(np.zeros(64, np.float32)))


def apart(array: np.ndarray) -> jax.Array:
    """On the GPU, in an allocation of its own where PYTORCH_NO_CUDA_MEMORY_CACHING=1 is set."""
    import torch

    array = np.asarray(array)
    if array.dtype != jnp.bfloat16:
        return jax.dlpack.from_dlpack(torch.tensor(array, device="cuda"))
    bits = torch.tensor(array.view(np.int16), device="cuda")
    return jax.dlpack.from_dlpack(bits.view(torch.bfloat16))


def main() -> None:
    name, implementation = sys.argv[1:]
    if name == PLANTED_FAULT:
        read_past_the_end(implementation).block_until_ready()
    elif name in DECODED:
        kind, call = DECODED[name]
        cache = jax.tree.map(apart, make_cache(kind, call))
        out, cache = feed(call, cache, [16, 1, 16, 7, 16], implementation, place=apart)
        assert np.isfinite(out.astype(np.float32)).all()
    else:
        got = CALLS[name].run(implementation, apart)
        assert all(np.isfinite(got[x].astype(np.float32)).all() for x in RESULTS if x != "lse")
    print(f"{name} by {implementation} ran", flush=True)


if __name__ == "__main__":
    main()
