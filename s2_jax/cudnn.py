"""Dense attention by cuDNN, for layers whose pattern leaves nothing out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap

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
    """Output `[batch, q_len, heads, value_dim]`; zeros for queries that see nothing."""
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
        query_seq_lengths=_mapped_as(call.query, lengths[0]),
        key_value_seq_lengths=_mapped_as(call.query, _at_least_one(lengths[1])),
        implementation="cudnn",
    )[:, :length]
    row = jnp.arange(length, dtype=jnp.int32)[None]
    counts = None
    if call.query_seq_lengths is not None:
        counts = row < call.query_seq_lengths[:, None]
    if call.key_value_seq_lengths is not None:
        some = call.key_value_seq_lengths[:, None] > 0
        counts = some if counts is None else counts & some
    return out if counts is None else jnp.where(counts[:, :, None, None], out, 0)


def cudnn_step(call: Call, keys: jax.Array, values: jax.Array, seen: jax.Array) -> jax.Array:
    """One new token a sequence, which sees the first `seen` keys; zeros where those are none.

    keys, values: `[batch, length, kv_heads, dim]`. seen: int32 `[batch]`. Unlike the kernels, cuDNN
    may multiply values past `seen` by zero: they must be finite.
    """

    @sequential_vmap
    def attend(query: jax.Array, keys: jax.Array, values: jax.Array, seen: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(
            query,
            keys,
            values,
            scale=call.scale,
            key_value_seq_lengths=_at_least_one(seen),
            implementation="cudnn",
        )

    out = attend(call.query, keys, values, seen)
    return jnp.where((seen > 0)[:, None, None, None], out, 0)


def can_step(call: Call) -> bool:
    """Whether `cudnn_step` computes what a call with one new token asks for."""
    return (
        isinstance(call.pattern, Dense)
        and call.logits_soft_cap is None
        and call.query.dtype in (jnp.bfloat16, jnp.float16)
    )


def _at_least_one(lengths: jax.Array | None) -> jax.Array | None:
    """cuDNN does not say what it makes of no keys."""
    return None if lengths is None else jnp.maximum(lengths, 1)


def _mapped_as(query: jax.Array, lengths: jax.Array | None) -> jax.Array | None:
    """The same lengths, mapped by `vmap` where the query is, as JAX's rule for cuDNN has it."""
    if lengths is None:
        return None
    return jnp.where(query[:, 0, 0, 0] > 0, lengths, lengths)
