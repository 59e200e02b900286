"""Checks that share no code with this library: JAX's own attention, and finite differences."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import s2_jax
from tests.calls import AttentionCall

S2_16 = s2_jax.local_stride(2, 3, block_size=16)
PATTERNS = {
    "s2": S2_16,
    "bidirectional": s2_jax.local_stride(1, 4, block_size=16, causal=False),
    "sink": s2_jax.local(2, block_size=16) | s2_jax.sink(1, block_size=16),
    "dilated": s2_jax.dilated_stride(2, block_size=16),
    "dense": s2_jax.dense(block_size=16),
}
HIDING = {
    "plain": {},
    "gqa-packed": {"heads": 4, "kv_heads": 2, "segments": "packed", "batch": 2},
    "window-lengths": {"window": 40, "kv_lengths": (71,), "query_lengths": (83,)},
    "offset": {"q_len": 45, "query_offset": 52, "heads": 3, "kv_heads": 1},
}


@jax.jit
def by_jax(query, key, value, d_out, mask):
    """Output and gradients: one program for all masks of a shape."""

    def attend(*arrays):
        return jax.nn.dot_product_attention(*arrays, mask=mask, implementation="xla")

    with jax.default_matmul_precision("highest"):  # TF32 on a GPU otherwise
        out, pull_back = jax.vjp(attend, query, key, value)
        return out, *pull_back(d_out)


@pytest.mark.parametrize(
    ("pattern", "hiding"), list(itertools.product(PATTERNS, HIDING)), ids=lambda name: name
)
def test_jax_agrees_given_the_expanded_mask(pattern, hiding, implementation):
    """20 configurations of `jax.nn.dot_product_attention`, forward and gradients."""
    call = AttentionCall(PATTERNS[pattern], **HIDING[hiding])
    mask = jnp.asarray(call.token_mask())
    seen = np.asarray(mask).any(axis=-1)  # rows that see nothing are an average of all in JAX
    inputs = {name: jnp.asarray(array) for name, array in call.inputs().items()}
    d_out = jnp.where(np.swapaxes(seen, 1, 2)[..., None], inputs["d_out"], 0.0)
    arrays = (inputs[name] for name in ("query", "key", "value"))
    out, *gradients = by_jax(*arrays, d_out, mask)
    ours = call.run(implementation, d_out=d_out, d_lse=np.zeros_like(inputs["d_lse"]))
    np.testing.assert_allclose(
        ours["out"], np.where(np.swapaxes(seen, 1, 2)[..., None], out, 0), rtol=2e-5, atol=2e-6
    )
    for name, truth in zip(("dq", "dk", "dv"), gradients, strict=True):
        np.testing.assert_allclose(ours[name], truth, rtol=2e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("causal", [True, False])
def test_the_reference_by_finite_differences(causal):
    """In float64, through the output and through the LSE, second derivatives included."""
    pattern = s2_jax.local_stride(1, 2, block_size=16, causal=causal)
    call = AttentionCall(pattern, q_len=19, kv_len=37, heads=2, query_offset=18, head_dim=3)
    with jax.enable_x64(True):
        arrays = [jnp.asarray(call.inputs()[n], jnp.float64) for n in ("query", "key", "value")]
        ids = jnp.arange(19, dtype=jnp.int32)[None] // 7, jnp.arange(37, dtype=jnp.int32)[None] // 7

        def attend(query, key, value):
            out, lse = s2_jax.s2_attention(
                query, key, value, pattern, query_offset=18, segment_ids=ids[0] - 2,
                kv_segment_ids=ids[1] - 4, logits_soft_cap=3.0, return_lse=True,
                implementation="reference",
            )  # fmt: skip
            return out, jnp.where(jnp.isneginf(lse), 0.0, lse)

        check_grads(attend, arrays, order=2, modes=("rev",), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("hiding", HIDING)
def test_directional_derivatives_of_the_kernels(hiding, kernels):
    """(f(x + h d) - f(x - h d)) / 2h of the float64 reference, along random directions."""
    call = AttentionCall(S2_16, soft_cap=4.0, **HIDING[hiding])
    got = call.run(kernels)
    inputs = {name: array.astype(np.float64) for name, array in call.inputs().items()}
    rng = np.random.default_rng(5)
    with jax.enable_x64(True):
        arrays = {n: jnp.asarray(inputs[n]) for n in ("query", "key", "value")}

        @jax.jit
        def value_of(query, key, value):
            offset, masks = call.query_offset, call.masks()
            out, lse = call.attend("reference", query, key, value, offset, masks)
            lse = jnp.where(jnp.isneginf(lse), 0.0, lse)
            return (out * inputs["d_out"]).sum() + (lse * inputs["d_lse"]).sum()

        for name, gradient in (("query", "dq"), ("key", "dk"), ("value", "dv")):
            direction = rng.normal(size=arrays[name].shape)
            step = 1e-5 * direction
            up = value_of(**arrays | {name: arrays[name] + step})
            down = value_of(**arrays | {name: arrays[name] - step})
            expected = float(up - down) / 2e-5
            found = float((got[gradient].astype(np.float64) * direction).sum())
            scale = np.linalg.norm(got[gradient]) * np.linalg.norm(direction)
            assert abs(found - expected) <= 1e-6 * scale, name
