"""The model: what a layer sees, causality, precision, and settings that are refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, use_abstract_mesh
from jax.sharding import PartitionSpec as P

import s2_jax
from models import HybridConfig, ModelConfig, Transformer
from models.presets import PRESETS
from tests.test_lowering import H100

HYBRID = HybridConfig(dense_first=1, dense_every=3, block_size=16, local_blocks=1, vert_stride=2)
TINY = ModelConfig(
    vocab_size=11,
    num_layers=2,
    width=12,
    num_heads=6,
    num_kv_heads=3,
    mlp_width=7,
    attention=HYBRID,
)


def make(config: ModelConfig = TINY) -> Transformer:
    return Transformer(config, rngs=nnx.Rngs(0))


def tokens(length: int, batch: int = 2) -> jax.Array:
    return jax.random.randint(jax.random.key(1), (batch, length), 0, TINY.vocab_size)


def influence(model: Transformer, length: int, **kwargs) -> np.ndarray:
    """[t, s]: whether the logits at position t depend on the input at position s."""
    graphdef, params = nnx.split(model, nnx.Param)

    def summed(x):
        logits = nnx.merge(graphdef, params).from_embeddings(x, **kwargs)[0]
        return (logits * jnp.arange(1.0, 12.0)[None, :]).sum(axis=-1)

    x = model.embeddings(tokens(length, batch=1)) * 50
    return np.abs(np.asarray(jax.jit(jax.jacrev(summed))(x))[:, 0]).max(axis=-1) > 0


def test_a_hybrid_has_one_pattern_per_layer():
    dense = s2_jax.dense(block_size=16)
    sparse = s2_jax.local_stride(1, 2, block_size=16)
    config = dataclasses.replace(TINY, num_layers=7)
    assert config.patterns() == (dense, sparse, dense, sparse, sparse, dense, sparse)


def test_without_dense_layers_every_layer_is_sparse():
    config = ModelConfig(num_layers=2, attention=HybridConfig(dense_first=0))
    assert config.patterns() == (config.attention.sparse,) * 2


def test_a_dense_model_is_dense_in_every_layer():
    config = ModelConfig(num_layers=2, attention=HybridConfig(kind="dense", dense_first=0))
    assert config.patterns() == (s2_jax.dense(),) * 2


def test_a_window_model_sees_that_many_tokens_and_may_have_dense_layers():
    attention = HybridConfig(kind="window", dense_first=0, dense_every=2, block_size=32, window=5)
    config = ModelConfig(num_layers=3, attention=attention)
    window, dense = s2_jax.token_window(5, block_size=32), s2_jax.dense(block_size=32)
    assert config.patterns() == (window, dense, window)


def test_the_settings_of_s2_layers_reach_their_pattern():
    config = HybridConfig(heads="query", head_offset=3, head_step=2, window=70)
    stride = s2_jax.local_stride(4, 8, heads="query", head_offset=3, head_step=2)
    assert config.sparse == stride | s2_jax.token_window(70)
    assert HybridConfig(homogeneous=True).sparse == s2_jax.local_stride(4, 8, homogeneous=True)


def test_heads_that_share_one_shift_see_the_same_columns():
    seen = HybridConfig(homogeneous=True, head_offset=1).sparse.block_mask_at(
        num_heads=3, q_blocks=11, kv_blocks=11
    )
    assert (seen == seen[:1]).all()


def test_the_attention_of_phi3_small():
    model = PRESETS["phi3-small-attention"]
    first, second, *_ = model.patterns()
    assert first == s2_jax.local_stride(16, 8, heads="query", head_offset=1, head_step=1)
    assert second == s2_jax.dense()
    assert [model.attention.is_dense(layer) for layer in range(32)] == [False, True] * 16
    assert (model.num_heads, model.num_kv_heads, model.head_features) == (32, 8, 128)


def test_a_layer_skips_what_its_pattern_hides():
    # Of 4 blocks, 10 pairs are causal; heads 0 and 2 see the columns 0, 2 and head 1 sees 1, 3,
    # and all see the diagonal: 8 and 6 pairs.
    dense, sparse = TINY.densities(64)
    assert dense == 1
    assert sparse == pytest.approx((8 + 6 + 8) / 30)


def test_no_logit_depends_on_a_later_token():
    length = 37
    assert (influence(make(), length) == np.tri(length, dtype=bool)).all()


def test_a_single_sparse_layer_sees_its_pattern_and_nothing_else():
    attention = HybridConfig(dense_first=0, block_size=16, local_blocks=1, vert_stride=3)
    config = dataclasses.replace(
        TINY, num_layers=1, num_heads=2, num_kv_heads=1, attention=attention
    )
    blocks = np.array([
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 0, 1, 0],
        [1, 0, 0, 1],
    ])  # fmt: skip
    expected = np.kron(blocks, np.ones((16, 16))).astype(bool) & np.tri(64, dtype=bool)
    assert (influence(make(config), 64) == expected).all()


def test_a_single_window_layer_sees_its_window_and_nothing_else():
    attention = HybridConfig(kind="window", dense_first=0, block_size=16, window=7)
    config = dataclasses.replace(TINY, num_layers=1, attention=attention)
    assert (
        influence(make(config), 41) == np.tri(41, dtype=bool) & ~np.tri(41, k=-7, dtype=bool)
    ).all()


def test_segments_do_not_see_each_other():
    segment_ids = jnp.asarray([[0] * 5 + [1] * 8], jnp.int32)
    same = np.equal.outer(segment_ids[0], segment_ids[0])
    seen = influence(make(), 13, segment_ids=segment_ids)
    assert (seen == (same & np.tri(13, dtype=bool))).all()


def test_parameters_and_logits_are_float32_whatever_is_computed_in():
    model = make(dataclasses.replace(TINY, dtype="bfloat16"))
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.float32.dtype}
    logits = nnx.jit(model)(tokens(17))
    assert logits.dtype == jnp.float32
    assert logits.shape == (2, 17, 11)
    full = nnx.jit(make())(tokens(17))
    assert 0 < float(jnp.abs(logits - full).max()) < 0.03


def test_equal_configurations_make_equal_graphs_so_that_one_trace_serves():
    first, second = (nnx.graphdef(make()) for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)


@functools.cache
def gradient(config):
    graphdef, params = nnx.split(make(config), nnx.Param)

    def loss(params):
        return (nnx.merge(graphdef, params)(tokens(19)) ** 2).sum()

    return jax.jit(jax.grad(loss))(params)


@pytest.mark.parametrize("remat", ["full", "attention"])
def test_recomputing_layers_changes_no_gradient(remat):
    plain = jax.tree.leaves(gradient(TINY))
    again = jax.tree.leaves(gradient(dataclasses.replace(TINY, remat=remat)))
    for a, b in zip(plain, again, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("remat", "launches"), [("none", 1), ("full", 2), ("attention", 1)])
def test_the_forward_kernel_runs_again_only_where_the_whole_layer_is_recomputed(remat, launches):
    # One layer: in the text of a program, equal layers share a function.
    config = dataclasses.replace(TINY, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=32)
    graphdef, params = nnx.split(make(dataclasses.replace(config, remat=remat)), nnx.Param)

    def loss(params):
        return (nnx.merge(graphdef, params)(tokens(128)) ** 2).sum()

    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=H100)):
        traced = jax.jit(jax.grad(loss)).trace(params)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count('s2_attention_forward"') == launches
    assert text.count('s2_attention_dq"') == 1


def test_a_head_may_have_more_features_than_its_share_of_the_width():
    model = make(dataclasses.replace(TINY, width=14, head_dim=10))
    attention = model.blocks[0].attention
    assert attention.query.kernel.shape == (14, 6, 10)
    assert attention.out.kernel.shape == (6, 10, 14)
    assert nnx.jit(model)(tokens(17)).shape == (2, 17, 11)


def test_tied_embeddings_are_the_head():
    tied = make(dataclasses.replace(TINY, tie_embeddings=True))
    untied = make()
    assert tied.head is None
    nnx.update(untied, nnx.state(tied, nnx.Param))
    untied.head.kernel[...] = tied.embed[...].T
    np.testing.assert_allclose(
        nnx.jit(tied)(tokens(17)), nnx.jit(untied)(tokens(17)), rtol=1e-5, atol=1e-6
    )


def test_the_epsilon_reaches_every_norm():
    model = make(dataclasses.replace(TINY, norm_epsilon=0.25))
    norms = [norm for block in model.blocks for norm in (block.attention_norm, block.mlp_norm)]
    assert {norm.epsilon for norm in (*norms, model.norm)} == {0.25}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("125m", 85e6),
        ("350m", 308e6),
        ("1.3b", 1.2e9),
        ("7b", 6.5e9),
        ("phi3-small-attention", 7.0e9),
    ],
)
def test_presets_have_the_size_of_their_name_without_the_vocabulary(name, parameters):
    # One layer is as big as another.
    two, three = (
        sum(x.size for x in jax.tree.leaves(nnx.eval_shape(lambda c=config: make(c))))
        for config in (dataclasses.replace(PRESETS[name], num_layers=layers) for layers in (2, 3))
    )
    assert (three - two) * PRESETS[name].num_layers == pytest.approx(parameters, rel=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers=0 must be positive"),
        ({"num_heads": 6, "num_kv_heads": 4}, "num_heads=6 must be a multiple of num_kv_heads=4"),
        ({"width": 20}, "width=20 must be an even multiple of num_heads=6"),
        ({"width": 18}, "width=18 must be an even multiple of num_heads=6"),
        ({"rope_base": 1.0}, "rope_base=1.0"),
        ({"rope_base": float("inf")}, "rope_base=inf"),
        ({"head_dim": 0}, "head_dim=0 must be positive and even"),
        ({"head_dim": 3}, "head_dim=3 must be positive and even"),
        ({"norm_epsilon": 0.0}, "norm_epsilon=0.0"),
        ({"norm_epsilon": float("nan")}, "norm_epsilon=nan"),
        ({"dtype": "float64"}, "dtype='float64' must be one of float32, bfloat16"),
        ({"remat": True}, "remat=True must be one of none, full, attention"),
        ({"param_dtype": "float16"}, "param_dtype='float16' must be one of float32, bfloat16"),
        ({"param_dtype": "bfloat16"}, "param_dtype='bfloat16' needs dtype='bfloat16'"),
        ({"dense_implementation": "flash"}, "dense_implementation='flash' must be one of cudnn"),
        ({"dense_implementation": "cudnn"}, "dense_implementation='cudnn' needs dtype='bfloat16'"),
        ({"remat": "layers"}, "remat='layers' must be one of none, full, attention"),
        ({"attention": HybridConfig(dense_first=9)}, "dense_first=9 is more than num_layers=2"),
    ],
)
def test_a_model_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dense_first": -1}, "dense_first=-1"),
        ({"dense_every": -2}, "dense_every=-2"),
        ({"block_size": 24}, "block_size"),
        ({"local_blocks": 0}, "local_blocks"),
        ({"vert_stride": 0}, "vert_stride"),
        ({"kind": "sparse"}, "kind='sparse' must be one of s2, dense, window"),
        ({"kind": "window"}, "needs window, the number of tokens"),
        ({"kind": "dense", "window": 7}, "takes no window=7"),
        ({"window": 0}, "window=0"),
        ({"heads": "all"}, "heads='all'"),
        ({"homogeneous": True, "head_step": 1}, "homogeneous=True .* head_step=1"),
    ],
)
def test_a_hybrid_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(HYBRID, **change)


@pytest.mark.parametrize("way", ["pmap", "shard_map", "explicit"])
def test_axes_of_other_meshes_may_have_any_name(way):
    """The model splits what it computes over Auto axes alone."""
    config = ModelConfig(num_layers=1, width=16, num_heads=2, num_kv_heads=2, mlp_width=24)
    model = Transformer(config, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    tokens = jax.random.randint(jax.random.key(0), (2, 1, 33), 0, 256)
    run = lambda params, tokens: nnx.merge(graphdef, params)(tokens)  # noqa: E731
    want = jax.vmap(run, (None, 0))(params, tokens)
    kind = AxisType.Explicit if way == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(kind,))
    if way == "pmap":
        got = jax.pmap(run, axis_name="tensor", in_axes=(None, 0))(params, tokens)
    elif way == "shard_map":
        split = jax.shard_map(
            run, mesh=mesh, in_specs=(P(), P("tensor")), out_specs=P("tensor"), check_vma=False
        )
        got = jax.jit(split)(params, tokens[:, 0])[:, None]
    else:
        with jax.set_mesh(mesh):
            got = jax.jit(run)(params, tokens[:, 0])[:, None]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
