"""What each piece and each operation sees, drawn: rows are query blocks, columns key blocks, heads
stand side by side."""

import numpy as np
import pytest

import s2_jax
from s2_jax.structure import Heads

CAUSAL = {"block_size": 16}
BOTH_WAYS = {"block_size": 16, "causal": False}


def drawn(drawing):
    """`#` is visible; one word a head in every row. NumPy bool `[heads, q_blocks, kv_blocks]`."""
    rows = [line.split() for line in drawing.strip().splitlines()]
    return np.array([[[block == "#" for block in head] for head in row] for row in rows]).swapaxes(
        0, 1
    )


def assert_sees(pattern, drawing, num_kv_heads=None):
    expected = drawn(drawing)
    num_heads, q_blocks, kv_blocks = expected.shape
    mask = pattern.block_mask_at(
        num_heads=num_heads, q_blocks=q_blocks, kv_blocks=kv_blocks, num_kv_heads=num_kv_heads
    )
    np.testing.assert_array_equal(mask, expected)


def token_mask(pattern, length, num_heads=1):
    heads = Heads(np.arange(num_heads)[:, None, None], num_heads, num_heads)
    position = np.arange(length)
    seen = pattern.visible_tokens(heads, position[:, None], position[None])
    return np.broadcast_to(seen, (num_heads, length, length))


# Pieces.


def test_dense():
    assert_sees(
        s2_jax.dense(**CAUSAL),
        """
        #....
        ##...
        ###..
        """,
    )
    assert_sees(s2_jax.dense(**BOTH_WAYS), "### ###\n### ###")


def test_local_counts_the_own_block():
    assert_sees(
        s2_jax.local(2, **CAUSAL),
        """
        #....
        ##...
        .##..
        ..##.
        """,
    )


def test_local_bidirectional_reaches_as_far_ahead():
    assert_sees(
        s2_jax.local(2, **BOTH_WAYS),
        """
        ##...
        ###..
        .###.
        ..###
        """,
    )


def test_sink():
    assert_sees(
        s2_jax.sink(2, **CAUSAL),
        """
        #...
        ##..
        ##..
        ##..
        """,
    )
    assert_sees(s2_jax.sink(**BOTH_WAYS), "#..\n#..")


def test_dilated_stride_counts_from_the_query():
    assert_sees(
        s2_jax.dilated_stride(3, **CAUSAL),
        """
        #....
        .#...
        ..#..
        #..#.
        .#..#
        """,
    )
    assert_sees(
        s2_jax.dilated_stride(3, **BOTH_WAYS),
        """
        #..#.
        .#..#
        ..#..
        """,
    )


def test_vertical_stride_is_absolute_and_shifts_from_head_to_head():
    assert_sees(
        s2_jax.vertical_stride(3, **CAUSAL),
        """
        #..... ...... ......
        #..... ...... .#....
        #..... ..#... .#....
        #..#.. ..#... .#....
        #..#.. ..#... .#..#.
        #..#.. ..#..# .#..#.
        """,
    )


def test_vertical_stride_bidirectional_columns_are_seen_from_both_sides():
    assert_sees(
        s2_jax.vertical_stride(3, **BOTH_WAYS),
        """
        #..#. ..#.. .#..#
        #..#. ..#.. .#..#
        """,
    )


def test_the_default_head_step_spreads_few_heads_over_a_wide_stride():
    assert_sees(
        s2_jax.vertical_stride(4, **BOTH_WAYS),  # step 4 // 2
        "#...#... ..#...#.",
    )


def test_key_value_heads_share_a_pattern_in_their_group():
    assert_sees(
        s2_jax.vertical_stride(2, **BOTH_WAYS),
        "#.#.# #.#.# .#.#. .#.#.",
        num_kv_heads=2,
    )


def test_query_heads_have_a_pattern_each():
    assert_sees(
        s2_jax.vertical_stride(4, heads="query", **BOTH_WAYS),
        "#...# ...#. ..#.. .#...",
        num_kv_heads=2,
    )


def test_homogeneous_heads_share_one_offset():
    assert_sees(
        s2_jax.vertical_stride(3, homogeneous=True, head_offset=1, **BOTH_WAYS),
        "..#..# ..#..#",
    )


def test_head_offset_shifts_all_heads():
    assert_sees(
        s2_jax.vertical_stride(3, head_offset=1, **BOTH_WAYS),
        "..#..# .#..#. #..#..",
    )


def test_head_step():
    assert_sees(
        s2_jax.vertical_stride(5, head_step=3, **BOTH_WAYS),
        "#....# ..#... ....#.",
    )


def test_dense_heads_are_the_last_ones():
    assert_sees(
        s2_jax.vertical_stride(3, head_step=1, dense_heads=1, **CAUSAL),
        """
        #... .... #...
        #... .... ##..
        #... ..#. ###.
        #..# ..#. ####
        """,
    )


def test_dense_heads_count_key_value_heads():
    assert_sees(
        s2_jax.vertical_stride(2, dense_heads=1, **BOTH_WAYS),
        "#.#. #.#. #### ####",
        num_kv_heads=2,
    )


@pytest.mark.parametrize(
    ("window", "drawing"),
    [
        (1, "#... \n .#.. \n ..#. \n ...#"),
        (2, "#... \n ##.. \n .##. \n ..##"),
        (17, "#... \n ##.. \n .##. \n ..##"),
        (18, "#... \n ##.. \n ###. \n .###"),
    ],
)
def test_token_window_shows_the_blocks_that_it_touches(window, drawing):
    assert_sees(s2_jax.token_window(window, **CAUSAL), drawing)


def test_token_window_is_exact_token_by_token():
    expected = drawn("#.... \n ##... \n ###.. \n .###. \n ..###")
    np.testing.assert_array_equal(token_mask(s2_jax.token_window(3, **CAUSAL), 5), expected)
    expected |= expected.swapaxes(1, 2)
    np.testing.assert_array_equal(token_mask(s2_jax.token_window(3, **BOTH_WAYS), 5), expected)


def test_local_stride_is_local_or_vertical_stride():
    numbers = {"heads": "query", "head_offset": 1, "head_step": 2, "dense_heads": 1, **CAUSAL}
    pattern = s2_jax.local_stride(2, 5, **numbers)
    assert pattern == s2_jax.local(2, **CAUSAL) | s2_jax.vertical_stride(5, **numbers)
    assert_sees(
        s2_jax.local_stride(2, 3, **CAUSAL),
        """
        #..... #..... #.....
        ##.... ##.... ##....
        ###... .##... .##...
        #.##.. ..##.. .###..
        #..##. ..###. .#.##.
        #..### ..#.## .#..##
        """,
    )


# Block masks.

MASK = drawn(
    """
    .##. #..#
    #..# ....
    #.#. .#.#
    """
)


def test_block_mask_with_causality():
    assert_sees(
        s2_jax.block_mask(MASK, **CAUSAL),
        """
        .... #...
        #... ....
        #.#. .#..
        """,
    )


def test_block_mask_bidirectional_is_sliced_to_the_call():
    assert_sees(
        s2_jax.block_mask(MASK, **BOTH_WAYS),
        """
        .## #..
        #.. ...
        """,
    )


def test_block_mask_by_key_value_head():
    assert_sees(s2_jax.block_mask(MASK, **BOTH_WAYS), ".##. .##. #..# #..#", num_kv_heads=2)


def test_block_mask_by_query_head():
    assert_sees(s2_jax.block_mask(MASK, **BOTH_WAYS), ".##. #..#", num_kv_heads=1)


def test_block_mask_is_a_copy():
    source = MASK.copy()
    pattern = s2_jax.block_mask(source, **BOTH_WAYS)
    source[:] = True
    assert_sees(pattern, ".##. #..#")


@pytest.mark.parametrize(
    ("heads", "q_blocks", "kv_blocks", "message"),
    [
        pytest.param(2, 4, 4, "3 query blocks", id="too few rows"),
        pytest.param(2, 3, 5, "4 key blocks", id="too few columns"),
        pytest.param(3, 3, 4, "2 heads", id="other heads"),
    ],
)
def test_block_mask_must_cover_the_call(heads, q_blocks, kv_blocks, message):
    pattern = s2_jax.block_mask(MASK, **CAUSAL)
    with pytest.raises(ValueError, match=message):
        pattern.block_mask_at(num_heads=heads, q_blocks=q_blocks, kv_blocks=kv_blocks)


# Identity.

MAKERS = {
    "dense": lambda n: s2_jax.dense(block_size=16 * n),
    "local": s2_jax.local,
    "sink": s2_jax.sink,
    "dilated_stride": s2_jax.dilated_stride,
    "token_window": s2_jax.token_window,
    "vertical_stride": s2_jax.vertical_stride,
    "head_step": lambda n: s2_jax.vertical_stride(7, head_step=n),
    "local_stride": lambda n: s2_jax.local_stride(3, n),
    "and": lambda n: s2_jax.local(5) & s2_jax.sink(n),
    "at_distance": lambda n: s2_jax.dense().at_distance(n, 11),
    "per_head": lambda n: s2_jax.per_head([s2_jax.dense(), s2_jax.local(n)]),
    "block_mask": lambda n: s2_jax.block_mask(np.arange(24).reshape(2, 3, 4) < n),
    "block_mask shape": lambda n: s2_jax.block_mask(np.zeros((2, 3, n), bool)),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_patterns_are_compared_by_value(make):
    assert make(2) == make(2)
    assert hash(make(2)) == hash(make(2))
    assert make(2) != make(4)
    assert len({make(2), make(2), make(4)}) == 2


def test_different_rules_with_equal_numbers_differ():
    kinds = [s2_jax.local, s2_jax.sink, s2_jax.dilated_stride, s2_jax.token_window]
    assert len({kind(2) for kind in kinds}) == 4
    a, b = s2_jax.local(2), s2_jax.sink(2)
    assert a | b != a & b
    assert s2_jax.local(2) != s2_jax.local(2, causal=False)


def test_grouping_does_not_matter():
    a, b, c = s2_jax.local(2), s2_jax.sink(3), s2_jax.vertical_stride(5)
    assert (a | b) | c == a | (b | c)
    assert (a & b) & c == a & (b & c)
    assert (a | b) & c != a | (b & c)


def test_numpy_integers_are_integers():
    assert s2_jax.local(np.int64(2)) == s2_jax.local(2)
    assert hash(s2_jax.vertical_stride(np.int32(5))) == hash(s2_jax.vertical_stride(5))


def test_a_pattern_has_no_truth_value():
    with pytest.raises(TypeError, match="truth value"):
        bool(s2_jax.local(2))
    with pytest.raises(TypeError, match="truth value"):
        _ = s2_jax.local(2) and s2_jax.sink(1)
