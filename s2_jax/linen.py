"""S2-Attention as a `flax.linen` module; the same parameters and results as `s2_jax.nnx`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from s2_jax.attention import s2_attention
from s2_jax.checks import axis_size
from s2_jax.nnx import check_heads, check_input
from s2_jax.patterns import Pattern
from s2_jax.rope import rotate_from


class S2Attention(nn.Module):
    """Self-attention in which every head sees its own blocks of the context.

    Parameters: `query`, `key` and `value` project to `[heads, head_dim]`, `out` back; all are
    `nn.DenseGeneral`, named and shaped as in `nn.MultiHeadDotProductAttention`.

    Attributes:
      in_features: width of the input and of the output.
      num_heads: query heads, of the whole (also where `head_axis` splits them).
      pattern: what each head sees.
      num_kv_heads: key/value heads, a divisor of `num_heads`, which is the default.
      head_dim: by default `in_features // num_heads`.
      rope_base: base of the rotary embedding (Llama: 10 000); None means none.
      use_bias: biases in all four projections.
      dtype: of the computation; by default that of the input and the parameters together.
      param_dtype: of the parameters.
      implementation: as for `s2_attention`.
      head_axis: the mesh axis over which the head dimension of all four kernels is split
        inside `shard_map` or `pmap`; the outputs are then summed over it. `init` makes whole
        kernels and runs outside.

    Raises (when first used):
      ValueError, TypeError: numbers that do not fit each other or the pattern, named.
    """

    in_features: int
    num_heads: int
    pattern: Pattern
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rope_base: float | None = None
    use_bias: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    implementation: str | None = None
    head_axis: str | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*batch length in_features"],
        context: Float[Array, "*batch kv_length in_features"] | None = None,
        *,
        query_offset: Any = 0,
        segment_ids: Int[Array, "*batch length"] | None = None,
        kv_segment_ids: Int[Array, "*batch kv_length"] | None = None,
    ) -> Float[Array, "*batch length in_features"]:
        """Attends from `x` to `context`, by default `x` itself.

        Args:
          x: the tokens that ask, at positions `query_offset + arange(length)`.
          context: the row from position 0 that `x` is a part of; needed where `query_offset`
            is not 0.
          query_offset: an int, or int32 `[]` or `[batch]`, possibly traced.
          segment_ids: integers; tokens see those with an equal number.
          kv_segment_ids: the same for `context`; by default `segment_ids`.

        Raises:
          ValueError, TypeError: shapes that do not fit, or an offset without a context.
        """
        num_kv_heads, head_dim = check_heads(
            self.in_features,
            self.num_heads,
            self.pattern,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            rope_base=self.rope_base,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            implementation=self.implementation,
            head_axis=self.head_axis,
        )
        head_axis = None if self.is_initializing() else self.head_axis
        shards = axis_size(head_axis)
        check_input(x, context, query_offset, segment_ids, kv_segment_ids, self.in_features)
        context = x if context is None else context
        heads, kv_heads = self.num_heads // shards, num_kv_heads // shards

        query = self._linear("query", (heads, head_dim))(x)
        key = self._linear("key", (kv_heads, head_dim))(context)
        value = self._linear("value", (kv_heads, head_dim))(context)
        attended = s2_attention(
            rotate_from(query, query_offset, self.rope_base),
            rotate_from(key, 0, self.rope_base),
            value,
            self.pattern,
            query_offset=query_offset,
            segment_ids=segment_ids,
            kv_segment_ids=kv_segment_ids,
            head_axis=head_axis,
            implementation=self.implementation,
        )
        out = self._linear("out", self.in_features, axis=(-2, -1))(attended)
        return out if head_axis is None else jax.lax.psum(out, head_axis)

    def _linear(self, name: str, features: Any, axis: Any = -1) -> nn.DenseGeneral:
        return nn.DenseGeneral(
            features=features,
            axis=axis,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )
