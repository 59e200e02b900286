"""S2-Attention as the `attention_fn=` of Flax's own attention modules, linen and NNX.

Flax describes a call in keyword arguments: linen passes those that the signature names and drops
the rest without a word (also where there is a `**kwargs`), NNX passes all. So every one is named
here, and one that S2-Attention cannot honour is refused.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.tiles import TileConfig
from s2_jax.attention import s2_attention
from s2_jax.checks import (
    check_float_dtype,
    check_head_axis,
    check_implementation,
    check_not_truncated,
    check_scale,
    check_soft_cap,
    is_array,
)
from s2_jax.patterns import Pattern
from s2_jax.structure import boolean


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionFn:
    """What `attention_fn` makes; hashable and compared by value, as Flax modules want it."""

    pattern: Pattern
    scale: float | None = None
    logits_soft_cap: float | None = None
    implementation: str | None = None
    head_axis: str | None = None
    tiles: TileConfig | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, Pattern):
            raise TypeError(
                f"pattern must be a pattern such as s2_jax.local_stride(16, 8), "
                f"got {type(self.pattern).__name__}"
            )
        check_implementation(self.implementation, self.tiles)
        check_head_axis(self.head_axis)
        # As floats, which can be hashed; a JAX array cannot.
        object.__setattr__(self, "scale", check_scale(self.scale))
        object.__setattr__(self, "logits_soft_cap", check_soft_cap(self.logits_soft_cap))

    def __call__(
        self,
        query: Float[Array, "*batch q_len heads head_dim"],
        key: Float[Array, "*batch kv_len kv_heads head_dim"],
        value: Float[Array, "*batch kv_len kv_heads value_dim"],
        bias: Any = None,
        mask: Any = None,
        broadcast_dropout: bool = True,
        dropout_rng: Any = None,
        dropout_rate: float = 0.0,
        deterministic: bool | None = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        force_fp32_for_softmax: bool = False,
        einsum_dot_general: Any = None,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
        promote_dtype: Any = None,
        is_causal: bool | None = None,
        input_positions: Any = None,
    ) -> Float[Array, "*batch q_len heads value_dim"]:
        """Attention as `flax.linen.dot_product_attention` describes a call.

        Honoured: `dtype` (query, key and value are cast to it, by default to the dtype that they
        promote to) and `force_fp32_for_softmax` (it always is at least float32). Of no effect:
        `dropout_rng` and `broadcast_dropout`, as there is no dropout; `is_causal=False`, as the
        pattern says what is causal. The others must be left out or None.
        """
        own_products = "the kernels have their own products"
        refused = {
            "bias": (bias, "it has no additive bias"),
            "mask": (
                mask,
                "say in the pattern what is hidden, or call s2_attention with segment_ids, lengths "
                "or query_offset (the mask may come from decode=True)",
            ),
            "precision": (precision, "float32 inputs are always multiplied in full float32"),
            "module": (module, "no attention weights exist to sow: leave sow_weights out"),
            "einsum_dot_general": (einsum_dot_general, own_products),
            "qk_attn_weights_einsum": (qk_attn_weights_einsum, own_products),
            "attn_weights_value_einsum": (attn_weights_value_einsum, own_products),
            "promote_dtype": (promote_dtype, "give dtype instead"),
            "input_positions": (
                input_positions,
                "rotate query and key before, or use S2Attention with rope_base",
            ),
        }
        for name, (given, advice) in refused.items():
            if given is not None:
                raise ValueError(
                    f"s2_jax.attention_fn cannot honour {name}={_brief(given)}: {advice}"
                )
        if dropout_rate != 0 and not deterministic:
            raise ValueError(
                f"s2_jax.attention_fn cannot honour {dropout_rate=} with {deterministic=}: it has "
                "no attention dropout; set dropout_rate=0 or deterministic=True"
            )
        if is_causal is not None and boolean("is_causal", is_causal) and not self.pattern.causal:
            raise ValueError(
                "s2_jax.attention_fn cannot honour is_causal=True with a bidirectional pattern: "
                "build the pattern with causal=True"
            )
        return self._attend(query, key, value, dtype)

    def _attend(self, query: Any, key: Any, value: Any, dtype: Any) -> Any:
        arrays = (("query", query), ("key", key), ("value", value))
        for name, array in arrays:
            if not is_array(array):
                raise TypeError(f"{name} must be a NumPy or JAX array, got {type(array).__name__}")
        if dtype is None:
            for name, array in arrays:
                check_not_truncated(name, array)
            dtype = jnp.result_type(query, key, value)
        else:
            check_float_dtype("dtype", dtype)
        batch = query.shape[:-3]
        for name, array in arrays:
            if array.ndim < 3 or array.shape[:-3] != batch:
                raise ValueError(
                    f"{name} must be [*batch, length, heads, head_dim] with the batch of query, "
                    f"got shapes {query.shape}, {key.shape} and {value.shape}"
                )

        def one_batch_axis(array: Any) -> Array:
            array = jnp.asarray(array, dtype)
            return array.reshape(math.prod(batch), *array.shape[-3:]) if len(batch) > 1 else array

        out = s2_attention(
            one_batch_axis(query),
            one_batch_axis(key),
            one_batch_axis(value),
            self.pattern,
            scale=self.scale,
            logits_soft_cap=self.logits_soft_cap,
            head_axis=self.head_axis,
            implementation=self.implementation,
            tiles=self.tiles,
        )
        return out.reshape(*batch, *out.shape[-3:]) if len(batch) > 1 else out


def attention_fn(
    pattern: Pattern,
    *,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    implementation: str | None = None,
    head_axis: str | None = None,
    tiles: TileConfig | None = None,
) -> AttentionFn:
    """S2-Attention as a drop-in for Flax's `dot_product_attention`.

    ::

        nn.MultiHeadDotProductAttention(num_heads=8, attention_fn=s2_jax.attention_fn(pattern))
        nnx.MultiHeadAttention(8, 512, attention_fn=s2_jax.attention_fn(pattern), rngs=rngs)

    Args:
      pattern: what each head sees; with `causal=True` no causal mask is needed (or accepted).
      scale, logits_soft_cap, implementation, head_axis, tiles: as for `s2_attention`.

    Returns:
      A callable `(query, key, value, **flax_options) -> out`, arrays `[*batch, length, heads,
      head_dim]` with any number of batch axes. Equal arguments make equal callables.

    Raises:
      TypeError, ValueError: an argument of the wrong kind. When called, a ValueError names an
        option of Flax's that cannot be honoured: a mask or bias, active dropout, a precision,
        weights to sow, other einsums, is_causal=True with a bidirectional pattern.
    """
    return AttentionFn(
        pattern=pattern,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        implementation=implementation,
        head_axis=head_axis,
        tiles=tiles,
    )


def _brief(value: Any) -> str:
    """An array by its shape, anything else as it is written."""
    shape = getattr(value, "shape", None)
    return repr(value) if shape is None else f"<array {value.dtype}{list(shape)}>"
