"""What a worker's seconds go into, by name."""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Iterator

PHASES = (
    "start", "layout", "trace", "lower", "compile", "first call", "arrays", "check", "warm-up",
    "profiler", "timing",
)  # fmt: skip
"""start: of the process, with its imports. first call: of PyTorch, which compiles then. profiler:
timing by JAX's. The rest of a run, a worker waits for the others."""


class Phases:
    """Adds up; phases do not nest."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = collections.defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        self._seconds[name] += seconds

    def take(self) -> dict[str, float]:
        """Those since the last time."""
        taken, self._seconds = self._seconds, collections.defaultdict(float)
        return taken
