"""S2-Attention inside Flax, as `attention_fn=` of Flax's own modules."""

import inspect

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import s2_jax
import s2_jax.linen
import s2_jax.nnx
from s2_jax.adapter import attention_fn
from tests.flax_modules import (
    BATCH,
    DENSE,
    LENGTH,
    PATTERN,
    assert_close,
    assert_trains,
    compiled,
    linen_kernels,
    nnx_kernels,
    normal,
    projected,
)

WIDTH, HEADS, HEAD_DIM = 35, 5, 7


@pytest.fixture(name="x")
def input_rows():
    return normal(1, BATCH, LENGTH, WIDTH)


def linen_attention(pattern=PATTERN, **options):
    return flax.linen.MultiHeadDotProductAttention(
        num_heads=HEADS, attention_fn=attention_fn(pattern), **options
    )


def nnx_attention(pattern=PATTERN, **options):
    return nnx.MultiHeadAttention(
        HEADS,
        WIDTH,
        attention_fn=attention_fn(pattern),
        decode=False,
        rngs=nnx.Rngs(0),
        **options,
    )


# The adapter as attention_fn= of Flax's modules.


def test_in_linen_it_is_s2_attention_on_the_same_projections(x):
    module = linen_attention()
    variables = compiled(module.init, jax.random.key(0), x)
    expected = compiled(projected, linen_kernels(variables), x)
    assert_close(compiled(module.apply, variables, x), expected)


def test_in_nnx_it_is_s2_attention_on_the_same_projections(x):
    module = nnx_attention()
    expected = compiled(projected, nnx_kernels(module), x)
    assert_close(nnx.jit(lambda module, x: module(x))(module, x), expected)


def test_a_dense_pattern_is_linens_own_causal_attention(x):
    ours, theirs = linen_attention(DENSE), flax.linen.MultiHeadDotProductAttention(HEADS)
    variables = compiled(theirs.init, jax.random.key(0), x)
    mask = flax.linen.make_causal_mask(x[..., 0])
    expected = compiled(lambda: theirs.apply(variables, x, mask=mask))
    assert_close(compiled(ours.apply, variables, x), expected)


def test_a_dense_pattern_is_nnx_own_causal_attention(x):
    theirs = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=nnx.Rngs(0))
    ours = nnx_attention(DENSE)
    expected = compiled(lambda: theirs(x, is_causal=True))
    assert_close(compiled(lambda: ours(x)), expected)


def test_a_causal_pattern_is_causal_whatever_nnx_says(x):
    module = nnx_attention()
    yes, no = (compiled(lambda says=says: module(x, is_causal=says)) for says in (True, False))
    np.testing.assert_array_equal(yes, no)


def test_linen_trains(x):
    module = linen_attention(dropout_rate=0.1, deterministic=True, use_bias=False)
    params = compiled(module.init, jax.random.key(0), x)
    gradient = jax.grad(lambda params: jnp.sum(module.apply(params, x) ** 2))
    assert_trains(compiled(gradient, params))


def test_nnx_trains(x):
    module = nnx_attention(dropout_rate=0.1, deterministic=True, use_bias=False)
    assert_trains(nnx.jit(nnx.grad(lambda module: jnp.sum(module(x) ** 2)))(module))


@pytest.mark.parametrize("dtype", [jnp.bfloat16])
def test_flax_dtype_is_honoured(x, dtype):
    module = linen_attention(dtype=dtype)
    variables = compiled(module.init, jax.random.key(0), x)
    assert jax.tree.leaves(variables)[0].dtype == jnp.float32
    assert jax.eval_shape(module.apply, variables, x).dtype == dtype
    module = nnx_attention(dtype=dtype)
    assert jax.eval_shape(lambda: module(x)).dtype == dtype


def test_dtype_casts_query_key_and_value():
    query, key, value = (normal(seed, 1, 19, 3, 8) for seed in range(3))
    low = [array.astype(jnp.bfloat16) for array in (query, key, value)]
    np.testing.assert_array_equal(
        attention_fn(PATTERN)(query, key, value, dtype=jnp.bfloat16),
        s2_jax.s2_attention(*low, PATTERN),
    )
    with jax.numpy_dtype_promotion("standard"):
        mixed = attention_fn(PATTERN)(low[0], key, value)
    assert mixed.dtype == jnp.float32


@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
def test_any_number_of_batch_axes(batch):
    query, key, value = (normal(seed, *batch, 19, 4, 8) for seed in range(3))
    out = attention_fn(PATTERN)(query, key, value)
    flat = [array.reshape(-1, 19, 4, 8) for array in (query, key, value)]
    assert_close(out, s2_jax.s2_attention(*flat, PATTERN).reshape(*batch, 19, 4, 8))


def test_options_reach_s2_attention():
    query, key, value = (normal(seed, 1, 19, 3, 8) for seed in range(3))
    options = {"scale": 0.3, "logits_soft_cap": 2.0, "implementation": "reference"}
    np.testing.assert_array_equal(
        attention_fn(PATTERN, **options)(query, key, value),
        s2_jax.s2_attention(query, key, value, PATTERN, **options),
    )


@pytest.mark.parametrize(
    "original",
    [
        pytest.param(flax.linen.dot_product_attention, id="linen"),
        pytest.param(nnx.dot_product_attention, id="nnx"),
    ],
)
def test_every_parameter_of_flax_is_named(original):
    """linen drops what the signature does not name, even where there is a **kwargs."""
    ours = inspect.signature(attention_fn(PATTERN)).parameters
    assert not set(inspect.signature(original).parameters) - set(ours)
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in ours.values())


def test_a_bidirectional_pattern_takes_is_causal_false():
    attention_fn(s2_jax.local(2, causal=False))(*[normal(0, 1, 19, 3, 8)] * 3, is_causal=False)


def test_without_dropout_its_other_options_have_no_effect():
    arrays = [normal(seed, 1, 19, 3, 8) for seed in range(3)]
    plain = attention_fn(PATTERN)(*arrays)
    for options in (
        {"dropout_rng": jax.random.key(0), "broadcast_dropout": False},
        {"dropout_rate": 0.5, "deterministic": True},
        {"force_fp32_for_softmax": True},
    ):
        np.testing.assert_array_equal(attention_fn(PATTERN)(*arrays, **options), plain)


def test_linen_modules_pass_on_what_is_refused(x):
    module = linen_attention()
    variables = compiled(module.init, jax.random.key(0), x)
    with pytest.raises(ValueError, match="mask"):
        module.apply(variables, x, mask=flax.linen.make_causal_mask(x[..., 0]))
    with pytest.raises(ValueError, match="module"):
        module.apply(variables, x, sow_weights=True)
    with pytest.raises(ValueError, match="precision"):
        linen_attention(precision="highest").apply(variables, x)
    dropping = linen_attention(dropout_rate=0.1, deterministic=False)
    with pytest.raises(ValueError, match="dropout_rate"):
        dropping.apply(variables, x, rngs={"dropout": jax.random.key(1)})
    decoding = linen_attention(decode=True)
    cache = decoding.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="decode=True"):
        decoding.apply(cache, x[:, :1], mutable=["cache"])


def test_nnx_modules_pass_on_what_is_refused(x):
    with pytest.raises(ValueError, match="mask"):
        nnx_attention()(x, mask=nnx.make_causal_mask(x[..., 0]))
    with pytest.raises(ValueError, match="module"):
        nnx_attention()(x, sow_weights=True)
    with pytest.raises(ValueError, match="precision"):
        nnx_attention(precision="highest")(x)
    with pytest.raises(ValueError, match="dropout_rate"):
        nnx_attention(dropout_rate=0.1)(x, deterministic=False, rngs=nnx.Rngs(1))


def test_equal_adapters_are_equal_and_trace_once():
    traces = []

    def attend(x, attention):
        traces.append(attention)
        return attention(x, x, x)

    def make(stride):
        return attention_fn(s2_jax.local_stride(1, stride), scale=0.5)

    attend = jax.jit(attend, static_argnames="attention")
    x = normal(0, 1, 19, 3, 8)
    for stride in (3, 3, 5):
        attend(x, attention=make(stride))
    assert traces == [make(3), make(5)]
    assert hash(linen_attention()) == hash(linen_attention())
    assert nnx.graphdef(nnx_attention()) == nnx.graphdef(nnx_attention())
