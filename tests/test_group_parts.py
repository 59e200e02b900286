"""The heads of a group in one program of dk/dv, or in several whose sums are added."""

import pytest

import s2_jax
from pallas_kernels import backward
from pallas_kernels.backward import parts_of_group
from pallas_kernels.tiles import Tile
from s2_jax.layout import PatternLayouts
from tests.calls import AttentionCall, check, small_tiles

TILE = Tile(64, 64, 4, 2)


@pytest.mark.parametrize(("parts", "heads"), [(1, "kv"), (2, "kv"), (6, "kv"), (3, "query")])
def test_parts_add_up(kernels, parts, heads, monkeypatch):
    monkeypatch.setattr(backward, "parts_of_group", lambda *_: parts)
    pattern = s2_jax.local_stride(1, 3, block_size=16, heads=heads)
    # A length of its own: what was traced at another is kept, with other parts.
    call = AttentionCall(
        pattern, q_len=211 + parts, kv_len=197, heads=12, kv_heads=2, batch=2,
        dtype="bfloat16" if parts == 2 else "float32",
        tiles=small_tiles(16, 32 if heads == "kv" else 16),
    )  # fmt: skip
    check(call, kernels)


@pytest.mark.parametrize(
    ("group", "longest", "parts"),
    [(1, 9.0, 1), (4, 0.0, 1), (4, 1.2, 1), (4, 2.5, 2), (4, 99.0, 4), (6, 3.6, 3), (5, 2.0, 5)],
)
def test_parts_make_the_longest_row_short(group, longest, parts):
    assert parts_of_group(group, TILE, longest) == parts


def test_fewer_and_larger_programs_take_longer_each():
    assert parts_of_group(4, Tile(64, 128, 8, 3), 2.5) == 1


def test_short_rows_have_the_longer_longest_row():
    pattern = s2_jax.local_stride(8, 16)
    tiles = s2_jax.TileConfig(forward=TILE, dq=TILE, dkv=TILE)
    shares = [
        PatternLayouts(pattern, 32, 8, 0, length, length, tiles).dkv().longest
        for length in (8192, 32768, 131072)
    ]
    assert shares == sorted(shares, reverse=True)
    # A column of all later queries beside what 264 programs do, of one head.
    rows = sum(min(n, 8) + max(0, (n - 8) / 16) for n in range(1, 2049))
    assert shares[2] == pytest.approx(2048 / (rows / 264), rel=0.03)
