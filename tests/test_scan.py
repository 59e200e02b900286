"""Layers as one loop: which repeat, the same results, and a program that does not grow."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import HybridConfig, ModelConfig, Transformer
from models.scan import segments

HYBRID = HybridConfig(dense_first=1, block_size=16, local_blocks=1, vert_stride=2)
CONFIG = ModelConfig(
    vocab_size=11, num_layers=5, width=12, num_heads=2, num_kv_heads=1, mlp_width=7,
    attention=HYBRID,
)  # fmt: skip


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("", []),
        ("a", [(0, 1, 1)]),
        ("ab", [(0, 1, 1), (1, 1, 1)]),
        ("aaaa", [(0, 1, 4)]),
        ("aabbbb", [(0, 1, 2), (2, 1, 4)]),
        ("babababa", [(0, 2, 4)]),
        ("abbabbab", [(0, 3, 2), (6, 1, 1), (7, 1, 1)]),
    ],
)
def test_which_layers_repeat(kinds, expected):
    assert list(segments(kinds)) == expected


def program(config: ModelConfig):
    """Loss and gradients as a function of the parameters and tokens, and the parameters."""

    @jax.jit
    def run(params, tokens):
        def loss(params):
            return jnp.mean(nnx.merge(graphdef, params)(tokens) ** 2)

        return jax.value_and_grad(loss)(params)

    graphdef, params = nnx.split(Transformer(config, rngs=nnx.Rngs(0)), nnx.Param)
    return run, params


@pytest.mark.parametrize(("remat", "every"), [("none", 0), ("attention", 2)])
def test_a_loop_over_layers_computes_the_same(remat, every):
    attention = dataclasses.replace(HYBRID, dense_every=every)
    config = dataclasses.replace(CONFIG, remat=remat, attention=attention)
    tokens = jax.random.randint(jax.random.key(0), (2, 19), 0, config.vocab_size)
    results = []
    for scan in (False, True):
        run, params = program(dataclasses.replace(config, scan_layers=scan))
        results.append(jax.tree.leaves(run(params, tokens)))
    for mine, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)


def test_more_layers_make_no_longer_program():
    tokens = jnp.zeros((1, 20), jnp.int32)
    products = []
    for layers in (5, 9):
        config = dataclasses.replace(CONFIG, num_layers=layers, scan_layers=True)
        run, params = program(config)
        products.append(run.lower(params, tokens).as_text().count("stablehlo.dot_general"))
    assert products[0] == products[1]
