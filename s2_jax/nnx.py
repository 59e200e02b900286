"""S2-Attention as a `flax.nnx` module: projections, grouped heads, rotary embedding."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from s2_jax.attention import s2_attention
from s2_jax.cache_checks import check_cache_of
from s2_jax.cached_attention import Cache, cached_attention
from s2_jax.checks import (
    axis_size,
    check_float_array,
    check_float_dtype,
    check_head_axis,
    check_implementation,
    check_offset,
    check_segments,
)
from s2_jax.patterns import Pattern
from s2_jax.rope import check_rope, rotate_from
from s2_jax.structure import at_least_one, boolean


def check_heads(
    in_features: int,
    num_heads: int,
    pattern: Pattern,
    *,
    num_kv_heads: int | None,
    head_dim: int | None,
    rope_base: float | None,
    use_bias: bool,
    dtype: Any,
    param_dtype: Any,
    implementation: str | None,
    head_axis: str | None,
) -> tuple[int, int]:
    """`(num_kv_heads, head_dim)` of a module with these settings, or an error that names one."""
    if not isinstance(pattern, Pattern):
        raise TypeError(
            f"pattern must be a pattern such as s2_jax.local_stride(16, 8), "
            f"got {type(pattern).__name__}"
        )
    at_least_one("in_features", in_features)
    at_least_one("num_heads", num_heads)
    if num_kv_heads is None:
        num_kv_heads = num_heads
    if num_heads % at_least_one("num_kv_heads", num_kv_heads):
        raise ValueError(f"{num_heads=} must be a multiple of {num_kv_heads=}")
    if head_dim is None:
        if in_features % num_heads:
            raise ValueError(f"{in_features=} must be divisible by {num_heads=}, or give head_dim")
        head_dim = in_features // num_heads
    at_least_one("head_dim", head_dim)
    if rope_base is not None:
        check_rope(head_dim, rope_base)
    check_head_axis(head_axis)
    if boolean("use_bias", use_bias) and head_axis is not None:
        raise ValueError(
            f"use_bias=True cannot be combined with {head_axis=}: "
            "every shard would add the output bias"
        )
    if dtype is not None:
        check_float_dtype("dtype", dtype)
    check_float_dtype("param_dtype", param_dtype)
    check_implementation(implementation, None)
    pattern.check(num_heads, num_kv_heads, 0, 0)
    return num_kv_heads, head_dim


def check_input(
    x: Any,
    context: Any,
    query_offset: Any,
    segment_ids: Any,
    kv_segment_ids: Any,
    in_features: int,
) -> None:
    """Raises TypeError or ValueError where a module call makes no sense, before it projects."""
    for name, array in (("x", x), ("context", context)):
        if array is None and name == "context":
            continue
        check_float_array(name, array)
        if array.ndim not in (2, 3) or array.shape[-1] != in_features:
            raise ValueError(
                f"{name} must be [batch, length, {in_features}] or the same without batch, "
                f"got shape {array.shape}"
            )
    row = x if context is None else context
    if x.shape[:-2] != row.shape[:-2]:
        raise ValueError(
            f"x and context must agree in batch, got shapes {x.shape} and {context.shape}"
        )
    batch, unbatched = (1, True) if x.ndim == 2 else (x.shape[0], False)
    offset = check_offset(query_offset, batch, unbatched)
    if context is None and not (isinstance(offset, int) and offset == 0):
        raise ValueError(
            "query_offset needs context: keys start at position 0, so that x at a later "
            "position needs the row from there on"
        )
    check_segments(segment_ids, kv_segment_ids, batch, x.shape[-2], row.shape[-2], unbatched)


def check_new_tokens(
    x: Any,
    cache: Any,
    first: Any,
    in_features: int,
    pattern: Pattern,
    num_heads: int,
    num_kv_heads: int,
) -> None:
    """Raises ValueError or TypeError where tokens cannot join a cache by a layer."""
    boolean("first", first)
    check_input(x, None, 0, None, None, in_features)
    if x.ndim != 3:
        raise ValueError(f"x must be [batch, new, {in_features}], got shape {x.shape}")
    check_cache_of(cache, pattern, num_heads, num_kv_heads)


class S2Attention(nnx.Module):
    """Self-attention in which every head sees its own blocks of the context.

    Parameters: `query`, `key` and `value` project to `[heads, head_dim]`, `out` back; all are
    `nnx.LinearGeneral`, named and shaped as in `nnx.MultiHeadAttention`.
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        pattern: Pattern,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_base: float | None = None,
        use_bias: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        implementation: str | None = None,
        head_axis: str | None = None,
        rngs: nnx.Rngs,
    ):
        """
        Args:
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
            inside `shard_map` or `pmap`; the outputs are then summed over it.
          rngs: `params` initialises the kernels.

        Raises:
          ValueError, TypeError: numbers that do not fit each other or the pattern, named.
        """
        self.num_kv_heads, self.head_dim = check_heads(
            in_features,
            num_heads,
            pattern,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope_base=rope_base,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            implementation=implementation,
            head_axis=head_axis,
        )
        self.in_features = in_features
        self.num_heads = num_heads
        self.pattern = pattern
        self.rope_base = rope_base
        self.implementation = implementation
        self.head_axis = head_axis

        def linear(inputs: Any, outputs: Any, axis: Any = -1) -> nnx.LinearGeneral:
            return nnx.LinearGeneral(
                inputs,
                outputs,
                axis=axis,
                use_bias=use_bias,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        self.query = linear(in_features, (num_heads, self.head_dim))
        self.key = linear(in_features, (self.num_kv_heads, self.head_dim))
        self.value = linear(in_features, (self.num_kv_heads, self.head_dim))
        self.out = linear((num_heads, self.head_dim), in_features, axis=(-2, -1))

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
        axis_size(self.head_axis)
        check_input(x, context, query_offset, segment_ids, kv_segment_ids, self.in_features)
        if context is None:
            query, key, value = self.project(x)
        else:
            query = self.project_query(x, query_offset)
            key, value = self.project_key_value(context)
        return self.attend(
            query,
            key,
            value,
            query_offset=query_offset,
            segment_ids=segment_ids,
            kv_segment_ids=kv_segment_ids,
            query_seq_lengths=query_seq_lengths,
            key_value_seq_lengths=key_value_seq_lengths,
        )

    def extend(
        self,
        x: Float[Array, "batch new in_features"],
        cache: Cache,
        *,
        lengths: Int[Array, " batch"] | None = None,
        first: bool = False,
    ) -> tuple[Float[Array, "batch new in_features"], Cache]:
        """New tokens join a cache and attend to what it holds; see `s2_jax.cached_attention`.

        Args:
          x: the new tokens, at positions `cache.length + arange(new)`.
          cache: made for this pattern and these heads.
          lengths: int32 `[batch]`, new tokens that count; by default all.
          first: the sequences begin with these tokens.

        Raises:
          ValueError, TypeError: a cache of another pattern or other heads, shapes that do not fit.
        """
        axis_size(self.head_axis)
        check_new_tokens(
            x, cache, first, self.in_features, self.pattern, self.num_heads, self.num_kv_heads
        )
        query, key, value, rope_base = self._new(x, 0 if first else cache.length)
        attended, cache = cached_attention(
            query,
            key,
            value,
            cache,
            lengths=lengths,
            first=first,
            head_axis=self.head_axis,
            rope_base=rope_base,
            implementation=self.implementation,
        )
        return self._project_out(attended), cache

    # The steps of a call, for those who keep keys and values in a way of their own.

    def project(
        self, x: Float[Array, "*batch length in_features"], offset: Any = 0
    ) -> tuple[
        Float[Array, "*batch length heads head_dim"],
        Float[Array, "*batch length kv_heads head_dim"],
        Float[Array, "*batch length kv_heads head_dim"],
    ]:
        """Queries, keys and values of the same tokens, which stand at positions from `offset`."""
        return self.project_query(x, offset), *self.project_key_value(x, offset)

    def project_query(
        self, x: Float[Array, "*batch length in_features"], query_offset: Any = 0
    ) -> Float[Array, "*batch length heads head_dim"]:
        """Queries of `x`, rotated for positions from `query_offset`."""
        return rotate_from(self.query(x), query_offset, self.rope_base)

    def project_key_value(
        self, x: Float[Array, "*batch length in_features"], offset: Any = 0
    ) -> tuple[
        Float[Array, "*batch length kv_heads head_dim"],
        Float[Array, "*batch length kv_heads head_dim"],
    ]:
        """Keys and values of `x`; the keys rotated for positions from `offset`."""
        return rotate_from(self.key(x), offset, self.rope_base), self.value(x)

    def attend(
        self,
        query: Float[Array, "*batch length heads head_dim"],
        key: Float[Array, "*batch kv_length kv_heads head_dim"],
        value: Float[Array, "*batch kv_length kv_heads head_dim"],
        **options: Any,
    ) -> Float[Array, "*batch length in_features"]:
        """Attention and the output projection; `options` are those of `s2_attention`."""
        attended = s2_attention(
            query,
            key,
            value,
            self.pattern,
            implementation=self.implementation,
            head_axis=self.head_axis,
            **options,
        )
        return self._project_out(attended)

    def _new(
        self, x: Float[Array, "*batch length in_features"], offset: Any
    ) -> tuple[Array, Array, Array, float | None]:
        """What `project` gives, and by which base it is still to be turned."""
        return *self.project(x, offset), None

    def _project_out(
        self, attended: Float[Array, "*batch length heads head_dim"]
    ) -> Float[Array, "*batch length in_features"]:
        out = self.out(attended)
        return out if self.head_axis is None else jax.lax.psum(out, self.head_axis)
