"""The form of a model that decodes: the same results, by reductions where there is one row."""

import dataclasses
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import (
    Generator,
    GeneratorConfig,
    HybridConfig,
    ModelCache,
    ModelConfig,
    Sampling,
    Transformer,
    for_decoding,
    load_pretrained,
)
from models.decoding import DecodingNorm, Stream
from models.products import RowLinear, row_product
from models.transformer import RMSNorm
from s2_jax.nnx import S2Attention
from tests.test_pretrained import DATA

HYBRID = HybridConfig(dense_first=0, dense_every=2, block_size=16, local_blocks=2, vert_stride=3)
CONFIG = ModelConfig(
    vocab_size=31,
    num_layers=2,
    width=21,
    num_heads=6,
    num_kv_heads=3,
    head_dim=10,
    mlp_width=19,
    attention=HYBRID,
)
LONGEST = 97
CHUNKS = (37, 1, 1, 23, 1, 5, 1)


def make(config: ModelConfig = CONFIG) -> Transformer:
    return Transformer(config, rngs=nnx.Rngs(0))


def draw(*shape: int, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)


def tokens(batch: int, length: int = sum(CHUNKS)) -> jax.Array:
    return jax.random.randint(jax.random.key(1), (batch, length), 0, CONFIG.vocab_size)


def in_chunks(config, model, tokens, kind):
    """Logits of all tokens, which come to a cache in chunks; most of these are one token."""
    cache = ModelCache.create(config, batch=tokens.shape[0], max_length=LONGEST, kind=kind)
    extend = nnx.jit(Transformer.extend, static_argnames="first")
    logits = nnx.jit(Transformer.logits)
    found, start = [], 0
    for chunk in CHUNKS:
        x, cache = extend(model, tokens[:, start : start + chunk], cache, first=start == 0)
        found.append(logits(model, x))
        start += chunk
    return jnp.concatenate(found, axis=1)


def assert_same(actual, expected):
    atol = 2e-5 * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=atol)


def dots(call, *arguments) -> int:
    return str(jax.make_jaxpr(call)(*arguments)).count("dot_general[")


# One product.


@pytest.mark.parametrize("rows", [(1,), (1, 1), (3,), (2, 5), (0, 1)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_a_product_is_that_of_a_linear_layer(rows, dtype, stored):
    linear = nnx.Linear(
        13, 7, use_bias=False, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(stored),
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    x, kernel = draw(*rows, 13), linear.kernel[...].T
    found, expected = row_product(x, kernel, dtype), linear(x)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    epsilon = float(jnp.finfo(dtype).eps)
    # In float32 sums of 13 terms, in an order of the CPU's; rounded to bfloat16 they are the same.
    tolerance = epsilon * (8 if dtype == "float32" else 1)
    np.testing.assert_allclose(*map(np.float32, (found, expected)), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_row_is_summed_in_float32_and_rounded_once(dtype):
    x, kernel = draw(1, 1009, dtype=dtype), draw(3, 1009, dtype=dtype)
    exact = np.float64(x) @ np.float64(kernel).T
    with jax.default_matmul_precision("bfloat16"):  # of matrix products alone
        found = np.float64(row_product(x, kernel, dtype))
    rounding = float(jnp.finfo(dtype).eps) * np.abs(exact) / 2
    summing = 1e-6 * (np.abs(np.float64(x)) @ np.abs(np.float64(kernel)).T)
    assert (np.abs(found - exact) <= rounding + summing).all()


@pytest.mark.parametrize(("inputs", "parts"), [(8, 1), (20, 2), (25, 5), (11, 1), (99, 1)])
def test_long_sums_are_taken_in_parts(inputs, parts, monkeypatch):
    """Where a number of parts up to 8 divides them."""
    monkeypatch.setattr("models.products._LONGEST_SUM", 10)
    layer, x = RowLinear(draw(7, inputs), None), draw(1, 1, inputs)
    assert layer.sums(x).shape == (parts, 1, 1, 7)
    np.testing.assert_allclose(layer.sums(x).sum(axis=0), layer(x), rtol=1e-5, atol=1e-5)
    assert layer.sums(jnp.ones((2, 1, inputs))).shape == (1, 2, 1, 7)


@pytest.mark.parametrize(("rows", "width"), [(1, 5), (3, 64), (2, 100)])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_norm_adds_what_a_layer_left(rows, width, parts, dtype, kernels):
    norm = RMSNorm(width, epsilon=0.1)
    norm.scale[...] = draw(width)
    x = draw(rows, 1, width, dtype=dtype)
    added = draw(parts, rows, 1, width, dtype="float32" if parts > 1 else dtype)
    found = DecodingNorm(norm, kernels).joined(Stream(x, added))
    expected = DecodingNorm(norm, "reference").joined(Stream(x, added))
    np.testing.assert_array_equal(*map(np.float32, (expected[0], x + added.sum(0).astype(dtype))))
    np.testing.assert_array_equal(*map(np.float32, (expected[1], norm(expected[0]))))
    epsilon = float(jnp.finfo(dtype).eps)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
        np.testing.assert_allclose(
            *map(np.float32, (mine, theirs)), rtol=4 * epsilon, atol=4 * epsilon
        )


def test_one_row_is_a_reduction_and_more_are_a_matrix_product():
    model = for_decoding(make())
    one, two, many = (jnp.ones((*shape, CONFIG.width)) for shape in ((1, 1), (2, 1), (1, 3)))
    attention, mlp = model.blocks[0].attention, model.blocks[0].mlp
    attended = jnp.ones((1, 1, CONFIG.num_heads, CONFIG.head_features))
    for call in (attention.project, mlp, model.logits):
        assert dots(call, one) == 0
        assert dots(call, two) == dots(call, many) == (2 if call is mlp else 1)
    assert dots(attention._project_out, attended) == 0
    assert dots(attention._project_out, jnp.repeat(attended, 2, axis=0)) == 1
    assert dots(make(dataclasses.replace(CONFIG, tie_embeddings=True)).logits, one) == 0


def test_a_product_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"kernel must be \[outputs, 5\], got shape \(5, 1\)"):
        row_product(jnp.ones((1, 5)), jnp.ones((5, 1)), "float32")


# The whole model.


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", ["evicting", "contiguous"])
def test_decoding_is_that_of_the_model(kind, batch):
    model, ids = make(), tokens(batch)
    decoding = for_decoding(model)
    expected = nnx.jit(model)(ids)
    assert_same(nnx.jit(decoding)(ids), expected)
    assert_same(in_chunks(CONFIG, decoding, ids, kind), expected)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_by_kernels_is_that_of_the_model(batch, kernels, monkeypatch):
    """Every sum but the first in parts, so that what a layer adds comes in parts too."""
    monkeypatch.setattr("models.products._LONGEST_SUM", 10)
    config = dataclasses.replace(CONFIG, mlp_width=27)
    model, ids = make(config), tokens(batch, 33)
    decoding = for_decoding(make(dataclasses.replace(config, implementation=kernels)))
    cache = ModelCache.create(config, batch=batch, max_length=LONGEST)
    found = []
    with jax.default_matmul_precision("highest"):  # as one row has it anyway
        extend = nnx.jit(Transformer.extend, static_argnames="first")
        _, cache = extend(for_decoding(model), ids[:, :31], cache, first=True)
        for position in (31, 32):
            x, cache = extend(decoding, ids[:, position, None], cache)
            found.append(decoding.logits(x))
        expected = nnx.jit(model)(ids)[:, 31:]
    assert_same(jnp.concatenate(found, axis=1), expected)


@pytest.mark.parametrize(("param_dtype", "batch"), [("float32", 1), ("bfloat16", 2)])
def test_bfloat16_is_as_exact_as_in_the_model(param_dtype, batch):
    config = dataclasses.replace(CONFIG, dtype="bfloat16", param_dtype=param_dtype)
    model, ids = make(config), tokens(batch)
    graphdef = nnx.graphdef(make())
    exact = nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(jnp.float32), nnx.state(model)))
    oracle, read = (np.asarray(nnx.jit(each)(ids)) for each in (exact, model))
    decoding = for_decoding(model)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(decoding)) if x.ndim > 1} == {
        jnp.dtype(param_dtype)
    }
    allowed = 2 * np.abs(read - oracle).max() + 4 * 2**-7 * np.abs(oracle).max()
    for found in (nnx.jit(decoding)(ids), in_chunks(config, decoding, ids, "evicting")):
        assert np.abs(np.asarray(found) - oracle).max() <= allowed


def test_layers_in_a_loop_and_segments():
    attention = dataclasses.replace(HYBRID, dense_every=0)
    config = dataclasses.replace(
        CONFIG, num_layers=3, scan_layers=True, remat="attention", attention=attention
    )
    model, ids = make(config), tokens(2, 40)
    segments = jnp.broadcast_to(jnp.arange(40, dtype=jnp.int32) // 17, ids.shape)
    assert_same(nnx.jit(for_decoding(model))(ids, segments), nnx.jit(model)(ids, segments))


def test_an_attention_with_a_context():
    model, x = make(), draw(2, 40, CONFIG.width)
    found, expected = (
        each.blocks[0].attention(x[:, 17:], x, query_offset=17)
        for each in (for_decoding(model), model)
    )
    assert_same(found, expected)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mistral"])
def test_imported_checkpoints(name):
    config, model = load_pretrained(DATA / name, dtype="float32")
    ids = tokens(1) % config.vocab_size
    decoding = for_decoding(model)
    assert (decoding.head is None) == config.tie_embeddings
    assert_same(in_chunks(config, decoding, ids, "evicting"), nnx.jit(model)(ids))


def test_a_generator_writes_the_same():
    settings = GeneratorConfig(max_length=LONGEST, rows=1, steps=5, chunk=29)
    prompts = [tokens(1, length)[0].tolist() for length in (41, 3, 60)]
    model = make()
    found, expected = (
        Generator(CONFIG, each, settings).generate(
            prompts, max_tokens=17, sampling=Sampling(temperature=0.9)
        )
        for each in (for_decoding(model), model)
    )
    assert found == expected


@pytest.mark.parametrize("kind", ["evicting", "contiguous"])
def test_no_tokens_at_all(kind):
    decoding = for_decoding(make())
    cache = ModelCache.create(CONFIG, batch=2, max_length=LONGEST, kind=kind)
    x, same = decoding.extend(tokens(2)[:, :0], cache)
    assert x.shape == (2, 0, CONFIG.width)
    jax.tree.map(np.testing.assert_array_equal, same, cache)


# Making it.


def test_it_is_made_of_shapes_alone():
    shapes = nnx.state(nnx.eval_shape(lambda: for_decoding(make())))
    state = nnx.state(for_decoding(make()))
    assert jax.tree.structure(shapes) == jax.tree.structure(state)
    for mine, theirs in zip(jax.tree.leaves(shapes), jax.tree.leaves(state), strict=True):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
    assert isinstance(mine, jax.ShapeDtypeStruct)


def test_it_is_made_under_jit():
    graphdef, params = nnx.split(make())

    def convert(params):
        return nnx.state(for_decoding(nnx.merge(graphdef, params)))

    jax.tree.map(np.testing.assert_array_equal, jax.jit(convert)(params), convert(params))


def test_the_model_is_freed_and_not_changed():
    model = make()
    before = nnx.state(model)
    kernels = [weakref.ref(x) for x in jax.tree.leaves(nnx.state(model.blocks)) if x.ndim > 1]
    kernels.append(weakref.ref(model.head.kernel[...]))
    decoding = for_decoding(model)
    assert type(model.blocks[0].attention) is S2Attention
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)
    del model, before
    gc.collect()
    assert [kernel() for kernel in kernels] == [None] * len(kernels)
    assert decoding.embed.shape == (CONFIG.vocab_size, CONFIG.width)


def test_what_is_refused():
    with pytest.raises(TypeError, match="model must be a Transformer, got Linear"):
        for_decoding(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(TypeError, match="head must be Linear, got RowLinear"):
        for_decoding(for_decoding(make()))
    tied = make(dataclasses.replace(CONFIG, tie_embeddings=True))
    with pytest.raises(TypeError, match=r"blocks\[0\].attention must be S2Attention, got Decoding"):
        for_decoding(for_decoding(tied))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_bias": True}, r"blocks\[1\].attention has biases"),
        ({"head_axis": "heads"}, r"blocks\[1\].attention splits its heads over head_axis='heads'"),
    ],
)
def test_layers_that_are_refused(options, message):
    model = make()
    model.blocks[1].attention = S2Attention(
        CONFIG.width, 6, CONFIG.patterns()[1], head_dim=10, rngs=nnx.Rngs(0), **options
    )
    with pytest.raises(ValueError, match=message):
        for_decoding(model)


def test_a_head_with_biases_is_refused():
    model = make()
    model.head = nnx.Linear(CONFIG.width, CONFIG.vocab_size, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="head has biases"):
        for_decoding(model)
    model.head = None
    assert not isinstance(for_decoding(model).head, RowLinear)


def test_layers_without_a_dtype_compute_in_that_of_their_arrays():
    config = dataclasses.replace(CONFIG, dtype="bfloat16", param_dtype="bfloat16")
    model = make(config)
    for block, pattern in zip(model.blocks, config.patterns(), strict=True):
        block.attention = S2Attention(
            21, 6, pattern, num_kv_heads=3, head_dim=10, rope_base=1e4, param_dtype=jnp.bfloat16,
            rngs=nnx.Rngs(1),
        )  # fmt: skip
    model.head = nnx.Linear(21, 31, use_bias=False, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(2))
    ids = tokens(1, length=41)
    got, want = nnx.jit(for_decoding(model))(ids), nnx.jit(model)(ids)
    assert got.dtype == want.dtype
    np.testing.assert_allclose(got, want, rtol=0.1, atol=0.1)
    cache = ModelCache.create(config, batch=1, max_length=LONGEST)  # of bfloat16
    for_decoding(model).extend(ids[:, :1], cache, first=True)


def test_a_product_without_a_dtype_is_promoted():
    layer = RowLinear(draw(5, 7, dtype="bfloat16"), None)
    assert layer(draw(3, 7, dtype="bfloat16")).dtype == jnp.bfloat16
    with jax.numpy_dtype_promotion("standard"):
        assert layer(draw(3, 7)).dtype == jnp.float32
