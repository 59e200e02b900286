"""What `s2_attention` accepts: every bad call ends here, before anything is compiled."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.explicit import check_split
from pallas_kernels.tiles import TileConfig
from s2_jax.patterns import Pattern

IMPLEMENTATIONS = (None, "triton", "mosaic", "jax_triton", "interpret", "reference", "cudnn")


@dataclasses.dataclass(frozen=True)
class Call:
    """A checked call, batch axis present. `query_offset` is an int, or int32 `[batch]`."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    pattern: Pattern
    scale: float
    query_offset: int | jax.Array
    segment_ids: jax.Array | None
    kv_segment_ids: jax.Array | None
    query_seq_lengths: jax.Array | None
    key_value_seq_lengths: jax.Array | None
    logits_soft_cap: float | None
    num_heads: int
    num_kv_heads: int
    head_axis: str | None

    @property
    def q_limit(self) -> int:
        """Query positions from here on have no answer; reached only by a traced offset."""
        q_len, kv_len = self.query.shape[1], self.key.shape[1]
        if isinstance(self.query_offset, int):
            return self.query_offset + q_len
        blocks = self.pattern.q_block_limit
        far = max(q_len, kv_len) + q_len
        return far if blocks is None else min(far, blocks * self.pattern.block_size)


def check_call(
    query: Any,
    key: Any,
    value: Any,
    pattern: Any,
    *,
    scale: Any,
    query_offset: Any,
    segment_ids: Any,
    kv_segment_ids: Any,
    query_seq_lengths: Any,
    key_value_seq_lengths: Any,
    logits_soft_cap: Any,
    head_axis: Any,
) -> tuple[Call, bool]:
    """The call in canonical form, and whether it came without a batch axis."""
    if not isinstance(pattern, Pattern):
        raise TypeError(
            f"pattern must be a pattern such as s2_jax.local_stride(16, 8), "
            f"got {type(pattern).__name__}"
        )
    query, key, value, unbatched = _check_arrays(query, key, value)
    batch, q_len, local_heads, head_dim = query.shape
    kv_len, local_kv_heads = key.shape[1:3]

    shards = axis_size(head_axis)
    num_heads, num_kv_heads = local_heads * shards, local_kv_heads * shards

    offset = check_offset(query_offset, batch, unbatched)
    last = offset + q_len if isinstance(offset, int) else max(q_len, kv_len)
    blocks = pattern.block_size
    pattern.check(num_heads, num_kv_heads, math.ceil(last / blocks), math.ceil(kv_len / blocks))

    rows = check_segments(segment_ids, kv_segment_ids, batch, q_len, kv_len, unbatched)
    lengths = {
        name: check_lengths(name, array, batch, limit, unbatched)
        for name, array, limit in (
            ("query_seq_lengths", query_seq_lengths, q_len),
            ("key_value_seq_lengths", key_value_seq_lengths, kv_len),
        )
    }
    call = Call(
        query=query,
        key=key,
        value=value,
        pattern=pattern,
        scale=_check_scale(scale, head_dim),
        query_offset=offset,
        **rows,
        **lengths,
        logits_soft_cap=check_soft_cap(logits_soft_cap),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_axis=head_axis,
    )
    return call, unbatched


def check_implementation(implementation: Any, tiles: Any) -> None:
    known = implementation is None or isinstance(implementation, str)
    if not known or implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{implementation=} must be one of {IMPLEMENTATIONS}")
    if tiles is not None and not isinstance(tiles, TileConfig):
        raise TypeError(f"tiles must be a TileConfig, got {type(tiles).__name__}")


def check_float_array(name: str, array: Any) -> None:
    if not is_array(array):
        raise TypeError(f"{name} must be a NumPy or JAX array, got {type(array).__name__}")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must have a floating dtype, got {array.dtype}")
    _check_dtype_of_jax(name, array)


def check_not_truncated(name: str, array: Any) -> None:
    numpy_double = isinstance(array, np.ndarray) and array.dtype == np.float64
    if numpy_double and not jax.config.read("jax_enable_x64"):
        raise TypeError(
            f"{name} is float64, which JAX would cast to float32: enable jax_enable_x64"
        )


def check_float_dtype(name: str, dtype: Any) -> None:
    try:
        floating = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        floating = False
    if dtype is None or not floating:  # NumPy reads None as float64
        raise TypeError(f"{name}={dtype!r} must be a floating dtype")


def check_head_axis(head_axis: Any) -> None:
    if head_axis is not None and not isinstance(head_axis, str):
        raise TypeError(f"head_axis must name one mesh axis, got {head_axis!r}")


def axis_size(head_axis: Any) -> int:
    check_head_axis(head_axis)
    if head_axis is None:
        return 1
    try:
        return jax.lax.axis_size(head_axis)
    except NameError:
        raise ValueError(
            f"{head_axis=} names no mesh axis in scope; use it inside shard_map or pmap"
        ) from None


def is_array(value: Any) -> bool:
    """JAX takes no masked arrays."""
    return isinstance(value, (np.ndarray, jax.Array)) and not isinstance(value, np.ma.MaskedArray)


def _kind(value: Any) -> Any:
    """What messages call a value of the wrong kind: an array by its dtype."""
    return value.dtype if is_array(value) else type(value).__name__


def _check_dtype_of_jax(name: str, array: Any) -> None:
    if isinstance(array, np.ndarray) and (not array.dtype.isnative or array.dtype.itemsize > 8):
        raise TypeError(f"{name} has dtype {array.dtype}, which JAX does not have")


def _check_arrays(query: Any, key: Any, value: Any) -> tuple[Any, Any, Any, bool]:
    arrays = {}
    for name, array in (("query", query), ("key", key), ("value", value)):
        check_float_array(name, array)
        if array.ndim not in (3, 4):
            raise ValueError(
                f"{name} must be [batch, length, heads, head_dim] or the same without batch, "
                f"got shape {array.shape}"
            )
        arrays[name] = array
    if len({array.dtype for array in arrays.values()}) > 1:
        raise TypeError(
            f"query, key and value must share one dtype, "
            f"got {query.dtype}, {key.dtype} and {value.dtype}"
        )
    if query.ndim != key.ndim or query.ndim != value.ndim:
        raise ValueError(
            f"query, key and value must have the same rank, "
            f"got shapes {query.shape}, {key.shape} and {value.shape}"
        )
    check_not_truncated("query", query)
    query, key, value = (jnp.asarray(array) for array in arrays.values())
    unbatched = query.ndim == 3
    if unbatched:
        query, key, value = query[None], key[None], value[None]
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"key and value must agree in batch, length and heads, "
            f"got {key.shape} and {value.shape}"
        )
    if query.shape[0] != key.shape[0]:
        raise ValueError(
            f"query and key must agree in batch, got {query.shape[0]} and {key.shape[0]}"
        )
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"query and key must have the same head_dim, got {query.shape[-1]} and {key.shape[-1]}"
        )
    if 0 in (query.shape[2], key.shape[2], query.shape[3], value.shape[3]):
        raise ValueError(
            f"heads and head_dim must not be 0, got shapes {query.shape} and {value.shape}"
        )
    if query.shape[2] % key.shape[2]:
        raise ValueError(
            f"the query heads must be a multiple of the key/value heads, "
            f"got {query.shape[2]} and {key.shape[2]}"
        )
    for name, array in (("query", query), ("key", key), ("value", value)):
        check_split(name, array)
    return query, key, value, unbatched


def check_offset(offset: Any, batch: int, unbatched: bool) -> int | jax.Array:
    if isinstance(offset, (int, np.integer)) and not isinstance(offset, bool):
        if not 0 <= offset < 2**30:
            raise ValueError(f"query_offset={offset} must not be negative, nor 2**30 or more")
        return int(offset)
    if not is_array(offset) or offset.dtype != jnp.int32:
        raise TypeError(f"query_offset must be an int or an int32 array, got {_kind(offset)}")
    shapes = [()] if unbatched else [(), (batch,)]
    if offset.shape not in shapes:
        raise ValueError(f"query_offset must have a shape of {shapes}, got {offset.shape}")
    if not isinstance(offset, jax.core.Tracer) and offset.size:
        known = np.asarray(offset)
        if known.min() < 0 or known.max() >= 2**30:
            raise ValueError(f"query_offset must not be negative, nor 2**30 or more, got {known}")
    return jnp.broadcast_to(jnp.asarray(offset), (batch,))


def check_segments(
    segment_ids: Any, kv_segment_ids: Any, batch: int, q_len: int, kv_len: int, unbatched: bool
) -> dict[str, Any]:
    ids = {"segment_ids": (segment_ids, q_len), "kv_segment_ids": (kv_segment_ids, kv_len)}
    rows = {name: _check_ids(name, a, batch, n, unbatched) for name, (a, n) in ids.items()}
    if segment_ids is None:
        if kv_segment_ids is not None:
            raise ValueError("kv_segment_ids needs segment_ids")
    elif kv_segment_ids is None:
        if q_len != kv_len:
            raise ValueError(
                f"kv_segment_ids is required where the lengths differ, got {q_len=}, {kv_len=}"
            )
        rows["kv_segment_ids"] = rows["segment_ids"]
    elif segment_ids.dtype != kv_segment_ids.dtype:
        raise TypeError(
            f"segment_ids and kv_segment_ids must share one dtype, "
            f"got {segment_ids.dtype} and {kv_segment_ids.dtype}"
        )
    return rows


def _check_ids(name: str, ids: Any, batch: int, length: int, unbatched: bool) -> Any:
    if ids is None:
        return None
    if not is_array(ids) or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"{name} must be an integer array, got {_kind(ids)}")
    _check_dtype_of_jax(name, ids)
    expected = (length,) if unbatched else (batch, length)
    if ids.shape != expected:
        raise ValueError(f"{name} must have shape {expected}, got {ids.shape}")
    if ids.dtype.itemsize > 4:
        raise TypeError(f"{name} is {ids.dtype}; ids of more than 32 bits must be cast to int32")
    ids = jnp.asarray(ids)
    unsigned = ids.dtype == jnp.uint32  # only equality matters
    ids = jax.lax.bitcast_convert_type(ids, jnp.int32) if unsigned else ids.astype(jnp.int32)
    return ids[None] if unbatched else ids


def check_lengths(name: str, lengths: Any, batch: int, limit: int, unbatched: bool) -> Any:
    if lengths is None:
        return None
    if isinstance(lengths, np.generic):
        lengths = np.asarray(lengths)
    if not is_array(lengths) or lengths.dtype != jnp.int32:
        raise TypeError(f"{name} must be an int32 array, got {_kind(lengths)}")
    expected = () if unbatched else (batch,)
    if lengths.shape != expected:
        raise ValueError(f"{name} must have shape {expected}, got {lengths.shape}")
    if not isinstance(lengths, jax.core.Tracer) and lengths.size:
        known = np.asarray(lengths)
        if known.min() < 0 or known.max() > limit:
            raise ValueError(f"{name} must lie in [0, {limit}], got {known}")
    lengths = jnp.asarray(lengths)
    return lengths[None] if unbatched else lengths


def _check_scale(scale: Any, head_dim: int) -> float:
    scale = check_scale(scale)
    return 1.0 / math.sqrt(head_dim) if scale is None else scale


def check_scale(scale: Any) -> float | None:
    if scale is None:
        return None
    scale = static_number("scale", scale, "multiply the query instead")
    if scale and not 1e-20 <= abs(scale) <= 1e8:
        raise ValueError(f"{scale=} must be 0 or between 1e-20 and 1e8 in size")
    return scale


def check_soft_cap(cap: Any) -> float | None:
    if cap is None:
        return None
    cap = static_number("logits_soft_cap", cap, "it must be known when tracing")
    if not 1e-20 <= cap <= 1e8:  # beyond, score / cap leaves float32
        raise ValueError(f"logits_soft_cap={cap} must be positive, between 1e-20 and 1e8")
    return cap


def static_number(name: str, number: Any, advice: str) -> float:
    if isinstance(number, jax.core.Tracer):
        raise TypeError(f"{name} must be a Python number, got a traced array; {advice}")
    if isinstance(number, (np.ndarray, np.generic, jax.Array)):
        if number.shape:
            raise TypeError(f"{name} must be a number, got an array of shape {number.shape}")
        real = any(jnp.issubdtype(number.dtype, kind) for kind in (jnp.integer, jnp.floating))
        kind = number.dtype
    else:
        real = isinstance(number, (int, float)) and not isinstance(number, bool)
        kind = type(number).__name__
    if not real:
        raise TypeError(f"{name} must be a number, got {kind}")
    try:
        number = float(number)
    except OverflowError:
        number = math.inf
    if not abs(number) <= float(np.finfo(np.float32).max):
        raise ValueError(f"{name}={number} must be finite in float32")
    return number
