"""What each piece and each operation sees, drawn: rows are query blocks, columns key blocks, heads
stand side by side."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

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


# Composition.


def test_or_sees_what_either_sees():
    assert_sees(
        s2_jax.local(1, **CAUSAL) | s2_jax.sink(1, **CAUSAL),
        """
        #...
        ##..
        #.#.
        #..#
        """,
    )


def test_and_sees_what_both_see():
    assert_sees(
        s2_jax.local(3, **BOTH_WAYS) & s2_jax.dilated_stride(2, **BOTH_WAYS),
        """
        #.#..
        .#.#.
        #.#.#
        .#.#.
        """,
    )


def test_at_distance_includes_near_and_excludes_far():
    assert_sees(
        s2_jax.dense(**CAUSAL).at_distance(1, 3),
        """
        .....
        #....
        ##...
        .##..
        ..##.
        """,
    )


def test_at_distance_without_far():
    assert_sees(
        s2_jax.dense(**CAUSAL).at_distance(2, None),
        """
        ....
        ....
        #...
        ##..
        """,
    )


def test_at_distance_bidirectional_is_symmetric():
    assert_sees(
        s2_jax.dense(**BOTH_WAYS).at_distance(1, 3),
        """
        .##..
        #.##.
        ##.##
        .##.#
        """,
    )


def test_at_distance_keeps_head_offsets():
    assert_sees(
        s2_jax.local(1, **CAUSAL) | s2_jax.vertical_stride(2, **CAUSAL).at_distance(2, None),
        """
        #.... #....
        .#... .#...
        #.#.. ..#..
        #..#. .#.#.
        #.#.# .#..#
        """,
    )


def test_per_head_by_query_head():
    assert_sees(
        s2_jax.per_head((s2_jax.local(1, **CAUSAL), s2_jax.dense(**CAUSAL))),
        """
        #.. #..
        .#. ##.
        ..# ###
        """,
        num_kv_heads=1,
    )


def test_per_head_by_key_value_head():
    assert_sees(
        s2_jax.per_head([s2_jax.local(1, **BOTH_WAYS), s2_jax.sink(1, **BOTH_WAYS)]),
        """
        #.. #.. #.. #..
        .#. .#. #.. #..
        """,
        num_kv_heads=2,
    )


def test_per_head_keeps_the_head_numbers_of_the_call():
    stride = s2_jax.vertical_stride(3, **BOTH_WAYS)
    assert_sees(s2_jax.per_head((stride, s2_jax.sink(1, **BOTH_WAYS), stride)), "#..#. #.... .#..#")


def test_per_head_needs_one_pattern_a_head():
    pattern = s2_jax.per_head([s2_jax.dense()] * 3)
    with pytest.raises(ValueError, match="3 patterns"):
        pattern.block_mask_at(num_heads=4, num_kv_heads=2, q_blocks=1, kv_blocks=1)


def test_more_dense_heads_than_heads():
    pattern = s2_jax.vertical_stride(3, dense_heads=3)
    with pytest.raises(ValueError, match="dense_heads=3"):
        pattern.block_mask_at(num_heads=6, num_kv_heads=2, q_blocks=1, kv_blocks=1)


@pytest.mark.parametrize("settings", [CAUSAL, BOTH_WAYS], ids=["causal", "bidirectional"])
def test_tokens_see_what_their_blocks_see(settings):
    pattern = (
        s2_jax.local(1, **settings)
        | s2_jax.vertical_stride(3, **settings).at_distance(2, 4)
        | s2_jax.per_head([s2_jax.sink(1, **settings), s2_jax.dilated_stride(2, **settings)])
    ) & s2_jax.block_mask(~drawn("#.... ..... \n" * 5), **settings)
    blocks = pattern.block_mask_at(num_heads=2, q_blocks=5, kv_blocks=5)
    tokens = blocks.repeat(16, axis=1).repeat(16, axis=2)[:, :71, :71]
    if pattern.causal:
        tokens = tokens & np.tri(71, dtype=bool)
    np.testing.assert_array_equal(token_mask(pattern, 71, num_heads=2), tokens)


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


# dkernel's rule, stated on its own.


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
