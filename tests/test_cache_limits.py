"""Caches at their limits: memory, pages and lengths that run out, and what JAX does to a call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import s2_jax
from s2_jax import ContiguousCache, EvictingCache, cached_attention
from tests.calls import AttentionCall
from tests.decoding import CACHES, make_cache


def test_memory():
    """At 131072 tokens, stride 16 and 8 local blocks: a fourteenth of the contiguous cache."""
    call = AttentionCall(
        s2_jax.local_stride(8, 16), heads=2, kv_heads=2, head_dim=8, dtype="bfloat16",
        q_len=131072, kv_len=131072,
    )  # fmt: skip
    sizes = {
        kind: sum(array.nbytes for array in jax.tree.leaves(make_cache(kind, call)))
        for kind in CACHES
    }
    assert sizes["contiguous"] == 131072 * 2 * 2 * 8 * 2 + 4
    assert 14 * sizes["evicting"] <= sizes["contiguous"]


def few_tokens(new: int, batch: int = 2):
    shapes = [(batch, new, heads, 8) for heads in (4, 2, 2)]
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def small_cache(kind=EvictingCache, **changes):
    options = {"batch": 2, "max_length": 100, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    pattern = s2_jax.local_stride(2, 4, block_size=16)
    return kind.create(pattern, **options | changes, dtype=jnp.float32)


@pytest.mark.parametrize("new", [2, 20])
def test_there_are_no_gradients(new):
    query, key, value = few_tokens(new)

    def loss(query, key):
        return cached_attention(query, key, value, small_cache())[0].sum()

    for argument in (0, 1):
        with pytest.raises(NotImplementedError, match="cached_attention has no gradients"):
            jax.grad(loss, argnums=argument)(query, key)


@pytest.mark.parametrize("kind", [EvictingCache, ContiguousCache])
@pytest.mark.parametrize("implementation", ["interpret", "reference"])
def test_vmap_over_steps(kind, implementation):
    """Also over the caches."""
    arrays = [jnp.stack([x, 2 * x]) for x in few_tokens(2)]
    caches = jax.tree.map(lambda x: jnp.stack([x, x]), small_cache(kind))

    def step(cache, *arrays):
        return cached_attention(*arrays, cache, implementation=implementation)[0]

    found = jax.jit(jax.vmap(step))(caches, *arrays)
    for entry in range(2):
        expected = step(small_cache(kind), *(array[entry] for array in arrays))
        np.testing.assert_allclose(found[entry], expected, atol=1e-6)


@pytest.mark.parametrize("chunks", [(40,), (1,) * 40, (20, 20)], ids=["prompt", "steps", "chunks"])
def test_a_sequence_that_outgrows_its_pages_gives_nan(chunks, implementation):
    """Sequence 0 has pages for 32 tokens, sequence 1 for all."""
    cache = small_cache(num_pages=6)
    cache = cache.with_pages(0, jnp.asarray([0, 1, -1, -1], jnp.int32))
    cache = cache.with_pages(1, jnp.asarray([2, 3, 4, 5], jnp.int32))
    arrays, found, start = few_tokens(40), [], 0
    step = jax.jit(cached_attention, static_argnames=("first", "implementation"))
    for new in chunks:
        part = [array[:, start : start + new] for array in arrays]
        out, cache = step(*part, cache, first=start == 0, implementation=implementation)
        found.append(out)
        start += new
    out = np.concatenate(found, axis=1)
    assert np.isnan(out[0, 32:]).all()
    expected = s2_jax.s2_attention(*arrays, cache.pattern)
    np.testing.assert_allclose(out[0, :32], expected[0, :32], atol=2e-6)
    np.testing.assert_allclose(out[1], expected[1], atol=2e-6)


@pytest.mark.parametrize("kind", [EvictingCache, ContiguousCache])
@pytest.mark.parametrize("max_length", [32, 100], ids=["one program a head", "several"])
def test_a_step_past_the_end_gives_nan_to_what_counts(max_length, kind, implementation):
    step = jax.jit(cached_attention, static_argnames=("first", "implementation"))
    before, counts = [max_length, max_length - 1, max_length], [1, 1, 0]
    cache, prompts = small_cache(kind, batch=3, max_length=max_length), few_tokens(max_length, 3)
    _, cache = step(*prompts, cache, lengths=jnp.asarray(before, jnp.int32), first=True)
    lengths = jnp.asarray(counts, jnp.int32)
    out, _ = step(*few_tokens(1, 3), cache, lengths=lengths, implementation=implementation)
    assert np.isnan(out[0]).all()
    assert np.isfinite(out[1]).all()
    assert not out[2].any()


def test_traced_lengths_are_clipped():
    arrays = few_tokens(3)
    step = jax.jit(lambda lengths: cached_attention(*arrays, small_cache(), lengths=lengths)[1])
    assert step(jnp.asarray([7, -2], jnp.int32)).length.tolist() == [3, 0]
