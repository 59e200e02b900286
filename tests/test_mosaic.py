"""The kernels that Mosaic lowers for Hopper. `-m gpu` runs them; elsewhere they are lowered."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from jax.sharding import PartitionSpec as P

import s2_jax
from pallas_kernels import lowering
from s2_jax import Tile, TileConfig
from tests.calls import AttentionCall, assert_padding_reaches_nothing, check
from tests.draws import mosaic_calls
from tests.test_lowering import A100, H100

S2 = s2_jax.local_stride(2, 3)
S2_128 = s2_jax.local_stride(2, 3, block_size=128)
needs_mosaic = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="its kernels want a newer JAX"
)
MOSAIC = Tile(128, 128, 8, 2, lowering="mosaic")
PLAIN = Tile(64, 64, 4, 2)

BASE = AttentionCall(
    S2, q_len=1000, kv_len=1000, heads=4, kv_heads=2, head_dim=64, dtype="bfloat16", tiles=None
)
CALLS = {
    "groups": BASE,
    "float16": dataclasses.replace(BASE, dtype="float16", kv_heads=4),
    "head-dim-128": dataclasses.replace(BASE, head_dim=128, batch=2, heads=3, kv_heads=1),
    "blocks-of-128": dataclasses.replace(BASE, pattern=S2_128, head_dim=128),
    "few-tokens": dataclasses.replace(BASE, q_len=8, kv_len=8),
    "few-queries": dataclasses.replace(BASE, q_len=8, kv_len=696, query_offset=640),
    "short": dataclasses.replace(BASE, q_len=56, kv_len=72, batch=3),
    "offset": dataclasses.replace(BASE, q_len=328, kv_len=1032, query_offset=640),
    "more-keys": dataclasses.replace(BASE, q_len=264, kv_len=904),
    "more-queries": dataclasses.replace(BASE, q_len=904, kv_len=264),
    "dense": dataclasses.replace(BASE, pattern=s2_jax.dense(), q_len=776, kv_len=776),
    "not-causal": dataclasses.replace(
        BASE, pattern=s2_jax.local_stride(2, 3, causal=False), q_len=456, kv_len=832
    ),
    # More tiles than programs: each takes two or three.
    "many-tiles": dataclasses.replace(
        BASE, q_len=1496, kv_len=1496, batch=3, heads=9, kv_heads=3, head_dim=128
    ),
    "many-tiles-packed": dataclasses.replace(
        BASE, q_len=1496, kv_len=1496, batch=3, heads=9, kv_heads=9, segments="packed"
    ),
    "nothing-seen": dataclasses.replace(
        BASE, pattern=s2_jax.local_stride(1, 8) & s2_jax.token_window(100), q_len=640, kv_len=640
    ),
    "window-joins": dataclasses.replace(BASE, window=150),
    "window-cuts": dataclasses.replace(BASE, window=300, window_joins="&"),
    "window-alone": dataclasses.replace(
        BASE, pattern=s2_jax.dense(), window=300, window_joins="&", head_dim=128
    ),
    "negative-scale": dataclasses.replace(BASE, scale=-0.3),
    "no-scale": dataclasses.replace(BASE, scale=0.0, q_len=296, kv_len=296),
    "packed": dataclasses.replace(BASE, segments="packed", batch=2, head_dim=128),
    "packed-in-any-order": dataclasses.replace(BASE, segments="shuffled", heads=3, kv_heads=3),
    "packed-at-random": dataclasses.replace(BASE, segments="random", q_len=600, kv_len=600),
    "packed-with-an-offset": dataclasses.replace(
        BASE, segments="packed", query_offset=256, q_len=400, kv_len=656
    ),
    "packed-not-causal": dataclasses.replace(
        BASE, pattern=s2_jax.local_stride(2, 3, causal=False), segments="padded"
    ),
    "packed-dense": dataclasses.replace(BASE, pattern=s2_jax.dense(), segments="packed"),
    "packed-window": dataclasses.replace(BASE, segments="packed", window=200),
    "packed-beyond-the-peak": dataclasses.replace(
        BASE, pattern=s2_jax.dense(), segments="packed", scale=12.0
    ),
    "padded": dataclasses.replace(
        BASE, batch=4, query_lengths=(1000, 130, 0, 641), kv_lengths=(1000, 130, 5, 700)
    ),
    "padded-keys": dataclasses.replace(BASE, batch=2, kv_lengths=(77, 1000), head_dim=128),
    "padded-queries": dataclasses.replace(BASE, batch=2, query_lengths=(77, 1000)),
    "padded-beyond-the-peak": dataclasses.replace(
        BASE,
        batch=2,
        pattern=s2_jax.dense(),
        scale=12.0,
        query_lengths=(700, 1000),
        kv_lengths=(700, 1000),
    ),
    "packed-and-padded": dataclasses.replace(
        BASE, batch=2, segments="packed", query_lengths=(900, 1000), kv_lengths=(900, 1000)
    ),
    "many-blocks": dataclasses.replace(
        BASE, pattern=s2_jax.local_stride(3, 5), q_len=3000, kv_len=3000, heads=5, kv_heads=1
    ),
    # As in test_pinned_peak.py: weights leave what the pinned peak is good for.
    "beyond-the-peak": dataclasses.replace(BASE, scale=12.0, q_len=1112, kv_len=1112),
    "beyond-the-peak-float16": dataclasses.replace(
        BASE, scale=12.0, dtype="float16", q_len=904, kv_len=904
    ),
    "below-the-peak": dataclasses.replace(
        BASE, pattern=s2_jax.dense(), scale=-12.0, q_len=200, kv_len=840, query_offset=640
    ),
}


@pytest.mark.gpu
@needs_mosaic
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_agrees_with_the_oracle(call):
    check(call, "mosaic")


@pytest.mark.gpu
@needs_mosaic
@given(mosaic_calls())
def test_drawn_calls_agree_with_the_oracle(call):
    check(call, "mosaic")


@pytest.mark.gpu
@needs_mosaic
@pytest.mark.parametrize("block_kv", [64, 128])
def test_other_tiles_agree_with_the_oracle(block_kv):
    tile = Tile(128, block_kv, 8, 3 if block_kv == 64 else 2, lowering="mosaic")
    tiles = TileConfig(tile, tile, PLAIN)
    call = dataclasses.replace(BASE, head_dim=128, tiles=tiles)
    check(call, "mosaic")


@pytest.mark.gpu
@needs_mosaic
def test_many_small_float16_weights_add_up():
    query = jnp.full((1, 128, 1, 64), -0.0831 * 11 / 4, jnp.float16)
    key = jnp.full((1, 32768, 1, 64), 0.75, jnp.float16)
    pattern = s2_jax.dense(block_size=128, causal=False)
    out = s2_jax.s2_attention(
        query, key, jnp.ones_like(key), pattern, scale=1.0, implementation="mosaic"
    )
    np.testing.assert_array_equal(np.asarray(out), 1.0)


@pytest.mark.gpu
@needs_mosaic
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_what_is_not_finite_stays_in_its_rows(bad):
    keys = jax.random.split(jax.random.key(0), 3)
    query, key, value = (jax.random.normal(k, (1, 1024, 2, 64), jnp.bfloat16) for k in keys)
    attend = jax.jit(attention("mosaic"))
    spoilt = query.at[0, 700, 1, 3].set(bad)
    good, found = (np.asarray(attend(q, key, value), np.float32) for q in (query, spoilt))
    assert np.isnan(found[0, 700, 1]).all()
    rest = np.ones(found.shape[:3], bool)
    rest[0, 700, 1] = False
    # Its tile takes its peaks anew, so that the others' last bits may differ.
    np.testing.assert_allclose(found[rest], good[rest], rtol=0, atol=0.02)


@pytest.mark.gpu
@needs_mosaic
@pytest.mark.parametrize("name", ["padded", "packed-and-padded"])
def test_nan_in_the_padding_reaches_nothing(name):
    assert_padding_reaches_nothing(CALLS[name], "mosaic")


@pytest.mark.gpu
@needs_mosaic
def test_the_same_call_gives_the_same_bits():
    call = dataclasses.replace(BASE, head_dim=128, heads=8, kv_heads=8, q_len=2048, kv_len=2048)
    first, second = (call.run("mosaic") for _ in range(2))
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], err_msg=name)


def lowered(attend, shapes, dtype="bfloat16", device=H100, mesh=None):
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]

    def loss(*arrays):
        return attend(*arrays).astype(jnp.float32).sum()

    with use_abstract_mesh(mesh or AbstractMesh((1,), ("x",), abstract_device=device)):
        run = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        return run.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def kernels_of(text):
    return text.count("mosaic_gpu_v2"), text.count("__gpu$xla.gpu.triton")


def attention(implementation=None, pattern=S2, **options):
    return lambda q, k, v: s2_jax.s2_attention(
        q, k, v, pattern, implementation=implementation, **options
    )


SHAPES = [(2, 1032, 4, 128), (2, 1032, 2, 128), (2, 1032, 2, 128)]


@needs_mosaic
@pytest.mark.parametrize("implementation", [None, "mosaic"])
@pytest.mark.parametrize("name", ["groups", "head-dim-128", "blocks-of-128", "window-joins"])
def test_forward_and_dq_are_lowered(name, implementation):
    call = CALLS[name]
    shapes = [(1, 1112, n, call.head_dim) for n in (4, 2, 2)]
    text = lowered(attention(implementation, call.whole_pattern), shapes)
    assert kernels_of(text) == (2, 1)


@needs_mosaic
def test_segments_and_lengths_are_lowered():
    lengths = jnp.asarray([1032, 40], jnp.int32)
    for options in (
        {"segment_ids": jnp.zeros((2, 1032), jnp.int32)},
        {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths},
    ):
        assert kernels_of(lowered(attention(**options), SHAPES)) == (2, 1)


@needs_mosaic
def test_triton_lowers_what_it_is_asked_for():
    assert kernels_of(lowered(attention("triton"), SHAPES)) == (0, 3)


@needs_mosaic
@pytest.mark.parametrize(
    ("changes", "device"),
    [
        ({"logits_soft_cap": 20.0}, H100),
        ({"query_offset": 64}, H100),
        ({"pattern": s2_jax.local_stride(2, 3, block_size=32)}, H100),
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
    assert kernels_of(lowered(attention("mosaic"), shapes)) == (2, 1)


@needs_mosaic
def test_mapped_by_vmap():
    shapes = [(3, *shape) for shape in SHAPES]
    assert kernels_of(lowered(jax.vmap(attention("mosaic")), shapes)) == (2, 1)


@needs_mosaic
@pytest.mark.parametrize(("check_vma", "kernels"), [(True, (0, 3)), (False, (2, 1))])
def test_inside_shard_map(check_vma, kernels):
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = AbstractMesh((2, 2), ("data", "tensor"), axis_types=auto, abstract_device=H100)
    split = P("data", None, "tensor")
    attend = jax.shard_map(
        attention(head_axis="tensor"), mesh=mesh, in_specs=split, out_specs=split,
        check_vma=check_vma,
    )  # fmt: skip
    text = lowered(attend, SHAPES, mesh=mesh)
    assert kernels_of(text) == kernels


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
    assert kernels_of(text) == (0, 3)


@needs_mosaic
def test_heads_alone_may_vary_inside_shard_map():
    auto = (jax.sharding.AxisType.Auto,)
    mesh = AbstractMesh((2,), ("x",), axis_types=auto, abstract_device=H100)
    attend = jax.shard_map(
        attention(head_axis="x"), mesh=mesh, in_specs=P(), out_specs=P(None, None, "x")
    )
    assert kernels_of(lowered(attend, [(1, 1032, 2, 64)] * 3, mesh=mesh)) == (0, 3)


@needs_mosaic
def test_leaks_can_be_checked():
    with jax.checking_leaks():
        assert kernels_of(lowered(attention(), [(1, 1224, 2, 64)] * 3)) == (0, 3)


@needs_mosaic
@pytest.mark.parametrize(
    ("keys", "forward", "dq", "dim", "segments", "fits"),
    [
        (128, 2, 2, 128, False, True),
        (128, 3, 2, 128, False, False),
        (128, 2, 2, 128, True, False),
        (64, 4, 4, 128, False, True),
        (64, 4, 4, 128, True, False),
        (64, 4, 3, 128, True, True),
        (64, 5, 3, 128, False, False),
        (128, 5, 5, 64, True, True),
        (128, 5, 6, 64, False, False),
    ],
)
def test_shared_memory_is_counted_as_it_is(keys, forward, dq, dim, segments, fits):
    """The same calls as fit by Mosaic's own count, at the edge of it."""
    forward, dq = (Tile(128, keys, 8, stages, lowering="mosaic") for stages in (forward, dq))
    ids = {"segment_ids": jnp.zeros((1, 136), jnp.int32)} if segments else {}
    attend = attention(tiles=TileConfig(forward, dq, PLAIN), **ids)
    shapes = [(1, 136, 1, dim)] * 3
    if fits:
        assert kernels_of(lowered(attend, shapes)) == (2, 1)
    else:
        with pytest.raises(ValueError, match=r"num_stages=. of tiles\.(forward|dq) are too many"):
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
    refused("multiples of 64 tokens, got 16", pattern=s2_jax.local_stride(2, 3, block_size=16))
    refused("query_offset known before, a multiple of 128", query_offset=64)
    refused(r"multiples of 8, got \(1032, 1031\)", shapes=[SHAPES[0], *[(2, 1031, 2, 128)] * 2])
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
    [(64, 128, 8), (128, 32, 8), (128, 128, 4), (128, 128, 8, 1), (128, 128, 8, 2, 2)],
    ids=str,
)
def test_tiles_it_has_not(fields):
    with pytest.raises(ValueError, match="a tile of lowering='mosaic' has block_q=128"):
        Tile(*fields, lowering="mosaic")


def test_tiles_of_no_known_lowering():
    with pytest.raises(ValueError, match="lowering='cuda' must be 'triton' or 'mosaic'"):
        Tile(128, 128, lowering="cuda")
    with pytest.raises(ValueError, match="lowering of dkv must be 'triton'"):
        TileConfig(MOSAIC, MOSAIC, MOSAIC)


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
