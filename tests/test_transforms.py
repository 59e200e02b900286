"""Under JAX's transformations: vmap, checkpoint, scan, donation, ahead of time, export."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, use_abstract_mesh

import s2_jax
from tests.calls import SMALL_TILES, AttentionCall
from tests.test_lowering import H100

PATTERN = s2_jax.local_stride(1, 3, block_size=16)
CALL = AttentionCall(PATTERN, q_len=67, kv_len=67, heads=4, kv_heads=2, batch=6, segments="packed")


def arrays():
    inputs = CALL.inputs()
    return [jnp.asarray(inputs[name]) for name in ("query", "key", "value")]


def attend(query, key, value, ids=None, implementation="interpret", **kwargs):
    tiles = None if implementation in (None, "reference") else SMALL_TILES
    return s2_jax.s2_attention(
        query, key, value, PATTERN, segment_ids=ids, implementation=implementation, tiles=tiles,
        **kwargs,
    )  # fmt: skip


def gradients(*args, **kwargs):
    *qkv, ids = args

    def loss(*qkv):
        return jnp.square(attend(*qkv, ids, **kwargs)).sum()

    return jax.grad(loss, (0, 1, 2))(*qkv)


@functools.cache
def unmapped(implementation):
    run = functools.partial(gradients, implementation=implementation)
    return jax.jit(run)(*arrays(), jnp.asarray(CALL.ids()[0]))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_vmap_over_any_axis(axis, implementation):
    ids = jnp.asarray(CALL.ids()[0])
    moved = [jnp.moveaxis(a[:, None], 0, axis) for a in arrays()]
    run = functools.partial(gradients, implementation=implementation)
    found = jax.jit(jax.vmap(run, in_axes=(axis, axis, axis, 0)))(*moved, ids[:, None])
    for ours, truth in zip(found, unmapped(implementation), strict=True):
        np.testing.assert_allclose(ours[:, 0], truth, rtol=1e-5, atol=1e-5)


def test_vmap_of_vmap_and_of_what_is_not_mapped(implementation):
    """Two mapped axes, without a batch axis of their own; one key and value for all queries."""
    query, key, value = arrays()
    ids = jnp.asarray(CALL.ids()[0])
    run = functools.partial(attend, implementation=implementation)
    folded = query.reshape(2, 3, *query.shape[1:])
    row_ids = ids.reshape(2, 3, -1)
    twice = jax.vmap(jax.vmap(run, in_axes=(0, None, None, 0)), in_axes=(0, None, None, 0))
    found = jax.jit(twice)(folded, key[0], value[0], row_ids)
    truth = jnp.stack([run(query[i], key[0], value[0], ids[i]) for i in range(6)])
    np.testing.assert_allclose(found.reshape(truth.shape), truth, rtol=1e-5, atol=1e-5)


def test_vmap_over_nothing(implementation):
    arguments = [jnp.ones((0, *a.shape)) for a in arrays()]
    ids = jnp.zeros((0, *CALL.ids()[0].shape), jnp.int32)
    found = jax.vmap(functools.partial(gradients, implementation=implementation))(*arguments, ids)
    assert [a.shape for a in found] == [a.shape for a in arguments]


def kernels_in(function, *shapes):
    """How often each kernel is launched by the program for a GPU."""
    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=H100)):
        text = jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    return {name: text.count(f's2_attention_{name}"') for name in ("forward", "dq", "dkv")}


@pytest.mark.parametrize("implementation", [None, "triton"])
def test_a_policy_that_keeps_output_and_lse_runs_the_forward_kernel_once(implementation):
    shape = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
    keep = jax.checkpoint_policies.save_only_these_names("s2_attention_out", "s2_attention_lse")

    def loss(x):
        y = s2_jax.s2_attention(x, x, x, s2_jax.local(2), implementation=implementation)
        return y.astype(jnp.float32).sum()

    kept = kernels_in(jax.value_and_grad(jax.checkpoint(loss, policy=keep)), shape)
    assert kept == {"forward": 1, "dq": 1, "dkv": 1}
    again = kernels_in(jax.value_and_grad(jax.checkpoint(loss)), shape)
    assert again == {"forward": 2, "dq": 1, "dkv": 1}


def test_grad_of_a_scan_over_layers(implementation):
    x = arrays()[1]
    scales = jnp.asarray([0.5, 1.0, 2.0])

    def layer(x, scale):
        return x + attend(x * scale, x, x, implementation=implementation), None

    def scanned(x):
        return jnp.square(jax.lax.scan(layer, x, scales)[0]).mean()

    def unrolled(x):
        for scale in scales:
            x, _ = layer(x, scale)
        return jnp.square(x).mean()

    ours, truth = (jax.jit(jax.grad(f))(x) for f in (scanned, unrolled))
    np.testing.assert_allclose(ours, truth, rtol=1e-4, atol=1e-6)


def test_donated_arguments(implementation):
    query, key, value = arrays()
    truth = attend(query, key, value, implementation=implementation)
    donating = jax.jit(functools.partial(attend, implementation=implementation), donate_argnums=0)
    found = donating(query, key, value)
    assert query.is_deleted()
    np.testing.assert_allclose(found, truth, rtol=1e-5, atol=1e-5)


def test_ahead_of_time(implementation):
    query, key, value = arrays()
    run = jax.jit(functools.partial(attend, implementation=implementation))
    compiled = run.lower(query, key, value).compile()
    np.testing.assert_allclose(
        compiled(query, key, value), run(query, key, value), rtol=1e-6, atol=1e-6
    )


def test_export(implementation):
    """An exported program runs where it was made for; the kernels need one check switched off."""
    query, key, value = arrays()
    run = jax.jit(functools.partial(attend, implementation=implementation))
    targets = ("__gpu$xla.gpu.triton", "triton_kernel_call_ffi")
    unchecked = [jax.export.DisabledSafetyCheck.custom_call(target) for target in targets]
    exported = jax.export.export(run, disabled_checks=unchecked)(query, key, value)
    np.testing.assert_allclose(
        exported.call(query, key, value), run(query, key, value), rtol=1e-6, atol=1e-6
    )


def test_forward_mode_and_second_derivatives_say_what_is_missing(kernels):
    query, key, value = (a[:1] for a in arrays())
    run = functools.partial(attend, implementation=kernels)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda q: run(q, key, value), (query,), (query,))
    with pytest.raises(NotImplementedError, match="second derivatives"):
        jax.grad(lambda q: jax.grad(lambda q: run(q, key, value).sum())(q).sum())(query)


def test_the_reference_has_both():
    """Checked by finite differences in test_reference.py."""
    query, key, value = (a[:1] for a in arrays())
    run = functools.partial(attend, key=key, value=value, implementation="reference")
    out, change = jax.jvp(run, (query,), (query,))
    assert out.shape == change.shape
    hessian = jax.grad(lambda q: jnp.square(jax.grad(lambda q: run(q).sum())(q)).sum())(query)
    assert np.isfinite(np.asarray(hessian)).all()
