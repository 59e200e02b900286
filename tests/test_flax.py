"""S2-Attention inside Flax: as `attention_fn=` of Flax's own modules, and as a module."""

import functools
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
from s2_jax.rope import rotate

BATCH, LENGTH, WIDTH, HEADS, HEAD_DIM = 2, 53, 35, 5, 7
BLOCK = 16
PATTERN = s2_jax.local_stride(1, 3, block_size=BLOCK)
DENSE = s2_jax.dense(block_size=BLOCK)


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def compiled(call, *arguments):
    """`call(*arguments)` as one computation, which is faster than op by op."""
    return jax.jit(call)(*arguments)


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


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


def projected(kernels, x):
    """`x` through kernels of query, key, value and out (biases are 0 at the start)."""
    query, key, value = (
        jnp.einsum("btf,fhd->bthd", x, kernels[name]) for name in ("query", "key", "value")
    )
    out = s2_jax.s2_attention(query, key, value, PATTERN)
    return jnp.einsum("bthd,hdf->btf", out, kernels["out"])


def linen_kernels(variables):
    return {name: params["kernel"] for name, params in variables["params"].items()}


def nnx_kernels(module):
    return {name: getattr(module, name).kernel[...] for name in ("query", "key", "value", "out")}


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


def assert_trains(gradients):
    for gradient in jax.tree.leaves(gradients):
        assert jnp.isfinite(gradient).all()
        assert jnp.any(gradient != 0)


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


# S2Attention.

WIDE, QUERY_HEADS, KV_HEADS, DIM = 11, 6, 3, 10


def nnx_module(pattern=PATTERN, **options):
    options = {"num_kv_heads": KV_HEADS, "head_dim": DIM, "rope_base": 100.0, **options}
    return s2_jax.nnx.S2Attention(WIDE, QUERY_HEADS, pattern, rngs=nnx.Rngs(0), **options)


def linen_module(pattern=PATTERN, **options):
    options = {"num_kv_heads": KV_HEADS, "head_dim": DIM, "rope_base": 100.0, **options}
    return s2_jax.linen.S2Attention(WIDE, QUERY_HEADS, pattern, **options)


@pytest.fixture(name="row")
def narrow_rows():
    return normal(2, BATCH, LENGTH, WIDE)


def linen_variables(module):
    """The parameters of an NNX module, for its linen twin."""
    return {"params": nnx.to_pure_dict(nnx.state(module, nnx.Param))}


KERNEL_SHAPES = {
    "query": (WIDE, QUERY_HEADS, DIM),
    "key": (WIDE, KV_HEADS, DIM),
    "value": (WIDE, KV_HEADS, DIM),
    "out": (QUERY_HEADS, DIM, WIDE),
}


def test_kernels_of_grouped_heads(row):
    kernels = nnx_kernels(nnx_module())
    assert {name: kernel.shape for name, kernel in kernels.items()} == KERNEL_SHAPES
    kernels = linen_kernels(jax.eval_shape(linen_module().init, jax.random.key(0), row))
    assert {name: kernel.shape for name, kernel in kernels.items()} == KERNEL_SHAPES


def test_without_rope_a_module_is_s2_attention_between_projections(row):
    module = nnx_module(rope_base=None)
    expected = compiled(projected, nnx_kernels(module), row)
    assert_close(compiled(lambda: module(row)), expected)


def test_with_rope_queries_and_keys_are_rotated(row):
    module = nnx_module()
    kernels = nnx_kernels(module)
    turned = {
        name: rotate(
            jnp.einsum("btf,fhd->bthd", row, kernels[name]), jnp.arange(LENGTH), base=100.0
        )
        for name in ("query", "key")
    }
    value = jnp.einsum("btf,fhd->bthd", row, kernels["value"])
    out = s2_jax.s2_attention(turned["query"], turned["key"], value, PATTERN)
    assert_close(module(row), jnp.einsum("bthd,hdf->btf", out, kernels["out"]))


@pytest.mark.parametrize("use_bias", [False, True], ids=["no bias", "bias"])
def test_linen_and_nnx_agree(row, use_bias):
    module = nnx_module(use_bias=use_bias)
    linen = linen_module(use_bias=use_bias)
    variables = linen_variables(module)
    initial = jax.eval_shape(linen.init, jax.random.key(0), row)
    assert jax.tree.map(jnp.shape, initial) == jax.tree.map(jnp.shape, variables)

    def call(attend):
        return attend(
            row[:, 29:], row, query_offset=29, segment_ids=ids[:, 29:], kv_segment_ids=ids
        )

    ids = jnp.where(jnp.arange(BATCH * LENGTH) % 11 < 5, 2, 3).reshape(BATCH, LENGTH)
    expected = compiled(lambda: call(module))
    assert_close(compiled(lambda: call(functools.partial(linen.apply, variables))), expected)


def test_modules_train(row):
    module = nnx_module(use_bias=True)
    assert_trains(nnx.jit(nnx.grad(lambda module: jnp.sum(module(row) ** 2)))(module))


def test_modules_see_what_some_head_sees_and_nothing_later(row):
    module = nnx_module(s2_jax.local_stride(1, 4, head_step=1, block_size=BLOCK))
    gradient = compiled(jax.jacobian(lambda x: module(x).sum(axis=-1)), row[0])
    seen_blocks = np.array(  # heads with columns 0, 3 and 2: nobody sees block 1 from afar
        [
            [1, 0, 0, 0],
            [1, 1, 0, 0],
            [1, 0, 1, 0],
            [1, 0, 1, 1],
        ],
        bool,
    )
    seen = seen_blocks.repeat(BLOCK, axis=0).repeat(BLOCK, axis=1)[:LENGTH, :LENGTH]
    seen &= np.tri(LENGTH, dtype=bool)
    np.testing.assert_array_equal(np.abs(gradient).sum(axis=-1) > 0, seen)


def test_a_part_of_a_row_with_its_context_is_a_part_of_the_whole(row):
    module = nnx_module()
    out = compiled(lambda: module(row[:, 17:40], row[:, :40], query_offset=17))
    assert_close(out, compiled(lambda: module(row)[:, 17:40]))


def test_rows_with_offsets_of_their_own(row):
    module = nnx_module()
    offset = jnp.array([5, 31], jnp.int32)
    part = jnp.stack([row[0, 5:18], row[1, 31:44]])
    whole = compiled(lambda: module(row))
    out = compiled(lambda offset: module(part, row, query_offset=offset), offset)
    assert_close(out, jnp.stack([whole[0, 5:18], whole[1, 31:44]]))


def test_the_steps_of_a_call_serve_a_cache(row):
    module = nnx_module()

    def in_two_parts():
        parts = [module.project_key_value(row[:, :29]), module.project_key_value(row[:, 29:], 29)]
        key, value = (jnp.concatenate(pair, axis=1) for pair in zip(*parts))
        query = module.project_query(row[:, 29:], 29)
        return module.attend(query, key, value, query_offset=29)

    assert_close(compiled(in_two_parts), compiled(lambda: module(row)[:, 29:]))


def test_a_row_without_batch_axis(row):
    module = nnx_module()
    assert_close(compiled(lambda: module(row[0])), compiled(lambda: module(row)[0]))


def test_packed_segments_do_not_see_each_other(row):
    ids = jnp.broadcast_to(jnp.where(jnp.arange(LENGTH) < 23, 7, 3), (BATCH, LENGTH))
    module = nnx_module(DENSE)
    packed = compiled(lambda: module(row, segment_ids=ids))
    assert_close(packed[:, :23], compiled(lambda: module(row[:, :23])))
    assert_close(packed[:, 23:], compiled(lambda: module(row[:, 23:])))  # rotation is relative
    variables = linen_variables(module)
    out = compiled(lambda: linen_module(DENSE).apply(variables, row, segment_ids=ids))
    assert_close(out, packed)


def test_heads_split_over_an_axis_give_the_whole(row):
    whole = nnx_module()
    graph, _ = nnx.split(nnx_module(head_axis="heads"))
    kernels = nnx.state(whole)

    def split(path, kernel):
        axis = 0 if any(getattr(key, "key", None) == "out" for key in path) else 1
        return jnp.stack(jnp.split(kernel, KV_HEADS, axis))

    shards = jax.tree_util.tree_map_with_path(split, kernels)
    expected = np.tile(compiled(lambda: whole(row)), (KV_HEADS, 1, 1, 1))
    out = jax.vmap(lambda shard: nnx.merge(graph, shard)(row), axis_name="heads")
    assert_close(compiled(out, shards), expected)

    linen = linen_module(head_axis="heads")
    shards = jax.tree_util.tree_map_with_path(split, linen_variables(whole))
    out = jax.vmap(lambda shard: linen.apply(shard, row), axis_name="heads")
    assert_close(compiled(out, shards), expected)
    initial = jax.eval_shape(linen.init, jax.random.key(0), row)
    assert linen_kernels(initial)["query"].shape == KERNEL_SHAPES["query"]
    with pytest.raises(ValueError, match="head_axis='heads' names no mesh axis"):
        linen.apply(linen_variables(whole), row)


def test_equal_modules_are_equal():
    def pattern():
        return s2_jax.local_stride(1, 3) & s2_jax.block_mask(np.ones((KV_HEADS, 5, 5), bool))

    assert linen_module(pattern()) == linen_module(pattern())
    assert hash(linen_module(pattern())) == hash(linen_module(pattern()))
    assert linen_module(PATTERN) != linen_module(DENSE)
    assert nnx.graphdef(nnx_module(pattern())) == nnx.graphdef(nnx_module(pattern()))
    assert nnx.graphdef(nnx_module(PATTERN)) != nnx.graphdef(nnx_module(DENSE))
