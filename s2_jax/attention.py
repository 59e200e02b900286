"""`s2_attention`: checks its arguments, chooses an implementation, and hands over."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from pallas_kernels import lowering
from pallas_kernels.attention import Portable, block_sparse_attention
from pallas_kernels.call import Settings
from pallas_kernels.explicit import explicit_axes, explicit_spec, is_split
from pallas_kernels.tiles import LEAST_MOSAIC_QUERIES, MOSAIC_ROWS, TileConfig, pick_tiles
from pallas_kernels.tokens import Tokens
from s2_jax.checks import Call, check_call, check_implementation
from s2_jax.cudnn import check_cudnn, cudnn_attention
from s2_jax.implementations import KERNEL_DTYPES, LAUNCHERS, on_old_gpu
from s2_jax.layout import PatternLayouts, gathers_keys, number_patterns
from s2_jax.patterns import Pattern
from s2_jax.reference import reference_attention
from s2_jax.structure import Heads, boolean

_LEAST_ROWS_FOR_MOSAIC = 1024
_MAX_HEAD_DIM = 256


def s2_attention(
    query: Float[Array, "*batch q_len heads head_dim"],
    key: Float[Array, "*batch kv_len kv_heads head_dim"],
    value: Float[Array, "*batch kv_len kv_heads value_dim"],
    pattern: Pattern,
    *,
    scale: float | None = None,
    query_offset: int | Int[Array, "*batch"] = 0,
    segment_ids: Int[Array, "*batch q_len"] | None = None,
    kv_segment_ids: Int[Array, "*batch kv_len"] | None = None,
    query_seq_lengths: Int[Array, "*batch"] | None = None,
    key_value_seq_lengths: Int[Array, "*batch"] | None = None,
    logits_soft_cap: float | None = None,
    head_axis: str | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    tiles: TileConfig | None = None,
) -> Any:
    """Attention in which every head sees the blocks that `pattern` gives it.

    Shapes as in `jax.nn.dot_product_attention`; the batch axis may be left out of everything.
    Differentiable in query, key and value, through the output and through the LSE.

    Args:
      query: `[batch, q_len, heads, head_dim]`; key: `[batch, kv_len, kv_heads, head_dim]`;
        value: `[batch, kv_len, kv_heads, value_dim]`. One float dtype for all; heads a multiple
        of kv_heads (GQA, MQA). Kernels take bfloat16, float16 and float32.
      pattern: what each head sees; static under `jit`, compared by value. What it hides must still
        be finite: a NaN in a hidden key or value can reach queries of the same tile.
      scale: of the scores; by default `1 / sqrt(head_dim)`. A Python number.
      query_offset: absolute position of query 0 (keys start at 0). An int is static. An int32
        array, `[]` or `[batch]`, may be traced: nothing is traced anew when it changes. It must
        not exceed max(q_len, kv_len); positions beyond what the call covers give NaN.
      segment_ids, kv_segment_ids: integers `[batch, q_len]` and `[batch, kv_len]`; tokens with
        equal ids see each other. The second defaults to the first where the lengths agree.
      query_seq_lengths, key_value_seq_lengths: int32 `[batch]`, valid leading rows. Padded
        queries give output 0 and LSE -inf.
      logits_soft_cap: caps scores smoothly, `cap * tanh(score / cap)`, where given.
      head_axis: mesh axis over which the heads are split, inside `shard_map` or `pmap`; a shard
        computes what its heads compute in the whole. Query and key/value heads must both be split.
      return_lse: also return the natural-log log-sum-exp of each query's scores.
      implementation: None takes the kernels where the call is lowered for an NVIDIA GPU and the
        reference elsewhere; "triton" the kernels that Triton lowers; "mosaic" those for
        Hopper (H100, H200) that Mosaic GPU lowers, which None also takes where it can;
        "jax_triton" those of Triton compiled by the official one instead of XLA's
        (`pip install s2-jax[triton]`); "interpret" the same in
        Pallas' interpreter, on any machine; "reference" plain jnp; "cudnn" cuDNN's attention, for
        `s2_jax.dense` alone, in bfloat16 or float16.
      tiles: tile sizes for the kernels, instead of the heuristic's.

    Returns:
      Output `[batch, q_len, heads, value_dim]` in the inputs' dtype; with `return_lse` also the
      LSE, `[batch, heads, q_len]` float32 (float64 from the reference on float64 inputs). A
      query with nothing to attend to gives zeros, an LSE of -inf and zero gradients.

    Raises:
      ValueError, TypeError: arguments that do not fit, named, before anything is compiled.
      NotImplementedError: what the kernels cannot do yet, on a GPU or where they were asked for.

    Source: S2-Attention, arXiv 2407.17678.
    """
    check_implementation(implementation, tiles)
    boolean("return_lse", return_lse)
    call, unbatched = check_call(
        query, key, value, pattern, scale=scale, query_offset=query_offset,
        segment_ids=segment_ids, kv_segment_ids=kv_segment_ids,
        query_seq_lengths=query_seq_lengths, key_value_seq_lengths=key_value_seq_lengths,
        logits_soft_cap=logits_soft_cap, head_axis=head_axis,
    )  # fmt: skip
    if implementation == "cudnn":
        check_cudnn(call, return_lse=return_lse)
    chosen = choose(call, implementation)
    if 0 in (call.query.shape[0], call.query.shape[1], call.key.shape[1]):
        out, lse = _nothing_to_see(call)
    elif chosen == "reference":
        out, lse = _run_reference(Reference.of(call), *_operands(call))
    elif chosen == "cudnn":
        out, lse = cudnn_attention(call), None
    else:
        out, lse = _kernels(call, implementation, tiles)
    if unbatched:
        out, lse = jax.tree.map(lambda x: x[0], (out, lse))
    return (out, lse) if return_lse else out


@dataclasses.dataclass(frozen=True)
class Reference:
    """The reference with the static side of a call bound, so that it can stand in for kernels."""

    pattern: Pattern
    num_heads: int
    num_kv_heads: int
    scale: float
    logits_soft_cap: float | None
    q_limit: int

    @classmethod
    def of(cls, call: Call) -> Reference:
        numbers = (call.num_heads, call.num_kv_heads)
        return cls(call.pattern, *numbers, call.scale, call.logits_soft_cap, call.q_limit)

    def __call__(
        self, query: Array, key: Array, value: Array, tokens: Tokens
    ) -> tuple[Array, Array]:
        if not is_split((query, key, value, tokens)):
            return self._run(query, key, value, tokens)
        batch, _, heads, _ = explicit_spec(query)  # which everything follows, as in the kernels
        split = (P(batch, None, heads, None), P(batch, heads, None))
        run = jax.sharding.auto_axes(self._run, axes=tuple(explicit_axes()), out_sharding=split)
        return run(query, key, value, tokens)

    def _run(self, query: Array, key: Array, value: Array, tokens: Tokens) -> tuple[Array, Array]:
        out, lse = reference_attention(
            query, key, value, self.pattern,
            Heads(tokens.head_index, self.num_heads, self.num_kv_heads), tokens,
            scale=self.scale, logits_soft_cap=self.logits_soft_cap,
        )  # fmt: skip
        row = jnp.arange(query.shape[1], dtype=jnp.int32)[None]
        position = tokens.offset[:, None] + row
        answered = (position >= 0) & (position < self.q_limit)
        if tokens.q_length is not None:
            answered |= row >= tokens.q_length[:, None]
        out = jnp.where(answered[:, :, None, None], out, jnp.nan)
        return out, jnp.where(answered[:, None, :], lse, jnp.nan)


@functools.partial(jax.jit, static_argnums=0)
def _run_reference(reference: Reference, *operands: Any) -> tuple[Array, Array]:
    return reference(*operands)


def _operands(call: Call) -> tuple[Any, ...]:
    """Arrays of a call: what `Reference` takes."""
    batch, _, local_heads, _ = call.query.shape
    index = jnp.arange(local_heads, dtype=jnp.int32)
    if call.head_axis is not None:
        index = index + jax.lax.axis_index(call.head_axis).astype(jnp.int32) * local_heads
    offset = call.query_offset
    if isinstance(offset, int):
        offset = jnp.full((batch,), offset, jnp.int32)
    index = jnp.broadcast_to(index[None], (batch, local_heads))
    tokens = Tokens(
        index, offset, call.segment_ids, call.kv_segment_ids,
        call.query_seq_lengths, call.key_value_seq_lengths,
    )  # fmt: skip
    return call.query, call.key, call.value, tokens


def _nothing_to_see(call: Call) -> tuple[Array, Array]:
    batch, q_len, heads, _ = call.query.shape
    dtype = jnp.float64 if call.query.dtype == jnp.float64 else jnp.float32
    out = jnp.zeros((batch, q_len, heads, call.value.shape[-1]), call.query.dtype)
    return out, jnp.full((batch, heads, q_len), -jnp.inf, dtype)


def _kernels(
    call: Call, implementation: str | None, tiles: TileConfig | None
) -> tuple[Array, Array]:
    q_len, kv_len = call.query.shape[1], call.key.shape[1]
    if tiles is None:
        copied = q_len % 8 or kv_len % 8  # as a whole, and results too: memory nobody asked for
        mosaic = implementation == "mosaic" or (
            implementation is None
            and q_len >= _LEAST_ROWS_FOR_MOSAIC
            and not copied
            and _missing_for_mosaic(call) is None
        )
        tiles = pick_tiles(
            head_dim=max(call.query.shape[-1], call.value.shape[-1]),
            itemsize=call.query.dtype.itemsize,
            q_len=q_len,
            block_size=call.pattern.block_size,
            group=call.query.shape[2] // call.key.shape[2],
            cut_short=call.segment_ids is not None,
            padded=call.query_seq_lengths is not None,
            gathers=gathers_keys(call.pattern, call.num_heads, call.num_kv_heads),
            compute_capability=lowering.compute_capability() or 90,
            mosaic=mosaic,
        )
    elif implementation == "mosaic" and not tiles.mosaic:
        raise ValueError(f"{implementation=} has tiles of lowering='mosaic', got {tiles}")
    elif tiles.mosaic:
        if implementation not in (None, "mosaic", "interpret"):
            raise ValueError(f"{implementation=} has no tiles of lowering='mosaic', got {tiles}")
        _check_mosaic(call, tiles, interpreted=implementation == "interpret")
    offset = call.query_offset if isinstance(call.query_offset, int) else None
    layouts = PatternLayouts(
        call.pattern, call.num_heads, call.num_kv_heads, offset or 0, call.q_limit, kv_len, tiles,
        traced_offset=offset is None,
    )  # fmt: skip
    # Kernels want a positive scale, under which the largest raw score stays the largest.
    scale = abs(call.scale) or 1.0
    if call.scale <= 0:
        call = dataclasses.replace(call, query=call.query * (-1 if call.scale else 0))
    settings = Settings(
        layouts=layouts,
        tiles=tiles,
        scale=scale,
        causal=call.pattern.causal,
        block_size=call.pattern.block_size,
        query_offset=offset,
        q_limit=call.q_limit,
        launcher=LAUNCHERS[implementation],
        soft_cap=call.logits_soft_cap,
        window=call.pattern.token_window()[1],
    )
    keys = call.pattern.head_keys(call.num_heads, call.num_kv_heads)
    fallback = (
        dataclasses.replace(Reference.of(call), scale=scale) if implementation is None else None
    )
    static = Portable(settings, number_patterns(keys), fallback)
    return block_sparse_attention(static, *_operands(call))


def choose(call: Call, implementation: str | None) -> str:
    """ "kernels", "reference" or "cudnn"; raises where what was asked for cannot run."""
    if implementation == "reference":
        return "reference"
    missing = _missing_in_kernels(call)
    on_gpu = lowering.target_platform() in ("gpu", "cuda")
    capability, too_old = lowering.compute_capability(), on_old_gpu()
    if implementation is None:
        if missing and not on_gpu:
            return "reference"
        if too_old:
            warnings.warn(
                f"the kernels need an NVIDIA GPU of compute capability "
                f"{lowering.OLDEST_COMPUTE_CAPABILITY / 10} or newer, got "
                f"{(capability or 0) / 10}; the reference runs instead", stacklevel=3,
            )  # fmt: skip
            return "reference"
    if implementation in ("triton", "mosaic", "jax_triton", "cudnn") and (not on_gpu or too_old):
        raise ValueError(
            f'implementation="{implementation}" needs an NVIDIA GPU (Ampere or newer), but '
            f"this call is traced for {lowering.target_platform()!r}; "
            f'"interpret" and "reference" run anywhere'
        )
    if implementation == "cudnn":
        return "cudnn"
    if implementation == "mosaic":
        _check_mosaic(call)
    if implementation == "jax_triton" and (packages := lowering.missing_packages()):
        raise ValueError(
            f'implementation="jax_triton" needs {" and ".join(packages)}: '
            f"pip install 's2-jax[triton]' (Linux only)"
        )
    if missing:
        raise NotImplementedError(
            f'the kernels do not support {missing}; implementation="reference" does'
        )
    return "kernels"


def _check_mosaic(call: Call, tiles: TileConfig | None = None, interpreted: bool = False) -> None:
    if missing := _missing_for_mosaic(call, interpreted):
        what = 'the kernels of implementation="mosaic"'
        if tiles is not None:
            what = "kernels for tiles of lowering='mosaic'"
        raise NotImplementedError(
            f"{what} {missing}; implementation=None without tiles takes them where they can"
        )
    if tiles is not None:
        size = call.pattern.block_size
        if tiles.dkv.lowering == "mosaic" and size < LEAST_MOSAIC_QUERIES:
            raise NotImplementedError(
                f"tiles.dkv of lowering='mosaic' takes blocks of {LEAST_MOSAIC_QUERIES} tokens or "
                f"more, got {size}"
            )
        tiles.check_mosaic_memory(call.query.shape[-1], call.segment_ids is not None)


def _missing_for_mosaic(call: Call, interpreted: bool = False) -> str | None:
    """What keeps Mosaic's kernels from a call, if anything does."""
    dims = (call.query.shape[-1], call.value.shape[-1])
    offset, capability = call.query_offset, lowering.compute_capability()
    needed = lowering.FIRST_JAX_THAT_INTERPRETS if interpreted else lowering.FIRST_MOSAIC_JAX
    reasons = {
        f"are for compute capability 9.0, got {(capability or 0) / 10}": (
            capability != 90 and not interpreted
        ),
        f"need JAX {'.'.join(map(str, needed))} or newer, got {jax.__version__}": (
            jax.__version_info__ < needed
        ),
        "need CUDA before 12.8, or 12.9.1 and newer": lowering.compiler_errs(),
        f"take bfloat16 and float16, got {call.query.dtype}": (
            call.query.dtype not in (jnp.bfloat16, jnp.float16)
        ),
        f"take head dims of 64 or 128, for keys and values alike, got {dims}": (
            dims not in ((64, 64), (128, 128))
        ),
        "take segment_ids with blocks of 32 tokens or more": (
            call.segment_ids is not None and call.pattern.block_size < 32
        ),
        f"take a query_offset known before, a multiple of {MOSAIC_ROWS}": (
            not isinstance(offset, int) or offset % MOSAIC_ROWS != 0
        ),
        "take no logits_soft_cap": call.logits_soft_cap is not None,
        "do not run inside shard_map with check_vma=True in this JAX": (
            not lowering.can_hide_varying()
            and bool(lowering.varying(jax.tree.leaves(_operands(call))))
        ),
        "leak in JAX's own tracing, which jax.checking_leaks finds": bool(
            jax.config.jax_check_tracer_leaks  # type: ignore[attr-defined]
        ),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def _missing_in_kernels(call: Call) -> str | None:
    dims = (call.query.shape[-1], call.value.shape[-1])
    reasons = {
        f"dtype {call.query.dtype} (they take bfloat16, float16 and float32)": (
            call.query.dtype not in KERNEL_DTYPES
        ),
        f"head dims above {_MAX_HEAD_DIM}, got {max(dims)}": max(dims) > _MAX_HEAD_DIM,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)
