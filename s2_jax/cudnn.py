"""Dense attention by cuDNN, for layers whose pattern leaves nothing out."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from s2_jax.checks import Call
from s2_jax.pieces import Dense


def check_cudnn(call: Call, *, return_lse: bool) -> None:
    """Raises ValueError where cuDNN cannot compute what is asked for."""
    reasons = {
        "a pattern other than s2_jax.dense": not isinstance(call.pattern, Dense),
        "segment ids": call.segment_ids is not None,
        "logits_soft_cap": call.logits_soft_cap is not None,
        "return_lse, whose gradient it would drop": return_lse,
        "query_offset, or other keys than those of the queries": (
            not isinstance(call.query_offset, int)
            or call.query_offset != 0
            or call.query.shape[1] != call.key.shape[1]
        ),
        f"dtype {call.query.dtype}": call.query.dtype not in (jnp.bfloat16, jnp.float16),
    }
    if found := next((reason for reason, applies in reasons.items() if applies), None):
        raise ValueError(f'implementation="cudnn" does not take {found}')


def cudnn_attention(call: Call) -> jax.Array:
    """Output `[batch, q_len, heads, value_dim]`; zeros for padded queries."""
    arrays, length = [call.query, call.key, call.value], call.query.shape[1]
    lengths = [call.query_seq_lengths, call.key_value_seq_lengths]
    if length % 2:  # JAX has the gradient for even ones alone
        arrays = [jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in arrays]
        whole = jnp.full((call.query.shape[0],), length, jnp.int32)
        lengths = [whole if some is None else some for some in lengths]
    out = jax.nn.dot_product_attention(
        *arrays,
        scale=call.scale,
        is_causal=call.pattern.causal,
        query_seq_lengths=lengths[0],
        key_value_seq_lengths=lengths[1],
        implementation="cudnn",
    )[:, :length]
    if call.query_seq_lengths is None:
        return out
    row = jnp.arange(length, dtype=jnp.int32)[None]
    counts = row < call.query_seq_lengths[:, None]
    return jnp.where(counts[:, :, None, None], out, 0)


def cudnn_step(call: Call, keys: jax.Array, values: jax.Array, seen: jax.Array) -> jax.Array:
    """One new token a sequence, which sees the first `seen` keys; zeros where those are none.

    keys, values: `[batch, length, kv_heads, dim]`. seen: int32 `[batch]`.
    """
    out = jax.nn.dot_product_attention(
        call.query,
        keys,
        values,
        scale=call.scale,
        key_value_seq_lengths=jnp.maximum(seen, 1),
        implementation="cudnn",
    )
    return jnp.where((seen > 0)[:, None, None, None], out, 0)
