"""How often to call, and what a profiler's trace says of the GPU's time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

GROUP_SECONDS = 0.05
"""The least that a group of calls takes."""
SHORT_SECONDS = 2e-3
"""Calls below it are timed on the device alone, without the gaps that the host leaves."""
_MOST_SHORT_CALLS = 50


def calls_of_group(once: float) -> int:
    return max(1, math.ceil(GROUP_SECONDS / max(once, 1e-6)))


def short_calls_of_group(once: float) -> int:
    """So few that a GPU's queue takes them all."""
    return min(_MOST_SHORT_CALLS, calls_of_group(once))


def seconds_once(run: Callable[[int], Any]) -> float:
    """Of one call, roughly. run: makes that many calls and waits."""
    for count in (1, 5):
        start = time.perf_counter()
        run(count)
        once = (time.perf_counter() - start) / count
        if once > GROUP_SECONDS:
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
    gpus = sorted((p for p in planes if p.name.startswith("/device:GPU")), key=lambda p: p.name)
    lines = list(gpus[0].lines) if gpus else []
    streams = [line for line in lines if "stream" in line.name.lower()] or lines
    spans = sorted((e.start_ns, e.start_ns + e.duration_ns) for s in streams for e in s.events)
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
