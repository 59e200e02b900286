"""Measures, against numbers counted by hand on

head 0   head 1
#...     #...
##..     .#..
#.#.     .##.
#.##     .#.#      8 + 6 of 10 + 10 causal blocks
"""

import numpy as np
import pytest

import s2_jax

PATTERN = s2_jax.local_stride(1, 2, block_size=16)
SAME_COLUMNS = s2_jax.local_stride(1, 2, block_size=16, homogeneous=True)
LENGTHS = (2, 64, 64)  # heads, q_len, kv_len


def nest(near, far, *, steps=(1, 1), window=2, change=8):
    """Local, then one column in `near`, then one in `far`, for the distant context."""
    return (
        s2_jax.local(window, block_size=16)
        | s2_jax.vertical_stride(near, block_size=16, head_step=steps[0]).at_distance(
            window, change
        )
        | s2_jax.vertical_stride(far, block_size=16, head_step=steps[1]).at_distance(change, None)
    )


def test_block_mask_at():
    head_0 = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]
    head_1 = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 1]]
    mask = PATTERN.block_mask_at(num_heads=2, q_blocks=4, kv_blocks=4)
    assert mask.dtype == np.bool_
    np.testing.assert_array_equal(mask, np.array([head_0, head_1], bool))


@pytest.mark.parametrize(
    ("pattern", "q_len", "kv_len", "expected"),
    [
        pytest.param(PATTERN, 64, 64, 14 / 20, id="whole"),
        pytest.param(PATTERN, 49, 61, 14 / 20, id="last blocks begun"),
        pytest.param(PATTERN, 48, 64, 9 / 12, id="fewer queries"),
        pytest.param(PATTERN, 64, 32, 9 / 14, id="fewer keys"),
        pytest.param(s2_jax.dense(), 640, 640, 1, id="dense"),
        pytest.param(s2_jax.local(2, causal=False), 256, 192, 8 / 12, id="bidirectional"),
        pytest.param(PATTERN, 0, 64, 0, id="no queries"),
        pytest.param(PATTERN, 64, 0, 0, id="no keys"),
    ],
)
def test_density(pattern, q_len, kv_len, expected):
    assert pattern.density(2, q_len, kv_len) == pytest.approx(expected)


def test_density_counts_the_heads_of_a_group():
    # Key/value heads 0 and 1 see 8 and 6 blocks, for three query heads each.
    assert PATTERN.density(6, 64, 64, 2) == pytest.approx(3 * 14 / 60)


def test_flops_are_whole_visible_blocks():
    one_matmul = 14 * 2 * 16 * 16 * 5
    assert PATTERN.flops(*LENGTHS, head_dim=5) == 2 * one_matmul
    assert PATTERN.flops(*LENGTHS, head_dim=5, backward=True) == 5 * one_matmul
    assert PATTERN.flops(2, 49, 61, head_dim=5) == 2 * one_matmul
    assert PATTERN.flops(6, 64, 64, 2, head_dim=5) == 3 * 2 * one_matmul


@pytest.mark.parametrize(
    ("pattern", "num_heads", "num_kv_heads", "expected"),
    [
        pytest.param(PATTERN, 2, None, 4 / 4, id="heads share the context"),
        pytest.param(SAME_COLUMNS, 2, None, 3 / 4, id="heads see the same"),
        pytest.param(PATTERN, 2, 1, 3 / 4, id="one group"),
        pytest.param(s2_jax.local(1, block_size=16), 3, None, 1 / 4, id="window"),
        pytest.param(s2_jax.dense(block_size=16), 1, None, 4 / 4, id="dense"),
    ],
)
def test_coverage_of_the_last_query(pattern, num_heads, num_kv_heads, expected):
    assert pattern.coverage(num_heads, 64, 64, num_kv_heads) == expected


def test_coverage_counts_causally_possible_blocks_only():
    assert SAME_COLUMNS.coverage(2, 48, 128) == 2 / 3  # row 2 of the drawing
    assert s2_jax.sink(1, block_size=16, causal=False).coverage(2, 48, 128) == 1 / 8


@pytest.mark.parametrize(
    ("pattern", "call", "expected"),
    [
        pytest.param(PATTERN, (2, 64, 64), [48, 32], id="whole"),
        pytest.param(PATTERN, (2, 61, 61), [45, 29], id="last block begun"),
        pytest.param(PATTERN, (6, 64, 64, 2), [48, 32], id="groups share"),
        pytest.param(
            s2_jax.local_stride(1, 2, block_size=16, heads="query"),
            (2, 64, 64, 1),
            [64],
            id="a group keeps what any of its heads sees",
        ),
        pytest.param(s2_jax.dense(block_size=16), (2, 61, 61), [61, 61], id="dense"),
        pytest.param(
            s2_jax.dilated_stride(2, block_size=16), (2, 61, 61), [61, 61], id="must keep all"
        ),
        pytest.param(PATTERN, (2, 0, 0), [0, 0], id="empty"),
    ],
)
def test_kv_footprint_in_tokens(pattern, call, expected):
    footprint = pattern.kv_footprint(*call)
    assert np.issubdtype(footprint.dtype, np.integer)
    np.testing.assert_array_equal(footprint, expected)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        pytest.param(s2_jax.dense(block_size=16), True, id="dense"),
        pytest.param(s2_jax.local(3, block_size=16), True, id="local"),
        pytest.param(s2_jax.token_window(21, block_size=16), True, id="token_window"),
        pytest.param(PATTERN, True, id="local_stride"),
        pytest.param(s2_jax.dilated_stride(2, block_size=16), False, id="dilated_stride"),
        pytest.param(
            s2_jax.vertical_stride(2, block_size=16).at_distance(2, None), False, id="gap"
        ),
        pytest.param(nest(2, 4), True, id="nest"),
        pytest.param(nest(2, 6), True, id="another nest"),
        pytest.param(nest(2, 3), False, id="strides that do not divide"),
        pytest.param(nest(4, 2), False, id="denser far away"),
        pytest.param(nest(2, 8, steps=(1, 2)), False, id="two head steps"),
        pytest.param(nest(2, 8, steps=(None, None)), False, id="default head steps"),
    ],
)
def test_is_kv_efficient(pattern, expected):
    assert pattern.is_kv_efficient(4, 24 * 16, 24 * 16) is expected


def test_the_nest_of_the_documentation_is_kv_efficient():
    length = 300 * 16
    pattern = nest(4, 32, window=16, change=256)
    assert pattern.is_kv_efficient(32, length, length)
    assert not nest(4, 30, window=16, change=256).is_kv_efficient(32, length, length)


def test_a_group_is_kv_efficient_together():
    # Alone, head 0 of the pair drops a block that it needs again; head 1 keeps it meanwhile.
    gap = s2_jax.dilated_stride(2, block_size=16)
    pair = s2_jax.per_head([gap, s2_jax.dense(block_size=16)])
    assert not pair.is_kv_efficient(2, 64, 64)
    assert pair.is_kv_efficient(2, 64, 64, 1)


@pytest.mark.parametrize("integer", [np.int8, np.int32, np.int64])
def test_small_integers_do_not_overflow(integer):
    pattern = s2_jax.dense(block_size=16)
    assert pattern.density(integer(32), 3000, 3000) == 1
    flops = pattern.flops(integer(4), 3000, 3000, head_dim=integer(127), backward=True)
    assert (flops, type(flops)) == (pattern.flops(4, 3000, 3000, head_dim=127, backward=True), int)
    with pytest.raises(TypeError, match="backward='no' must be True or False"):
        pattern.flops(4, 64, 64, head_dim=16, backward="no")
    with pytest.raises(ValueError, match="num_heads=0 must be at least 1"):
        pattern.coverage(0, 0, 0)


@pytest.mark.parametrize("measure", ["density", "coverage", "kv_footprint", "is_kv_efficient"])
def test_heads_that_do_not_fit(measure):
    with pytest.raises(ValueError, match="num_kv_heads=2"):
        getattr(PATTERN, measure)(3, 64, 64, 2)
