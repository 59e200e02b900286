"""Mosaic's kernels in Pallas' interpreter for GPUs, which also finds races and lost arrivals."""

import dataclasses

import jax
import pytest
from hypothesis import given
from jax.sharding import AxisType

import s2_jax
from pallas_kernels import hopper_forward, hopper_tiles
from pallas_kernels.hopper_keys import Chunks
from s2_jax import Tile, TileConfig
from tests.calls import AttentionCall, assert_padding_reaches_nothing, check
from tests.draws import mosaic_calls
from tests.test_mosaic import ONE, small_weights

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 12), reason="older interpreters do not know all that is used"
)
TILES, WIDE = (
    TileConfig(
        Tile(128, keys, 8, 2, lowering="mosaic"),
        Tile(128, keys, 8, 3 if keys == 64 else 2, lowering="mosaic"),
        Tile(128, 128, 8, 2, lowering="mosaic"),
    )
    for keys in (64, 128)
)
TRITON_DKV = dataclasses.replace(WIDE, dkv=Tile(64, 64, 4, 1))
BASE = AttentionCall(
    s2_jax.local_stride(1, 2), q_len=264, kv_len=264, heads=2, kv_heads=1, head_dim=64,
    dtype="bfloat16", tiles=TILES,
)  # fmt: skip
CALLS = {
    "groups": BASE,
    "wide-steps": dataclasses.replace(BASE, tiles=WIDE, q_len=400, kv_len=400),
    "batches": dataclasses.replace(BASE, batch=3, heads=1, dtype="float16", q_len=136, kv_len=136),
    "head-dim-128": dataclasses.replace(BASE, head_dim=128, q_len=136, kv_len=136, heads=1),
    "odd-lengths": dataclasses.replace(
        BASE, q_len=139, kv_len=203, pattern=s2_jax.local_stride(1, 2, causal=False)
    ),
    "offset": dataclasses.replace(BASE, q_len=136, kv_len=264, query_offset=128),
    "more-queries": dataclasses.replace(BASE, q_len=264, kv_len=72),
    "nothing-seen": dataclasses.replace(
        BASE, pattern=s2_jax.vertical_stride(2), heads=2, kv_heads=2
    ),
    "blocks-of-16": dataclasses.replace(
        BASE,
        pattern=s2_jax.local_stride(9, 3, block_size=16),
        tiles=TRITON_DKV,
        q_len=200,
        kv_len=200,
    ),
    "blocks-of-32": dataclasses.replace(
        BASE, pattern=s2_jax.local_stride(5, 3, block_size=32), q_len=520, kv_len=520
    ),
    "blocks-of-128": dataclasses.replace(BASE, pattern=s2_jax.local_stride(1, 2, block_size=128)),
    # The heads of a group in several programs.
    "one-group": dataclasses.replace(BASE, heads=4, kv_heads=1, q_len=136, kv_len=136),
    "window": dataclasses.replace(BASE, window=100, window_joins="&"),
    "packed": dataclasses.replace(BASE, segments="packed", pattern=s2_jax.dense()),
    "padded": dataclasses.replace(
        BASE, batch=2, heads=1, query_lengths=(264, 70), kv_lengths=(264, 70)
    ),
    # Everything is taken in again.
    "beyond-the-peak": dataclasses.replace(
        BASE, pattern=s2_jax.dense(), scale=12.0, q_len=264, kv_len=264, heads=1
    ),
    "beyond-the-peak-packed": dataclasses.replace(
        BASE, pattern=s2_jax.dense(), scale=12.0, segments="packed", heads=1, tiles=WIDE
    ),
}


def chunks_of(size, by_rank=False):
    """Of dk/dv's tiles so many a program, but for the first one and what is left."""

    def of(lists, heads):
        several, last = divmod(lists.num_tiles - 1, size)
        return Chunks(by_rank, heads, 1, several, size, last)

    return of


@pytest.fixture(autouse=True)
def over_one_device(monkeypatch):
    """Nothing is split there, and no rule for that is asked of the interpreter."""
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    # Each program takes several tiles.
    monkeypatch.setattr(hopper_tiles, "multiprocessors", lambda: 2)
    monkeypatch.setattr(Chunks, "of", chunks_of(2))
    with jax.set_mesh(mesh):
        yield


@pytest.mark.parametrize("name", ["groups", "head-dim-128", "odd-lengths", "packed", "padded"])
def test_one_backward_kernel_agrees_with_the_oracle(name):
    check(dataclasses.replace(CALLS[name], tiles=ONE), "interpret")


@given(mosaic_calls())
def test_drawn_calls_agree_with_the_oracle(call):
    check(call, "interpret")


@pytest.mark.parametrize("tiles", [TILES, ONE], ids=["two", "one"])
def test_nan_in_the_padding_reaches_nothing(tiles):
    call = dataclasses.replace(CALLS["padded"], tiles=tiles)
    assert_padding_reaches_nothing(call, "interpret")


def test_small_float16_weights_keep_their_digits():
    assert max(small_weights("interpret").values()) < 2e-3


def test_tiles_that_share_a_flag_are_all_taken_again(monkeypatch):
    monkeypatch.setattr(hopper_forward, "_FLAGS", 2)
    check(dataclasses.replace(CALLS["beyond-the-peak"], q_len=640, kv_len=640), "interpret")


def test_programs_of_several_key_tiles_in_any_order(monkeypatch):
    monkeypatch.setattr(Chunks, "of", chunks_of(3, by_rank=True))
    call = dataclasses.replace(BASE, pattern=s2_jax.local_stride(1, 6), q_len=1024, kv_len=1024)
    check(call, "interpret")


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_agrees_with_the_oracle(call):
    check(call, "interpret")
