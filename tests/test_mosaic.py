"""The kernels that Mosaic lowers for Hopper, on a GPU (`-m gpu`)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

import s2_jax
from pallas_kernels import tiles
from pallas_kernels.hopper_keys import Chunks
from s2_jax import Tile, TileConfig
from tests.calls import AttentionCall, _dense, assert_padding_reaches_nothing, check
from tests.draws import mosaic_calls

S2 = s2_jax.local_stride(2, 3)
S2_16 = s2_jax.local_stride(9, 3, block_size=16)
S2_32 = s2_jax.local_stride(3, 5, block_size=32)
S2_128 = s2_jax.local_stride(2, 3, block_size=128)
needs_mosaic = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="its kernels want a newer JAX"
)
OWN = TileConfig(*(Tile(128, 128, 8, 2, lowering="mosaic") for _ in range(3)))

ONE = TileConfig(
    Tile(128, 64, 8, 4, lowering="mosaic"), None, Tile(64, 128, 8, 2, lowering="mosaic")
)

BASE = AttentionCall(
    S2, q_len=1000, kv_len=1000, heads=4, kv_heads=2, head_dim=64, dtype="bfloat16", tiles=None
)
CALLS = {
    "groups": BASE,
    "float16": dataclasses.replace(BASE, dtype="float16", kv_heads=4),
    "head-dim-128": dataclasses.replace(BASE, head_dim=128, batch=2, heads=3, kv_heads=1),
    "blocks-of-128": dataclasses.replace(BASE, pattern=S2_128, head_dim=128),
    "blocks-of-16": dataclasses.replace(BASE, pattern=S2_16, head_dim=128),
    "blocks-of-16-window": dataclasses.replace(
        BASE, pattern=S2_16, window=100, batch=2, kv_lengths=(1000, 333)
    ),
    "blocks-of-32-packed": dataclasses.replace(
        BASE, pattern=S2_32, segments="packed", window=100, q_len=600, kv_len=600
    ),
    "blocks-of-16-not-causal": dataclasses.replace(
        BASE, pattern=s2_jax.local_stride(9, 3, block_size=16, causal=False), window=200
    ),
    "blocks-of-32": dataclasses.replace(BASE, pattern=S2_32, query_offset=128, kv_len=1128),
    "blocks-of-32-padded": dataclasses.replace(
        BASE, pattern=S2_32, batch=2, query_lengths=(1000, 130), kv_lengths=(900, 300)
    ),
    "odd-lengths": dataclasses.replace(BASE, q_len=1003, kv_len=1003, batch=2, head_dim=128),
    "odd-lengths-packed": dataclasses.replace(
        BASE, q_len=333, kv_len=461, query_offset=128, segments="packed"
    ),
    "odd-lengths-padded": dataclasses.replace(
        BASE,
        q_len=301,
        kv_len=999,
        batch=2,
        query_lengths=(301, 9),
        kv_lengths=(997, 3),
        pattern=s2_jax.local_stride(2, 3, causal=False),
    ),
    "one-token": dataclasses.replace(BASE, q_len=1, kv_len=1),
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
    "padded-by-all-three": dataclasses.replace(
        BASE, batch=3, query_lengths=(1000, 0, 641), kv_lengths=(1000, 5, 700), tiles=OWN
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
    # The heads of a group in several programs each, whose sums are added up.
    "one-group": dataclasses.replace(BASE, heads=8, kv_heads=1, head_dim=128),
    "one-group-packed": dataclasses.replace(BASE, heads=8, kv_heads=1, segments="packed"),
    # As in test_pinned_peak.py: weights leave what the pinned peak is good for.
    "beyond-the-peak": dataclasses.replace(BASE, scale=12.0, q_len=1112, kv_len=1112),
    "beyond-the-peak-float16": dataclasses.replace(
        BASE, scale=12.0, dtype="float16", q_len=904, kv_len=904
    ),
    "below-the-peak": dataclasses.replace(
        BASE, pattern=s2_jax.dense(), scale=-12.0, q_len=200, kv_len=840, query_offset=640
    ),
}


@pytest.fixture(autouse=True)
def dkv_for_short_rows(monkeypatch):
    monkeypatch.setattr(tiles, "LEAST_MOSAIC_ROWS", dict.fromkeys(tiles.LEAST_MOSAIC_ROWS, 1))


def attention(implementation=None, pattern=S2, **options):
    return lambda q, k, v: s2_jax.s2_attention(
        q, k, v, pattern, implementation=implementation, **options
    )


@pytest.mark.gpu
@needs_mosaic
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_agrees_with_the_oracle(call):
    check(call, "mosaic")


@pytest.mark.gpu
@needs_mosaic
@pytest.mark.parametrize("name", [n for n, c in CALLS.items() if c.pattern.block_size > 16])
def test_one_backward_kernel_agrees_with_the_oracle(name):
    check(dataclasses.replace(CALLS[name], tiles=ONE), "mosaic")


@pytest.mark.gpu
@needs_mosaic
@pytest.mark.parametrize("by_rank", [False, True])
@pytest.mark.parametrize(
    "name", ["groups", "many-tiles-packed", "many-blocks", "one-group", "padded-by-all-three"]
)
def test_programs_of_several_key_tiles(name, by_rank, monkeypatch):
    # A scale of its own: what was traced at others is kept, with other programs.
    call = dataclasses.replace(CALLS[name], scale=0.21 + by_rank / 100)

    def of(lists, heads):
        several, last = divmod(lists.num_tiles - 1, 3)
        return Chunks(by_rank, heads, 1, several, 3, last)

    monkeypatch.setattr(Chunks, "of", of)
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
    dkv = Tile(128, 128, 8, block_kv // 32 + 1, lowering="mosaic")
    call = dataclasses.replace(BASE, head_dim=64, tiles=TileConfig(tile, tile, dkv))
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
@pytest.mark.parametrize("tiles", [None, OWN, ONE], ids=["usual", "own", "one_backward"])
@pytest.mark.parametrize("name", ["padded", "packed-and-padded"])
def test_nan_in_the_padding_reaches_nothing(name, tiles):
    assert_padding_reaches_nothing(dataclasses.replace(CALLS[name], tiles=tiles), "mosaic")


def small_weights(implementation):
    """How far dk and dv of keys with weights of 1e-6 and less are off, relative, in float16.

    One key has nearly all the weight, and a loss scale is on.
    """
    call = dataclasses.replace(
        BASE, pattern=s2_jax.dense(causal=False), q_len=128, kv_len=128, heads=1, kv_heads=1,
        dtype="float16", scale=1.0, tiles=OWN,
    )  # fmt: skip
    inputs = call.inputs()
    query, key = (inputs[name] * np.float16(0.1) for name in ("query", "key"))
    query[..., 0], key[..., 0], key[:, 0] = 1, 0, 0
    key[:, 0, :, 0] = 14
    changed = {"query": query, "key": key, "d_out": inputs["d_out"] * np.float16(256)}
    changed["d_lse"] = np.zeros_like(inputs["d_lse"])
    found = call.run(implementation, **changed)
    exact = {name: array.astype(np.float64) for name, array in (inputs | changed).items()}
    mask = np.ones((1, 1, 128, 128), bool)
    wanted = _dense(**exact, mask=mask, scale=1.0, cap=None)
    rest = np.s_[:, 1:]  # keys
    return {
        name: np.linalg.norm(found[name][rest] - wanted[name][rest])
        / np.linalg.norm(wanted[name][rest])
        for name in ("dk", "dv")
    }


@pytest.mark.gpu
@needs_mosaic
def test_small_float16_weights_keep_their_digits():
    assert max(small_weights("mosaic").values()) < 2e-3


@pytest.mark.gpu
@needs_mosaic
@pytest.mark.parametrize("tiles", [None, ONE], ids=["usual", "one_backward"])
def test_the_same_call_gives_the_same_bits(tiles):
    call = dataclasses.replace(
        BASE, head_dim=128, heads=8, kv_heads=8, q_len=2048, kv_len=2048, tiles=tiles
    )
    first, second = (call.run("mosaic") for _ in range(2))
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], err_msg=name)
