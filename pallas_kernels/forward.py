"""The forward kernel: output and LSE of one query tile of one head a program.

FlashAttention-2's online softmax (arXiv 2307.08691, section 3.1), over the key tiles that the
block lists name.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.call import (
    Grid,
    ListRefs,
    Operands,
    Settings,
    num_query_tiles,
    padded_dim,
    query_rows,
    whole,
)
from pallas_kernels.lowering import call_kernel
from pallas_kernels.rows import load_rows, store_rows, store_scalars
from pallas_kernels.softmax import LOG2_E, Softmax, dot, partial_mask
from pallas_kernels.walk import ListMeta, walk_partial, walk_runs


def s2_forward_kernel(*refs: Any, settings: Settings, meta: ListMeta, grid: Grid) -> None:
    q_ref, k_ref, v_ref = refs[:3]
    o_ref, lse_ref = refs[-2:]
    head, rank, batch = grid.program()
    lists = ListRefs(refs[3 : 3 + Operands.SIZE], meta, settings, batch)
    tile = settings.tiles.forward
    q_len, kv_len = q_ref.shape[0], k_ref.shape[0]
    dim, value_dim = padded_dim(q_ref.shape[1]), padded_dim(v_ref.shape[1])
    row, q_positions, q_rows, exists = query_rows(
        settings, lists, head, rank, grid, tile.block_q, q_len
    )
    query = load_rows(q_ref, q_rows, dim, exists)
    log2_scale = settings.scale * LOG2_E

    def attend(carry: Softmax, positions: jax.Array, bits: jax.Array | None) -> Softmax:
        inside = None if bits is None else positions < kv_len
        key = load_rows(k_ref, positions, dim, inside)
        scores = dot(query, key, transpose_b=True)
        if bits is not None:
            mask = partial_mask(
                0, min(tile.block_q, settings.block_size), meta.rows, bits, q_positions, positions,
                causal=settings.causal, limits=(0, kv_len),
            )  # fmt: skip
            scores = jnp.where(mask, scores, -jnp.inf)
        return carry.step(scores, load_rows(v_ref, positions, value_dim, inside), log2_scale)

    carry = Softmax.start(tile.block_q, value_dim)
    carry = walk_runs(
        lists.run_start, lists.runs, row, meta, lambda p, c: attend(c, p, None), carry
    )
    carry = walk_partial(
        lists.partial_start, lists.partial, row, meta, lambda p, b, c: attend(c, p, b), carry
    )
    out, lse = carry.finish(log2_scale)
    if settings.query_offset is None:
        defined = (q_positions >= 0) & (q_positions < settings.q_limit)
        out = jnp.where(defined[:, None], out, jnp.nan)
        lse = jnp.where(defined, lse, jnp.nan)
    store_rows(o_ref, q_rows, out, exists)
    store_scalars(lse_ref, q_rows, lse, exists)


def forward(
    settings: Settings,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    pattern_of_head: jax.Array,
    offset: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Output `[batch, q_len, heads, value_dim]` and LSE, in log2, `[batch, heads, q_len]`."""
    batch, q_len, num_heads, head_dim = query.shape
    kv_len, kv_heads, value_dim = value.shape[1:]
    group = num_heads // kv_heads
    lists = settings.layouts.forward()
    rows = num_query_tiles(settings, lists, settings.tiles.forward.block_q, q_len)
    grid = Grid(num_heads, rows, batch, lists.heads_first)
    operands = Operands.of(lists, pattern_of_head, offset)
    out, lse = call_kernel(
        functools.partial(s2_forward_kernel, settings=settings, meta=ListMeta.of(lists), grid=grid),
        (query, key, value, *operands),
        name="s2_attention_forward",
        grid=grid.shape,
        in_specs=[
            grid.by_head(q_len, head_dim),
            grid.by_head(kv_len, head_dim, group),
            grid.by_head(kv_len, value_dim, group),
            *map(whole, operands),
        ],
        out_specs=[
            grid.by_head(q_len, value_dim),
            grid.scalars(q_len),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((batch, q_len, num_heads, value_dim), query.dtype),
            jax.ShapeDtypeStruct((batch, num_heads, q_len), jnp.float32),
        ],
        tile=settings.tiles.forward,
        launcher=settings.launcher,
    )
    return out, lse
