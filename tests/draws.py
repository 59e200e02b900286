"""Patterns and calls for hypothesis to draw."""

from __future__ import annotations

import dataclasses

from hypothesis import strategies as st

import s2_jax
from s2_jax import Tile, TileConfig
from tests.calls import AttentionCall, small_tiles

SEGMENTS = ("packed", "padded", "shuffled", "random")
VARIANTS = 8


def draw_pattern(draw, common, depth=0):
    number = lambda most: draw(st.integers(1, most))  # noqa: E731
    kinds = ["local", "vertical", "dilated", "sink", "s2"]
    kind = draw(st.sampled_from(kinds + ["or", "and", "distance"] * (depth < 2)))
    if kind == "local":
        return s2_jax.local(number(4), **common)
    if kind == "vertical":
        offset, heads = number(5), draw(st.sampled_from(["kv", "query"]))
        return s2_jax.vertical_stride(number(5), head_offset=offset, heads=heads, **common)
    if kind == "dilated":
        return s2_jax.dilated_stride(number(4), **common)
    if kind == "sink":
        return s2_jax.sink(number(2), **common)
    if kind == "s2":
        return s2_jax.local_stride(number(3), number(6), **common)
    if kind == "distance":
        near = draw(st.integers(0, 3))
        far = draw(st.sampled_from([None, near + 1, near + 3]))
        return draw_pattern(draw, common, depth + 1).at_distance(near, far)
    left, right = draw_pattern(draw, common, depth + 1), draw_pattern(draw, common, depth + 1)
    return left | right if kind == "or" else left & right


@st.composite
def call_families(draw, block_size: int) -> list[AttentionCall]:
    """Calls that share one compiled program: one shape and pattern, other tokens hidden in each."""
    pattern = draw_pattern(draw, {"block_size": block_size, "causal": draw(st.booleans())})
    block_q, block_kv = draw(st.sampled_from([(16, 16), (16, 32), (32, 16), (32, 32), (64, 16)]))
    several = draw(st.sampled_from([True, True, False]))
    q_len = draw(st.integers(2 * block_q + 1, 4 * block_q + 7) if several else st.integers(1, 40))
    kv_len = draw(st.integers(2 * block_kv + 1, 160) if several else st.integers(1, 70))
    if draw(st.booleans()):
        kv_len = q_len = max(q_len, kv_len) if several else q_len
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    head_dim = draw(st.sampled_from([16, 20, 32]))
    batch = draw(st.sampled_from([1, 2]))
    traced = draw(st.sampled_from([False, False, True]))
    call = AttentionCall(
        pattern,
        q_len=q_len,
        kv_len=kv_len,
        heads=kv_heads * draw(st.sampled_from([1, 2, 3])),
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=draw(st.sampled_from([head_dim, head_dim, 16, 24])),
        batch=batch,
        query_offset=draw(st.sampled_from([0, 0, 1, 31, 64])),
        window=draw(st.sampled_from([None, None, 1, 23, 64, 90])),
        window_joins=draw(st.sampled_from("|&")),
        soft_cap=draw(st.sampled_from([None, None, 2.0])),
        dtype=draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        tiles=small_tiles(block_q, block_kv),
    )
    hidden = {name: draw(st.booleans()) for name in ("segments", "query", "key")}

    def lengths(limit: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(0, limit)) for _ in range(batch))

    return [
        dataclasses.replace(
            call,
            seed=draw(st.integers(0, 99)),
            query_offset=lengths(max(q_len, kv_len)) if traced else call.query_offset,
            segments=draw(st.sampled_from(SEGMENTS)) if hidden["segments"] else None,
            query_lengths=lengths(q_len) if hidden["query"] else None,
            kv_lengths=lengths(kv_len) if hidden["key"] else None,
        )
        for _ in range(VARIANTS)
    ]


@st.composite
def decodings(draw) -> tuple[AttentionCall, list[tuple[int, ...]]]:
    """A call, and the pieces in which its tokens come to a cache; not all to each sequence."""
    kv_heads, block_size = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([16, 32]))
    length, batch = draw(st.integers(1, 7 * block_size)), draw(st.sampled_from([1, 2]))
    call = AttentionCall(
        draw_pattern(draw, {"block_size": block_size, "causal": True}),
        q_len=length,
        kv_len=length,
        heads=kv_heads * draw(st.sampled_from([1, 2, 3])),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([16, 20])),
        value_dim=draw(st.sampled_from([16, 24])),
        batch=batch,
        window=draw(st.sampled_from([None, None, 1, 23, 64])),
        window_joins=draw(st.sampled_from("|&")),
        soft_cap=draw(st.sampled_from([None, None, 2.0])),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        seed=draw(st.integers(0, 99)),
    )
    most = draw(st.sampled_from([16, 16, 48]))
    pieces, left = [], [draw(st.integers(0, length)) for _ in range(batch - 1)] + [length]
    while any(left):
        piece = tuple(
            draw(st.integers(0 if batch > 1 else 1, min(most, x))) if x else 0 for x in left
        )
        left = [x - came for x, came in zip(left, piece)]
        pieces.append(piece)
    return call, pieces


@st.composite
def mosaic_calls(draw) -> AttentionCall:
    """Calls that Mosaic's kernels take, small enough for an interpreter."""
    size = draw(st.sampled_from([64, 64, 128, 16, 32]))
    pattern = draw_pattern(draw, {"block_size": size, "causal": draw(st.booleans())})
    offset = draw(st.sampled_from([0, 0, 128, 256]))
    q_len = draw(st.integers(1, 40).map(lambda n: 8 * n) | st.integers(1, 320))
    kv_len = draw(st.sampled_from([offset + q_len, offset + q_len, draw(st.integers(1, 400))]))
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (1, 3)]))
    batch = draw(st.sampled_from([1, 1, 2]))
    forward, dq = (
        Tile(128, keys, 8, stages, lowering="mosaic")
        for keys, stages in draw(st.sampled_from([((64, 4), (128, 2)), ((128, 2), (64, 2))]))
    )

    dkv = Tile(128, 128, 8, 2, lowering="mosaic") if size > 16 else Tile(64, 64, 4, 1)

    def lengths(limit: int) -> tuple[int, ...] | None:
        return draw(st.none() | st.tuples(*[st.integers(0, limit)] * batch))

    return AttentionCall(
        pattern, q_len=q_len, kv_len=kv_len, heads=kv_heads * group, kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([64, 64, 128])), batch=batch, query_offset=offset,
        window=draw(st.sampled_from([None, None, 1, 70, 150])),
        window_joins=draw(st.sampled_from("|&")),
        dtype=draw(st.sampled_from(["bfloat16", "float16"])),
        segments=draw(st.sampled_from([None, None, *(SEGMENTS if size > 16 else ())])),
        query_lengths=lengths(q_len), kv_lengths=lengths(kv_len),
        scale=draw(st.sampled_from([None, None, 6.0])),
        tiles=TileConfig(forward, dq, dkv), seed=draw(st.integers(0, 99)),
    )  # fmt: skip
