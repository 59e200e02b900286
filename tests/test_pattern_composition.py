"""What patterns see that are made of others, drawn as in test_patterns.py."""

import numpy as np
import pytest

import s2_jax
from tests.test_patterns import BOTH_WAYS, CAUSAL, assert_sees, drawn, token_mask


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
