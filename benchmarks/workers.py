"""The processes of the frameworks, as the parent sees them."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.cases import FRAMEWORKS, Framework

_ROOT = Path(__file__).resolve().parents[1]
_LEAST_TIMEOUT = 10
"""Seconds that an answer may take even where the run should be over."""


class Lost(Exception):
    """A worker that crashed, hung or failed: it has been stopped, and what it held is gone."""


class Hung(Lost):
    """A worker that did not answer in time."""


class Unusable(Lost):
    """A worker that cannot start: its framework does not work here."""


@dataclasses.dataclass(frozen=True)
class Timeouts:
    """Seconds to wait for an answer."""

    ready: float = 120
    compile: float = 180
    prepare: float = 180
    round: float = 120
    clear: float = 30


class Worker:
    """A process and its two pipes; its errors go to a log file."""

    def __init__(
        self, name: str, framework: Framework, environment: dict[str, str], log: Path
    ) -> None:
        self._log = log
        command = [sys.executable, "-m", "benchmarks.attention_worker", name, framework.module]
        with log.open("a") as errors:
            self._log_start = errors.tell()
            self._process = subprocess.Popen(
                [*command, *framework.packages], cwd=_ROOT, text=True, stderr=errors,
                env=os.environ | environment, start_new_session=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def ask(self, request: dict[str, Any] | None, timeout: float) -> dict[str, Any]:
        """The answer to a request; without one, the next line."""
        assert self._process.stdin is not None
        if request is not None:
            try:
                print(json.dumps(request), file=self._process.stdin, flush=True)
            except OSError:
                raise Lost(self._ending()) from None
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            raise Hung(f"no answer within {timeout:g} s") from None
        if line is None:
            raise Lost(self._ending())
        return json.loads(line)

    def _ending(self) -> str:
        """Exit code, and the last line that it wrote to its log."""
        code = self._process.wait()
        text = self._log.read_bytes()[self._log_start :].decode(errors="replace")
        lines = [line for line in text.splitlines() if line]
        return f"exit code {code}" + (f": {lines[-1][:300]}" if lines else "")

    def close(self) -> None:
        """Ends it and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(5)
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()


class Pool:
    """One worker a framework, started when it is first asked something.

    phases: for each framework, what the seconds of its workers went into.
    """

    def __init__(
        self,
        logs: Path,
        timeouts: Timeouts,
        frameworks: Mapping[Any, Framework] = FRAMEWORKS,
        deadline: float = math.inf,
    ) -> None:
        """logs: the log files' path without their end. frameworks: those there are, by name.
        deadline: when the run should be over, by `time.perf_counter`: no answer is awaited longer.
        """
        self._logs, self._timeouts, self._frameworks = logs, timeouts, frameworks
        self._deadline = deadline
        self._environments: dict[Any, dict[str, str]] = {}
        self._workers: dict[str, Worker] = {}
        self.phases: dict[str, collections.Counter[str]] = {}

    def renew(self, environments: Mapping[Any, dict[str, str]]) -> None:
        """Gives each framework's worker its environment; where it is a new one, it starts anew."""
        for name in list(self._workers):
            if environments.get(name) != self._environments.get(name):
                self.close(name)
        self._environments = dict(environments)

    def _timeout(self, kind: str) -> float:
        left = max(_LEAST_TIMEOUT, self._deadline - time.perf_counter())
        return min(getattr(self._timeouts, kind), left)

    def _start(self, name: str) -> None:
        start = time.perf_counter()
        log = self._logs.with_name(f"{self._logs.name}-{name}.log")
        environment = self._environments.get(name, {})
        self._workers[name] = Worker(name, self._frameworks[name], environment, log)
        first = self._workers[name].ask(None, self._timeout("ready"))
        self._count(name, {"start": time.perf_counter() - start})
        if "error" in first:
            raise Unusable(first["error"])

    def _count(self, name: str, phases: dict[str, float]) -> None:
        self.phases.setdefault(name, collections.Counter()).update(phases)

    def ask(self, name: str, **request: Any) -> dict[str, Any]:
        """Raises `Lost`, the worker being stopped, where there is no answer or an error."""
        try:
            if name not in self._workers:
                self._start(name)
            reply = self._workers[name].ask(request, self._timeout(request["do"]))
            self._count(name, reply.pop("phases", {}))
            if "error" in reply:
                raise Lost(reply["error"])
        except Lost:
            self.close(name)
            raise
        return reply

    def clear(self) -> None:
        """Every worker forgets what it prepared; one that cannot is stopped."""
        for name in list(self._workers):
            with contextlib.suppress(Lost):
                self.ask(name, do="clear")

    def close(self, *names: str) -> None:
        """Stops these workers, or all."""
        for name in names or list(self._workers):
            if worker := self._workers.pop(name, None):
                worker.close()
