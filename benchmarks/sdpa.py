"""PyTorch's attention forward, by backend: of one new token to a cache, or of a prompt to itself.

The module of a worker, see `benchmarks.attention_worker`. `measure_sdpa` is the parent's side.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from benchmarks.attention_worker import first_line
from benchmarks.cases import Framework
from benchmarks.timing import summary
from benchmarks.torch_attention import call_seconds, events_time
from benchmarks.workers import Lost, Pool, Timeouts

Backend = Literal["FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"]
BACKENDS: tuple[Backend, ...] = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")
WORKER = Framework(("torch",), "benchmarks.sdpa", False, "PyTorch SDPA, dense")


@dataclasses.dataclass(frozen=True)
class SdpaCase:
    """bfloat16; causal where queries are as many as keys. copies: of keys and values, which calls
    take in turn, so that none finds its own in the cache of the GPU."""

    backend: Backend
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    q_len: int
    kv_len: int
    copies: int = 1


CASE = SdpaCase


class Session:
    """What the worker holds: the inputs of one shape, and how long calls take, roughly."""

    def __init__(self, name: str) -> None:
        self._inputs: tuple[SdpaCase, Any] | None = None
        self._seconds: dict[SdpaCase, float] = {}

    def _calls(self, case: SdpaCase) -> Callable[[], Any]:
        """A call, each time with the next copy."""
        import torch  # type: ignore[import-not-found]
        from torch.nn.attention import SDPBackend, sdpa_kernel  # type: ignore[import-not-found]
        from torch.nn.functional import (  # type: ignore[import-not-found]
            scaled_dot_product_attention,
        )

        shape = dataclasses.replace(case, backend="FLASH_ATTENTION")
        if self._inputs is None or self._inputs[0] != shape:
            self.forget_inputs()
            torch.manual_seed(0)

            def draw(heads: int, length: int) -> Any:
                size = (case.batch, heads, length, case.head_dim)
                return torch.randn(size, dtype=torch.bfloat16, device="cuda")

            query = draw(case.heads, case.q_len)
            pairs = [
                (draw(case.kv_heads, case.kv_len), draw(case.kv_heads, case.kv_len))
                for _ in range(case.copies)
            ]
            self._inputs = shape, (query, pairs)
        query, pairs = self._inputs[1]
        copies = itertools.cycle(pairs)
        backend = getattr(SDPBackend, case.backend)
        grouped, causal = case.heads != case.kv_heads, case.q_len == case.kv_len

        def call() -> Any:
            with sdpa_kernel(backend), torch.no_grad():
                return scaled_dot_product_attention(
                    query, *next(copies), is_causal=causal, enable_gqa=grouped
                )

        return call

    def prepare(self, case: SdpaCase) -> dict[str, Any]:
        """Raises NotImplementedError where the backend does not take this, which ends nothing."""
        import torch  # type: ignore[import-not-found]

        try:
            call = self._calls(case)
            if not bool(torch.isfinite(call()).all()):
                raise FloatingPointError("results that are not finite")
            self._seconds[case] = call_seconds(call)
        except RuntimeError as failure:
            self.forget_inputs()
            raise NotImplementedError(first_line(failure)) from None
        return {}

    def round(self, case: SdpaCase) -> dict[str, Any]:
        call = self._calls(case)
        if case not in self._seconds:  # of a worker before this one
            self._seconds[case] = call_seconds(call)
        return events_time(call, self._seconds[case])

    def forget_inputs(self) -> None:
        import torch  # type: ignore[import-not-found]

        self._inputs = None
        gc.collect()
        torch.cuda.empty_cache()

    def clear(self) -> None:
        self._seconds = {}
        self.forget_inputs()


def measure_sdpa(
    shapes: Sequence[SdpaCase], backends: Sequence[Backend], rounds: int, logs: Path
) -> tuple[str, dict[SdpaCase, dict[str, Any]]]:
    """ "ok" or why there is nothing; for every shape and backend what it took, or its error.

    The backends of a shape take turns. Nothing stays on the GPU.
    """
    if not backends or not shapes:
        return "not asked for", {}
    if any(importlib.util.find_spec(package) is None for package in WORKER.packages):
        return "not installed: torch", {}
    found: dict[SdpaCase, dict[str, Any]] = {}
    pool = Pool(logs, Timeouts(), {"sdpa": WORKER})
    try:
        for shape in shapes:
            cases = [dataclasses.replace(shape, backend=backend) for backend in backends]
            times: dict[SdpaCase, list[dict[str, Any]]] = {case: [] for case in cases}
            errors: dict[SdpaCase, str] = {}
            for do in ("prepare", *["round"] * rounds):
                for case in cases:
                    if case in errors:
                        continue
                    try:
                        reply = pool.ask("sdpa", do=do, case=dataclasses.asdict(case), keep=True)
                    except Lost as lost:
                        errors[case] = f"{do}: {lost}"
                        continue
                    if "unsupported" in reply:
                        errors[case] = f"not supported: {reply['unsupported']}"
                    elif do == "round":
                        times[case].append(reply)
            pool.clear()
            for case in cases:
                found[case] = summary(times[case]) | {"error": errors.get(case)}
    finally:
        pool.close()
    return "ok", found
