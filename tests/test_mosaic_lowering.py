"""Which calls Mosaic's kernels are lowered for, which go to Triton and which are refused."""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from jax.sharding import PartitionSpec as P

import s2_jax
from pallas_kernels import lowering, partition, tiles
from s2_jax import Tile, TileConfig
from tests.draws import mosaic_calls
from tests.test_lowering import A100, H100
from tests.test_mosaic import CALLS, S2, attention, needs_mosaic

MOSAIC = Tile(128, 128, 8, 2, lowering="mosaic")
PLAIN = Tile(64, 64, 4, 2)


def lowered(attend, shapes, dtype="bfloat16", device=H100, mesh=None):
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]

    def loss(*arrays):
        return attend(*arrays).astype(jnp.float32).sum()

    with use_abstract_mesh(mesh or AbstractMesh((1,), ("x",), abstract_device=device)):
        run = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        return run.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


@pytest.fixture(autouse=True)
def dkv_for_short_rows(monkeypatch):
    monkeypatch.setattr(tiles, "LEAST_MOSAIC_ROWS", dict.fromkeys(tiles.LEAST_MOSAIC_ROWS, 1))


ALL = (3, 0)  # three kernels by Mosaic, none by Triton


def by_default(call):
    """Of padded queries Mosaic's dk/dv wants copies."""
    return (2, 1) if call.query_lengths and call.tiles is None else ALL


def kernels_of(text):
    return text.count("mosaic_gpu_v2"), text.count("__gpu$xla.gpu.triton")


SHAPES = [(2, 1032, 4, 128), (2, 1032, 2, 128), (2, 1032, 2, 128)]


@needs_mosaic
@pytest.mark.parametrize("implementation", [None, "mosaic"])
@pytest.mark.parametrize("name", ["groups", "head-dim-128", "blocks-of-128"])
def test_all_three_are_lowered(name, implementation):
    call = CALLS[name]
    shapes = [(1, 1112, n, call.head_dim) for n in (4, 2, 2)]
    text = lowered(attention(implementation, call.whole_pattern), shapes)
    assert kernels_of(text) == ALL


MASKS = [
    *("not-causal", "packed-not-causal", "packed-window", "window-joins", "window-cuts"),
    *("window-alone", "dense", "packed-dense", "packed-and-padded", "offset"),
]


@needs_mosaic
@pytest.mark.parametrize("name", MASKS)
def test_every_kind_of_mask_is_lowered(name):
    """Each is a program of its own to Mosaic, which looks for a layout of every array in it."""
    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=H100)):
        assert kernels_of(CALLS[name].lowered("mosaic")) == by_default(CALLS[name])


@needs_mosaic
@given(mosaic_calls())
def test_drawn_calls_are_lowered(call):
    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=H100)):
        small = call.tiles.dkv.lowering == "triton"
        assert kernels_of(call.lowered("mosaic")) == ((2, 1) if small else ALL)


@needs_mosaic
@pytest.mark.parametrize("name", ["window-joins", "packed", "padded", "padded-by-all-three"])
def test_lowered_in_64_bit_mode(name):
    mesh = AbstractMesh((1,), ("x",), abstract_device=H100)
    with jax.enable_x64(True), use_abstract_mesh(mesh):
        assert kernels_of(CALLS[name].lowered("mosaic")) == by_default(CALLS[name])


@needs_mosaic
@pytest.mark.parametrize(
    "pattern",
    [
        s2_jax.local_stride(2, 3, block_size=16),
        s2_jax.block_mask(np.tril(np.ones((4, 17, 17), dtype=bool))),
    ],
    ids=["small-blocks", "columns-of-all-kinds"],
)
def test_triton_keeps_gradients_of_keys_that_mosaic_has_no_tiles_for(pattern):
    assert kernels_of(lowered(attention(pattern=pattern), SHAPES)) == (2, 1)


@needs_mosaic
def test_triton_keeps_gradients_of_keys_of_short_rows(monkeypatch):
    monkeypatch.undo()
    assert kernels_of(lowered(attention(), SHAPES)) == (2, 1)
    assert kernels_of(lowered(attention(), [(1, 8184, 1, 128)] * 3)) == (2, 1)
    assert kernels_of(lowered(attention(), [(1, 8192, 1, 128)] * 3)) == ALL
    ids = {"segment_ids": jnp.zeros((1, 16384), jnp.int32)}
    assert kernels_of(lowered(attention(**ids), [(1, 16384, 1, 128)] * 3)) == (2, 1)


@needs_mosaic
@pytest.mark.parametrize("name", ["packed", "padded", "one-group"])
def test_traced_where_it_may_be_split(name, monkeypatch):
    """JAX wants no constant arrays in what it may split over devices."""
    monkeypatch.setattr(partition, "may_be_split", lambda: True)
    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=H100)):
        assert "custom_partitioning" in str(CALLS[name].staged("mosaic").jaxpr)


@needs_mosaic
def test_triton_lowers_what_it_is_asked_for():
    assert kernels_of(lowered(attention("triton"), SHAPES)) == (0, 3)


@needs_mosaic
@pytest.mark.parametrize(
    ("changes", "device"),
    [
        ({"logits_soft_cap": 20.0}, H100),
        ({"query_offset": 64}, H100),
        ({}, A100),
        ({}, AbstractDevice(device_kind="NVIDIA B200", num_cores=148, platform="cuda")),
    ],
    ids=str,
)
def test_none_takes_triton_where_mosaic_cannot(changes, device):
    assert kernels_of(lowered(attention(**changes), SHAPES, device=device)) == (0, 3)


@needs_mosaic
def test_none_takes_triton_for_short_rows():
    shapes = [(8, 504, 4, 128)] * 3
    assert kernels_of(lowered(attention(), shapes)) == (0, 3)
    assert kernels_of(lowered(attention("mosaic"), shapes)) == ALL


@needs_mosaic
def test_none_makes_no_copies_for_multiples_of_8():
    shapes = [(1, 4099, 1, 64)] * 3
    assert kernels_of(lowered(attention(None), shapes)) == (0, 3)
    assert kernels_of(lowered(attention("mosaic"), shapes)) == ALL


@needs_mosaic
def test_mapped_by_vmap():
    shapes = [(3, *shape) for shape in SHAPES]
    assert kernels_of(lowered(jax.vmap(attention("mosaic")), shapes)) == ALL


@needs_mosaic
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(check_vma, mapped):
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = AbstractMesh((2, 2), ("data", "tensor"), axis_types=auto, abstract_device=H100)
    attend, shapes, split = attention(head_axis="tensor"), SHAPES, P("data", None, "tensor")
    if mapped:
        attend, shapes = jax.vmap(attend), [(3, *shape) for shape in SHAPES]
        split = P(None, *split)
    attend = jax.shard_map(attend, mesh=mesh, in_specs=split, out_specs=split, check_vma=check_vma)
    assert kernels_of(lowered(attend, shapes, mesh=mesh)) == ALL


def refused(
    match, error=NotImplementedError, device=H100, shapes=SHAPES, dtype="bfloat16", **options
):
    with pytest.raises(error, match=match):
        lowered(attention("mosaic", **options), shapes, dtype, device)


@needs_mosaic
@pytest.mark.parametrize("name", ["segment_ids", "key_value_seq_lengths"])
def test_what_varies_inside_shard_map_may_be_a_mask_alone(name):
    auto = (jax.sharding.AxisType.Auto,)
    mesh = AbstractMesh((2,), ("data",), axis_types=auto, abstract_device=H100)

    def attend(q, k, v, mask):
        return s2_jax.s2_attention(q, k, v, S2, **{name: mask})

    attend = jax.shard_map(
        attend, mesh=mesh, in_specs=(P(), P(), P(), P("data")), out_specs=P("data")
    )
    mask = jnp.ones((2, 1032) if name == "segment_ids" else (2,), jnp.int32)
    shapes = [(1, *shape[1:]) for shape in SHAPES]
    text = lowered(lambda *arrays: attend(*arrays, mask), shapes, mesh=mesh)
    assert kernels_of(text) == ALL


@needs_mosaic
def test_heads_alone_may_vary_inside_shard_map():
    auto = (jax.sharding.AxisType.Auto,)
    mesh = AbstractMesh((2,), ("x",), axis_types=auto, abstract_device=H100)
    attend = jax.shard_map(
        attention(head_axis="x"), mesh=mesh, in_specs=P(), out_specs=P(None, None, "x")
    )
    assert kernels_of(lowered(attend, [(1, 1032, 2, 64)] * 3, mesh=mesh)) == ALL


@needs_mosaic
def test_leaks_can_be_checked():
    gc.freeze()  # JAX collects garbage after every trace, which takes long in a process of tests
    try:
        with jax.checking_leaks():
            assert kernels_of(lowered(attention(), [(1, 1224, 2, 64)] * 3)) == (0, 3)
    finally:
        gc.unfreeze()


@needs_mosaic
@pytest.mark.parametrize(
    ("keys", "forward", "dq", "dkv", "dim", "segments", "fits"),
    [
        (128, 2, None, None, 128, True, True),
        (128, 3, None, None, 128, False, False),
        (128, None, 2, None, 128, True, True),
        (128, None, 3, None, 128, False, False),
        (64, 4, 3, None, 128, True, True),
        (64, 4, 4, None, 128, False, False),
        (64, 5, 3, None, 128, False, False),
        (128, 5, 5, None, 64, True, True),
        (128, 5, 7, None, 64, False, False),
        (128, None, None, 2, 128, True, True),
        (128, None, None, 3, 128, False, False),
        (128, None, None, 5, 64, True, True),
        (128, None, None, 6, 64, False, False),
    ],
)
def test_shared_memory_is_counted_as_it_is(keys, forward, dq, dkv, dim, segments, fits):
    """The same calls as fit by Mosaic's own count, at the edge of it."""
    forward, dq, dkv = (
        Tile(128, keys, 8, stages, lowering="mosaic") if stages else PLAIN
        for stages in (forward, dq, dkv)
    )
    ids = {"segment_ids": jnp.zeros((1, 136), jnp.int32)} if segments else {}
    attend = attention(tiles=TileConfig(forward, dq, dkv), **ids)
    shapes = [(1, 136, 1, dim)] * 3
    if fits:
        assert sum(kernels_of(lowered(attend, shapes))) == 3
    else:
        with pytest.raises(ValueError, match=r"num_stages=. of tiles\.\w+ are too many"):
            lowered(attend, shapes)


def test_tiles_for_a_call_that_mosaic_does_not_take_are_named():
    tiles = TileConfig(MOSAIC, PLAIN, PLAIN)
    with pytest.raises(NotImplementedError, match=r"tiles of lowering='mosaic' .*without tiles"):
        lowered(attention(tiles=tiles), SHAPES, device=A100)


@needs_mosaic
def test_what_it_cannot_do_is_refused():
    refused("compute capability 9.0, got 8.0", device=A100)
    refused("bfloat16 and float16, got float32", dtype="float32")
    refused(r"head dims of 64 or 128, .* got \(80, 80\)", shapes=[(1, 256, 2, 80)] * 3)
    blocks_of_16 = s2_jax.local_stride(2, 3, block_size=16)
    ids = {"segment_ids": jnp.zeros((2, 1032), jnp.int32)}
    refused("segment_ids with blocks of 32 tokens or more", pattern=blocks_of_16, **ids)
    tiles = TileConfig(MOSAIC, MOSAIC, MOSAIC)
    match = r"tiles.dkv of lowering='mosaic' takes blocks of 32 tokens or more, got 16"
    refused(match, pattern=blocks_of_16, tiles=tiles)
    refused("query_offset known before, a multiple of 128", query_offset=64)
    refused("no logits_soft_cap", logits_soft_cap=5.0)


def test_without_a_gpu_it_is_refused():
    arrays = [jnp.zeros((1, 64, 1, 64), jnp.bfloat16)] * 3
    with pytest.raises(ValueError, match='"mosaic" needs an NVIDIA GPU'):
        attention("mosaic")(*arrays)


@needs_mosaic
def test_tiles_of_triton_alone_are_not_for_it():
    tiles = TileConfig(PLAIN, PLAIN, PLAIN)
    refused("has tiles of lowering='mosaic'", ValueError, tiles=tiles)


def test_its_tiles_are_not_for_triton():
    tiles = TileConfig(MOSAIC, MOSAIC, PLAIN)
    with pytest.raises(ValueError, match="has no tiles of lowering='mosaic'"):
        lowered(attention("triton", tiles=tiles), SHAPES)


@pytest.mark.skipif(jax.__version_info__ >= (0, 12), reason="newer ones interpret them")
def test_an_old_jax_does_not_interpret_them():
    tiles = TileConfig(MOSAIC, MOSAIC, PLAIN)
    arrays = [jnp.zeros((1, 64, 1, 64), jnp.bfloat16)] * 3
    with pytest.raises(NotImplementedError, match=r"need JAX 0.12 or newer, got 0\.1[01]"):
        attention("interpret", tiles=tiles)(*arrays)


@pytest.mark.parametrize(
    "fields",
    [(64, 64, 8), (128, 32, 8), (128, 128, 4), (128, 128, 8, 1), (128, 128, 8, 2, 2)],
    ids=str,
)
def test_tiles_it_has_not(fields):
    with pytest.raises(ValueError, match="a tile of lowering='mosaic' has block_q=128"):
        Tile(*fields, lowering="mosaic")


def test_half_as_many_queries_are_for_all_three_gradients():
    half = Tile(64, 128, 8, 2, lowering="mosaic")
    for these in ((half, MOSAIC, PLAIN), (MOSAIC, half, PLAIN)):
        with pytest.raises(ValueError, match="of lowering='mosaic' has block_q=128"):
            TileConfig(*these)
    for these in ((MOSAIC, MOSAIC, half), (MOSAIC, None, PLAIN)):
        with pytest.raises(ValueError, match="dq is None where dkv has"):
            TileConfig(*these)
    TileConfig(MOSAIC, None, half).check_mosaic_memory(128, segments=True)
    deep = TileConfig(MOSAIC, None, dataclasses.replace(half, num_stages=3))
    with pytest.raises(ValueError, match=r"num_stages=3 of tiles\.dkv are too many"):
        deep.check_mosaic_memory(128, segments=False)


def test_tiles_of_no_known_lowering():
    with pytest.raises(ValueError, match="lowering='cuda' must be 'triton' or 'mosaic'"):
        Tile(128, 128, lowering="cuda")
    with pytest.raises(ValueError, match="dkv of lowering='mosaic' has block_kv=128"):
        TileConfig(MOSAIC, MOSAIC, Tile(128, 64, 8, 2, lowering="mosaic"))


@pytest.mark.parametrize(
    ("version", "errs"),
    [("PJRT C API\ncuda 12090", True), ("cuda 12080", True), ("cuda 13000", False), ("", False)],
)
def test_a_compiler_is_known_by_its_version(version, errs, monkeypatch):
    class Client:
        platform_version = version

    class Device:
        client = Client

    monkeypatch.setattr(lowering, "_device", lambda: Device)
    assert lowering.compiler_errs() == errs


@pytest.mark.parametrize("kind", ["NVIDIA H800", "NVIDIA H20", "NVIDIA GH200 480GB", "NVIDIA H200"])
def test_every_hopper_is_one(kind):
    device = AbstractDevice(device_kind=kind, num_cores=78, platform="cuda")
    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        assert (lowering.compute_capability(), lowering.multiprocessors()) == (90, 78)


def test_a_gpu_under_a_mesh_is_asked_itself(monkeypatch):
    class Device:
        device_kind, compute_capability, core_count = "NVIDIA Next", "9.0", 140

    device = AbstractDevice(device_kind="NVIDIA Next", num_cores=None, platform="cuda")
    monkeypatch.setattr(jax, "local_devices", lambda: [Device])
    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        assert (lowering.compute_capability(), lowering.multiprocessors()) == (90, 140)


@needs_mosaic
def test_a_compiler_that_errs_is_not_asked(monkeypatch):
    monkeypatch.setattr(lowering, "compiler_errs", lambda: True)
    assert kernels_of(lowered(attention(), SHAPES)) == (0, 3)
    refused("need CUDA before 12.8, or 12.9.1 and newer")
