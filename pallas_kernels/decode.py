"""The decode kernel: a few queries of each sequence against a cache of keys and values.

The query heads of a group share one tile, so that a key is read once for all of them. Each
program takes a part of the blocks that its key/value head still sees; the parts are put together
by their log-sum-exps (Flash-Decoding), by a kernel of their own.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.call import padded_dim
from pallas_kernels.combine import combine
from pallas_kernels.lowering import Launcher, call_kernel, compute_capability
from pallas_kernels.masks import TileMask, Window
from pallas_kernels.rows import load_rows, load_scalars, store_rows, store_scalars
from pallas_kernels.scores import Scoring
from pallas_kernels.softmax import LOG2_E, Softmax, dot
from pallas_kernels.tiles import Tile

MAX_ROWS = 32  # one bit a row
NO_ROOM = -2  # the position of a query that gets NaN
_LEAST_ROWS = 16
_FEW_LISTS = 64


@dataclasses.dataclass(frozen=True)
class DecodeTile:
    """How the work is cut, and how the kernel is compiled.

    keys: of a turn of the loop, a power of two from 16 on. programs: how many there are to be at
    least, so far as the lists can be split; 256 is about what a large GPU runs at a time.
    num_warps, num_stages: as of `Tile`.
    """

    keys: int
    programs: int = 256
    num_warps: int = 4
    num_stages: int = 2


class DecodeLists(NamedTuple):
    """What the queries of a program see: entries, each a block of keys.

    place: int32 `[batch, programs, entries]`, which block of the storage it is; -1 for one that is
      not read. block: its number in the sequence. bits: bit r says whether query row r sees it.
    used: int32 `[batch, programs]`, entries from here on are not looked at.
    """

    place: jax.Array
    block: jax.Array
    bits: jax.Array
    used: jax.Array


@dataclasses.dataclass(frozen=True)
class DecodeSettings(Scoring):
    """The static side of a call.

    paged: the storage is pages, which all sequences share. window: exact tokens that join the
    blocks. tile: instead of the heuristic's.
    """

    scale: float
    block_size: int
    paged: bool
    soft_cap: float | None = None
    window: Window | None = None
    launcher: Launcher = "pallas"
    tile: DecodeTile | None = None


def s2_decode_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, position_ref: Any, place_ref: Any, block_ref: Any,
    bits_ref: Any, used_ref: Any, o_ref: Any, lse_ref: Any,
    *, settings: DecodeSettings, rows: int, keys: int, splits: int,
) -> None:  # fmt: skip
    dim, value_dim = padded_dim(q_ref.shape[1]), padded_dim(v_ref.shape[1])
    block_size = settings.block_size
    # A turn of the loop takes `keys` keys: several blocks, or a part of one.
    unit, group, parts = (
        min(keys, block_size),
        max(1, keys // block_size),
        max(1, block_size // keys),
    )

    used = used_ref[0]
    share = lax.div(used + (splits - 1), np.int32(splits))
    start = pl.program_id(0) * share
    stop = jnp.minimum(start + share, used)
    blocks = jnp.maximum(stop - start, 0)
    turns = blocks * parts if parts > 1 else lax.div(blocks + (group - 1), np.int32(group))

    row = lax.iota(jnp.int32, rows)
    exists = None if rows == q_ref.shape[0] else row < q_ref.shape[0]
    query = load_rows(q_ref, row, dim, exists)
    position = load_scalars(position_ref, row, exists, -1)
    newest = jnp.max(position, axis=0)
    mask = TileMask(True, position, None, 1, rows, True, settings.window)
    lane = lax.iota(jnp.int32, keys)
    member, within = lax.div(lane, np.int32(unit)), lax.rem(lane, np.int32(unit))

    def entries(ref: Any, begin: jax.Array, nothing: int) -> jax.Array:
        """Of each key, the number that its entry has. Loaded one by one: see `walk._entries`."""
        if group == 1:
            return jnp.full((keys,), ref[begin])
        numbers = jnp.full((keys,), nothing, jnp.int32)
        for i in range(group):
            there = begin + i < stop
            number = jnp.where(there, ref[jnp.where(there, begin + i, begin)], nothing)
            numbers = jnp.where(member == i, number, numbers)
        return numbers

    def attend(turn: jax.Array, carry: Softmax) -> Softmax:
        if parts > 1:
            begin = start + lax.div(turn, np.int32(parts))
            in_block = within + lax.rem(turn, np.int32(parts)) * keys
        else:
            begin, in_block = start + turn * group, within
        place = entries(place_ref, begin, -1)
        positions = entries(block_ref, begin, 0) * block_size + in_block
        inside = (place >= 0) & (positions <= newest)
        stored = jnp.maximum(place, 0) * block_size + in_block
        key = load_rows(k_ref, stored, dim, inside)
        scores = settings.scores(dot(query, key, transpose_b=True))
        seen = mask(positions, entries(bits_ref, begin, 0), inside, None)
        value = load_rows(v_ref, stored, value_dim, inside)
        return carry.step(jnp.where(seen, scores, -jnp.inf), value, settings.exp2)

    carry = lax.fori_loop(0, turns, attend, Softmax.start(rows, value_dim))
    out, lse = carry.finish(settings.exp2)
    out = jnp.where((position == NO_ROOM)[:, None], jnp.nan, out)
    store_rows(o_ref, row, out, exists)
    store_scalars(lse_ref, row, lse / LOG2_E, exists)


def decode(
    settings: DecodeSettings,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    position: jax.Array,
    lists: DecodeLists,
) -> tuple[jax.Array, jax.Array]:
    """Attention of a few queries over the blocks that the lists name.

    Args:
      settings: the static side.
      query: `[batch, programs, rows, head_dim]`, at most 32 rows; programs a multiple of kv_heads,
        those of a key/value head side by side.
      key: `[batch, length, kv_heads, head_dim]`, or pages that all sequences share,
        `[kv_heads, pages, block_size, head_dim]`.
      value: the same, with value_dim.
      position: int32 `[batch, programs, rows]`, where a query stands in its sequence; -1: it sees
        nothing and gets 0; `NO_ROOM`: it gets NaN.
      lists: what they see.

    Returns:
      Output `[batch, programs, rows, value_dim]` in the query's dtype, and natural-log LSE
      `[batch, programs, rows]`, float32.
    """
    batch, programs, num_rows, head_dim = query.shape
    value_dim, entries = value.shape[-1], lists.place.shape[-1]
    assert num_rows <= MAX_ROWS
    rows = _LEAST_ROWS if num_rows <= _LEAST_ROWS else MAX_ROWS
    dims = padded_dim(head_dim) + padded_dim(value_dim)
    tile = settings.tile or pick_tile(key.dtype.itemsize, dims, batch * programs)
    splits = max(1, min(-(-tile.programs // (batch * programs)), -(-entries // 2)))
    if settings.paged:
        key, value = (x.reshape(x.shape[0], -1, x.shape[-1]) for x in (key, value))
    kv_heads = key.shape[0 if settings.paged else 2]
    per_head = np.int32(programs // kv_heads)
    whole, shape = splits == 1, (splits, batch, programs, num_rows)

    def of_program(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *shape), lambda s, p, b: (b, p, *[0] * len(shape)))

    def partial_result(*shape: int) -> pl.BlockSpec:
        zeros = [0] * len(shape)
        return pl.BlockSpec((None, None, None, *shape), lambda s, p, b: (s, b, p, *zeros))

    def storage(array: jax.Array) -> pl.BlockSpec:
        rows, dim = array.shape[1], array.shape[-1]
        if settings.paged:
            return pl.BlockSpec((None, rows, dim), lambda s, p, b: (lax.div(p, per_head), 0, 0))
        shape = (None, rows, None, dim)
        return pl.BlockSpec(shape, lambda s, p, b: (b, 0, lax.div(p, per_head), 0))

    out, lse = call_kernel(
        functools.partial(
            s2_decode_kernel, settings=settings, rows=rows, keys=tile.keys, splits=splits
        ),
        (query, key, value, position, *lists[:3], lists.used[..., None]),
        name="s2_attention_decode",
        grid=(splits, programs, batch),
        in_specs=[
            of_program(num_rows, head_dim), storage(key), storage(value),
            of_program(num_rows), *[of_program(entries)] * 3, of_program(1),
        ],
        out_specs=[partial_result(num_rows, value_dim), partial_result(num_rows)],
        out_shape=[
            jax.ShapeDtypeStruct((*shape, value_dim), query.dtype if whole else jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ],
        tile=Tile(rows, tile.keys, tile.num_warps, tile.num_stages),
        launcher=settings.launcher,
    )  # fmt: skip
    return (out[0], lse[0]) if whole else combine(out, lse, query.dtype, settings.launcher)


def pick_tile(itemsize: int, dims: int, lists: int, capability: int | None = None) -> DecodeTile:
    """Keys and values of a turn take 32 KB, so that two or three turns are under way.

    dims: padded, of keys and values together. lists: how many there are, to be split over programs.
    capability: of the GPU, by default that of the call.
    """
    fit = (1 << 15) // (itemsize * dims)
    keys = max(16, min(64, 1 << (fit.bit_length() - 1)))  # dims need not be a power of two
    if itemsize > 2:
        # Products of float32 are made of registers alone: more threads, or they spill, as would
        # what a third turn brings.
        return DecodeTile(keys, num_warps=8)
    hopper = (capability or compute_capability() or 90) >= 90
    # Measured on Hopper: 1.01 to 1.07 times as fast where all programs run at a time.
    warps = 2 if hopper and lists <= _FEW_LISTS and dims <= 256 else 4
    return DecodeTile(keys, num_warps=warps, num_stages=3 if hopper else 2)
