"""S2-Attention as a `flax.linen` module; the same parameters and results as `s2_jax.nnx`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from s2_jax.attention import s2_attention
from s2_jax.cached_attention import Cache, cached_attention
from s2_jax.checks import axis_size
from s2_jax.nnx import check_heads, check_input, check_new_tokens
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

    def setup(self) -> None:
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
        shards = axis_size(self._split_over)

        def linear(features: Any, axis: Any = -1) -> nn.DenseGeneral:
            return nn.DenseGeneral(
                features=features,
                axis=axis,
                use_bias=self.use_bias,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
            )

        self.query = linear((self.num_heads // shards, head_dim))
        self.key = linear((num_kv_heads // shards, head_dim))
        self.value = linear((num_kv_heads // shards, head_dim))
        self.out = linear(self.in_features, axis=(-2, -1))

    def __call__(
        self,
        x: Float[Array, "*batch length in_features"],
        context: Float[Array, "*batch kv_length in_features"] | None = None,
        *,
        query_offset: Any = 0,
        segment_ids: Int[Array, "*batch length"] | None = None,
        kv_segment_ids: Int[Array, "*batch kv_length"] | None = None,
        query_seq_lengths: Int[Array, " *batch"] | None = None,
        key_value_seq_lengths: Int[Array, " *batch"] | None = None,
    ) -> Float[Array, "*batch length in_features"]:
        """Attends from `x` to `context`, by default `x` itself.

        Args:
          x: the tokens that ask, at positions `query_offset + arange(length)`.
          context: the row from position 0 that `x` is a part of; needed where `query_offset`
            is not 0.
          query_offset: an int, or int32 `[]` or `[batch]`, possibly traced.
          segment_ids: integers; tokens see those with an equal number.
          kv_segment_ids: the same for `context`; by default `segment_ids`.
          query_seq_lengths: int32 `[batch]`, tokens of `x` that count; the rest is padding on the
            right, and gives zeros before the output projection.
          key_value_seq_lengths: the same for `context`.

        Raises:
          ValueError, TypeError: shapes that do not fit, or an offset without a context.
        """
        check_input(x, context, query_offset, segment_ids, kv_segment_ids, self.in_features)
        context = x if context is None else context
        attended = s2_attention(
            rotate_from(self.query(x), query_offset, self.rope_base),
            rotate_from(self.key(context), 0, self.rope_base),
            self.value(context),
            self.pattern,
            query_offset=query_offset,
            segment_ids=segment_ids,
            kv_segment_ids=kv_segment_ids,
            query_seq_lengths=query_seq_lengths,
            key_value_seq_lengths=key_value_seq_lengths,
            head_axis=self._split_over,
            implementation=self.implementation,
        )
        return self._project_out(attended)

    def extend(
        self,
        x: Float[Array, "batch new in_features"],
        cache: Cache,
        *,
        lengths: Int[Array, " batch"] | None = None,
        first: bool = False,
    ) -> tuple[Float[Array, "batch new in_features"], Cache]:
        """New tokens join a cache and attend to what it holds; see `s2_jax.cached_attention`.

        A method for `apply(variables, x, cache, method="extend")`. The cache is passed in and
        returned; it is no variable of the module.

        Args:
          x: the new tokens, at positions `cache.length + arange(new)`.
          cache: made for this pattern and these heads.
          lengths: int32 `[batch]`, new tokens that count; by default all.
          first: the sequences begin with these tokens.

        Raises:
          ValueError, TypeError: a cache of another pattern or other heads, shapes that do not fit.
        """
        num_kv_heads = self.num_kv_heads or self.num_heads
        check_new_tokens(
            x, cache, first, self.in_features, self.pattern, self.num_heads, num_kv_heads
        )
        attended, cache = cached_attention(
            self.query(x),
            self.key(x),
            self.value(x),
            cache,
            lengths=lengths,
            first=first,
            head_axis=self._split_over,
            rope_base=self.rope_base,
            implementation=self.implementation,
        )
        return self._project_out(attended), cache

    @property
    def _split_over(self) -> str | None:
        """The mesh axis over which the heads of a call are split."""
        return None if self.is_initializing() else self.head_axis

    def _project_out(
        self, attended: Float[Array, "*batch length heads head_dim"]
    ) -> Float[Array, "*batch length in_features"]:
        out = self.out(attended)
        return out if self._split_over is None else jax.lax.psum(out, self._split_over)
