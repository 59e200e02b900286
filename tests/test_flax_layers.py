"""S2Attention, the module, in Linen and in NNX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import s2_jax
import s2_jax.linen
import s2_jax.nnx
from s2_jax.rope import rotate
from tests.flax_modules import (
    BATCH,
    BLOCK,
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


def test_what_padding_holds_changes_nothing(row):
    module = nnx_module()
    linen = functools.partial(linen_module().apply, linen_variables(module))
    lengths = jnp.array([53, 20], jnp.int32)
    counts = (jnp.arange(LENGTH)[None] < lengths[:, None])[..., None]
    spoilt = jnp.where(counts, row, jnp.nan)
    given = {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths}
    expected = jnp.where(counts, compiled(lambda: module(row)), 0)
    for layer in (module, linen):
        assert_close(compiled(lambda layer=layer: layer(spoilt, **given)), expected)
        with pytest.raises(ValueError, match="query_seq_lengths must have shape"):
            layer(row, query_seq_lengths=lengths[:1])


@pytest.mark.parametrize(
    ("rope_base", "kind"), [(None, s2_jax.EvictingCache), (100.0, s2_jax.ContiguousCache)]
)
def test_linen_and_nnx_extend_alike(row, rope_base, kind):
    module, linen = (make(rope_base=rope_base) for make in (nnx_module, linen_module))
    variables = linen_variables(module)
    cache = kind.create(
        PATTERN, batch=BATCH, max_length=80, num_heads=QUERY_HEADS, num_kv_heads=KV_HEADS,
        head_dim=DIM, dtype=jnp.float32,
    )  # fmt: skip
    lengths = jnp.array([40, 31], jnp.int32)

    def through(extend):
        out, held = extend(row[:, :40], cache, lengths=lengths, first=True)
        outs = [out[:, :31]]
        for token in (41, 42):
            out, held = extend(row[:, token : token + 1], held)
            outs.append(out)
        return jnp.concatenate(outs, axis=1), held

    found, held = compiled(
        lambda: through(functools.partial(linen.apply, variables, method="extend"))
    )
    expected, same = compiled(lambda: through(module.extend))
    assert_close(found, expected)
    jax.tree.map(assert_close, held, same)
    whole = compiled(lambda: linen.apply(variables, row))
    assert_close(found[:, :31], whole[:, :31])
    late = linen.init(jax.random.key(0), row[:, :1], cache, method="extend")
    assert jax.tree.map(jnp.shape, late) == jax.tree.map(jnp.shape, variables)


def test_linen_refuses_the_cache_of_another_pattern(row):
    cache = s2_jax.EvictingCache.create(
        s2_jax.local_stride(2, 3, block_size=BLOCK), batch=BATCH, max_length=80,
        num_heads=QUERY_HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, dtype=jnp.float32,
    )  # fmt: skip
    variables = linen_variables(nnx_module())
    for bad, match in ((cache, "pattern"), (None, "cache")):
        with pytest.raises((TypeError, ValueError), match=match):
            linen_module().apply(variables, row, bad, method="extend")


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
