"""Block lists: drawn by hand for a small pattern, and unrolled token by token for drawn ones."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import s2_jax
from pallas_kernels.block_lists import COUNT_BITS, MAX_COUNT
from pallas_kernels.tiles import Tile, TileConfig, pick_tiles
from s2_jax import layout
from s2_jax.layout import Geometry, PatternLayouts, block_lists, number_patterns
from s2_jax.runs import RunBuilder
from s2_jax.structure import Heads
from tests.draws import draw_pattern


def read(lists, row):
    """Runs as (first, step, count) and partial units as (unit, bits) of one row."""
    runs = [
        (int(first), int(word) >> COUNT_BITS, int(word) & MAX_COUNT)
        for first, word in lists.runs[lists.run_start[row] : lists.run_start[row + 1]]
    ]
    entries = lists.partial[lists.partial_start[row] : lists.partial_start[row + 1]]
    return runs, [(int(e) >> lists.rows, int(e) & ((1 << lists.rows) - 1)) for e in entries]


def test_local_stride_by_hand():
    """Head 0 of local_stride(2, 3), six blocks of 16; rows come longest first.

    # . . . . .
    # # . . . .
    # # # . . .
    # . # # . .
    # . . # # .
    # . . # # #
    """
    pattern = s2_jax.local_stride(2, 3, block_size=16)
    lists = block_lists(pattern, 1, 1, Geometry("q", 16, 16, 16, 0, 96, 96))
    assert lists.order.tolist() == [[5, 4, 3, 2, 1, 0]]
    assert [read(lists, row) for row in range(6)] == [
        ([(0, 3, 2), (4, 1, 1)], [(5, 1)]),
        ([(0, 3, 2)], [(4, 1)]),
        ([(0, 2, 2)], [(3, 1)]),
        ([(0, 1, 2)], [(2, 1)]),
        ([(0, 1, 1)], [(1, 1)]),
        ([], [(0, 1)]),
    ]


def test_merged_rows_by_hand():
    """The same in query tiles of two blocks: what one of the two rows misses is partial."""
    pattern = s2_jax.local_stride(2, 3, block_size=16)
    lists = block_lists(pattern, 1, 1, Geometry("q", 32, 16, 16, 0, 96, 96))
    by_tile = {int(tile): read(lists, row) for row, tile in enumerate(lists.order[0])}
    assert by_tile == {
        0: ([], [(0, 0b11), (1, 0b10)]),
        1: ([(0, 1, 1)], [(1, 0b01), (2, 0b11), (3, 0b10)]),
        2: ([(0, 3, 2)], [(4, 0b11), (5, 0b10)]),
    }


def test_the_transpose_by_hand():
    """Columns of the same: column 0 serves every later query, column 1 its own block and one."""
    pattern = s2_jax.local_stride(2, 3, block_size=16)
    lists = block_lists(pattern, 1, 1, Geometry("kv", 16, 16, 16, 0, 96, 96))
    by_tile = {int(tile): read(lists, row) for row, tile in enumerate(lists.order[0])}
    assert by_tile[0] == ([(1, 1, 5)], [(0, 1)])
    assert by_tile[1] == ([(2, 1, 1)], [(1, 1)])
    assert by_tile[3] == ([(4, 1, 2)], [(3, 1)])
    assert lists.order[0][0] == 0


def tiles_of(lists, pattern):
    """The parts of the tile of each row, `[num_tiles, rows]`."""
    order = np.asarray(lists.order[pattern])
    if lists.holds_queries:
        return order[:, None] * lists.rows + np.arange(lists.rows)
    return order.reshape(-1, lists.rows)


def unrolled(lists, geometry, row, parts, window=None):
    """How often each (query, key) pair of a tile's row is visited, twice where unmasked."""
    visits = np.zeros((geometry.q_stop, geometry.kv_len), int)
    fixed = np.concatenate([p * geometry.part + np.arange(geometry.part) for p in parts])
    part = np.arange(geometry.fixed_tile) // geometry.part
    low, high = geometry.walk_range
    runs, partial = read(lists, row)
    everyone = (1 << lists.rows) - 1
    units = [(first + i * step, everyone, True) for first, step, count in runs
             for i in range(count * lists.group)]  # fmt: skip
    for unit, bits, full in units + [(unit, bits, False) for unit, bits in partial]:
        walk = unit * lists.unit + np.arange(lists.unit)
        if full:
            assert low <= walk.min()
            assert walk.max() < high
        q, kv = np.meshgrid(*((fixed, walk) if geometry.fixed == "q" else (walk, fixed)),
                            indexing="ij")  # fmt: skip
        seen = np.broadcast_to((bits >> part) & 1 != 0, (lists.unit, part.size))
        seen = seen.T if geometry.fixed == "q" else seen
        if window is not None and not full:
            near = np.abs(q - kv) < window.size
            seen = seen | near if window.adds else seen & near
        inside = (
            (q >= geometry.q_start) & (kv >= 0) & (q < geometry.q_stop) & (kv < geometry.kv_len)
        )
        np.add.at(visits, (q[seen & inside], kv[seen & inside]), 1 + full)
    return visits


@st.composite
def geometries(draw):
    size = st.sampled_from([16, 32, 64, 128])
    start, q_len, kv_len = (draw(st.integers(low, 400)) for low in (0, 1, 1))
    return Geometry(
        draw(st.sampled_from(["q", "kv"])), draw(size), draw(size), draw(size),
        start, start + q_len, kv_len, draw(st.booleans()),
    )  # fmt: skip


@pytest.mark.parametrize("few_units", [0, 64], ids=["by-intervals", "by-rows"])
def test_lists_hold_every_visible_pair_once(few_units, monkeypatch):
    monkeypatch.setattr(layout, "_FEW_UNITS", few_units)

    @settings(max_examples=60)
    @given(geometries(), st.booleans(), st.data())
    def drawn(geometry, causal, data):
        pattern = draw_pattern(
            data.draw, {"block_size": geometry.block_size, "causal": causal}, depth=0
        )
        if size := data.draw(st.sampled_from([None, None, 1, 17, 100]), "window"):
            window = s2_jax.token_window(size, block_size=geometry.block_size, causal=causal)
            joins = data.draw(st.sampled_from("|& "), "joins")
            pattern = {"|": pattern | window, "&": pattern & window, " ": window}[joins]
        block_lists.cache_clear()
        lists = block_lists(pattern, 4, 2, geometry)
        numbers = number_patterns(pattern.head_keys(4, 2))
        q, kv = np.arange(geometry.q_stop)[:, None], np.arange(geometry.kv_len)[None]
        for head in {numbers.index(number) for number in numbers}:
            base = numbers[head] * lists.num_tiles
            tiles = tiles_of(lists, numbers[head])
            held = sorted(tiles[(tiles >= 0) & (tiles * geometry.part < geometry.fixed_range[1])])
            first = geometry.tiles.start * geometry.rows
            assert held == list(range(first, -(-geometry.fixed_range[1] // geometry.part)))
            if lists.whole:
                assert len(held) == tiles.size
            visits = sum(
                unrolled(lists, geometry, base + row, tile, pattern.token_window()[1])
                for row, tile in enumerate(tiles)
            )
            seen = pattern.visible_tokens(Heads(np.asarray(head), 4, 2), q, kv)
            seen = np.broadcast_to(seen, visits.shape) & (q >= geometry.q_start)
            assert (visits[seen] > 0).all()
            assert (visits <= 2).all(), "visited twice"
            full, masked = visits == 2, (visits == 1) & (q < kv if causal else False)
            assert (seen | ~full).all(), "a full tile needs no mask"
            assert (seen | masked)[visits == 1].all(), "only causality is left to the mask"

    drawn()


def test_random_masks_keep_every_block():
    rng = np.random.default_rng(3)
    mask = rng.random((4, 23, 29)) < 0.4
    pattern = s2_jax.block_mask(mask, block_size=16, causal=False)
    geometry = Geometry("q", 32, 32, 16, 0, 23 * 16, 29 * 16)
    lists = block_lists(pattern, 4, 4, geometry)
    for head in range(4):
        visits = sum(
            unrolled(lists, geometry, head * lists.num_tiles + row, tile)
            for row, tile in enumerate(tiles_of(lists, head))
        )
        assert np.array_equal(visits > 0, np.kron(mask[head], np.ones((16, 16), bool)))


def test_equal_heads_share_lists():
    """Stride 3 has three distinct heads, however many there are."""
    pattern = s2_jax.local_stride(1, 3, block_size=16)
    assert number_patterns(pattern.head_keys(7, 7)) == (0, 1, 2, 0, 1, 2, 0)
    lists = block_lists(pattern, 7, 7, Geometry("q", 16, 16, 16, 0, 160, 160))
    assert lists.order.shape == (3, 10)


def test_equal_calls_share_lists():
    tile = Tile(16, 16)
    tiles = TileConfig(tile, tile, tile)
    layouts = [
        PatternLayouts(s2_jax.local_stride(2, 3, block_size=16), 4, 2, 0, 100, 100, tiles)
        for _ in range(2)
    ]
    assert layouts[0] == layouts[1]
    assert layouts[0].forward() is layouts[1].forward()
    assert layouts[0].forward() is layouts[0].dq()


def test_a_gathered_tile_takes_the_units_of_a_run():
    """Vertical stride 4 in blocks of 16, walked in key tiles of 64: four columns a tile."""
    pattern = s2_jax.vertical_stride(4, block_size=16)
    lists = block_lists(pattern, 1, 1, Geometry("q", 16, 64, 16, 512, 528, 528))
    assert lists.group == 4
    runs, partial = read(lists, 0)
    assert runs == [(0, 4, 2)]
    assert partial == [(32, 1)]


@given(st.sets(st.integers(0, 40)), st.integers(0, 3))
def test_any_set_of_units_becomes_runs(units, tile):
    assume(units)
    builder = RunBuilder(4)
    for unit in sorted(units):
        builder.add(*(np.array([x]) for x in (tile, unit, 1, 1)))
    tiles, runs = builder.finish()
    assert set(tiles) == {tile}
    listed = [first + i * step for first, step, count in runs for i in range(count)]
    assert sorted(listed) == sorted(units)
    assert len(listed) == len(units)


def test_lists_refuse_rows_too_long_to_index():
    with pytest.raises(ValueError, match="use larger blocks"):
        block_lists(s2_jax.local(1, block_size=16), 1, 1, Geometry("q", 16, 16, 16, 0, 16, 1 << 22))


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_lists_grow_with_the_length_and_not_with_its_square(block_size):
    sizes = []
    for length in (1 << 14, 1 << 16):
        tiles = pick_tiles(head_dim=128, itemsize=2, q_len=length, block_size=block_size)
        pattern = s2_jax.local_stride(8, 16, block_size=block_size)
        layouts = PatternLayouts(pattern, 4, 4, 0, length, length, tiles)
        lists = [layouts.forward(), layouts.dq(), layouts.dkv()]
        sizes.append(sum(one.runs.nbytes + one.partial.nbytes for one in lists))
    assert sizes[1] < 5 * sizes[0]
