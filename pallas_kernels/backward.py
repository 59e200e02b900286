"""The backward kernels: dq from the forward's lists, dk and dv from their transpose.

Both recompute the probabilities from the LSE (arXiv 2307.08691, section 3.2). Every output tile
belongs to one program, which adds in a fixed order: the gradients are the same bit for bit.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

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
from pallas_kernels.rows import load_rows, load_scalars, store_rows
from pallas_kernels.softmax import LOG2_E, dot, partial_mask
from pallas_kernels.walk import ListMeta, walk_partial, walk_runs


def s2_dq_kernel(*refs: Any, settings: Settings, meta: ListMeta, grid: Grid) -> None:
    q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref = refs[:6]
    dq_ref = refs[-1]
    head, rank, batch = grid.program()
    lists = ListRefs(refs[6 : 6 + Operands.SIZE], meta, settings, batch)
    tile = settings.tiles.dq
    q_len, kv_len = q_ref.shape[0], k_ref.shape[0]
    dim, value_dim = padded_dim(q_ref.shape[1]), padded_dim(v_ref.shape[1])
    row, q_positions, q_rows, exists = query_rows(
        settings, lists, head, rank, grid, tile.block_q, q_len
    )
    query = load_rows(q_ref, q_rows, dim, exists)
    grad_out = load_rows(do_ref, q_rows, value_dim, exists)
    lse = load_scalars(lse_ref, q_rows, exists, float("inf"))
    delta = load_scalars(delta_ref, q_rows, exists, 0.0)

    def accumulate(dq: jax.Array, positions: jax.Array, bits: jax.Array | None) -> jax.Array:
        inside = None if bits is None else positions < kv_len
        key = load_rows(k_ref, positions, dim, inside)
        scores = dot(query, key, transpose_b=True) * (settings.scale * LOG2_E)
        weights = jnp.exp2(scores - lse[:, None])
        value = load_rows(v_ref, positions, value_dim, inside)
        grad_weights = dot(grad_out, value, transpose_b=True)
        grad_scores = weights * (grad_weights - delta[:, None])
        if bits is not None:
            mask = partial_mask(
                0, min(tile.block_q, settings.block_size), meta.rows, bits, q_positions, positions,
                causal=settings.causal, limits=(0, kv_len),
            )  # fmt: skip
            grad_scores = jnp.where(mask, grad_scores, 0.0)
        return dq + dot(grad_scores.astype(key.dtype), key)

    dq = jnp.zeros((tile.block_q, dim), jnp.float32)
    dq = walk_runs(lists.run_start, lists.runs, row, meta, lambda p, c: accumulate(c, p, None), dq)
    dq = walk_partial(
        lists.partial_start, lists.partial, row, meta, lambda p, b, c: accumulate(c, p, b), dq
    )
    if settings.query_offset is None:
        defined = (q_positions >= 0) & (q_positions < settings.q_limit)
        dq = jnp.where(defined[:, None], dq, 0.0)
    store_rows(dq_ref, q_rows, dq * settings.scale, exists)


def s2_dkv_kernel(*refs: Any, settings: Settings, meta: ListMeta, grid: Grid, group: int) -> None:
    q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref = refs[:6]
    dk_ref, dv_ref = refs[-2:]
    kv_head, rank, batch = grid.program()
    lists = ListRefs(refs[6 : 6 + Operands.SIZE], meta, settings, batch)
    tile = settings.tiles.dkv
    q_len, kv_len = q_ref.shape[0], k_ref.shape[0]
    dim, value_dim = padded_dim(k_ref.shape[1]), padded_dim(v_ref.shape[1])
    offset = lists.offset()
    first_head = kv_head * group
    kv_positions = lists.tile_at(first_head, rank) * tile.block_kv + lax.iota(
        jnp.int32, tile.block_kv
    )
    exists = None if kv_len % tile.block_kv == 0 else kv_positions < kv_len
    kv_rows = kv_positions if exists is None else jnp.where(exists, kv_positions, kv_len)
    key = load_rows(k_ref, kv_rows, dim, exists)
    value = load_rows(v_ref, kv_rows, value_dim, exists)
    traced = settings.query_offset is None
    first, last, window = offset, offset + q_len, None
    if traced:
        first, last = jnp.maximum(offset, 0), jnp.minimum(last, settings.q_limit)
        unit = np.int32(meta.unit)
        window = (lax.div(first, unit), lax.div(last + (unit - 1), unit))

    def accumulate(
        member: Any, carry: tuple[jax.Array, jax.Array], positions: jax.Array, bits: Any
    ) -> tuple[jax.Array, jax.Array]:
        dk, dv = carry
        rows = positions - offset
        inside = None
        if bits is not None or traced:
            inside = (positions >= first) & (positions < last)
            rows = jnp.where(inside, rows, q_len)
        query = load_rows(q_ref, rows, dim, inside, member)
        lse = load_scalars(lse_ref, rows, inside, float("inf"), member)
        scores = dot(key, query, transpose_b=True) * (settings.scale * LOG2_E)
        weights = jnp.exp2(scores - lse[None, :])
        mask = None
        if bits is not None:
            mask = partial_mask(
                1, min(tile.block_kv, settings.block_size), meta.rows, bits, positions,
                kv_positions, causal=settings.causal, limits=(first, last),
            )  # fmt: skip
            weights = jnp.where(mask, weights, 0.0)
        grad_out = load_rows(do_ref, rows, value_dim, inside, member)
        dv += dot(weights.astype(grad_out.dtype), grad_out)
        delta = load_scalars(delta_ref, rows, inside, 0.0, member)
        grad_weights = dot(value, grad_out, transpose_b=True)
        grad_scores = weights * (grad_weights - delta[None, :])
        if mask is not None:
            grad_scores = jnp.where(mask, grad_scores, 0.0)
        dk += dot(grad_scores.astype(query.dtype), query)
        return dk, dv

    def add_member(member: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        row = lists.row(first_head + member, rank)
        carry = walk_runs(
            lists.run_start, lists.runs, row, meta,
            lambda p, c: accumulate(member, c, p, None), carry, window=window, backwards=True,
        )  # fmt: skip
        return walk_partial(
            lists.partial_start, lists.partial, row, meta,
            lambda p, b, c: accumulate(member, c, p, b), carry,
        )  # fmt: skip

    zeros = (
        jnp.zeros((tile.block_kv, dim), jnp.float32),
        jnp.zeros((tile.block_kv, value_dim), jnp.float32),
    )
    dk, dv = add_member(0, zeros) if group == 1 else lax.fori_loop(0, group, add_member, zeros)
    store_rows(dk_ref, kv_rows, dk * settings.scale, exists)
    store_rows(dv_ref, kv_rows, dv, exists)


def backward(
    settings: Settings,
    inputs: tuple[jax.Array, jax.Array, jax.Array],
    pattern_of_head: jax.Array,
    offset: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    grad_out: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of query, key and value.

    lse: as the forward kernel gives it, in log2: a rounding less than from natural log.
    delta: float32 `[batch, heads, q_len]`, the sum of `grad_out * out` less the LSE's gradient.
    """
    arrays = (*inputs, grad_out, lse, delta)
    return _dq(settings, arrays, pattern_of_head, offset), *_dkv(
        settings, arrays, pattern_of_head, offset
    )


def _dq(
    settings: Settings, arrays: tuple[jax.Array, ...], pattern_of_head: jax.Array, offset: jax.Array
) -> jax.Array:
    query, _, value = arrays[:3]
    batch, q_len, num_heads, head_dim = query.shape
    kv_len, kv_heads, value_dim = value.shape[1:]
    group = num_heads // kv_heads
    lists = settings.layouts.dq()
    rows = num_query_tiles(settings, lists, settings.tiles.dq.block_q, q_len)
    grid = Grid(num_heads, rows, batch, lists.heads_first)
    operands = Operands.of(lists, pattern_of_head, offset)
    [dq] = call_kernel(
        functools.partial(s2_dq_kernel, settings=settings, meta=ListMeta.of(lists), grid=grid),
        (*arrays, *operands),
        name="s2_attention_dq",
        grid=grid.shape,
        in_specs=[
            grid.by_head(q_len, head_dim),
            grid.by_head(kv_len, head_dim, group),
            grid.by_head(kv_len, value_dim, group),
            grid.by_head(q_len, value_dim),
            grid.scalars(q_len),
            grid.scalars(q_len),
            *map(whole, operands),
        ],
        out_specs=[grid.by_head(q_len, head_dim)],
        out_shape=[jax.ShapeDtypeStruct(query.shape, query.dtype)],
        tile=settings.tiles.dq,
        launcher=settings.launcher,
    )
    return dq


def _dkv(
    settings: Settings, arrays: tuple[jax.Array, ...], pattern_of_head: jax.Array, offset: jax.Array
) -> tuple[jax.Array, jax.Array]:
    query, key, value = arrays[:3]
    batch, q_len, num_heads, head_dim = query.shape
    kv_len, kv_heads, value_dim = value.shape[1:]
    group = num_heads // kv_heads
    lists = settings.layouts.dkv()
    operands = Operands.of(lists, pattern_of_head, offset)
    grid = Grid(kv_heads, lists.num_tiles, batch, lists.heads_first)
    dk, dv = call_kernel(
        functools.partial(
            s2_dkv_kernel, settings=settings, meta=ListMeta.of(lists), grid=grid, group=group
        ),
        (*arrays, *operands),
        name="s2_attention_dkv",
        grid=grid.shape,
        in_specs=[
            grid.by_group(q_len, head_dim, group),
            grid.by_head(kv_len, head_dim),
            grid.by_head(kv_len, value_dim),
            grid.by_group(q_len, value_dim, group),
            grid.group_scalars(q_len, group),
            grid.group_scalars(q_len, group),
            *map(whole, operands),
        ],
        out_specs=[grid.by_head(kv_len, head_dim), grid.by_head(kv_len, value_dim)],
        out_shape=[
            jax.ShapeDtypeStruct(key.shape, key.dtype),
            jax.ShapeDtypeStruct(value.shape, value.dtype),
        ],
        tile=settings.tiles.dkv,
        launcher=settings.launcher,
    )
    return dk, dv
