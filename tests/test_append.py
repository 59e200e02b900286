"""One token joins a cache: what is turned, what is written, and what is not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import s2_jax
from s2_jax import ContiguousCache, EvictingCache, cached_attention
from s2_jax.nnx import S2Attention
from s2_jax.rope import rotate_from

PATTERN = s2_jax.local_stride(2, 3, block_size=16)
BATCH, LONGEST, BASE = 3, 70, 500.0
KINDS = {"contiguous": ContiguousCache, "evicting": EvictingCache}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def make(kind, head_dim, heads=6, kv_heads=2, dtype="float32", **changes):
    return kind.create(
        PATTERN, batch=BATCH, max_length=LONGEST, num_heads=heads, num_kv_heads=kv_heads,
        head_dim=head_dim, dtype=dtype, **changes,
    )  # fmt: skip


def tokens(new, head_dim, seed=0, heads=6, kv_heads=2, dtype="float32"):
    rng = np.random.default_rng(seed)
    shapes = [(BATCH, new, n, head_dim) for n in (heads, kv_heads, kv_heads)]
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def filled(cache, lengths, head_dim, **sizes):
    """A cache that holds so many tokens of each sequence, and then NaN everywhere else."""
    dtype = cache.key.dtype
    _, cache = cached_attention(
        *tokens(max(lengths), head_dim, dtype=dtype, **sizes), cache,
        lengths=jnp.asarray(lengths, jnp.int32), first=True, implementation="reference",
    )  # fmt: skip
    return cache


@pytest.mark.parametrize(("new", "head_dim"), [(1, 10), (1, 32), (5, 10), (20, 32)])
def test_a_rope_base_turns_queries_and_keys(kind, implementation, new, head_dim):
    cache, arrays = filled(make(kind, head_dim), (40, 0, 17), head_dim), tokens(new, head_dim, 1)
    query, key = (rotate_from(x, cache.length, BASE) for x in arrays[:2])
    lengths = jnp.asarray([new, 1, 0], jnp.int32)
    found = cached_attention(
        *arrays, cache, lengths=lengths, rope_base=BASE, implementation=implementation
    )
    expected = cached_attention(
        query, key, arrays[2], cache, lengths=lengths, implementation="reference"
    )
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=2e-6)
    assert not jnp.array_equal(found[1].key, cache.key)


def test_a_prompt_is_turned_from_position_0(kind, implementation):
    cache, arrays = filled(make(kind, 32), (40, 0, 17), 32), tokens(21, 32, 1)
    query, key = (rotate_from(x, 0, BASE) for x in arrays[:2])
    found, _ = cached_attention(
        *arrays, cache, first=True, rope_base=BASE, implementation=implementation
    )
    expected, _ = cached_attention(
        query, key, arrays[2], cache, first=True, implementation="reference"
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("head_dim", "rope_base"), [(7, None), (48, None), (6, BASE), (64, BASE)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_row_of_each_head_is_written(kind, kernels, head_dim, rope_base, dtype):
    """To the bit what there is besides: sequence 1 gets nothing, sequence 2 is full."""
    cache = filled(make(kind, head_dim, dtype=dtype), (33, 20, LONGEST), head_dim)
    spoilt = dataclasses.replace(
        cache, key=jnp.where(cache.key == 0, jnp.nan, cache.key),
        value=jnp.where(cache.value == 0, jnp.nan, cache.value),
    )  # fmt: skip
    arrays, lengths = tokens(1, head_dim, 1, dtype=dtype), jnp.asarray([1, 0, 1], jnp.int32)
    options = {"lengths": lengths, "rope_base": rope_base}
    out, after = cached_attention(*arrays, spoilt, implementation=kernels, **options)
    _, expected = cached_attention(*arrays, spoilt, implementation="reference", **options)
    np.testing.assert_array_equal(*map(np.float32, (after.value, expected.value)))
    changed = np.asarray(after.key != spoilt.key) & np.isfinite(after.key)
    assert changed.sum() == 2 * head_dim  # one row of each of two heads
    rtol = 1e-5 if dtype == "float32" else 1e-2  # a fused multiply-add rounds once
    np.testing.assert_allclose(*map(np.float32, (after.key, expected.key)), rtol=rtol, atol=rtol)
    assert np.isnan(out[2]).all()
    assert np.isfinite(np.float32(out[:2])).all()


def test_a_rope_base_may_be_an_array(kind):
    cache, arrays = make(kind, 32), tokens(1, 32)
    expected, _ = cached_attention(*arrays, cache, rope_base=BASE)
    base = jnp.float32(BASE)
    step = jax.jit(lambda *args: cached_attention(*args, rope_base=base))
    np.testing.assert_allclose(step(*arrays, cache)[0], expected, rtol=1e-6, atol=1e-6)


def test_a_layer_with_projections_of_its_own_decodes_with_them():
    class Normed(S2Attention):
        def project(self, x, offset=0):
            query, key, value = super().project(x, offset)
            return query / 7, key * 3, value

    layer = Normed(24, 6, PATTERN, num_kv_heads=2, head_dim=8, rope_base=BASE, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((BATCH, 20, 24)), jnp.float32)
    found, cache = layer.extend(x[:, :19], make(EvictingCache, 8), first=True)
    last, _ = layer.extend(x[:, 19:], cache)
    np.testing.assert_allclose(
        jnp.concatenate([found, last], axis=1), layer(x), rtol=1e-4, atol=1e-5
    )


def test_values_of_another_size_join_as_well(kind, implementation):
    cache, arrays = make(kind, 32, value_dim=8), tokens(1, 32)
    arrays[2] = arrays[2][..., :8]
    found = cached_attention(*arrays, cache, rope_base=BASE, implementation=implementation)
    query, key = (rotate_from(x, cache.length, BASE) for x in arrays[:2])
    expected = cached_attention(query, key, arrays[2], cache, implementation="reference")
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=2e-6)
