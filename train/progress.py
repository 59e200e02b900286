"""Progress on a terminal as a bar, elsewhere as plain lines."""

from __future__ import annotations

import datetime
import math
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress


class Progress:
    """Shows the step, the loss, the speed and the time left; a context manager."""

    def __init__(self, console: Console, *, start: int, steps: int) -> None:
        self._console = console
        self._steps = steps
        self._bar = RichProgress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps, completed=start, status="compiling")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, step: int, loss: float, speed: float, left: float) -> None:
        """Loss in nats per byte, speed in tokens per second, time left in seconds."""
        bits, remaining = loss / math.log(2), datetime.timedelta(seconds=round(left))
        status = f"loss {bits:.3f} bits/byte  {speed:,.0f} tokens/s  {remaining} left"
        if self._console.is_terminal:
            self._bar.update(self._task, completed=step, status=status)
        else:
            self.note(f"step {step}/{self._steps}  {status}")

    def note(self, line: str) -> None:
        """A line of its own, above the bar where there is one."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


class Clock:
    """Times steps, and nothing else: not the first one, which compiles, nor what is skipped."""

    def __init__(self, tokens_per_step: int) -> None:
        self._tokens = tokens_per_step
        self._step: int | None = None
        self._since = 0.0
        self._lap = (0, 0.0)
        self._total = (0, 0.0)

    def lap(self, step: int) -> None:
        """Everything up to this step has been computed."""
        if self._step is not None:
            self._lap = (step - self._step, time.perf_counter() - self._since)
            self._total = (self._total[0] + self._lap[0], self._total[1] + self._lap[1])
        self._step = step

    def skip(self) -> None:
        """What has passed since the last lap does not count."""
        self._since = time.perf_counter()

    @property
    def speed(self) -> float:
        """Tokens per second in the last lap."""
        steps, seconds = self._lap
        return steps * self._tokens / seconds if steps else 0.0

    def left(self, steps: int) -> float:
        """Seconds until step `steps`, at the mean speed so far."""
        done, seconds = self._total
        return (steps - (self._step or 0)) * seconds / done if done else 0.0
