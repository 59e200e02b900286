"""Drawn hybrid models decode what one forward pass over the whole sequence computes.

pytest tests/test_drawn_models.py --hypothesis-profile=deep    # 80 models, up to 4096 tokens
pytest -m gpu tests/test_drawn_models.py --hypothesis-profile=gpu   # 10 models
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from models import HybridConfig, ModelCache, ModelConfig, Transformer

VOCABULARY = 17


@st.composite
def models(draw) -> ModelConfig:
    """At least one layer that is not dense."""
    window = draw(st.sampled_from([None, None, 37, 100]))
    kind = "window" if window and draw(st.booleans()) else "s2"
    attention = HybridConfig(
        kind=kind,
        dense_first=draw(st.integers(0, 1)),
        dense_every=draw(st.sampled_from([0, 2])),
        block_size=draw(st.sampled_from([16, 32, 64])),
        local_blocks=draw(st.integers(1, 3)),
        vert_stride=draw(st.integers(1, 5)),
        heads=draw(st.sampled_from(["kv", "query"])),
        head_offset=draw(st.integers(0, 3)),
        head_step=draw(st.sampled_from([None, 1, 2])),
        window=window,
    )
    kv_heads = draw(st.integers(1, 3))
    return ModelConfig(
        vocab_size=VOCABULARY,
        num_layers=3 if attention.dense_first else 2,
        width=24,
        num_heads=kv_heads * draw(st.integers(1, 3)),
        num_kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([8, 16, 20])),
        mlp_width=20,
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        attention=attention,
    )


@st.composite
def sequences(draw, longest: int) -> tuple[int, int, int]:
    """Tokens of a prompt's first and second chunk, and those that are decoded one by one."""
    first = draw(st.integers(1, longest // 2))
    second = draw(st.integers(17, max(18, longest // 3)))
    return first, second, draw(st.integers(1, longest - first - second))


def decoded(config: ModelConfig, model: Transformer, tokens, chunks, kind: str):
    """Logits of all tokens, taken in two chunks and then one by one."""

    @nnx.jit
    def run(model, tokens):
        first, second, _ = chunks
        cache = ModelCache.create(config, batch=1, max_length=tokens.shape[1] + 3, kind=kind)
        a, cache = model.extend(tokens[:, :first], cache, first=True)
        b, cache = model.extend(tokens[:, first : first + second], cache)

        def step(cache, token):
            x, cache = model.extend(token[None, None], cache)
            return cache, x[:, 0]

        _, c = jax.lax.scan(step, cache, tokens[0, first + second :])
        return model.logits(jnp.concatenate([a, b, jnp.swapaxes(c, 0, 1)], axis=1))

    return np.asarray(run(model, tokens))


@pytest.fixture(autouse=True)
def float32_products_in_full():
    """GPUs round the factors of float32 products to 11 bits, unless they are told not to."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["evicting", "contiguous"])
def test_a_long_sequence(dtype, kind):
    """32 768 tokens: two odd chunks, and more than two strides of blocks one by one."""
    attention = HybridConfig(dense_every=3, block_size=64, local_blocks=3, vert_stride=16)
    config = ModelConfig(
        vocab_size=VOCABULARY, num_layers=3, width=32, num_heads=4, num_kv_heads=2, head_dim=16,
        mlp_width=20, dtype=dtype, attention=attention,
    )  # fmt: skip
    check(config, (20011, 10007, 32768 - 20011 - 10007), kind)


@pytest.mark.parametrize("place", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_drawn_models_decode_what_they_read(place, request):
    deep = settings.get_current_profile_name() == "deep"
    longest = 4096 if deep else 2048 if place == "gpu" else 150

    @given(models(), sequences(longest), st.sampled_from(["evicting", "contiguous"]))
    def drawn(config, chunks, kind):
        check(config, chunks, kind)

    drawn()


def check(config: ModelConfig, chunks: tuple[int, int, int], kind: str) -> None:
    """Logits of decoding against those of one float32 pass of the reference."""
    model = Transformer(config, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(1), (1, sum(chunks)), 0, VOCABULARY)
    found = decoded(config, model, tokens, chunks, kind)
    exact = Transformer(
        dataclasses.replace(config, dtype="float32", implementation="reference"),
        rngs=nnx.Rngs(0),
    )
    oracle = np.asarray(nnx.jit(exact)(tokens))
    read = np.asarray(nnx.jit(model)(tokens))
    epsilon = float(jnp.finfo(config.dtype).eps)
    allowed = 2 * np.abs(read - oracle).max() + 4 * epsilon * np.abs(oracle).max()
    if config.dtype == "float32":  # two orders of summation, through all layers
        allowed = 100 * epsilon * np.abs(oracle).max()
    assert np.abs(found - oracle).max() <= allowed
