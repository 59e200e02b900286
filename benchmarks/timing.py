"""How long a call takes on a device: groups of calls back to back, and the median group."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

GROUP_SECONDS = 0.03
_SLOW_SECONDS = 0.3
_SLOW_REPEATS = 3


def median_seconds(run: Callable[[int], float], repeats: int) -> float:
    """Seconds a call.

    Args:
      run: queues that many calls, waits once, and gives the seconds they took together.
      repeats: groups, of at least `GROUP_SECONDS` each; at most 3 where one call is slow.
    """
    run(1)
    once = run(3) / 3
    count = max(1, math.ceil(GROUP_SECONDS / max(once, 1e-6)))
    groups = min(repeats, _SLOW_REPEATS) if once > _SLOW_SECONDS else repeats
    return statistics.median(run(count) / count for _ in range(groups))
