"""How often to call, and what a profiler's trace says of the GPU's time."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

GROUP_SECONDS = 0.05
"""The least that a group of calls takes."""
SHORT_SECONDS = 2e-3
"""Calls below it are timed on the device alone, without the gaps that the host leaves."""
_MOST_SHORT_CALLS = 50
_LOADING_SECONDS = 1
_NAMED_KERNELS = 40


def calls_of_group(once: float, group_seconds: float | None = None) -> int:
    """So many that they take that long, or `GROUP_SECONDS`; a longer call is a group alone."""
    least = GROUP_SECONDS if group_seconds is None else group_seconds
    return max(1, math.ceil(least / max(once, 1e-6)))


def short_calls_of_group(once: float) -> int:
    """So few that a GPU's queue takes them all."""
    return min(_MOST_SHORT_CALLS, calls_of_group(once))


def seconds_once(run: Callable[[int], Any], loaded: bool = False) -> float:
    """Of one call, roughly. run: makes that many calls and waits.

    The first call may load the program, which can take longer than the call. loaded: it is there.
    """
    loading, *measuring = (1, _LOADING_SECONDS), (1, GROUP_SECONDS), (5, 0)
    for count, enough in measuring if loaded else (loading, *measuring):
        start = time.perf_counter()
        run(count)
        once = (time.perf_counter() - start) / count
        if once > enough:
            break
    return once


def traced_seconds(planes: Iterable[Any], calls: int) -> float | None:
    """Of one call on the first GPU: from its first kernel's start to its last one's end.

    The gaps that the host leaves between calls do not count, as they do not between CUDA events
    around a full queue. Where calls cannot be told apart, the time that any stream was at work.

    Args:
      planes: those of `jax.profiler.ProfileData`; lines that are not streams repeat what they say.

    Returns:
      None where there is no GPU, or where there are fewer events than calls.
    """
    spans = [(begin, end) for begin, end, _ in _gpu_events(planes)]
    if not spans or len(spans) < calls:
        return None
    together = 1 if len(spans) % calls else len(spans) // calls
    groups = [spans[i : i + together] for i in range(0, len(spans), together)]
    busy, reached = 0.0, -math.inf
    for group in groups:
        stop = max(stop for _, stop in group)
        busy += max(0.0, stop - max(group[0][0], reached))
        reached = max(reached, stop)
    return busy / calls / 1e9


def kernel_seconds(planes: Iterable[Any], calls: int) -> dict[str, float]:
    """Of one call on the first GPU, by the kernel's name, the longest first."""
    found: dict[str, float] = {}
    for begin, end, name in _gpu_events(planes):
        found[name] = found.get(name, 0.0) + (end - begin) / calls / 1e9
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _gpu_events(planes: Iterable[Any]) -> list[tuple[float, float, str]]:
    """Begin and end in nanoseconds, and the name, of what the first GPU's streams did."""
    gpus = sorted((p for p in planes if p.name.startswith("/device:GPU")), key=lambda p: p.name)
    lines = list(gpus[0].lines) if gpus else []
    streams = [line for line in lines if "stream" in line.name.lower()] or lines
    return sorted(
        (e.start_ns, e.start_ns + e.duration_ns, getattr(e, "name", ""))
        for s in streams for e in s.events
    )  # fmt: skip


def summary(times: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of rounds with the least and the most; and of the last one that was traced, the
    time that the GPU was busy, and the longest kernels.
    """
    ms = [1e3 * one["seconds"] for one in times]
    kernels: dict[str, float] = {}
    for one in times:
        kernels = one.get("kernels") or kernels
    return {
        "ms": statistics.median(ms) if ms else None,
        "min_ms": min(ms, default=None),
        "max_ms": max(ms, default=None),
        "rounds": len(ms),
        "clock": "+".join(sorted({one["clock"] for one in times})) or None,
        "clock_why": next((one["why"] for one in times if "why" in one), None),
        "busy_ms": 1e3 * sum(kernels.values()) if kernels else None,
        "kernels_ms": {name: 1e3 * s for name, s in list(kernels.items())[:_NAMED_KERNELS]},
    }
