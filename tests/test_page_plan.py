"""The plan of the evicting cache against the pattern's own mask."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import s2_jax
from s2_jax.page_plan import plan_pages
from tests.draws import draw_pattern


@st.composite
def rows(draw):
    """A pattern, query heads, key/value heads and a number of blocks."""
    pattern = draw_pattern(draw, {"block_size": 16})
    if draw(st.sampled_from([False, False, True])):
        window = s2_jax.token_window(draw(st.integers(1, 70)), block_size=16)
        pattern = draw(st.sampled_from([pattern | window, pattern & window]))
    kv_heads, group = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 3]))
    blocks = draw(st.integers(1, 60))
    if draw(st.sampled_from([False, False, False, True])):  # of which no structure is known
        mask = pattern.block_mask_at(num_heads=kv_heads, q_blocks=blocks, kv_blocks=blocks)
        pattern = s2_jax.block_mask(mask, block_size=16)
    return pattern, kv_heads * group, kv_heads, blocks


def last_seen(pattern, num_heads, num_kv_heads, blocks):
    """The last query block of each key block, int `[num_kv_heads, blocks]`; -1 where none is."""
    mask = pattern.block_mask_at(
        num_heads=num_heads, num_kv_heads=num_kv_heads, q_blocks=blocks, kv_blocks=blocks
    )
    seen = mask.reshape(num_kv_heads, -1, blocks, blocks).any(axis=1)
    return np.max(np.where(seen, np.arange(blocks)[:, None], -1), axis=1)


# Plans are NumPy's work and compile nothing: many can be drawn.
@settings(max_examples=300)
@given(rows())
def test_a_plan_keeps_what_is_seen_and_no_more(row):
    pattern, num_heads, num_kv_heads, blocks = row
    length = 16 * blocks
    if not pattern.is_kv_efficient(num_heads, length, length, num_kv_heads):
        with pytest.raises(ValueError, match="not KV-efficient"):
            plan_pages(pattern, num_heads, num_kv_heads, blocks)
        return
    plan = plan_pages(pattern, num_heads, num_kv_heads, blocks)
    last, used = last_seen(*row), []
    np.testing.assert_array_equal(plan.last_of_block[plan.plan_of_head], last)
    for ends, slots in zip(last, plan.slot_of_block[plan.plan_of_head]):
        np.testing.assert_array_equal(slots >= 0, ends >= 0)
        # A block lives while it is seen and one block longer; no two that live share a slot.
        block = np.arange(blocks)
        alive = (slots >= 0) & (block <= block[:, None]) & (block[:, None] <= ends + 1)
        for now in alive:
            assert len(set(slots[now])) == now.sum()
        # As many slots as ever live at once, the lowest first.
        most = np.maximum.accumulate([0, *alive.sum(axis=1)])
        np.testing.assert_array_equal(np.maximum.accumulate([-1, *slots]) + 1, most)
        used.append(most)
    np.testing.assert_array_equal(plan.slots_by_block, np.max(used, axis=0))
    assert plan.slots == max(1, plan.slots_by_block[-1])


def test_a_small_plan():
    """Two local blocks and every third: the other two slots go round, one block late.

    Block 1 is seen last by block 2, so that block 3 may not have its slot, but block 4 may.
    """
    pattern = s2_jax.local_stride(2, 3, homogeneous=True)
    plan = plan_pages(pattern, 2, 1, 9)
    assert plan.plan_of_head.tolist() == [0]
    assert plan.last_of_block.tolist() == [[8, 2, 3, 8, 5, 6, 8, 8, 8]]
    assert plan.slot_of_block.tolist() == [[0, 1, 2, 3, 1, 2, 4, 1, 2]]
    assert plan.slots_by_block.tolist() == [0, 1, 2, 3, 4, 4, 4, 5, 5, 5]


def test_heads_alike_share_a_plan():
    pattern = s2_jax.local_stride(1, 4, head_step=2, block_size=16)
    assert plan_pages(pattern, 8, 8, 20).plan_of_head.tolist() == [0, 1] * 4
    with_queries = s2_jax.local_stride(1, 4, head_step=1, heads="query", block_size=16)
    assert plan_pages(with_queries, 8, 2, 20).plan_of_head.tolist() == [0, 0]


def test_the_reason_names_head_and_blocks():
    """Of the second head, which comes back to its column."""
    back = s2_jax.local(1) | s2_jax.sink(1).at_distance(3, None)
    pattern = s2_jax.per_head([s2_jax.local(2), back])
    message = "key/value head 1 does not see key block 0 from query block 2, but does from 3"
    with pytest.raises(ValueError, match=message):
        plan_pages(pattern, 4, 2, 9)


def test_a_long_row_is_planned_from_one_period():
    """A million tokens: a plan of 16384 blocks, from the 66 columns that differ."""
    pattern = s2_jax.local_stride(8, 64) | s2_jax.sink(2)
    plan = plan_pages(pattern, 2, 2, 1 << 14)
    columns = (1 << 14) // 64
    assert plan.slots == 2 + columns + 8 + 1  # sinks, local blocks, and the one that goes


def test_bidirectional_patterns_are_refused():
    with pytest.raises(ValueError, match="a cache needs a causal pattern"):
        plan_pages(s2_jax.local(2, causal=False), 1, 1, 4)
