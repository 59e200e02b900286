"""The kernel that puts the parts of decoding together by their log-sum-exps."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.call import padded_dim
from pallas_kernels.lowering import Launcher, call_kernel
from pallas_kernels.rows import load_rows, load_scalars, store_scalars
from pallas_kernels.tiles import Tile

TILE = Tile(16, 16, num_warps=4, num_stages=1)  # its sides mean nothing here
_TILE_NUMBERS = 4096  # of the partial results that are added at a time


def s2_combine_kernel(out_ref: Any, lse_ref: Any, o_ref: Any, whole_ref: Any) -> None:
    """One query of one head. What stands in `out_ref` is finite, or a NaN that is meant."""
    parts, dim = out_ref.shape[0], padded_dim(out_ref.shape[1])
    turn = min(pl.next_power_of_2(parts), max(1, _TILE_NUMBERS // dim))
    turns = -(-parts // turn)

    def lses(i: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        part = i * turn + lax.iota(jnp.int32, turn)
        exists = part < parts
        return part, exists, load_scalars(lse_ref, part, exists, -jnp.inf)

    def outs(i: Any) -> tuple[jax.Array, jax.Array]:
        part, exists, lse = lses(i)
        return lse, load_rows(out_ref, part, dim, exists)

    only = outs(0) if turns == 1 else None  # nothing is loaded after the sums have begun

    def higher(i: Any, peak: jax.Array) -> jax.Array:
        lse = lses(i)[2] if only is None else only[0]
        return jnp.maximum(peak, jnp.max(lse, axis=0))

    peak = _loop(turns, higher, jnp.float32(-jnp.inf))
    peak = jnp.where(peak == -jnp.inf, 0.0, peak)

    def add(i: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        lse, out = outs(i) if only is None else only
        weight = jnp.exp(lse - peak)
        return carry[0] + jnp.sum(weight[:, None] * out, axis=0), carry[1] + jnp.sum(weight, axis=0)

    start = jnp.zeros((dim,), jnp.float32), jnp.float32(0)
    out, total = _loop(turns, add, start)
    seen = total != 0  # a NaN was seen too
    total = jnp.where(seen, total, 1.0)
    column = lax.iota(jnp.int32, dim)
    exists = None if dim == o_ref.shape[0] else column < o_ref.shape[0]
    store_scalars(o_ref, column, (out / total).astype(o_ref.dtype), exists)
    whole_ref[...] = jnp.where(seen, peak + jnp.log(total), -jnp.inf)[None]


def _loop(turns: int, body: Any, carry: Any) -> Any:
    """One turn without a loop, which would keep the loads of the second one waiting."""
    return body(0, carry) if turns == 1 else lax.fori_loop(0, turns, body, carry)


def combine(
    out: jax.Array, lse: jax.Array, dtype: Any, launcher: Launcher
) -> tuple[jax.Array, jax.Array]:
    """Of the parts of attention over disjoint keys, attention over all of them.

    Args:
      out: float32 `[parts, batch, programs, rows, dim]`.
      lse: float32 `[parts, batch, programs, rows]`, natural logarithm.
      dtype: of the output.

    Returns:
      Output `[batch, programs, rows, dim]` and its LSE, float32 `[batch, programs, rows]`.
    """
    parts, batch, programs, rows, dim = out.shape
    found, whole = call_kernel(
        s2_combine_kernel,
        (out, lse),
        name="s2_attention_combine",
        grid=(rows, programs, batch),
        in_specs=[
            pl.BlockSpec((parts, None, None, None, dim), lambda r, p, b: (0, b, p, r, 0)),
            pl.BlockSpec((parts, None, None, None), lambda r, p, b: (0, b, p, r)),
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, dim), lambda r, p, b: (b, p, r, 0)),
            pl.BlockSpec((None, None, None, 1), lambda r, p, b: (b, p, r, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((batch, programs, rows, dim), dtype),
            jax.ShapeDtypeStruct((batch, programs, rows, 1), jnp.float32),
        ],
        tile=TILE,
        launcher=launcher,
    )
    return found, whole[..., 0]
