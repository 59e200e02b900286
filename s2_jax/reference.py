"""The oracle: attention token by token, in plain jnp, in any float dtype.

It reads the pattern's definition for every pair of tokens and knows nothing of layouts or tiles.
Queries are taken a chunk at a time (and recomputed in the backward pass), so that long rows fit.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.tokens import Tokens
from s2_jax.patterns import Pattern
from s2_jax.structure import Heads

_SCORES_PER_CHUNK = 1 << 25


def reference_attention(
    query: Float[Array, "batch q_len heads head_dim"],
    key: Float[Array, "batch kv_len kv_heads head_dim"],
    value: Float[Array, "batch kv_len kv_heads value_dim"],
    pattern: Pattern,
    heads: Heads,
    tokens: Tokens,
    *,
    scale: float,
    logits_soft_cap: float | None = None,
) -> tuple[Float[Array, "batch q_len heads value_dim"], Float[Array, "batch heads q_len"]]:
    """Output in the inputs' dtype and LSE in float32 (float64 for float64 inputs).

    Scores, softmax and accumulation are float32 (float64 for float64); the probabilities are
    cast to the inputs' dtype before they meet the values, as in the kernels. `heads.index`
    `[batch, heads]` are the pattern's numbers of the query heads given.
    """
    batch, q_len, num_heads, _ = query.shape
    kv_len = key.shape[1]
    query, key, value = (
        _without_padding(array, length)
        for array, length in (
            (query, tokens.q_length), (key, tokens.kv_length), (value, tokens.kv_length)
        )
    )  # fmt: skip
    chunk = min(q_len, max(1, _SCORES_PER_CHUNK // max(1, batch * num_heads * kv_len)))
    num_chunks = math.ceil(q_len / chunk)
    rows = jnp.arange(num_chunks * chunk, dtype=jnp.int32).reshape(num_chunks, chunk)
    padded = jnp.pad(query, ((0, 0), (0, num_chunks * chunk - q_len), (0, 0), (0, 0)))
    chunks = jnp.moveaxis(padded.reshape(batch, num_chunks, chunk, *query.shape[2:]), 1, 0)

    @jax.checkpoint
    def attend(q: Array, row: Array) -> tuple[Array, Array]:
        mask = _token_mask(pattern, heads, tokens, row, q_len, kv_len)
        return _attend(q, key, value, mask, scale=scale, logits_soft_cap=logits_soft_cap)

    out, lse = jax.lax.map(lambda args: attend(*args), (chunks, rows))
    out = jnp.moveaxis(out, 0, 1).reshape(batch, num_chunks * chunk, num_heads, value.shape[-1])
    lse = jnp.moveaxis(lse, 0, 2).reshape(batch, num_heads, num_chunks * chunk)
    return _without_padding(out[:, :q_len], tokens.q_length), lse[:, :, :q_len]


def _without_padding(array: Array, length: Array | None) -> Array:
    """Zeros in padded rows: whatever stands there, forward or backward, reaches nothing."""
    if length is None:
        return array
    row = jnp.arange(array.shape[1], dtype=jnp.int32)[None]
    return jnp.where((row < length[:, None])[:, :, None, None], array, 0)


def _token_mask(
    pattern: Pattern,
    heads: Heads,
    tokens: Tokens,
    row: Int[Array, " chunk"],
    q_len: int,
    kv_len: int,
) -> Bool[Array, "batch heads chunk kv_len"]:
    head = jnp.asarray(heads.index, dtype=jnp.int32)[:, :, None, None]
    column = jnp.arange(kv_len, dtype=jnp.int32)
    q_position = (tokens.offset[:, None] + row[None])[:, None, :, None]
    indexed = Heads(head, heads.num_heads, heads.num_kv_heads)
    mask = pattern.visible_tokens(indexed, q_position, column[None, None, None, :])
    shape = (*head.shape[:2], row.shape[0], kv_len)
    mask = jnp.broadcast_to(mask, shape)
    if tokens.q_length is not None:
        mask &= (row[None, :] < tokens.q_length[:, None])[:, None, :, None]
    if tokens.kv_length is not None:
        mask &= (column[None, :] < tokens.kv_length[:, None])[:, None, None, :]
    if tokens.q_ids is not None and tokens.kv_ids is not None:
        ids = jnp.take(tokens.q_ids, jnp.minimum(row, q_len - 1), axis=1)
        mask &= (ids[:, :, None] == tokens.kv_ids[:, None, :])[:, None]
    return mask


def _attend(
    q: Float[Array, "batch chunk heads head_dim"],
    k: Float[Array, "batch kv_len kv_heads head_dim"],
    v: Float[Array, "batch kv_len kv_heads value_dim"],
    mask: Bool[Array, "batch heads chunk kv_len"],
    *,
    scale: float,
    logits_soft_cap: float | None,
) -> tuple[Float[Array, "batch chunk heads value_dim"], Float[Array, "batch heads chunk"]]:
    batch, chunk, num_heads, _ = q.shape
    kv_heads = k.shape[2]
    dtype = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    dots = {"preferred_element_type": dtype, "precision": jax.lax.Precision.HIGHEST}
    grouped = q.reshape(batch, chunk, kv_heads, num_heads // kv_heads, q.shape[-1])
    scores = jnp.einsum("bqkgh,bskh->bkgqs", grouped, k, **dots) * scale
    scores = scores.reshape(batch, num_heads, chunk, k.shape[1])
    if logits_soft_cap is not None:
        scores = logits_soft_cap * jnp.tanh(scores / logits_soft_cap)
    scores = jnp.where(mask, scores, -jnp.inf)
    peak = jax.lax.stop_gradient(jnp.max(scores, axis=-1))
    peak = jnp.where(jnp.isfinite(peak), peak, 0)
    weights = jnp.where(mask, jnp.exp(scores - peak[..., None]), 0)
    total = jnp.sum(weights, axis=-1)
    some = jnp.any(mask, axis=-1)
    total = jnp.where(some, total, 1)
    lse = jnp.where(some, peak + jnp.log(total), -jnp.inf)
    weights = (weights / total[..., None]).astype(v.dtype)
    weights = weights.reshape(batch, kv_heads, num_heads // kv_heads, chunk, k.shape[1])
    out = jnp.einsum("bkgqs,bskh->bqkgh", weights, v, **dots)
    return out.reshape(batch, chunk, num_heads, v.shape[-1]).astype(q.dtype), lse
