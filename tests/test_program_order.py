"""Which program takes which row of which head: every one once, in the order that is meant."""

import jax.numpy as jnp
import numpy as np
import pytest

import s2_jax
from pallas_kernels import hopper_keys
from pallas_kernels.call import Grid
from pallas_kernels.tiles import Tile
from s2_jax import packing
from s2_jax.layout import PatternLayouts, block_lists
from tests.calls import AttentionCall, check, small_tiles

TILE = Tile(64, 64, 4, 2)


@pytest.mark.parametrize("together", [None, 1, 2, 3, 7, 9])
@pytest.mark.parametrize(("heads", "rows"), [(1, 1), (3, 7), (4, 12), (5, 2)])
def test_programs_take_every_row_of_every_head(heads, rows, together):
    grid = Grid(heads, rows, 2, together)
    width, height, batch = grid.shape
    assert (width * height, batch) == (heads * rows, 2)
    number = np.arange(heads * rows, dtype=np.int32)
    head, rank = grid._place(jnp.asarray(number % width), jnp.asarray(number // width))
    size = together or rows
    expected = [
        (h, r)
        for first in range(0, rows, size)
        for h in range(heads)
        for r in range(first, min(first + size, rows))
    ]
    assert list(zip(head.tolist(), rank.tolist(), strict=True)) == expected


@pytest.mark.parametrize("together", [1, 3, 4])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2)])
def test_the_order_changes_no_result(heads, kv_heads, together, kernels, monkeypatch):
    monkeypatch.setattr(packing, "_together", lambda *_: together)
    block_lists.cache_clear()
    # Lengths of its own: what was traced at others is kept, in another order.
    call = AttentionCall(
        s2_jax.local_stride(2, 3, block_size=16), q_len=150 + together, kv_len=163, heads=heads,
        kv_heads=kv_heads, batch=2, dtype="float32", tiles=small_tiles(16, 32),
    )  # fmt: skip
    try:
        check(call, kernels)
    finally:
        block_lists.cache_clear()


def test_long_columns_are_begun_early_and_share_the_cache():
    def together(length: int, heads: int = 32) -> int | None:
        tiles = s2_jax.TileConfig(forward=TILE, dq=TILE, dkv=TILE)
        pattern = s2_jax.local_stride(8, 16)
        return PatternLayouts(pattern, heads, heads, 0, length, length, tiles).dkv().together

    assert together(8192) == together(16384) == 1
    assert together(32768) == together(131072) == 64
    assert together(1 << 19) is None
    assert together(65536, heads=8) == 1


@pytest.mark.parametrize("multiprocessors", [1, 132])
@pytest.mark.parametrize("heads", [3, 32])
@pytest.mark.parametrize(
    ("pattern", "length"),
    [
        (s2_jax.local_stride(8, 16), 8192),
        (s2_jax.local_stride(8, 16), 1000),
        (s2_jax.dense(), 4096),
    ],
    ids=["columns", "few", "dense"],
)
def test_programs_of_several_key_tiles_take_each_once(
    pattern, length, heads, multiprocessors, monkeypatch
):
    monkeypatch.setattr(hopper_keys, "multiprocessors", lambda: multiprocessors)
    tile = Tile(128, 128, 8, 2, lowering="mosaic")
    lists = PatternLayouts(
        pattern, 32, 32, 0, length, length, s2_jax.TileConfig(tile, tile, tile)
    ).dkv()  # fmt: skip
    chunks = hopper_keys.Chunks.of(lists, heads)
    place = chunks.place(jnp.arange(chunks.programs, dtype=jnp.int32))
    tiles = [
        (head, rank + step * chunks.several)
        for head, rank, number in zip(*map(np.asarray, place), strict=True)
        for step in range(number)
    ]
    assert sorted(tiles) == [(h, r) for h in range(heads) for r in range(lists.num_tiles)]
    # What is long comes before what is short, and single tiles at the end.
    ranks = np.asarray(place.rank)
    assert ranks[: chunks.heads * chunks.long].max(initial=-1) < max(chunks.long, 1)
    assert np.all(np.asarray(place.tiles)[chunks.programs - heads * chunks.last :] == 1)
    assert 1 <= chunks.size <= 8
    if multiprocessors == 1 and length == 8192:
        assert chunks.size == 8
        assert chunks.several > 0


def test_long_key_tiles_come_head_by_head_unless_the_last_would_end_late(monkeypatch):
    monkeypatch.setattr(hopper_keys, "multiprocessors", lambda: 132)

    def by_rank(heads: int) -> bool:
        tile = Tile(128, 128, 8, 2, lowering="mosaic")
        tiles = s2_jax.TileConfig(tile, tile, tile)
        layouts = PatternLayouts(s2_jax.local_stride(8, 16), 32, 32, 0, 131072, 131072, tiles)
        return hopper_keys.Chunks.of(layouts.dkv(), heads).by_rank

    assert by_rank(8)
    assert not by_rank(32)
