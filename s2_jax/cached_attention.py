"""`cached_attention`: new tokens join a cache and attend to what it holds."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.decode import NO_ROOM, DecodeSettings
from pallas_kernels.decode_partition import decode_over_mesh
from pallas_kernels.explicit import is_split
from pallas_kernels.lowering import Launcher
from s2_jax.attention import choose, s2_attention
from s2_jax.cache_checks import check_new
from s2_jax.cache_lists import Queries
from s2_jax.checks import Call, check_call, check_implementation, check_lengths
from s2_jax.contiguous_cache import ContiguousCache
from s2_jax.cudnn import can_step, cudnn_step
from s2_jax.decode_reference import reference_decode
from s2_jax.evicting_cache import EvictingCache
from s2_jax.implementations import run
from s2_jax.joining import Cache, New, join
from s2_jax.rope import check_rope
from s2_jax.structure import boolean

# More new tokens than this are taken by the kernels for long rows of queries.
_DECODE_AT_MOST = 16


def cached_attention(
    query: Float[Array, "batch new heads head_dim"],
    key: Float[Array, "batch new kv_heads head_dim"],
    value: Float[Array, "batch new kv_heads value_dim"],
    cache: Cache,
    *,
    lengths: Int[Array, " batch"] | None = None,
    first: bool = False,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    head_axis: str | None = None,
    rope_base: float | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "batch new heads value_dim"], Cache]:
    """Appends new keys and values to a cache, and attends to all that the pattern shows of it.

    One call serves the whole of a prompt, a chunk of it, and one or a few tokens at a time. The
    results are those of one call of `s2_attention` over the whole sequence. There are no gradients.
    Up to 16 new tokens are decoded, at a cost that depends on what their heads see. More of them,
    where the sequences have begun before, lay the cache out for all of `max_length` first.

    Args:
      query, key, value: of the new tokens, which stand at positions `cache.length + arange(new)`;
        one dtype, that of the cache.
      cache: a `ContiguousCache` or an `EvictingCache`. It is not changed; donate it under `jit`, so
        that the new one takes its memory.
      lengths: int32 `[batch]`, how many of the new tokens count in each sequence (the leading ones;
        the others give zeros); by default all. Traced ones are clipped to what there is.
      first: the sequences begin with these tokens, and what the cache held is dropped: the prompt
        is attended to directly, which is faster than to an empty cache.
      scale, logits_soft_cap, implementation: as for `s2_attention`.
      head_axis: mesh axis over which heads, and the cache, are split inside `shard_map` or `pmap`.
      rope_base: queries and keys are first turned for their positions, as by `s2_jax.rope.rotate`
        with this base; None: they come as they are to be.

    Returns:
      Output `[batch, new, heads, value_dim]` and the new cache. Tokens past `cache.max_length`, or
      past the length that the pages of the sequence are enough for, are not kept and give NaN.

    Raises:
      ValueError, TypeError: what does not fit the cache, named, before anything is compiled.
      NotImplementedError: what the kernels cannot do, as for `s2_attention`.

    Source: S2-Attention, arXiv 2407.17678, section 3.3 (KV-efficient patterns).
    """
    check_implementation(implementation, None)
    if implementation == "mosaic":
        raise ValueError(
            'implementation="mosaic" is for s2_attention; None takes its kernels for whole prompts'
        )
    if not isinstance(cache, ContiguousCache | EvictingCache):
        raise TypeError(
            f"cache must be a ContiguousCache or an EvictingCache, got {type(cache).__name__}"
        )
    if getattr(query, "ndim", 4) != 4:
        raise ValueError(f"query must be [batch, new, heads, head_dim], got shape {query.shape}")
    call, _ = check_call(
        query, key, value, cache.pattern, scale=scale, query_offset=0, segment_ids=None,
        kv_segment_ids=None, query_seq_lengths=None, key_value_seq_lengths=None,
        logits_soft_cap=logits_soft_cap, head_axis=head_axis,
    )  # fmt: skip
    shards = call.num_heads // call.query.shape[2]
    check_new(cache, call.query, call.key, call.value, shards)
    if is_split((call.query, call.key, call.value, cache)):
        raise NotImplementedError(
            "cached_attention does not follow arrays over Explicit mesh axes: use Auto axes, or "
            "shard_map with head_axis"
        )
    new = call.query.shape[1]
    lengths = check_lengths("lengths", lengths, cache.length.shape[0], new, unbatched=False)
    if boolean("first", first) and new > cache.max_length:
        raise ValueError(f"{new} new tokens are more than max_length={cache.max_length}")
    if rope_base is not None:
        rope_base = check_rope(call.query.shape[-1], rope_base)
    if choose(call, implementation) == "reference":
        implementation = "reference"
    return _extend(call, cache, lengths, first, rope_base, implementation)


def _extend(
    call: Call,
    cache: Cache,
    lengths: Array | None,
    first: bool,
    rope_base: float | None,
    implementation: str | None,
) -> tuple[Array, Cache]:
    """`cached_attention`, its arguments checked."""
    new = call.query.shape[1]
    before = cache.emptied() if first else cache
    padded = None if lengths is None else jnp.clip(lengths, 0, new)  # None needs no masks
    lengths = jnp.full(cache.length.shape, new, jnp.int32) if padded is None else padded
    arrays = _undifferentiable(call.query, call.key, call.value, cache.key, cache.value)
    call = dataclasses.replace(call, query=arrays[0], key=arrays[1], value=arrays[2])
    before = dataclasses.replace(before, key=arrays[3], value=arrays[4])
    kv_heads = jnp.arange(call.key.shape[2], dtype=jnp.int32)
    if call.head_axis is not None:
        kv_heads += lax.axis_index(call.head_axis).astype(jnp.int32) * kv_heads.size
    start = before.length
    tokens = New(call.query, call.key, call.value)
    if new == 1 and not first:
        query, grown = join(tokens, before, lengths, kv_heads, rope_base, implementation)
        call = dataclasses.replace(call, query=query)
    else:
        tokens = tokens.turned(0 if first else start, rope_base)
        call = dataclasses.replace(call, query=tokens.query, key=tokens.key)
        grown = before.append(call.key, call.value, lengths, kv_heads)
    attend = functools.partial(
        s2_attention,
        pattern=cache.pattern,
        scale=call.scale,
        logits_soft_cap=call.logits_soft_cap,
        head_axis=call.head_axis,
        implementation=implementation,
        query_seq_lengths=padded,
    )
    step = jnp.arange(new, dtype=jnp.int32)[None]
    position = start[:, None] + step
    counts = step < lengths[:, None]
    beyond = counts & before.has_no_room(position)
    # cuDNN takes whole prompts and single tokens alone.
    later = None if implementation == "cudnn" else implementation
    by_cudnn = implementation == "cudnn" and new == 1 and can_step(call) and not grown.paged
    if first or not new:
        out = attend(call.query, call.key, call.value, key_value_seq_lengths=padded)
    elif by_cudnn:
        seen = jnp.where(counts[:, 0], jnp.minimum(position[:, 0] + 1, cache.max_length), 0)
        out = cudnn_step(call, grown.key, grown.value, seen)
    elif new <= _DECODE_AT_MOST:
        # What lies past max_length was never written, so that nothing may look there.
        asks = jnp.where(beyond, NO_ROOM, jnp.where(counts, position, -1))
        queries = Queries(cache.pattern, asks, kv_heads, cache.num_heads, cache.num_kv_heads)
        # The kernel gives NaN itself: a step is spared one more.
        return _decode(call, grown, queries, later), cast(Cache, grown)
    else:
        keys, values = before.whole(call.key, call.value, lengths, kv_heads)
        out = attend(
            call.query,
            keys,
            values,
            query_offset=start,
            key_value_seq_lengths=jnp.minimum(start + lengths, cache.max_length),
            implementation=later,
        )
    return jnp.where(beyond[..., None, None], jnp.nan, out), cast(Cache, grown)


@jax.custom_jvp
def _undifferentiable(*arrays: Array) -> tuple[Array, ...]:
    return arrays


@_undifferentiable.defjvp
def _(*_: Any) -> Any:
    raise NotImplementedError("cached_attention has no gradients; s2_attention has")


def _decode(
    call: Call, cache: ContiguousCache | EvictingCache, queries: Queries, implementation: str | None
) -> Array:
    settings = DecodeSettings(
        scale=abs(call.scale) or 1.0,
        block_size=cache.pattern.block_size,
        paged=cache.paged,
        soft_cap=call.logits_soft_cap,
        window=cache.pattern.token_window()[1],
    )
    # Kernels want a positive scale, under which the largest raw score stays the largest.
    query = call.query if call.scale > 0 else call.query * (-1 if call.scale else 0)

    def kernel(*operands: Any, launcher: Launcher) -> tuple[Array, Array]:
        return decode_over_mesh(dataclasses.replace(settings, launcher=launcher), *operands)

    reference = functools.partial(reference_decode, settings)
    rows, position = queries.pack(query)
    operands = (rows, cache.key, cache.value, position, cache.lists(queries))
    out, _ = run(implementation, kernel, reference, *operands)
    return queries.unpack(out)
