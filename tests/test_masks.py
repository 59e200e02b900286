"""What is hidden token by token: segments, lengths, windows; capped scores; other value dims."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import s2_jax
from tests.calls import (
    AttentionCall,
    assert_padding_reaches_nothing,
    check,
    small_tiles,
    with_nan_in_the_padding,
)

S2_16 = s2_jax.local_stride(2, 3, block_size=16)
S2_16_BOTH = s2_jax.local_stride(2, 3, block_size=16, causal=False)
LONG = {"q_len": 211, "kv_len": 211}

CALLS = {
    "packed": AttentionCall(S2_16, segments="packed", batch=2, **LONG),
    "packed-bidirectional": AttentionCall(S2_16_BOTH, segments="packed", batch=2, **LONG),
    "packed-padded": AttentionCall(S2_16, segments="padded", heads=6, kv_heads=2, **LONG),
    "segments-in-any-order": AttentionCall(S2_16, segments="shuffled", batch=3, **LONG),
    "segments-at-random": AttentionCall(S2_16_BOTH, segments="random", **LONG),
    "segments-gathered": AttentionCall(
        S2_16, segments="packed", batch=2, tiles=small_tiles(64, 64), **LONG
    ),
    "segments-traced-offset": AttentionCall(
        S2_16, segments="packed", batch=2, q_len=83, kv_len=211, query_offset=(29, 128)
    ),
    "segments-offset": AttentionCall(
        S2_16, segments="shuffled", batch=2, q_len=83, kv_len=211, query_offset=77
    ),
    "segments-block-mask": AttentionCall(
        s2_jax.block_mask(np.random.default_rng(3).random((2, 14, 14)) < 0.4, block_size=16),
        segments="packed",
        heads=4,
        kv_heads=2,
        **LONG,
    ),
    "lengths": AttentionCall(
        S2_16, batch=4, query_lengths=(211, 97, 1, 0), kv_lengths=(130, 97, 211, 50), **LONG
    ),
    "lengths-bidirectional": AttentionCall(
        S2_16_BOTH, batch=3, query_lengths=(64, 150, 211), kv_lengths=(210, 64, 0), **LONG
    ),
    "lengths-gathered": AttentionCall(
        S2_16, batch=2, kv_lengths=(71, 190), query_lengths=(200, 190), tiles=small_tiles(64, 64),
        **LONG,
    ),
    "lengths-traced-offset": AttentionCall(
        S2_16, batch=3, q_len=83, kv_len=211, query_offset=(0, 45, 128),
        query_lengths=(83, 20, 71), kv_lengths=(83, 65, 199),
    ),
    "lengths-and-segments": AttentionCall(
        S2_16, batch=2, heads=4, kv_heads=2, segments="packed", query_lengths=(180, 211),
        kv_lengths=(180, 60), **LONG,
    ),
    "soft-cap": AttentionCall(S2_16, soft_cap=1.5, scale=1.0, **LONG),
    "soft-cap-bfloat16": AttentionCall(
        S2_16, soft_cap=30.0, head_dim=64, dtype="bfloat16", segments="packed", **LONG
    ),
    "soft-cap-negative-scale": AttentionCall(S2_16, soft_cap=1.5, scale=-1.0),
    "window": AttentionCall(s2_jax.dense(block_size=16), window=37, window_joins="&", **LONG),
    "window-1": AttentionCall(s2_jax.dense(block_size=16), window=1, window_joins="&"),
    "window-and-sink": AttentionCall(s2_jax.sink(1, block_size=16), window=50, **LONG),
    "window-or-stride": AttentionCall(
        s2_jax.vertical_stride(4, block_size=16), window=41, heads=4, kv_heads=4, **LONG
    ),
    "window-and-stride": AttentionCall(S2_16, window=70, window_joins="&", **LONG),
    "window-bidirectional": AttentionCall(
        s2_jax.sink(1, block_size=16, causal=False), window=33, **LONG
    ),
    "window-gathered": AttentionCall(
        s2_jax.sink(1, block_size=16), window=50, tiles=small_tiles(64, 64), **LONG
    ),
    "window-wide-tiles": AttentionCall(
        s2_jax.dense(block_size=128), window=100, window_joins="&", tiles=small_tiles(64, 32),
        q_len=333, kv_len=333,
    ),
    "window-offset": AttentionCall(
        s2_jax.sink(1, block_size=16), window=50, q_len=71, kv_len=149, query_offset=53
    ),
    "window-traced-offset": AttentionCall(
        S2_16, window=50, window_joins="&", q_len=71, kv_len=149, batch=2, query_offset=(7, 53),
        segments="packed",
    ),
    "value-dim-larger": AttentionCall(S2_16, head_dim=24, value_dim=40, heads=4, kv_heads=2),
    "value-dim-smaller": AttentionCall(
        S2_16, head_dim=192, value_dim=128, dtype="bfloat16", tiles=None, segments="packed"
    ),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_agrees_with_the_oracle(call, implementation):
    check(call, implementation)


def test_a_token_window_alone(implementation):
    """Mistral's sliding window: the pattern is the window, and nothing else."""
    call = AttentionCall(s2_jax.dense(block_size=16), window=37, window_joins="&")
    alone = dataclasses.replace(
        call, pattern=s2_jax.token_window(37, block_size=16), window=None
    ).run(implementation)
    for name, truth in call.run(implementation).items():
        np.testing.assert_allclose(alone[name], truth, rtol=1e-6, atol=1e-6, err_msg=name)


def test_packed_documents_equal_separate_calls(kernels):
    """64 documents in one row. Blocks and strides count positions in the row, so that those
    equal calls of their own which start at a multiple of block_size x vert_stride.
    """
    rng = np.random.default_rng(11)
    stride, size = 3, 16
    lengths = rng.integers(5, 70, size=64)
    lengths[1::18] = 17, 61, 61, 17  # those compared below, in two programs
    starts, position = [], 0
    for number, length in enumerate(lengths):
        if number % 2:
            position = -(-position // (stride * size)) * stride * size
        starts.append(position)
        position += length
    ids = np.full(position, -1, np.int32)
    for number, (start, length) in enumerate(zip(starts, lengths)):
        ids[start : start + length] = number
    pattern = s2_jax.local_stride(2, stride, block_size=size)
    inputs = AttentionCall(pattern, q_len=position, kv_len=position).inputs()
    query, key, value, d_out = (jnp.asarray(inputs[n]) for n in ("query", "key", "value", "d_out"))

    def run(query, key, value, d_out, ids=None):
        def attend(*arrays):
            return s2_jax.s2_attention(
                *arrays, pattern, segment_ids=ids, implementation=kernels, tiles=small_tiles()
            )

        out, pull_back = jax.vjp(attend, query, key, value)
        return out, *pull_back(d_out)

    whole = jax.jit(run)(query, key, value, d_out, jnp.asarray(ids)[None])
    aligned = 0
    for number in range(1, 64, 9):
        start, stop = starts[number], starts[number] + lengths[number]
        if start % (stride * size):
            continue
        aligned += 1
        apart = jax.jit(run)(*(a[:, start:stop] for a in (query, key, value, d_out)))
        for ours, theirs in zip(whole, apart, strict=True):
            np.testing.assert_allclose(ours[:, start:stop], theirs, rtol=2e-5, atol=2e-5)
    assert aligned >= 4


def test_padding_and_neighbours_change_no_bit(kernels):
    """Whatever stands in the padding, NaN included, and in the other rows of the batch."""
    call = AttentionCall(
        S2_16, batch=3, heads=4, kv_heads=2, segments="packed",
        query_lengths=(150, 211, 64), kv_lengths=(150, 200, 211), **LONG,
    )  # fmt: skip
    clean = call.run(kernels)
    inputs = with_nan_in_the_padding(call)
    poisoned = call.run(kernels, **inputs)
    for name in clean:
        assert clean[name].tobytes() == poisoned[name].tobytes(), name
    for array in inputs.values():
        array[1:] = 3.0
    alone = call.run(kernels, **inputs)
    for name in clean:
        assert clean[name][0].tobytes() == alone[name][0].tobytes(), name


def test_nan_in_the_padding_reaches_nothing(implementation):
    """Nor does one in the gradient of a padded query's output."""
    assert_padding_reaches_nothing(CALLS["lengths"], implementation)


def test_padding_gets_zeros(implementation):
    call = CALLS["lengths"]
    got = call.run(implementation)
    for row, (queries, keys) in enumerate(zip(call.query_lengths, call.kv_lengths)):
        assert not got["out"][row, queries:].any()
        assert np.isneginf(got["lse"][row, :, queries:]).all()
        assert not got["dq"][row, queries:].any()
        assert not got["dk"][row, keys:].any()
        assert not got["dv"][row, keys:].any()


def test_padding_past_the_call_gets_zeros_too(implementation):
    """A right-padded chunk at the end of a row: its padding lies past what the mask covers."""
    pattern = s2_jax.block_mask(np.ones((1, 4, 4), bool), block_size=16)
    query, key = jnp.ones((1, 20, 1, 16)), jnp.ones((1, 64, 1, 16))

    @jax.jit
    def attend(offset, length):
        return s2_jax.s2_attention(
            query, key, key, pattern, query_offset=offset, query_seq_lengths=length,
            implementation=implementation,
        )  # fmt: skip

    out = np.asarray(attend(jnp.int32(50), jnp.asarray([10], jnp.int32)))[0, :, 0, 0]
    np.testing.assert_allclose(out[:10], 1.0, rtol=1e-6)
    assert not out[10:].any()


def test_new_lengths_and_segments_trace_nothing():
    traces = []

    @jax.jit
    def attend(query, ids, lengths):
        traces.append(1)
        return s2_jax.s2_attention(
            query, query, query, S2_16, segment_ids=ids, key_value_seq_lengths=lengths
        )

    query = jnp.ones((1, 64, 2, 16))
    for number in (1, 40):
        ids = jnp.arange(64, dtype=jnp.int32)[None] // number
        attend(query, ids, jnp.asarray([number], jnp.int32))
    assert len(traces) == 1
