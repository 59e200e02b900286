"""The result of a run as a JSON file that is complete up to the last finished cell."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import tyro

from benchmarks import report
from benchmarks.attention_worker import first_line
from train.environment import flags


class Common(Protocol):
    """What the settings of these benchmarks have in common."""

    @property
    def platform(self) -> str: ...
    @property
    def out(self) -> Path: ...
    @property
    def budget_s(self) -> float: ...


S = TypeVar("S", bound=Common)


def read_settings(kind: type[S], prog: str, arguments: Sequence[str] | None) -> S:
    """From the command line; ends the process where the platform asked for is not there.

    JAX, once it is used, takes nearly all of the GPU's memory at once, so that there is one piece.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    settings = tyro.cli(kind, prog=prog, args=arguments)
    if settings.platform == "gpu" and report.find_gpu() is None:
        print("error: no NVIDIA GPU (nvidia-smi names none); nothing to measure", file=sys.stderr)
        sys.exit(2)
    return settings


class Record:
    """data: what the file says. The first use of JAX.

    Raises:
      ValueError: JAX runs on another platform than the settings say.
    """

    def __init__(self, settings: Any, begin: float, alike: Sequence[str] = ()) -> None:
        """begin: of the run, by `time.perf_counter`, from which its budget counts. alike: what is
        equal in rows that are compared with the dense model's, see `add_ratios`.
        """
        self._alike = alike
        self._out, self._budget_s, self._begin = settings.out, settings.budget_s, begin
        device = jax.devices()[0]
        if device.platform != settings.platform:
            raise ValueError(
                f"JAX runs on platform {device.platform!r}, not on {settings.platform!r}"
            )
        self.data: dict[str, Any] = {
            "gpu": report.find_gpu(),
            "device_kind": device.device_kind,
            "platform": device.platform,
            "versions": report.versions(),
            "commit": report.commit(),
            "flags": flags(),
            "settings": {
                name: None if isinstance(value, Path) else value  # says nothing elsewhere
                for name, value in dataclasses.asdict(settings).items()
            },
            "notes": [],
            "not_measured": [],
            "failed": [],
            "rows": [],
        }
        self._out.parent.mkdir(parents=True, exist_ok=True)

    def add(self, row: dict[str, Any], line: str) -> None:
        """A finished cell, with the clock that it left the GPU at, and its line of text."""
        self.data["rows"].append(row | {"sm_mhz": report.gpu_clock()})
        print(f"[{self.write():.0f} s] {line}", flush=True)

    def spent(self, what: str) -> bool:
        """Whether the budget is; if so, `what` is noted as not measured."""
        if time.perf_counter() - self._begin <= self._budget_s:
            return False
        self.data["not_measured"].append(what)
        self.write()
        return True

    def fail(self, what: str, failure: BaseException) -> None:
        """A part of the run that is lost as a whole."""
        line = f"{what}: {first_line(failure)}"
        self.data["failed"].append(line)
        print(f"[{self.write():.0f} s] {line}", flush=True)

    def write(self) -> float:
        """The file; the seconds since the start."""
        if self._alike:
            add_ratios(self.data["rows"], self._alike)
        self.data["seconds"] = time.perf_counter() - self._begin
        self._out.write_text(json.dumps(self.data, indent=1) + "\n")
        return self.data["seconds"]

    def closing(self, figures: str = "medians of rounds") -> list[str]:
        """The lines below a table: the machine, what the figures are, what is missing or failed."""
        data = self.data
        gpu = data["gpu"] or {"name": data["device_kind"], "driver": "none"}
        lines = [f"{gpu['name']}, driver {gpu['driver']}; {figures}"]
        lines += [f"{name}={value}" for name, value in data["flags"].items()]
        lines += [f"{name}: {status}" for name, status in data.get("peers", {}).items()]
        lines += data["notes"]
        lines += [f"failed: {what}" for what in data["failed"]]
        lines += [f"not measured, the budget was spent: {what}" for what in data["not_measured"]]
        return lines


def add_ratios(rows: list[dict[str, Any]], same: Sequence[str]) -> None:
    """dense_over_it: how many times as long the dense model takes, where all of `same` is equal."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in same)

    dense = {key(row): row["ms"] for row in rows if row.get("model") == "dense" and row["ms"]}
    for row in rows:
        there = row["ms"] and key(row) in dense
        row["dense_over_it"] = dense[key(row)] / row["ms"] if there else None
