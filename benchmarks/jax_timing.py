"""Times calls of JAX programs: by the wall clock or, where they are short, by JAX's profiler."""

from __future__ import annotations

import contextlib
import functools
import math
import tempfile
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax

from benchmarks.attention_worker import first_line
from benchmarks.timing import (
    SHORT_SECONDS,
    calls_of_group,
    kernel_seconds,
    seconds_once,
    short_calls_of_group,
    summary,
    traced_seconds,
)

Run = Callable[[int], None]
"""Makes that many calls and waits for them."""
K = TypeVar("K", bound=Hashable)
_MOST_TRACES = 3
_FEWEST_ROUNDS = 2


class Stopwatch:
    """Of one program. traced_below: seconds of a call up to which the profiler is asked.
    group_seconds: as `calls_of_group` takes them.
    """

    def __init__(
        self, traced_below: float = SHORT_SECONDS, group_seconds: float | None = None
    ) -> None:
        self._traced_below, self._group_seconds = traced_below, group_seconds
        self._seconds: float | None = None
        self._traces = 0
        self._why: str | None = None

    def warm_up(self, run: Run, loaded: bool = False) -> None:
        """Finds out what a call takes, roughly, the first time. loaded: it has been called."""
        if self._seconds is None:
            self._seconds = seconds_once(run, loaded)

    def time(self, run: Run) -> dict[str, Any]:
        """Seconds of one call, from a group of them, and the clock; nothing after enough traces."""
        self.warm_up(run)
        assert self._seconds is not None
        if self._seconds < self._traced_below and self._why is None:
            if self._traces == _MOST_TRACES:
                return {}
            self._traces += 1
            count = short_calls_of_group(self._seconds)
            run(2)
            try:
                found = traced(lambda: run(count), count)
            except Exception as failure:  # a profiler may be missing in many ways; time goes on
                found, self._why = None, f"profiler: {first_line(failure)}"[:200]
            if found is not None:
                return found | {"clock": "profiler"}
            self._why = self._why or "profiler: fewer GPU events than calls"
        count = calls_of_group(self._seconds, self._group_seconds)
        if count > 1:
            run(1)
        start = time.perf_counter()
        run(count)
        seconds = (time.perf_counter() - start) / count
        return {"seconds": seconds, "clock": "wall"} | ({"why": self._why} if self._why else {})


def traced(run: Callable[[], None], calls: int) -> dict[str, Any] | None:
    """Seconds of one call on the GPU by its profiler, and of each kernel in it, by name.

    None where it has not seen all calls, as on a machine without a GPU.
    """
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            run()
        path = sorted(Path(folder).rglob("*.xplane.pb"))[-1]
        planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
        seconds = traced_seconds(planes, calls)
        if seconds is None:
            return None
        return {"seconds": seconds, "kernels": kernel_seconds(planes, calls)}


def calls(once: Callable[[], Any]) -> Run:
    """Queues calls one after the other and waits for the last one."""

    def run(count: int) -> None:
        for _ in range(count):
            results = None  # freed before the next call asks for memory
            results = once()
        jax.block_until_ready(results)

    return run


def in_turn(
    runs: Mapping[K, Run],
    rounds: int,
    *,
    limit_s: float = math.inf,
    traced_below: float = SHORT_SECONDS,
    profile: bool = False,
) -> dict[K, dict[str, Any]]:
    """Rounds in which every program has its turn; what each took, as `summary`, or its error.

    After `limit_s` no further round is begun, but there are two. profile: at last one call more of
    each that the profiler has not seen, for its kernels.
    """
    start = time.perf_counter()
    watches = {key: Stopwatch(traced_below) for key in runs}
    found: dict[K, list[dict[str, Any]]] = {key: [] for key in runs}
    errors: dict[K, str] = {}
    for number in range(rounds):
        if number >= _FEWEST_ROUNDS and time.perf_counter() - start > limit_s:
            break
        for key, run in runs.items():
            if key in errors:
                continue
            try:
                if times := watches[key].time(run):
                    found[key].append(times)
            except Exception as failure:  # out of memory, say: the others go on
                errors[key] = first_line(failure)
    for key, run in runs.items():
        if profile and key not in errors and found[key] and "kernels" not in found[key][-1]:
            with contextlib.suppress(Exception):  # times are there without it
                found[key][-1]["kernels"] = (traced(functools.partial(run, 1), 1) or {})["kernels"]
    return {key: summary(found[key]) | {"error": errors.get(key)} for key in runs}
