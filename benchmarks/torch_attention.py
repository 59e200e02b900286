"""The PyTorch frameworks: SDPA's backends, FlexAttention and dkernel. Imports PyTorch late."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable
from typing import Any

from benchmarks.cases import GROUP_SECONDS, MODES, Case, Mode, Name
from benchmarks.flex_mask import flex_block_mask
from benchmarks.phases import Phases
from benchmarks.timing import SHORT_SECONDS, calls_of_group, seconds_once, short_calls_of_group

Attention = Callable[[Any, Any, Any], Any]
_CYCLES_A_SECOND = 2e9
"""At least what a GPU's clock makes."""
_SURELY_LONG = 4 * GROUP_SECONDS
"""Seconds of a call that is a group alone even if others had the GPU meanwhile."""


def _sdpa(backend: str, case: Case) -> Attention:
    from torch.nn.attention import SDPBackend, sdpa_kernel  # type: ignore[import-not-found]
    from torch.nn.functional import (  # type: ignore[import-not-found]
        scaled_dot_product_attention,
    )

    grouped = case.heads != case.kv_heads

    def attention(query: Any, key: Any, value: Any) -> Any:
        with sdpa_kernel(getattr(SDPBackend, backend)):
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
    return LocalStrideSparseAttention(
        case.heads, case.length, case.block_size, case.local_blocks, case.stride, seq_dim=1
    ).cuda()


_ATTENTION: dict[str, Callable[[Case], Attention]] = {
    "flash2": functools.partial(_sdpa, "FLASH_ATTENTION"),
    "torch_cudnn": functools.partial(_sdpa, "CUDNN_ATTENTION"),
    "flex": _flex,
    "dkernel": _dkernel,
}


def _draw_inputs(name: Name, case: Case) -> tuple[Any, ...]:
    """Query, key, value, and the output's gradient, in the framework's own layout."""
    import torch  # type: ignore[import-not-found]

    torch.manual_seed(0)

    def draw(heads: int) -> Any:
        middle = (case.length, heads) if name == "dkernel" else (heads, case.length)
        shape = (case.batch, *middle, case.head_dim)
        return torch.randn(shape, dtype=torch.bfloat16, device="cuda")

    inputs = (draw(case.heads), draw(case.kv_heads), draw(case.kv_heads))
    return (*(x.requires_grad_() for x in inputs), draw(case.heads))


def _call(attention: Attention, mode: Mode, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    import torch  # type: ignore[import-not-found]

    query, key, value, grad = inputs
    if mode == "train":
        return torch.autograd.grad(attention(query, key, value), (query, key, value), grad)
    with torch.no_grad():
        return (attention(query, key, value),)


def call_seconds(call: Callable[[], Any], loaded: bool = False) -> float:
    """Of one call, roughly. loaded: it has been called before."""
    import torch  # type: ignore[import-not-found]

    def run(count: int) -> None:
        for _ in range(count):
            call()
        torch.cuda.synchronize()

    if not loaded:
        run(1)
    return seconds_once(run, loaded)


def events_time(
    call: Callable[[], Any], once: float, group_seconds: float | None = None
) -> dict[str, Any]:
    """Of one of many calls, between CUDA events. Short ones wait in the queue until all are there.

    once: what a call takes, roughly. group_seconds: as `calls_of_group` takes them.
    """
    import torch  # type: ignore[import-not-found]

    short = once < SHORT_SECONDS
    count = short_calls_of_group(once) if short else calls_of_group(once, group_seconds)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if count > 1:
        call()
    if short and hasattr(torch.cuda, "_sleep"):
        torch.cuda._sleep(int(_CYCLES_A_SECOND * once * count))
    begin.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return {"seconds": begin.elapsed_time(end) / 1e3 / count, "clock": "cuda-events"}


class Session:
    """What the worker holds: attentions by case, and the inputs of one shape."""

    def __init__(self, name: Name) -> None:
        import torch  # type: ignore[import-not-found]

        torch.cuda.init()  # takes seconds, which count as those of the start
        self._name = name
        self._attentions: dict[Case, Attention] = {}
        self._seconds: dict[tuple[Case, Mode], float] = {}
        self._inputs: tuple[Case, tuple[Any, ...]] | None = None
        self.phases = Phases()

    def _inputs_of(self, case: Case) -> tuple[Any, ...]:
        import torch  # type: ignore[import-not-found]

        if self._inputs is None or self._inputs[0] != case.shape:
            self.forget_inputs()
            with self.phases("arrays"):
                self._inputs = case.shape, _draw_inputs(self._name, case)
                torch.cuda.synchronize()
        return self._inputs[1]

    def forget_inputs(self) -> None:
        import torch  # type: ignore[import-not-found]

        self._inputs = None
        gc.collect()
        torch.cuda.empty_cache()

    def prepare(self, case: Case) -> dict[str, Any]:
        """Calls each mode once, which compiles; memory is the allocator's peak meanwhile.

        Raises:
          FloatingPointError: the results are not finite.
        """
        import torch  # type: ignore[import-not-found]

        if case.documents > 1 or case.padded:
            raise NotImplementedError(f"{self._name} is measured on whole rows only")
        inputs = self._inputs_of(case)
        before, start = torch.cuda.memory_allocated(), time.perf_counter()
        with self.phases("layout"):
            attention = self._attentions[case] = _ATTENTION[self._name](case)
        facts: dict[str, Any] = {"layout_s": time.perf_counter() - start}
        facts["first_call_s"] = facts["layout_s"]
        for mode in MODES:
            # The second call's memory: the first may try several programs.
            for first in (True, False):
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                start = time.perf_counter()
                with self.phases("first call" if first else "warm-up"):
                    results = _call(attention, mode, inputs)
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - start
                facts["first_call_s"] += seconds * first
                needed = torch.cuda.max_memory_allocated() - before
                with self.phases("check"):
                    if not all(bool(torch.isfinite(result).all()) for result in results):
                        raise FloatingPointError("results that are not finite")
                del results
            if seconds > _SURELY_LONG:
                self._seconds[case, mode] = seconds
            used = inputs[:3] if mode == "forward" else inputs
            facts[mode] = {"bytes": needed + sum(x.nbytes for x in used)}
        return facts

    def round(self, case: Case) -> dict[str, Any]:
        inputs = self._inputs_of(case)
        return {mode: self._time(case, mode, inputs) for mode in MODES}

    def _time(self, case: Case, mode: Mode, inputs: tuple[Any, ...]) -> dict[str, Any]:
        def call() -> Any:
            return _call(self._attentions[case], mode, inputs)

        if (case, mode) not in self._seconds:
            with self.phases("warm-up"):
                self._seconds[case, mode] = call_seconds(call, loaded=True)
        with self.phases("timing"):
            return events_time(call, self._seconds[case, mode], GROUP_SECONDS)

    def clear(self) -> None:
        self._attentions, self._seconds = {}, {}
        if self._name == "dkernel":
            from dkernel import LocalStrideSparseAttention  # type: ignore[import-not-found]

            # The class is a cache of its instances, which hold GPU memory.
            LocalStrideSparseAttention.cache_clear()
        self.forget_inputs()
