"""Ending a run early, between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self


class Stopped(Exception):
    """The run was told to stop; a checkpoint of its last step has been written."""


class StopSignal:
    """Notes SIGTERM, as a scheduler sends before it takes the machine, or another signal.

    A context manager.
    """

    def __init__(self, number: int = signal.SIGTERM) -> None:
        self.received = False
        self._number = number
        self._before: Any = None

    def __enter__(self) -> Self:
        ignored = signal.getsignal(self._number) is signal.SIG_IGN  # as in a shell's background
        if threading.current_thread() is threading.main_thread() and not ignored:
            self._before = signal.signal(self._number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(self._number, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True
