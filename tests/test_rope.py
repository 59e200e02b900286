"""Rotary embedding: pairs, positions, precision, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from s2_jax.rope import positions_from, rotate
from tests.flax_modules import BATCH, LENGTH, assert_close, normal

DIM = 10


def test_rotation_of_one_pair():
    x = jnp.array([[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]]])
    expected = [
        [[1, 0]],
        [[np.cos(2), np.sin(2)]],
        [[-np.sin(5), np.cos(5)]],
    ]
    assert_close(rotate(x, jnp.array([0, 2, 5]), base=1e4), expected)


def test_pairs_are_half_a_head_apart_and_slow_down():
    x = jnp.array([[[1.0, 1.0, 0.0, 0.0]]])
    fast, slow = 3, 3 / 100**0.5
    expected = [[[np.cos(fast), np.cos(slow), np.sin(fast), np.sin(slow)]]]
    assert_close(rotate(x, jnp.array([3]), base=100.0), expected)


def test_scores_depend_on_the_distance_alone():
    query, key = normal(0, 1, LENGTH, 3, DIM), normal(1, 1, LENGTH, 3, DIM)

    def scores(offset):
        positions = positions_from(offset, LENGTH)
        turned = (rotate(array, positions, base=1e4) for array in (query, key))
        return jnp.einsum("bqhd,bkhd->bhqk", *turned)

    np.testing.assert_allclose(scores(0), scores(977), atol=1e-3)
    assert jnp.max(jnp.abs(scores(0) - jnp.einsum("bqhd,bkhd->bhqk", query, key))) > 0.1


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        (3, [3, 4, 5]),
        (np.int64(3), [3, 4, 5]),
        (jnp.int32(3), [3, 4, 5]),
        (np.array([3, 11], np.int32), [[3, 4, 5], [11, 12, 13]]),
    ],
    ids=["int", "int64 scalar", "scalar", "one a row"],
)
def test_positions(offset, expected):
    positions = positions_from(offset, 3)
    assert positions.dtype == jnp.int32
    np.testing.assert_array_equal(positions, expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_rotation_keeps_the_dtype_and_computes_in_float32(dtype):
    x = normal(0, BATCH, LENGTH, 3, DIM, dtype=dtype)
    positions = positions_from(977, LENGTH)
    turned = rotate(x, positions)
    assert turned.dtype == dtype
    np.testing.assert_array_equal(turned, rotate(x.astype(jnp.float32), positions).astype(dtype))


@pytest.mark.parametrize("offset", [True, 2.0, np.array([1, 2]), None], ids=repr)
def test_bad_offsets(offset):
    with pytest.raises(TypeError, match="query_offset"):
        positions_from(offset, 3)


def test_an_odd_head_cannot_be_rotated():
    with pytest.raises(ValueError, match="head_dim=7"):
        rotate(normal(0, 5, 3, 7), jnp.arange(5))
