"""Parts of the keys, attended to apart and put together, equal one call over all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import s2_jax
from tests.calls import AttentionCall, assert_as_good_as

CALL = AttentionCall(
    s2_jax.local_stride(2, 3, block_size=16),
    heads=4, kv_heads=2, batch=2, value_dim=24, q_len=97, kv_len=97,
)  # fmt: skip


def in_parts(query, key, value):
    """Each of three parts holds every third key: its segment is the one that all queries are in."""
    token = jnp.arange(CALL.kv_len, dtype=jnp.int32)[None].repeat(CALL.batch, axis=0)

    def attend(part):
        return s2_jax.s2_attention(
            query, key, value, CALL.pattern, segment_ids=jnp.zeros_like(token),
            kv_segment_ids=token % 3 - part, return_lse=True, implementation="reference",
        )  # fmt: skip

    return s2_jax.combine_partials(*jax.vmap(attend)(jnp.arange(3, dtype=jnp.int32)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parts_equal_the_whole_gradients_included(dtype):
    """By the rule of tests/calls.py, from out and LSE to the gradients through both."""
    call = AttentionCall(**(vars(CALL) | {"dtype": dtype}))
    inputs = call.inputs()

    @jax.jit
    def run(query, key, value, d_out, d_lse):
        results, pull_back = jax.vjp(in_parts, query, key, value)
        return *results, *pull_back((d_out, d_lse))

    found = run(*(inputs[name] for name in ("query", "key", "value", "d_out", "d_lse")))
    got = dict(zip(("out", "lse", "dq", "dk", "dv"), map(np.asarray, found)))
    assert got["out"].dtype == dtype
    assert got["lse"].dtype == np.float32
    assert_as_good_as(got, call.run("reference"), call.oracle(), dtype)


def test_by_hand():
    """Weights 1 : 3 of two parts; LSEs are of natural logarithms."""
    outs = jnp.asarray([2.0, 6.0]).reshape(2, 1, 1, 1, 1)
    lses = jnp.log(jnp.asarray([1.0, 3.0])).reshape(2, 1, 1, 1)
    out, lse = s2_jax.combine_partials(outs, lses)
    np.testing.assert_allclose(out, [[[[5.0]]]], rtol=1e-6)
    np.testing.assert_allclose(lse, [[[np.log(4.0)]]], rtol=1e-6)


def test_axes():
    """Outputs have heads after queries, LSEs before."""
    lses = np.zeros((2, 1, 3, 5), np.float32)
    lses[1, 0, 2, 4] = -np.inf
    outs = np.stack([np.ones((1, 5, 3, 4), np.float32), np.zeros((1, 5, 3, 4), np.float32)])
    expected = np.full((1, 5, 3, 4), 0.5)
    expected[0, 4, 2] = 1.0
    out, lse = s2_jax.combine_partials(outs, lses)
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    assert lse.shape == (1, 3, 5)


def test_a_query_that_saw_nothing():
    """In any part: zeros and -inf, and gradients of zero; in one of them: that of the other."""
    outs = jnp.ones((2, 1, 2, 1, 3))
    lses = jnp.asarray([[-jnp.inf, -jnp.inf], [-jnp.inf, 7.0]]).reshape(2, 1, 1, 2)

    @jax.jit
    def run(outs, lses):
        results, pull_back = jax.vjp(s2_jax.combine_partials, outs, lses)
        return results, pull_back(jax.tree.map(jnp.ones_like, results))

    (out, lse), (d_outs, d_lses) = jax.device_get(run(outs, lses))
    np.testing.assert_array_equal(out[0, :, 0], [[0, 0, 0], [1, 1, 1]])
    np.testing.assert_array_equal(lse[0, 0], [-np.inf, 7])
    np.testing.assert_array_equal(d_outs[:, 0, :, 0, 0], [[0, 0], [0, 1]])
    np.testing.assert_array_equal(d_lses[:, 0, 0], [[0, 0], [0, 1]])


def test_large_and_small_scores():
    """exp of them would leave float32."""
    lses = jnp.asarray([[1e4, -1e4], [1e4, -1e4]]).reshape(2, 1, 1, 2)
    out, lse = s2_jax.combine_partials(jnp.ones((2, 1, 2, 1, 3)), lses)
    np.testing.assert_array_equal(out, np.ones((1, 2, 1, 3)))
    np.testing.assert_allclose(lse[0, 0], np.log(2) + np.asarray([1e4, -1e4]), rtol=1e-6)


def test_nan_stays():
    """A part that failed is not taken for one that saw nothing."""
    lses = jnp.asarray([jnp.nan, 0.0]).reshape(2, 1, 1, 1)
    out, lse = s2_jax.combine_partials(jnp.ones((2, 1, 1, 1, 1)), lses)
    assert np.isnan(out).all()
    assert np.isnan(lse).all()


def test_no_parts():
    out, lse = s2_jax.combine_partials(jnp.ones((0, 1, 2, 1, 3)), jnp.ones((0, 1, 1, 2)))
    np.testing.assert_array_equal(out, np.zeros((1, 2, 1, 3)))
    assert np.isneginf(lse).all()


def test_float64():
    with jax.enable_x64(True):
        outs, lses = jnp.asarray([2.0, 6.0]), jnp.log(jnp.asarray([1.0, 3.0]))
        out, lse = s2_jax.combine_partials(outs.reshape(2, 1, 1, 1, 1), lses.reshape(2, 1, 1, 1))
        assert out.dtype == lse.dtype == np.float64
        np.testing.assert_allclose(float(out[0, 0, 0, 0]), 5, rtol=1e-15)


def test_vmap_and_jit():
    outs, lses = jnp.arange(48.0).reshape(2, 2, 1, 3, 2, 2), jnp.zeros((2, 2, 1, 2, 3))
    out, lse = jax.jit(jax.vmap(s2_jax.combine_partials))(outs, lses)
    np.testing.assert_allclose(out, outs.mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(lse, np.full((2, 1, 2, 3), np.log(2)), rtol=1e-6)
