"""Rows whose weights leave the range that the pinned peak of the forward kernel is good for."""

import jax.numpy as jnp
import numpy as np
import pytest

import s2_jax
from s2_jax import Tile, TileConfig
from tests.calls import AttentionCall, check, unrolled_tiles

S2_16 = s2_jax.local_stride(2, 3, block_size=16)
CALLS = {
    # Most of a row's weight lies in tiles that are taken in after its peak is pinned. (In float32
    # the backward pass would show the rounding of so large an LSE.)
    "beyond-the-peak": AttentionCall(
        S2_16, q_len=331, kv_len=331, scale=12.0, dtype="bfloat16", tiles=unrolled_tiles(2)
    ),
    "beyond-the-peak-float16": AttentionCall(
        S2_16, q_len=331, kv_len=331, scale=12.0, dtype="float16"
    ),
    "below-the-peak": AttentionCall(
        s2_jax.dense(block_size=16), scale=-12.0, kv_len=160, query_offset=63, dtype="bfloat16"
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_agrees_with_the_oracle(call, implementation):
    check(call, implementation)


def test_many_small_float16_weights_add_up(implementation):
    """No row has seen a masked tile, so that weights are relative to 0: all are subnormal."""
    query = jnp.full((1, 16, 1, 16), -0.0831 * 11, jnp.float16)
    key = jnp.full((1, 32768, 1, 16), 0.75, jnp.float16)
    tile = Tile(16, 128, num_warps=4, num_stages=1)
    out = s2_jax.s2_attention(
        query, key, jnp.ones_like(key), s2_jax.dense(block_size=128, causal=False), scale=1.0,
        implementation=implementation,
        tiles=TileConfig(tile, tile, tile) if implementation != "reference" else None,
    )  # fmt: skip
    np.testing.assert_array_equal(np.asarray(out), 1.0)
