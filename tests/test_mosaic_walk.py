"""Which tiles and keys Mosaic's kernels take, found by running their walks in plain JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import s2_jax
from pallas_kernels import hopper_forward, hopper_tiles
from pallas_kernels.call import Settings
from pallas_kernels.tiles import Tile, TileConfig
from s2_jax.layout import PatternLayouts, number_patterns

S2 = s2_jax.local_stride(2, 3)


def schedule(q_len, *, batch=1, heads=3, keys=128, offset=0, pattern=S2, **masks):
    """A forward kernel's, over arrays."""
    tile = Tile(128, keys, 8, 2, lowering="mosaic")
    tiles = TileConfig(tile, tile, Tile(64, 64, 4, 2))
    kv_len = offset + q_len
    settings = Settings(
        layouts=PatternLayouts(pattern, heads, heads, offset, kv_len, kv_len, tiles),
        tiles=tiles, scale=1.0, causal=pattern.causal, block_size=pattern.block_size,
        query_offset=offset, q_limit=kv_len,
    )  # fmt: skip
    lists = settings.layouts.forward()
    numbers = jnp.asarray(number_patterns(pattern.head_keys(heads, heads)), jnp.int32)
    arrays = {
        "query": jnp.zeros((batch, q_len, heads, 64)),
        "key": jnp.zeros((batch, kv_len, heads, 64)),
        "pattern_of_head": jnp.broadcast_to(numbers, (batch, heads)),
        "offset": jnp.full((batch,), offset, jnp.int32),
        **masks,
    }
    refs = hopper_tiles.operands(
        settings, lists, arrays, {n: jnp.asarray(x) for n, x in lists.arrays.items()}
    )
    return hopper_tiles.Schedule(refs, settings, lists, heads, batch, q_len, kv_len)


@pytest.fixture
def as_program(monkeypatch):
    """Runs a function as if in a program of so many, by its number."""

    def run(function, programs):
        monkeypatch.setattr(hopper_tiles, "multiprocessors", lambda: programs)

        @jax.jit
        def one(number):
            monkeypatch.setattr(hopper_tiles.lax, "axis_index", lambda name: number)
            return function()

        try:
            return [one(np.int32(number)) for number in range(programs)]
        finally:
            monkeypatch.undo()

    return run


@pytest.mark.parametrize("programs", [1, 2, 5, 8, 60])
@pytest.mark.parametrize(("q_len", "batch", "heads"), [(640, 1, 3), (1024, 2, 3), (8, 1, 1)])
def test_every_tile_is_taken_once_and_long_ones_are_shared_out(
    q_len, batch, heads, programs, as_program
):
    of = schedule(q_len, batch=batch, heads=heads)
    tiles = -(-q_len // 128)
    programs = min(programs, tiles * heads * batch)

    def take():
        def body(round_, taken):
            task = of.task(round_)
            return taken.at[task.batch, task.head, task.place].add(1)

        return of.visit(body, jnp.zeros((batch, heads, tiles), jnp.int32))

    taken = np.stack(as_program(take, programs))
    np.testing.assert_array_equal(taken.sum(axis=0), 1)
    rows = (taken * np.arange(1, tiles + 1)).sum(axis=(1, 2, 3))  # a row's work grows with it
    assert rows.max() - rows.min() <= 2 * tiles


def test_a_length_that_deals_the_same_rows_is_shared_out_too(as_program):
    """Each program's tiles stand as far apart as a head has tiles."""
    of = schedule(128 * 12, heads=8)

    def take():
        return of.visit(lambda round_, work: work + of.task(round_).place + 1, jnp.int32(0))

    work = np.stack(as_program(take, 12))
    assert work.max() == work.min() == 8 * 13 // 2


def visited(of, everything=False):
    """bool `[batch, heads, q_len, kv_len]`: what the steps of all tiles let queries see, and how
    often each unit is fetched for a tile that no mask hides from it.
    """
    size, lists = of.lists.unit, of.lists.group
    units = -(-of.kv_len // size) + 4
    seen = np.zeros((of.batch, of.heads, of.lists.num_tiles, 2, units), np.int32)

    @jax.jit
    def one(round_):
        task = of.task(round_)

        def step(at, counts):
            for place in range(lists):
                unit, bits, exists = at(place)
                for half in range(2):
                    part = half * of.lists.rows // 2
                    counts = counts.at[half, unit].add(((bits >> part) & 1) * jnp.int32(exists))
            return counts

        counts = jnp.zeros((2, units), jnp.int32)
        masked = task.steps.visit_masked(step, counts, everything=everything)
        plain = counts if everything else task.steps.visit_plain(step, counts)
        number = task.steps.number(everything)
        walked = task.steps.visit_masked(lambda _, n: n + 1, jnp.int32(0), everything=everything)
        return task.batch, task.head, task.place, number, walked, masked, plain

    first = of.settings.query_offset // 128
    for number in range(of.tiles):
        batch, head, place, told, walked, masked, plain = one(np.int32(number))
        assert told[0] == walked
        assert int(plain.sum()) == 2 * lists * int(told[1])
        seen[batch, head, place - first] = masked + plain
    return seen


@pytest.mark.parametrize("keys", [64, 128])
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("offset", [0, 256])
def test_steps_are_the_blocks_that_are_seen(keys, everything, offset, monkeypatch):
    monkeypatch.setattr(hopper_tiles.lax, "axis_index", lambda name: jnp.int32(0))
    monkeypatch.setattr(hopper_tiles, "multiprocessors", lambda: 1)
    of = schedule(600, keys=keys, offset=offset)
    found = visited(of, everything)
    rows = -(-(offset + 600) // 64)
    mask = S2.block_mask_at(num_heads=3, num_kv_heads=3, q_blocks=rows, kv_blocks=rows)
    expected = np.zeros_like(found)
    for row in range(offset // 64, rows):
        expected[0, :, (row - offset // 64) // 2, row % 2, :rows] = mask[:, row]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("everything", [False, True])
def test_steps_of_packed_rows_leave_other_documents_out(everything, monkeypatch):
    monkeypatch.setattr(hopper_tiles.lax, "axis_index", lambda name: jnp.int32(0))
    monkeypatch.setattr(hopper_tiles, "multiprocessors", lambda: 1)
    ids = jnp.asarray(np.repeat([1, 2, 3], [700, 300, 536]), jnp.int32)[None]
    whole = functools.partial(schedule, 1536, pattern=s2_jax.dense())
    alone, packed = visited(whole()), visited(whole(q_ids=ids, kv_ids=ids), everything)
    assert (packed <= alone).all()
    ids = np.asarray(ids)[0].reshape(-1, 64)
    meet = np.array([[bool(set(q) & set(k)) for k in ids] for q in ids])
    needed = np.zeros_like(packed)
    for row in range(24):
        needed[0, :, row // 2, row % 2, :24] = meet[row] & (np.arange(24) <= row)
    assert (packed >= needed).all()
    assert packed.sum() < 0.7 * alone.sum()


@pytest.mark.parametrize("rounds", [33, 150])
def test_tiles_taken_again_are_those_that_left_the_range(rounds, monkeypatch):
    """And, where there are more than flags, those that share theirs."""
    monkeypatch.setattr(hopper_forward, "_FLAGS", 128)
    rng = np.random.default_rng(rounds)
    flags = hopper_forward.Flags(np.full((2, 4), -1, np.int32))  # what was there before
    bad = rng.random((2, rounds)) < 0.1
    for round_, warpgroup in np.ndindex(rounds, 2):
        flags.set(warpgroup, np.int32(round_), bad[warpgroup, round_])

    class Rounds:
        @staticmethod
        def visit(body, state):
            for round_ in range(rounds):
                state = body(np.int32(round_), state)
            return state

    def take(round_, state):
        return state.at[round_].add(1)

    taken = np.asarray(flags.visit(Rounds, take, jnp.zeros(rounds, jnp.int32)))
    shared = np.zeros(128, bool)
    np.logical_or.at(shared, np.arange(rounds) % 128, bad.any(axis=0))
    np.testing.assert_array_equal(taken, shared[np.arange(rounds) % 128])
