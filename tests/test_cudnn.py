"""Dense layers by cuDNN: what is handed over, what comes back, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo

import s2_jax
from models import HybridConfig, ModelConfig, Transformer
from pallas_kernels import lowering
from s2_jax import ContiguousCache, cached_attention, joining

DENSE = s2_jax.dense(block_size=16)


def inputs(length: int = 37, dtype: str = "bfloat16"):
    shapes = [(2, length, heads, 64) for heads in (4, 2, 2)]
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes)]


def call(pattern=DENSE, dtype: str = "bfloat16", **options):
    return s2_jax.s2_attention(*inputs(dtype=dtype), pattern, implementation="cudnn", **options)


@pytest.fixture(params=[pytest.param("cudnn", marks=pytest.mark.gpu), "stand-in"])
def cudnn(request, monkeypatch):
    """cuDNN itself on a GPU; elsewhere, XLA's own attention behind the same function."""
    if request.param == "stand-in":
        dot_product_attention = jax.nn.dot_product_attention

        def stand_in(*args, implementation, **kwargs):
            assert implementation == "cudnn"
            return dot_product_attention(*args, implementation="xla", **kwargs)

        monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
        monkeypatch.setattr(lowering, "target_platform", lambda: "gpu")
        monkeypatch.setattr(lowering, "compute_capability", lambda: 90)
    # jax.nn relies on these, in gradients too.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [None, (37, 20)])
def test_it_computes_what_the_reference_does(cudnn, causal, lengths):
    pattern = s2_jax.dense(block_size=16, causal=causal)
    options = {"scale": 0.2}
    if lengths is not None:
        array = jnp.asarray(lengths, jnp.int32)
        options |= {"query_seq_lengths": array, "key_value_seq_lengths": array}

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation, *arrays):
        def loss(*arrays):
            out = s2_jax.s2_attention(*arrays, pattern, implementation=implementation, **options)
            return out.astype(jnp.float32).sum(), out

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*arrays)

    for mine, theirs in zip(
        *map(jax.tree.leaves, (run("cudnn", *inputs()), run("reference", *inputs())))
    ):
        np.testing.assert_allclose(
            np.asarray(mine, np.float32), np.asarray(theirs, np.float32), atol=0.05, rtol=0.05
        )


def test_a_prompt_is_taken_in_by_it_and_decoding_goes_on(cudnn):
    query, key, value = inputs()
    whole = s2_jax.s2_attention(query, key, value, DENSE, implementation="reference")
    cache = ContiguousCache.create(
        DENSE, batch=2, max_length=64, num_heads=4, num_kv_heads=2, head_dim=64
    )
    found = []
    for start, stop in ((0, 30), (30, 31), (31, 37)):
        new = (array[:, start:stop] for array in (query, key, value))
        out, cache = cached_attention(*new, cache, first=start == 0, implementation="cudnn")
        found.append(out)
    got = np.asarray(jnp.concatenate(found, axis=1), np.float32)
    np.testing.assert_allclose(got, np.asarray(whole, np.float32), atol=0.03, rtol=0.03)


def test_sequences_of_different_lengths_are_decoded(cudnn):
    query, key, value = inputs()
    steps = [jnp.asarray(x, jnp.int32) for x in ([30, 11], [1, 0], [1, 1], [0, 1])]
    found = {}
    for implementation in ("cudnn", "reference"):
        cache = ContiguousCache.create(
            DENSE, batch=2, max_length=32, num_heads=4, num_kv_heads=2, head_dim=64
        )
        outs, start = [], 0
        for i, lengths in enumerate(steps):
            stop = start + (30 if i == 0 else 1)
            new = (array[:, start:stop] for array in (query, key, value))
            out, cache = cached_attention(
                *new, cache, lengths=lengths, first=i == 0, implementation=implementation
            )
            outs.append(np.asarray(out, np.float32))
            start = stop
        found[implementation] = outs
    for mine, theirs in zip(found["cudnn"], found["reference"], strict=True):
        np.testing.assert_allclose(mine, theirs, atol=0.03, rtol=0.03)
    assert not found["cudnn"][1][1].any()  # no new token


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": s2_jax.local(2, block_size=16)}, "a pattern other than s2_jax.dense"),
        ({"segment_ids": np.zeros((2, 37), np.int32)}, "segment ids"),
        ({"logits_soft_cap": 3.0}, "logits_soft_cap"),
        ({"return_lse": True}, "return_lse"),
        ({"query_offset": 1}, "query_offset"),
        ({"dtype": "float32"}, "dtype float32"),
    ],
)
def test_what_it_cannot_do_is_refused(options, message):
    with pytest.raises(ValueError, match=f'implementation="cudnn" does not take {message}'):
        call(**options)


def test_it_needs_a_gpu():
    with jax.default_device(jax.devices("cpu")[0]), pytest.raises(ValueError, match="needs an NV"):
        call()


@pytest.mark.parametrize(("remat", "times"), [("none", 1), ("attention", 1), ("full", 2)])
def test_what_is_recomputed_leaves_it_out(remat, times, monkeypatch):
    """Lowered for a GPU, whatever there is."""
    monkeypatch.setattr(lowering, "target_platform", lambda: "gpu")
    monkeypatch.setattr(lowering, "compute_capability", lambda: 90)
    answers = {
        "check_cudnn_version": lambda: 91200,
        "check_compute_capability": lambda capability: True,
        "is_cuda_compute_capability_equal": lambda capability: False,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(fused_attention_stablehlo, name, answer)
    config = ModelConfig(
        num_layers=2, width=128, num_heads=2, num_kv_heads=2, dtype="bfloat16", remat=remat,
        dense_implementation="cudnn", attention=HybridConfig(kind="dense"),
    )  # fmt: skip
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(model, nnx.Param)

    def loss(params, tokens):
        return nnx.merge(graphdef, params)(tokens).sum()

    tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    traced = jax.jit(jax.grad(loss)).trace(params, tokens)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    found = [text.count(f"custom_call @__cudnn$fmhaSoftmax{end}(") for end in ("", "Backward")]
    assert found == [times * config.num_layers, config.num_layers]


def test_a_step_in_float32_is_left_to_the_kernels(cudnn):
    query, key, value = (x[:, :1] for x in inputs(dtype="float32"))
    cache = ContiguousCache.create(
        DENSE, batch=2, max_length=64, num_heads=4, num_kv_heads=2, head_dim=64, dtype="float32"
    )
    out, _ = cached_attention(query, key, value, cache, implementation="cudnn")
    np.testing.assert_allclose(out, jnp.repeat(value, 2, axis=2), rtol=1e-5)


@pytest.fixture
def lower_for_cuda(monkeypatch):
    """With JAX's own rules for cuDNN, on a machine without it."""
    monkeypatch.setattr(lowering, "target_platform", lambda: "gpu")
    monkeypatch.setattr(lowering, "compute_capability", lambda: 90)
    for name, answer in {
        "check_cudnn_version": 91200,
        "check_compute_capability": True,
        "is_cuda_compute_capability_equal": False,
    }.items():
        monkeypatch.setattr(fused_attention_stablehlo, name, lambda *_, answer=answer: answer)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield (
            lambda function, *arrays: (
                jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",))
            )
        )


@pytest.mark.parametrize("length", [36, 37])
@pytest.mark.parametrize("lengths", [None, (20, 7)])
def test_vmap_maps_what_jax_wants_mapped(lower_for_cuda, length, lengths):
    if lengths is not None:
        lengths = jnp.asarray(lengths, jnp.int32)

    def attend(*arrays):
        out = s2_jax.s2_attention(
            *arrays, DENSE, implementation="cudnn", query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
        )  # fmt: skip
        return jnp.square(out).sum()

    arrays = [jnp.stack([x] * 3) for x in inputs(length)]
    lower_for_cuda(jax.vmap(jax.grad(attend)), *arrays)


@pytest.mark.parametrize("cache_axis", [0, None])
def test_a_step_under_vmap(lower_for_cuda, cache_axis, monkeypatch):
    # JAX 0.12 lowers our kernel for an abstract GPU alone, and cuDNN's not for one.
    monkeypatch.setattr(joining, "_by_kernel", lambda *_: False)
    cache = ContiguousCache.create(
        DENSE, batch=2, max_length=64, num_heads=4, num_kv_heads=2, head_dim=64
    )
    if cache_axis == 0:
        cache = jax.tree.map(lambda x: jnp.stack([x] * 3), cache)
    arrays = [jnp.stack([x[:, :1]] * 3) for x in inputs()]

    def step(*arguments):
        return cached_attention(*arguments, implementation="cudnn")

    lower_for_cuda(jax.vmap(step, in_axes=(0, 0, 0, cache_axis)), *arrays, cache)


def test_sequences_without_keys_give_zeros(cudnn):
    lengths = jnp.asarray([37, 0], jnp.int32)

    def out(*arrays):
        return s2_jax.s2_attention(
            *arrays, DENSE, implementation="cudnn", key_value_seq_lengths=lengths
        )

    assert not np.asarray(out(*inputs())[1]).any()
    gradients = jax.grad(lambda *arrays: out(*arrays).astype(jnp.float32).sum(), (0, 1, 2))
    for gradient in gradients(*inputs()):
        assert not np.asarray(gradient[1]).any()
