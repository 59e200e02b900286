"""dkernel's rule, stated on its own, is that of `local_stride`."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import s2_jax


@st.composite
def dkernel_calls(draw):
    kv_heads = draw(st.integers(1, 5))
    homogeneous = draw(st.booleans())
    return {
        "kv_heads": kv_heads,
        "query_heads": kv_heads * draw(st.integers(1, 3)),
        "local_blocks": draw(st.integers(1, 5)),
        "stride": draw(st.integers(1, 17)),
        "offset": draw(st.integers(-7, 23)),
        "homogeneous": homogeneous,
        "dense_heads": 0 if homogeneous else draw(st.integers(0, kv_heads)),
        "q_blocks": draw(st.integers(1, 13)),
        "kv_blocks": draw(st.integers(1, 13)),
    }


@given(call=dkernel_calls())
def test_local_stride_is_dkernels_rule(call):
    """dkernel's default step divides by the query heads; ours, by the pattern heads."""
    kv_heads, query_heads, stride = call["kv_heads"], call["query_heads"], call["stride"]
    step = 0 if call["homogeneous"] else max(1, stride // query_heads)

    def sees(head, i, j):
        if j > i:
            return False
        in_window = i - j < call["local_blocks"]
        in_column = (j + head * step + call["offset"]) % stride == 0
        return in_window or in_column or head >= kv_heads - call["dense_heads"]

    expected = np.zeros((query_heads, call["q_blocks"], call["kv_blocks"]), bool)
    for n, i, j in itertools.product(*map(range, expected.shape)):
        expected[n, i, j] = sees(n // (query_heads // kv_heads), i, j)

    steps = [None] if call["homogeneous"] else [step]
    if kv_heads == query_heads:
        steps.append(None)
    for head_step in steps:
        pattern = s2_jax.local_stride(
            call["local_blocks"],
            stride,
            homogeneous=call["homogeneous"],
            head_offset=call["offset"],
            head_step=head_step,
            dense_heads=call["dense_heads"],
        )
        mask = pattern.block_mask_at(
            num_heads=query_heads,
            q_blocks=call["q_blocks"],
            kv_blocks=call["kv_blocks"],
            num_kv_heads=kv_heads,
        )
        np.testing.assert_array_equal(mask, expected)
