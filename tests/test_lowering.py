"""Every kernel, at every tile configuration that can be picked, lowers for CUDA without a GPU."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, use_abstract_mesh
from jax.sharding import PartitionSpec as P

import s2_jax
from pallas_kernels.tiles import TileConfig, pick_tiles
from tests.decoding import CACHES, make_cache
from tests.test_cached_attention import FEATURES as DECODED
from tests.test_cached_attention import PATTERNS
from tests.test_masks import CALLS as MASKED

KERNELS = ("s2_attention_forward", "s2_attention_dq", "s2_attention_dkv")
H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
A100 = AbstractDevice(device_kind="NVIDIA A100-SXM4-80GB", num_cores=108, platform="cuda")


def lowered(attend, *shapes, device=H100, dtype="bfloat16", grad=True):
    """The program text of `attend` and its gradients, for CUDA."""
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]

    def loss(*arrays):
        return attend(*arrays).astype(jnp.float32).sum()

    run = jax.grad(loss, argnums=(0, 1, 2)) if grad else loss
    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        return jax.jit(run).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def picks():
    """Each distinct configuration once, with a head dim and dtype that it is picked for."""
    found = {}
    capabilities, lengths = (80, 86, 89, 90, 100, 120), (1, 1024, 1 << 20)
    for dtype, head_dim in itertools.product(("bfloat16", "float32"), (80, 128, 192, 256)):
        for capability, q_len, group in itertools.product(capabilities, lengths, (1, 2)):
            tiles = pick_tiles(
                head_dim=head_dim,
                itemsize=jnp.dtype(dtype).itemsize,
                q_len=q_len,
                group=group,
                compute_capability=capability,
            )
            found.setdefault((tiles, dtype, head_dim), (tiles, dtype, head_dim))
    return list(found)


def name(pick):
    tiles, dtype, head_dim = pick
    sizes = "-".join(f"{t.block_q}x{t.block_kv}" for t in (tiles.forward, tiles.dq, tiles.dkv))
    return f"{dtype}-{head_dim}-{sizes}"


@pytest.mark.parametrize("pick", picks(), ids=name)
def test_every_pick_lowers(pick):
    tiles, dtype, head_dim = pick
    pattern = s2_jax.local_stride(2, 3, block_size=64)
    text = lowered(
        lambda q, k, v: s2_jax.s2_attention(q, k, v, pattern, implementation="triton", tiles=tiles),
        (1, 515, 4, head_dim),
        (1, 515, 2, head_dim),
        (1, 515, 2, head_dim),
        dtype=dtype,
    )
    assert all(kernel in text for kernel in KERNELS)


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_every_block_size_lowers(block_size):
    pattern = s2_jax.local_stride(2, 3, block_size=block_size, causal=False)
    shape = (2, 1000, 2, 64)
    text = lowered(
        lambda q, k, v: s2_jax.s2_attention(q, k, v, pattern, implementation="triton"),
        *(shape,) * 3,
    )
    assert all(kernel in text for kernel in KERNELS)


def test_a_traced_offset_lowers():
    offset = jax.ShapeDtypeStruct((), jnp.int32)
    key = jax.ShapeDtypeStruct((1, 512, 2, 64), jnp.bfloat16)
    query = jax.ShapeDtypeStruct((1, 17, 2, 64), jnp.bfloat16)

    def attend(query, key, offset):
        return s2_jax.s2_attention(
            query, key, key, s2_jax.local_stride(2, 3), query_offset=offset,
            implementation="triton",
        ).astype(jnp.float32).sum()  # fmt: skip

    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=H100)):
        traced = jax.jit(jax.grad(attend)).trace(query, key, offset)
        assert KERNELS[0] in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("device", [H100, A100], ids=["h100", "a100"])
def test_none_takes_the_kernels_where_lowered_for_cuda(device):
    shape = (1, 256, 2, 64)
    text = lowered(
        lambda q, k, v: s2_jax.s2_attention(q, k, v, s2_jax.local(2)), *(shape,) * 3, device=device
    )
    assert all(kernel in text for kernel in KERNELS)
    assert "stablehlo.dot_general" not in text, "the reference must not come along"


def test_the_platform_of_the_lowering_decides():
    """One trace, two programs: kernels for CUDA, the reference for a CPU."""
    query = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
    attend = jax.jit(lambda q: s2_jax.s2_attention(q, q, q, s2_jax.local(2)))
    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=H100)):
        traced = attend.trace(query)
        assert KERNELS[0] in traced.lower(lowering_platforms=("cuda",)).as_text()
        assert KERNELS[0] not in traced.lower(lowering_platforms=("cpu",)).as_text()


def test_what_kernels_lack_is_an_error_on_a_gpu_and_never_quadratic():
    shape = (1, 256, 2, 288)
    with pytest.raises(NotImplementedError, match="head dims above 256"):
        lowered(lambda q, k, v: s2_jax.s2_attention(q, k, v, s2_jax.local(2)), *(shape,) * 3)


def test_an_old_gpu_gets_one_warning_and_the_reference():
    turing = AbstractDevice(device_kind="Tesla T4", num_cores=40, platform="cuda")
    shape = (1, 256, 2, 64)
    with pytest.warns(UserWarning, match="compute capability"):
        text = lowered(
            lambda q, k, v: s2_jax.s2_attention(q, k, v, s2_jax.local(2)),
            *(shape,) * 3, device=turing, grad=False,
        )  # fmt: skip
    assert KERNELS[0] not in text


def test_short_tiles_can_be_given():
    tiles = pick_tiles(head_dim=64, itemsize=2, q_len=64, compute_capability=80)
    assert isinstance(tiles, TileConfig)
    shape = (1, 64, 1, 64)
    text = lowered(
        lambda q, k, v: s2_jax.s2_attention(
            q, k, v, s2_jax.dense(), tiles=tiles, implementation="triton"
        ),
        *(shape,) * 3,
    )
    assert KERNELS[0] in text


FEATURES = {name: call for name, call in MASKED.items() if call.tiles is not None}


@pytest.mark.parametrize("call", FEATURES.values(), ids=FEATURES)
def test_every_feature_lowers(call):
    """What test_masks.py interprets is lowered for CUDA too, with its gradients."""

    def shape(array):
        return jax.ShapeDtypeStruct(array.shape, array.dtype)

    inputs, masks = jax.tree.map(shape, (call.inputs(), call.masks()))
    arrays = [inputs[name] for name in ("query", "key", "value")]
    offset = jax.ShapeDtypeStruct((call.batch,), jnp.int32)

    def loss(query, key, value, offset, masks):
        start = offset if call.traced else call.query_offset
        out, lse = call.attend("triton", query, key, value, start, masks)
        return out.astype(jnp.float32).sum() + lse.sum()

    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=H100)):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*arrays, offset, masks)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert all(kernel in text for kernel in KERNELS)


def decoding(call, kind, new, implementation=None):
    """A step of a sequence traced for an H100."""
    cache = jax.eval_shape(lambda: make_cache(kind, call))
    query, key, value = (
        jax.ShapeDtypeStruct((1, new, *call.inputs()[name].shape[2:]), call.dtype)
        for name in ("query", "key", "value")
    )

    def step(query, key, value, cache):
        return s2_jax.cached_attention(
            query, key, value, cache, scale=call.scale, logits_soft_cap=call.soft_cap,
            implementation=implementation,
        )  # fmt: skip

    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=H100)):
        return jax.jit(step).trace(query, key, value, cache)


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("call", [*PATTERNS.values(), *DECODED.values()], ids=[*PATTERNS, *DECODED])
def test_decoding_lowers(call, kind):
    """What test_cached_attention.py interprets is lowered for CUDA too, for either cache."""
    traced = decoding(call, kind, new=5, implementation="triton")
    assert "s2_attention_decode" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("kind", CACHES)
def test_a_chunk_takes_the_kernels_for_long_rows(kind):
    traced = decoding(PATTERNS["window"], kind, new=17)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "s2_attention_forward" in text
    assert "s2_attention_decode" not in text


@pytest.mark.parametrize("kind", CACHES)
def test_the_platform_decides_how_to_decode(kind):
    """One trace, two programs; the reference does not come along where the kernel does."""
    traced = decoding(PATTERNS["window"], kind, new=1)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "s2_attention_decode" in text
    assert "stablehlo.dot_general" not in text
    assert "s2_attention_decode" not in traced.lower(lowering_platforms=("cpu",)).as_text()


@pytest.mark.parametrize("implementation", [None, "triton"])
@pytest.mark.parametrize("grad", [False, True])
def test_heads_by_hand_in_a_mesh_of_explicit_axes_lower(implementation, grad):
    """The batch stays split over an axis that `shard_map` leaves alone."""
    axes = (AxisType.Explicit,) * 2
    mesh = AbstractMesh((2, 2), ("data", "tensor"), axis_types=axes, abstract_device=H100)
    heads = P(None, None, "tensor")

    def attend(q, k, v):
        pattern = s2_jax.local_stride(2, 3)
        return s2_jax.s2_attention(
            q, k, v, pattern, head_axis="tensor", implementation=implementation
        )

    by_hand = jax.shard_map(
        attend, mesh=mesh, axis_names={"tensor"}, in_specs=heads, out_specs=heads
    )
    run = by_hand
    if grad:
        run = jax.grad(lambda *arrays: by_hand(*arrays).astype(jnp.float32).sum(), (0, 1, 2))
    split = NamedSharding(mesh, P("data", None, "tensor"))
    arrays = [jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.bfloat16, sharding=split)] * 3
    with use_abstract_mesh(mesh):
        text = jax.jit(run).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert [kernel in text for kernel in KERNELS] == [True, grad, grad]
