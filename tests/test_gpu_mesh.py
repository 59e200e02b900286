"""Batch and heads over two GPUs: the bits of one GPU, and no collective; `-m multi_gpu`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import s2_jax
from tests.meshes import BOTH_KINDS, COLLECTIVE, PATTERN, attend, inputs, place

pytestmark = pytest.mark.multi_gpu

WIDE = s2_jax.local_stride(1, 8, block_size=64)  # as Mosaic's kernels take it
RESULTS = ("out", "lse", "dq", "dk", "dv")
SPLITS = {"batch": P("x"), "heads": P(None, None, "x")}
LSE_SPLITS = {"batch": P("x"), "heads": P(None, "x")}
draw = functools.partial(inputs, batch=4, q_len=520, kv_len=520, head_dim=64, dtype="bfloat16")


@pytest.fixture(params=["triton", "mosaic", "jax_triton"])
def implementation(request):
    return request.param


@pytest.fixture(params=SPLITS)
def split(request):
    return request.param


def run(query, key, value, ids, *, implementation, head_axis=None):
    """Output, LSE and gradients; what comes back to both results follows from them."""

    def forward(*arrays):
        return attend(
            *arrays, ids, implementation=implementation, head_axis=head_axis, return_lse=True,
            pattern=WIDE if implementation == "mosaic" else PATTERN,
        )  # fmt: skip

    (out, lse), pull_back = jax.vjp(forward, query, key, value)
    return out, lse, *pull_back((jnp.cos(out), jnp.sin(lse)))


@functools.cache
def on_one_gpu(implementation, kv_heads):
    arrays = draw(kv_heads=kv_heads)
    return jax.device_get(jax.jit(functools.partial(run, implementation=implementation))(*arrays))


def assert_same_bits(ours, theirs):
    arrays = zip(RESULTS, map(np.asarray, ours), map(np.asarray, theirs), strict=True)
    assert not [name for name, a, b in arrays if a.tobytes() != b.tobytes()]


def make_mesh(kind):
    devices = jax.devices()
    assert len(devices) > 1, f"these tests need two GPUs, found {devices}"
    return jax.make_mesh((2,), ("x",), axis_types=(kind,), devices=devices[:2])


@BOTH_KINDS
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_jit_over_a_mesh(kind, kv_heads, split, implementation):
    mesh = make_mesh(kind)
    arrays = place(draw(kv_heads=kv_heads), mesh, SPLITS[split])
    with jax.set_mesh(mesh):
        program = jax.jit(functools.partial(run, implementation=implementation))
        compiled = program.lower(*arrays).compile()
        found = compiled(*arrays)
    assert_same_bits(found, on_one_gpu(implementation, kv_heads))
    for gradient, array in zip(found[2:], arrays):
        assert gradient.sharding.is_equivalent_to(array.sharding, array.ndim)
    assert not COLLECTIVE.findall(compiled.as_text())


def by_hand(split, implementation, head_axis, *, check_vma):
    """The same under `shard_map`."""
    spec, lse_spec = SPLITS[split], LSE_SPLITS[split]
    return jax.shard_map(
        functools.partial(run, implementation=implementation, head_axis=head_axis),
        mesh=make_mesh(AxisType.Auto), check_vma=check_vma,
        in_specs=(spec, spec, spec, P(spec[0])), out_specs=(spec, lse_spec, spec, spec, spec),
    )  # fmt: skip


@pytest.mark.parametrize("check_vma", [True, False], ids=["check-vma", "no-check-vma"])
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_shard_map(check_vma, kv_heads, split, implementation):
    head_axis = "x" if split == "heads" else None
    arrays = place(draw(kv_heads=kv_heads), make_mesh(AxisType.Auto), SPLITS[split])
    compiled = (
        jax.jit(by_hand(split, implementation, head_axis, check_vma=check_vma))
        .lower(*arrays)
        .compile()
    )
    assert_same_bits(compiled(*arrays), on_one_gpu(implementation, kv_heads))
    assert not COLLECTIVE.findall(compiled.as_text())


@pytest.mark.parametrize("way", ["jit", "shard_map"])
def test_the_pattern_follows_the_global_head(way, implementation):
    """The same numbers in every head: only its pattern, one of eight, tells it from the others."""
    *arrays, ids = draw()
    arrays = [*(jnp.broadcast_to(a[:, :, :1], a.shape) for a in arrays), jnp.zeros_like(ids)]
    plain = functools.partial(run, implementation=implementation)
    whole = jax.jit(plain)(*arrays)
    split = plain if way == "jit" else by_hand("heads", implementation, "x", check_vma=False)
    found = jax.jit(split)(*place(arrays, make_mesh(AxisType.Auto), SPLITS["heads"]))
    assert_same_bits(found, whole)
    assert len({np.asarray(found[0])[:, :, head].tobytes() for head in range(8)}) == 8


@pytest.mark.parametrize("kv_heads", [8, 2])
def test_pmap(kv_heads, split, implementation):
    make_mesh(AxisType.Auto)  # two GPUs there must be
    *arrays, ids = draw(kv_heads=kv_heads)
    axis, head_axis = (0, None) if split == "batch" else (2, "x")

    def parts(array, axis):
        shape = array.shape
        return array.reshape(*shape[:axis], 2, shape[axis] // 2, *shape[axis + 1 :])

    ids_axis, lse_axis = (0, 0) if split == "batch" else (None, 1)
    program = jax.pmap(
        functools.partial(run, implementation=implementation, head_axis=head_axis),
        axis_name="x", in_axes=(axis, axis, axis, ids_axis),
        out_axes=(axis, lse_axis, axis, axis, axis), devices=jax.devices()[:2],
    )  # fmt: skip
    found = program(*(parts(a, axis) for a in arrays), ids if ids_axis is None else parts(ids, 0))
    expected = on_one_gpu(implementation, kv_heads)
    assert_same_bits([np.asarray(a).reshape(b.shape) for a, b in zip(found, expected)], expected)
