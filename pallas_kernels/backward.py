"""The backward kernels: dq from the forward's lists, dk and dv from their transpose.

Both recompute the probabilities from the LSE (arXiv 2307.08691, section 3.2). Every output tile
belongs to one program, which adds in a fixed order: the gradients are the same bit for bit. On
Hopper one kernel can make all three: see hopper_backward.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

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
from pallas_kernels.program import KeyTile, Program, QueryTile
from pallas_kernels.rows import load_rows, load_scalars, store_rows
from pallas_kernels.softmax import add_dot, dot
from pallas_kernels.tiles import Tile
from pallas_kernels.walk import ListMeta, Turn, Walk

_LONGEST = 1.3
_INPUTS = ("query", "key", "value", "grad_out", "lse", "delta")


def s2_dq_kernel(
    *refs: Any, names: tuple[str, ...], settings: Settings, meta: ListMeta, grid: Grid
) -> None:
    q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref = refs[:6]
    dq_ref = refs[-1]
    named = dict(zip(names, refs[6:-1], strict=True))
    program = Program.start(named, meta, settings, grid, q_ref.shape[0], k_ref.shape[0])
    dim, value_dim = padded_dim(q_ref.shape[1]), padded_dim(v_ref.shape[1])
    assert settings.tiles.dq is not None
    tile = QueryTile.of(program, settings.tiles.dq.block_q)
    query = load_rows(q_ref, tile.rows, dim, tile.exists)
    grad_out = load_rows(do_ref, tile.rows, value_dim, tile.exists)
    lse = load_scalars(lse_ref, tile.rows, tile.exists, float("inf"))
    delta = load_scalars(delta_ref, tile.rows, tile.exists, 0.0)
    mask = program.mask(tile.positions, program.ids("q_ids", tile.rows, tile.exists))
    first, last = program.kv_limits()

    def grads_of_scores(
        positions: jax.Array, bits: jax.Array | None, exists: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Of one tile of keys, and the keys."""
        inside: Any = None if bits is None else (positions >= first) & (positions < last)
        key = load_rows(k_ref, positions, dim, inside)
        scores = settings.scores(dot(query, key, transpose_b=True))
        slope = settings.slope(scores)
        if bits is not None:
            ids = program.ids("kv_ids", positions, inside)
            scores = jnp.where(mask(positions, bits, inside, ids), scores, -jnp.inf)
        shift = lse if exists is None else jnp.where(exists, lse, jnp.inf)
        weights = settings.exp2(scores, shift[:, None])
        value = load_rows(v_ref, positions, value_dim, inside)
        grad_weights = dot(grad_out, value, transpose_b=True)
        grad_scores = weights * (grad_weights - delta[:, None])
        if slope is not None:
            grad_scores *= slope
        return grad_scores.astype(key.dtype), key

    def add(turn: Turn, bits: jax.Array | None, dq: jax.Array) -> jax.Array:
        return add_dot(dq, *grads_of_scores(turn.positions, bits, None))

    def add_plain(turns: list[Turn], dq: jax.Array) -> jax.Array:
        for pair in [grads_of_scores(turn.positions, None, turn.exists) for turn in turns]:
            dq = add_dot(dq, *pair)
        return dq

    dq = jnp.zeros((settings.tiles.dq.block_q, dim), jnp.float32)
    walk = Walk(named, tile.row, meta, tile.span)
    dq, _ = walk.plain(add_plain, dq, settings.tiles.dq.unroll)
    dq = walk.masked(add, dq)
    store_rows(dq_ref, tile.rows, tile.blank(program, dq * settings.scale, 0.0, 0.0), tile.exists)


def s2_dkv_kernel(
    *refs: Any, names: tuple[str, ...], settings: Settings, meta: ListMeta, grid: Grid, group: int
) -> None:
    q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref = refs[:6]
    dk_ref, dv_ref = refs[-2:]
    named = dict(zip(names, refs[6:-2], strict=True))
    q_len, kv_len = q_ref.shape[0], k_ref.shape[0]
    program = Program.start(named, meta, settings, grid, q_len, kv_len)
    block_kv = settings.tiles.dkv.block_kv
    dim, value_dim = padded_dim(k_ref.shape[1]), padded_dim(v_ref.shape[1])
    first_head = program.head * group
    tile = KeyTile.of(program, first_head, block_kv)
    key = load_rows(k_ref, tile.rows, dim, tile.exists)
    value = load_rows(v_ref, tile.rows, value_dim, tile.exists)
    mask_of = program.mask(tile.positions, program.ids("kv_ids", tile.rows, tile.exists))
    offset = program.offset
    first, last = program.q_limits()

    def accumulate(
        first_member: Any, turn: Turn, bits: jax.Array | None, carry: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, ...]:
        (positions, _, member), (dk, dv) = turn, carry
        member += first_member
        rows, inside, mask = positions - offset, None, None
        if bits is not None:
            inside = (positions >= first) & (positions < last)
            rows = jnp.where(inside, rows, q_len)
            mask = mask_of(positions, bits, inside, program.ids("q_ids", rows, inside))
        query = load_rows(q_ref, rows, dim, inside, member)
        lse = load_scalars(lse_ref, rows, inside, float("inf"), member)
        scores = settings.scores(dot(key, query, transpose_b=True))
        slope = settings.slope(scores)
        if mask is not None:
            scores = jnp.where(mask, scores, -jnp.inf)
        weights = settings.exp2(scores, lse[None, :])
        # The exponentials hide behind this product, and the rest behind that of dv.
        grad_out = load_rows(do_ref, rows, value_dim, inside, member)
        grad_weights = dot(value, grad_out, transpose_b=True)
        dv = add_dot(dv, weights.astype(grad_out.dtype), grad_out)
        delta = load_scalars(delta_ref, rows, inside, 0.0, member)
        grad_scores = weights * (grad_weights - delta[None, :])
        if slope is not None:
            grad_scores *= slope
        dk = add_dot(dk, grad_scores.astype(query.dtype), query)
        return dk, dv

    def add_members(first: Any, members: int, carry: tuple[jax.Array, ...]) -> Any:
        """Of heads that share their lists."""
        row = program.row(first_head + first, program.rank)
        walk = Walk(named, row, meta, tile.span, backwards=True, members=members)
        body = functools.partial(accumulate, first)
        carry, _ = walk.plain(lambda turns, carry: body(turns[0], None, carry), carry)
        return walk.masked(body, carry)

    zeros = (
        jnp.zeros((block_kv, dim), jnp.float32),
        jnp.zeros((block_kv, value_dim), jnp.float32),
    )
    if group == 1 or meta.shared:
        dk, dv = add_members(0, group, zeros)
    else:
        dk, dv = lax.fori_loop(0, group, lambda head, sums: add_members(head, 1, sums), zeros)
    if "kv_length" in named:  # padding saw queries, without a mask
        counts = (tile.positions < program.kv_limits()[1])[:, None]
        dk, dv = (jnp.where(jnp.broadcast_to(counts, x.shape), x, 0.0) for x in (dk, dv))
    store_rows(dk_ref, tile.rows, dk * settings.scale, tile.exists)
    store_rows(dv_ref, tile.rows, dv, tile.exists)


def dq(settings: Settings, arrays: Arrays, list_arrays: Arrays) -> tuple[jax.Array]:
    """The gradient of the query.

    arrays: as for the forward kernel, and
      grad_out: `[batch, q_len, heads, value_dim]`.
      lse: as the forward kernel gives it, in log2: a rounding less than from natural log. Of a
        query that saw nothing it is +inf, so that its weights are zeros.
      delta: float32 `[batch, heads, q_len]`, the sum of `grad_out * out` less the LSE's gradient.
    """
    assert settings.tiles.dq is not None
    if settings.tiles.dq.lowering == "mosaic":
        from pallas_kernels import hopper_dq  # slow to import, and not in every JAX

        return hopper_dq.dq(settings, arrays, list_arrays)
    inputs = [arrays[name] for name in _INPUTS]
    query, value = arrays["query"], arrays["value"]
    batch, q_len, num_heads, head_dim = query.shape
    kv_len, kv_heads, value_dim = value.shape[1:]
    group = num_heads // kv_heads
    lists = settings.layouts.dq()
    grid = Grid(num_heads, num_query_tiles(settings, lists, q_len), batch, lists.together)
    named = operands(settings, lists, arrays, list_arrays)
    [gradient] = call_kernel(
        functools.partial(
            s2_dq_kernel, names=tuple(named), settings=settings, meta=ListMeta.of(lists),
            grid=grid,
        ),
        (*inputs, *named.values()),
        name="s2_attention_dq",
        grid=grid.shape,
        in_specs=[
            grid.by_head(q_len, head_dim),
            grid.by_head(kv_len, head_dim, group),
            grid.by_head(kv_len, value_dim, group),
            grid.by_head(q_len, value_dim),
            grid.scalars(q_len),
            grid.scalars(q_len),
            *operand_specs(named, grid),
        ],
        out_specs=[grid.by_head(q_len, head_dim)],
        out_shape=[jax.ShapeDtypeStruct(query.shape, query.dtype)],
        tile=settings.tiles.dq,
        launcher=settings.launcher,
    )  # fmt: skip
    return (gradient,)


def dkv(settings: Settings, arrays: Arrays, list_arrays: Arrays) -> tuple[jax.Array, jax.Array]:
    """The gradients of key and value; arguments as for `dq`."""
    if settings.tiles.dkv.lowering == "mosaic":
        from pallas_kernels.hopper_dkv import dkv as run  # slow to import, and not in every JAX
    else:
        run = _dkv
    grad_key, grad_value = _summed(run, settings, arrays, list_arrays)
    return grad_key, grad_value


def all_three(settings: Settings, arrays: Arrays, list_arrays: Arrays) -> tuple[jax.Array, ...]:
    """The gradients of query, key and value by one kernel; arguments as for `dq`."""
    from pallas_kernels.hopper_backward import backward

    return _summed(backward, settings, arrays, list_arrays)


def _summed(
    run: Callable[..., Sequence[jax.Array]],
    settings: Settings,
    arrays: Arrays,
    list_arrays: Arrays,
) -> tuple[jax.Array, ...]:
    """What a kernel makes, the last two the gradients of key and value, for each head of those."""
    query, key, value = (arrays[name] for name in _INPUTS[:3])
    batch, _, num_heads, _ = query.shape
    kv_heads, lists = key.shape[2], settings.layouts.dkv()
    longest = lists.longest / max(1, batch * kv_heads)
    parts = parts_of_group(num_heads // kv_heads, settings.tiles.dkv, longest)
    dtypes = (key.dtype, value.dtype) if parts == 1 else (jnp.float32, jnp.float32)
    out_shape = [
        jax.ShapeDtypeStruct((*x.shape[:2], kv_heads * parts, x.shape[-1]), dtype)
        for x, dtype in zip((key, value), dtypes, strict=True)
    ]
    *others, grad_key, grad_value = run(settings, arrays, list_arrays, out_shape)
    if parts == 1:
        return *others, grad_key, grad_value
    wholes = (
        x.reshape(*key.shape[:3], parts, x.shape[-1]).sum(axis=3) for x in (grad_key, grad_value)
    )
    dtypes = key.dtype, value.dtype
    return *others, *(x.astype(dtype) for x, dtype in zip(wholes, dtypes, strict=True))


def _dkv(
    settings: Settings,
    arrays: Arrays,
    list_arrays: Arrays,
    out_shape: list[jax.ShapeDtypeStruct],
) -> Sequence[jax.Array]:
    """Sums over the query heads of each key/value head, or over some of them at a time."""
    inputs, lists = [arrays[name] for name in _INPUTS], settings.layouts.dkv()
    batch, q_len, num_heads, head_dim = arrays["query"].shape
    kv_len, kv_heads, value_dim = arrays["value"].shape[1:]
    parts = out_shape[0].shape[2] // kv_heads
    members = num_heads // (kv_heads * parts)
    named = operands(settings, lists, arrays, list_arrays)
    grid = Grid(kv_heads * parts, lists.num_tiles, batch, lists.together)
    return call_kernel(
        functools.partial(
            s2_dkv_kernel, names=tuple(named), settings=settings, meta=ListMeta.of(lists),
            grid=grid, group=members,
        ),
        (*inputs, *named.values()),
        name="s2_attention_dkv",
        grid=grid.shape,
        in_specs=[
            grid.by_group(q_len, head_dim, members),
            grid.by_head(kv_len, head_dim, parts),
            grid.by_head(kv_len, value_dim, parts),
            grid.by_group(q_len, value_dim, members),
            grid.group_scalars(q_len, members),
            grid.group_scalars(q_len, members),
            *operand_specs(named, grid),
        ],
        out_specs=[grid.by_head(kv_len, head_dim), grid.by_head(kv_len, value_dim)],
        out_shape=out_shape,
        tile=settings.tiles.dkv,
        launcher=settings.launcher,
    )  # fmt: skip


def parts_of_group(group: int, tile: Tile, longest: float) -> int:
    """Into how many programs to split the heads of a group, each for some of them.

    longest: what the longest row takes, as a share of the time that all take where programs of
    four warps share them out evenly. It may take a little more than that: each part costs a float32
    sum of its own, written and read again.
    """
    longest *= 4 / tile.num_warps
    return next((n for n in range(1, group) if group % n == 0 and longest / n < _LONGEST), group)
