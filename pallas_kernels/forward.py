"""The forward kernel: output and LSE of one query tile of one head a program.

FlashAttention-2's online softmax (arXiv 2307.08691, section 3.1), over the key tiles that the
block lists name.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.call import (
    Arrays,
    Grid,
    Settings,
    num_query_tiles,
    operand_specs,
    operands,
    padded_dim,
)
from pallas_kernels.lowering import call_kernel
from pallas_kernels.program import Program, QueryTile
from pallas_kernels.rows import load_rows, store_rows, store_scalars
from pallas_kernels.softmax import LEAST_FLOAT16_WEIGHT, LEAST_TOTAL, Pinned, Softmax, dot
from pallas_kernels.walk import ListMeta, Turn, Walk


def s2_forward_kernel(
    *refs: Any, names: tuple[str, ...], settings: Settings, meta: ListMeta, grid: Grid
) -> None:
    q_ref, k_ref, v_ref = refs[:3]
    o_ref, lse_ref = refs[-2:]
    named = dict(zip(names, refs[3:-2], strict=True))
    program = Program.start(named, meta, settings, grid, q_ref.shape[0], k_ref.shape[0])
    block_q = settings.tiles.forward.block_q
    dim, value_dim = padded_dim(q_ref.shape[1]), padded_dim(v_ref.shape[1])
    tile = QueryTile.of(program, block_q)
    query = load_rows(q_ref, tile.rows, dim, tile.exists)
    mask = program.mask(tile.positions, program.ids("q_ids", tile.rows, tile.exists))
    first, last = program.kv_limits()

    def attend(turn: Turn, bits: jax.Array | None, carry: Softmax) -> Softmax:
        positions = turn.positions
        inside: Any = None if bits is None else (positions >= first) & (positions < last)
        key = load_rows(k_ref, positions, dim, inside)
        scores = settings.scores(dot(query, key, transpose_b=True))
        if bits is not None:
            ids = program.ids("kv_ids", positions, inside)
            scores = jnp.where(mask(positions, bits, inside, ids), scores, -jnp.inf)
        value = load_rows(v_ref, positions, value_dim, inside)
        return carry.step(scores, value, settings.exp2)

    def attend_pinned(turns: list[Turn], carry: Pinned) -> Pinned:
        weights = []
        for turn in turns:
            scores = settings.scores(
                dot(query, load_rows(k_ref, turn.positions, dim, None), transpose_b=True)
            )
            weights.append(carry.weights(scores, settings.exp2, turn.exists))
        for turn, weight in zip(turns, weights, strict=True):
            carry = carry.add(weight, load_rows(v_ref, turn.positions, value_dim, None))
        return carry

    def store(carry: Softmax) -> None:
        out, lse = carry.finish(settings.exp2)
        store_rows(o_ref, tile.rows, tile.blank(program, out, 0.0, jnp.nan), tile.exists)
        store_scalars(lse_ref, tile.rows, tile.blank(program, lse, -jnp.inf, jnp.nan), tile.exists)

    walk = Walk(named, tile.row, meta, tile.span)
    start = Softmax.start(block_q, value_dim)
    pinned, taken = walk.plain(
        attend_pinned, walk.masked(attend, start).pin(), settings.tiles.forward.unroll
    )
    carry = pinned.release()
    store(carry)

    least: Any = LEAST_TOTAL
    if v_ref.dtype == jnp.float16:
        keys = (taken * meta.tile).astype(jnp.float32)
        least = jnp.maximum(keys * LEAST_FLOAT16_WEIGHT, LEAST_TOTAL)

    @pl.when((taken > 0) & carry.out_of_range(tile.counts(program), least))
    def _() -> None:
        store(walk.everything(attend, start))


def forward(settings: Settings, arrays: Arrays, list_arrays: Arrays) -> tuple[jax.Array, jax.Array]:
    """Output `[batch, q_len, heads, value_dim]` and LSE, in log2, `[batch, heads, q_len]`.

    arrays: query, key, value, pattern_of_head and those of `Tokens`, by name. list_arrays: of
    the layout, whose static side the settings hold.
    """
    if settings.tiles.forward.lowering == "mosaic":
        from pallas_kernels import hopper_forward  # slow to import, and not in every JAX

        return hopper_forward.forward(settings, arrays, list_arrays)
    query, key, value = (arrays[name] for name in ("query", "key", "value"))
    batch, q_len, num_heads, head_dim = query.shape
    kv_len, kv_heads, value_dim = value.shape[1:]
    group = num_heads // kv_heads
    lists = settings.layouts.forward()
    grid = Grid(num_heads, num_query_tiles(settings, lists, q_len), batch, lists.together)
    named = operands(settings, lists, arrays, list_arrays)
    out, lse = call_kernel(
        functools.partial(
            s2_forward_kernel, names=tuple(named), settings=settings, meta=ListMeta.of(lists),
            grid=grid,
        ),
        (query, key, value, *named.values()),
        name="s2_attention_forward",
        grid=grid.shape,
        in_specs=[
            grid.by_head(q_len, head_dim),
            grid.by_head(kv_len, head_dim, group),
            grid.by_head(kv_len, value_dim, group),
            *operand_specs(named, grid),
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
    )  # fmt: skip
    return out, lse
