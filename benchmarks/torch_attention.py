"""The PyTorch frameworks: FlashAttention-2, FlexAttention and dkernel. Imports PyTorch late."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable
from typing import Any

from benchmarks.cases import BLOCK_SIZE, Case, Measurement, Mode, Name
from benchmarks.flex_mask import flex_block_mask
from benchmarks.timing import median_seconds

Attention = Callable[[Any, Any, Any], Any]


def _flash2(case: Case) -> Attention:
    from torch.nn.attention import SDPBackend, sdpa_kernel  # type: ignore[import-not-found]
    from torch.nn.functional import (  # type: ignore[import-not-found]
        scaled_dot_product_attention,
    )

    grouped = case.heads != case.kv_heads

    def attention(query: Any, key: Any, value: Any) -> Any:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=grouped
            )

    return attention


def _flex(case: Case) -> Attention:
    mask = flex_block_mask(case, "cuda")
    grouped = case.heads != case.kv_heads
    attention = _compiled_flex_attention()
    return lambda query, key, value: attention(
        query, key, value, block_mask=mask, enable_gqa=grouped
    )


@functools.cache
def _compiled_flex_attention() -> Any:
    """One program a length and mode, for all patterns: a mask brings its numbers as tensors."""
    import torch  # type: ignore[import-not-found]
    from torch.nn.attention.flex_attention import (  # type: ignore[import-not-found]
        flex_attention,
    )

    torch._dynamo.config.recompile_limit = 64
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _dkernel(case: Case) -> Attention:
    from dkernel import LocalStrideSparseAttention  # type: ignore[import-not-found]

    if case.heads != case.kv_heads:
        raise NotImplementedError("dkernel trains with as many key/value heads as query heads only")
    # The class is a cache of its instances, which hold GPU memory.
    LocalStrideSparseAttention.cache_clear()
    return LocalStrideSparseAttention(
        case.heads, case.length, BLOCK_SIZE, case.local_blocks, case.stride, seq_dim=1
    ).cuda()


_ATTENTION: dict[str, Callable[[Case], Attention]] = {
    "flash2": _flash2,
    "flex": _flex,
    "dkernel": _dkernel,
}


def _inputs(name: Name, case: Case, mode: Mode) -> tuple[Any, ...]:
    """Query, key, value, and to train the output's gradient, in the framework's own layout."""
    import torch  # type: ignore[import-not-found]

    torch.manual_seed(0)

    def draw(heads: int) -> Any:
        middle = (case.length, heads) if name == "dkernel" else (heads, case.length)
        shape = (case.batch, *middle, case.head_dim)
        return torch.randn(shape, dtype=torch.bfloat16, device="cuda")

    inputs = (draw(case.heads), draw(case.kv_heads), draw(case.kv_heads))
    if mode == "forward":
        return inputs
    return (*(x.requires_grad_() for x in inputs), draw(case.heads))


def measure(name: Name, case: Case, mode: Mode, repeats: int) -> Measurement:
    """Time between CUDA events, the allocator's peak meanwhile, and the first call.

    Raises:
      FloatingPointError: the results are not finite.
    """
    import torch  # type: ignore[import-not-found]

    gc.collect()
    torch.cuda.empty_cache()
    start = time.perf_counter()
    attention = _ATTENTION[name](case)
    prepared = time.perf_counter() - start
    query, key, value, *grad = _inputs(name, case, mode)

    def call() -> tuple[Any, ...]:
        if mode == "train":
            out = attention(query, key, value)
            return torch.autograd.grad(out, (query, key, value), grad[0])
        with torch.no_grad():
            return (attention(query, key, value),)

    torch.cuda.synchronize()
    start = time.perf_counter()
    results = call()
    torch.cuda.synchronize()
    first_call = prepared + time.perf_counter() - start
    if not all(bool(torch.isfinite(result).all()) for result in results):
        raise FloatingPointError(f"{name} gives results that are not finite for {case}")
    del results

    def run(count: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    torch.cuda.reset_peak_memory_stats()
    seconds = median_seconds(run, repeats)
    return Measurement(seconds, torch.cuda.max_memory_allocated(), first_call)
