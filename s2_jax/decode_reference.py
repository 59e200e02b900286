"""What the decode kernel computes, in plain jnp: it runs where there is no GPU."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.decode import NO_ROOM, DecodeLists, DecodeSettings


def reference_decode(
    settings: DecodeSettings,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    position: jax.Array,
    lists: DecodeLists,
) -> tuple[jax.Array, jax.Array]:
    """Arguments and results as of `pallas_kernels.decode.decode`; any float dtype."""
    size, (batch, programs, entries) = settings.block_size, lists.place.shape
    keys, values = (_blocks(settings, x, lists.place, programs) for x in (key, value))
    step = jnp.arange(size, dtype=jnp.int32)[None, None, None]
    at = (lists.block[..., None] * size + step)[:, :, None]
    used = jnp.arange(entries, dtype=jnp.int32)[None, None] < lists.used[..., None]
    read = ((lists.place >= 0) & used)[:, :, None, :, None]
    asks = position[..., None, None]
    row = jnp.arange(query.shape[2], dtype=jnp.int32)[None, None, :, None]
    seen = (((lists.bits[:, :, None] >> row) & 1) != 0)[..., None]
    if settings.window is not None:
        near = asks - at < settings.window.size
        seen = seen | near if settings.window.adds else seen & near
    mask = seen & read & (at <= asks)
    dtype = jnp.float64 if query.dtype == jnp.float64 else jnp.float32
    product = functools.partial(
        jnp.einsum, preferred_element_type=dtype, precision=jax.lax.Precision.HIGHEST
    )
    # What nobody sees may hold anything.
    values = jnp.where(mask.any(axis=2)[..., None], values, 0)
    scores = product("bprd,bpesd->bpres", query, keys) * settings.scale
    if settings.soft_cap is not None:
        scores = settings.soft_cap * jnp.tanh(scores / settings.soft_cap)
    flat = (batch, programs, query.shape[2], entries * size)
    scores = jnp.where(mask, scores, -jnp.inf).reshape(flat)
    peak = jnp.max(scores, axis=-1, keepdims=True, initial=-jnp.inf)
    weights = jnp.exp(scores - jnp.where(jnp.isneginf(peak), 0, peak))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    some = total > 0
    lse = jnp.where(some, peak + jnp.log(jnp.where(some, total, 1)), -jnp.inf)[..., 0]
    weights = (weights / jnp.where(some, total, 1)).astype(value.dtype)
    values = values.reshape(batch, programs, entries * size, -1)
    out = product("bprk,bpkd->bprd", weights, values).astype(query.dtype)
    return jnp.where(position[..., None] == NO_ROOM, jnp.nan, out), lse


def _blocks(
    settings: DecodeSettings, storage: jax.Array, place: jax.Array, programs: int
) -> jax.Array:
    """The blocks that the lists name, `[batch, programs, entries, block_size, dim]`."""
    batch, _, entries = place.shape
    kv_heads, dim = storage.shape[0 if settings.paged else 2], storage.shape[-1]
    place = jnp.maximum(place, 0).reshape(batch, kv_heads, -1)
    take = jax.vmap(lambda blocks, place: blocks[place])  # of each key/value head
    if settings.paged:
        found = jax.vmap(take, (None, 0))(storage, place)
    else:
        blocks = storage.reshape(batch, -1, settings.block_size, kv_heads, dim)
        found = jax.vmap(take)(jnp.moveaxis(blocks, 3, 1), place)
    return found.reshape(batch, programs, entries, settings.block_size, dim)
