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


def busy_seconds(planes: Iterable[Any], calls: int) -> float | None:
    """How long the first GPU was at work: the union of what its streams ran.

    None if that is fewer events than calls. planes: those of `jax.profiler.ProfileData`; lines
    that are not streams repeat what streams say.
    """
    gpus = sorted((p for p in planes if p.name.startswith("/device:GPU")), key=lambda p: p.name)
    for plane in gpus[:1]:
        lines = list(plane.lines)
        streams = [line for line in lines if "stream" in line.name.lower()] or lines
        spans = sorted((e.start_ns, e.start_ns + e.duration_ns) for s in streams for e in s.events)
        busy, reached = 0.0, -math.inf
        for start, stop in spans:
            busy += max(0.0, stop - max(start, reached))
            reached = max(reached, stop)
        if busy > 0 and len(spans) >= calls:
            return busy / 1e9
    return None
