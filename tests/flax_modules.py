"""What the tests of Flax's own modules and of S2Attention share."""

import jax
import jax.numpy as jnp
import numpy as np

import s2_jax

BATCH, LENGTH = 2, 53
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


def assert_trains(gradients):
    for gradient in jax.tree.leaves(gradients):
        assert jnp.isfinite(gradient).all()
        assert jnp.any(gradient != 0)
