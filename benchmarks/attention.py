"""`python -m benchmarks.attention`: s2_attention and its peers on one NVIDIA GPU.

Every framework has a worker process. For a shape, all workers first compile what they need, side
by side; then they are timed in turn, round by round, so that a drifting clock meets all alike.
The result is JSON, written after every shape, and tables on the terminal.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tyro

from benchmarks import report
from benchmarks.cases import FRAMEWORKS, Name, missing_package
from benchmarks.rows import row_of
from benchmarks.suites import SUITES, Item, SuiteName, plan
from benchmarks.workers import Hung, Lost, Pool, Timeouts, Unusable

LARGE_BYTES = 4 << 30
"""Arrays of a case from which on only one worker at a time holds inputs."""
_FEWEST_ROUNDS = 2
_MOST_HANGS = 2


@dataclasses.dataclass(frozen=True)
class Settings:
    """Measures forward and backward of causal attention in bfloat16."""

    suites: tuple[SuiteName, ...] = tuple(SUITES)
    """Which sets of cases."""
    lengths: tuple[int, ...] = ()
    """Tokens of a sequence, instead of each suite's own; paper, packed and million only have
    their own."""
    frameworks: tuple[Name, ...] = tuple(name for name in FRAMEWORKS if name != "reference")
    """Which to run."""
    rounds: int = 5
    """Timed groups of calls, whose median counts. Slow shapes get fewer, but 2."""
    budget_s: float = 540
    """Seconds after which no further shape is begun; a shape's rounds may take a twentieth."""
    out: Path = Path("runs/attention.json")
    """Where the result goes; the workers' logs go beside it."""

    def __post_init__(self) -> None:
        for name in ("suites", "frameworks"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one")
        if any(length < 1 for length in self.lengths):
            raise ValueError(f"lengths={self.lengths!r} must be positive")
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds!r} must be positive")
        if not self.budget_s > 0:
            raise ValueError(f"budget_s={self.budget_s!r} must be positive")
        if not plan(self.suites, self.lengths, self.frameworks):
            raise ValueError(
                f"nothing to measure: suites={self.suites!r} have no case of "
                f"lengths={self.lengths!r} for frameworks={self.frameworks!r}"
            )


class Bench:
    """Measures groups of items with a pool of workers; remembers which frameworks are of no use."""

    def __init__(self, pool: Pool, status: dict[Name, str]) -> None:
        self._pool, self.status = pool, status
        self._hangs: collections.Counter[Name] = collections.Counter()

    def _ask(self, item: Item, do: str, keep: bool) -> dict[str, Any] | None:
        """The answer, or None with the item's error set. Raises `Lost` if the worker is gone."""
        fields = dataclasses.asdict(item.case)
        try:
            reply = self._pool.ask(item.framework, do=do, case=fields, keep=keep)
        except Lost as lost:
            item.error = f"{do}: {lost}"
            self._hangs[item.framework] += isinstance(lost, Hung)
            if isinstance(lost, Unusable):
                self.status[item.framework] = f"not usable: {lost}"
            elif self._hangs[item.framework] == _MOST_HANGS:
                self.status[item.framework] = f"given up, it hung {_MOST_HANGS} times: {lost}"
            raise
        if "unsupported" in reply:
            item.error = f"not supported: {reply['unsupported']}"
            return None
        return reply

    def _prepare(self, items: list[Item], keep: bool) -> None:
        """Of one framework. A lost worker takes all with it, so that the others start anew."""
        todo = [item for item in items if item.error is None]
        while todo:
            if (why := self.status[todo[0].framework]) != "ok":
                for item in todo:
                    item.error = why
                return
            try:
                for item in todo:
                    if (facts := self._ask(item, "prepare", keep)) is not None:
                        item.facts |= facts
                return
            except Lost:
                todo = [item for item in todo if item.error is None]

    def measure(self, items: list[Item], rounds: int, limit_s: float) -> None:
        """One group: prepares side by side, then times in turn, until `limit_s` have passed."""
        keep = items[0].case.io_bytes("train") < LARGE_BYTES
        of = {name: [i for i in items if i.framework == name] for name in self.status}
        with concurrent.futures.ThreadPoolExecutor(len(of)) as threads:
            list(threads.map(lambda own: self._prepare(own, keep), of.values()))
        start = time.perf_counter()
        for number in range(rounds):
            if number >= _FEWEST_ROUNDS and time.perf_counter() - start > limit_s:
                break
            for item in items:
                if item.error is not None:
                    continue
                try:
                    if (times := self._ask(item, "round", keep)) is not None:
                        item.rounds.append(times)
                except Lost:
                    self._prepare(of[item.framework], keep)
            if number == 0:
                clock = report.gpu_clock()
                for item in items:
                    item.facts["sm_mhz"] = clock


def environment_of(items: list[Item], gpu: dict[str, Any], caches: str) -> dict[str, str]:
    """Of the workers of a group. JAX never returns memory: for large arrays it gets a limit."""
    fraction, need = 0.95, items[0].case.io_bytes("train")
    if need >= LARGE_BYTES and gpu.get("memory_mb"):
        fraction = min(fraction, (1.3 * need + (2 << 30)) / (gpu["memory_mb"] * 2**20))
    return {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # as nvidia-smi counts
        "CUDA_VISIBLE_DEVICES": report.gpu_id(),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{fraction:.3f}",
        # Times of the first call are those of a first call.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "TRITON_CACHE_DIR": f"{caches}/triton",
        "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor",
    }


def run(
    settings: Settings, gpu: dict[str, Any], timeouts: Timeouts | None = None
) -> dict[str, Any]:
    """Measures everything; the file is complete up to the last group."""
    begin = time.perf_counter()
    missing = {name: missing_package(name) for name in settings.frameworks}
    status = {name: f"not installed: {why}" if why else "ok" for name, why in missing.items()}
    result: dict[str, Any] = {
        "gpu": gpu,
        "versions": report.versions(),
        "commit": report.commit(),
        "settings": dataclasses.asdict(settings) | {"out": None, "dtype": "bfloat16"},
        "frameworks": status,
        "not_measured": [],
        "rows": [],
    }
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    installed = tuple(name for name in status if status[name] == "ok")
    with tempfile.TemporaryDirectory() as caches:
        pool = Pool(settings.out.with_suffix(""), timeouts or Timeouts())
        bench = Bench(pool, status)
        try:
            for items in plan(settings.suites, settings.lengths, installed):
                start, what = time.perf_counter(), report.describe(items[0].case.shape)
                if start - begin > settings.budget_s:
                    result["not_measured"].append(what)
                    continue
                pool.renew(environment_of(items, gpu, caches))
                bench.measure(items, settings.rounds, settings.budget_s / 20)
                pool.clear()
                result["rows"] += _rows(items, status)
                result["seconds"] = time.perf_counter() - begin
                settings.out.write_text(json.dumps(result, indent=1) + "\n")
                taken = time.perf_counter() - start
                print(f"{what}: {len(items)} programs in {taken:.0f} s", flush=True)
        finally:
            pool.close()
    settings.out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def _rows(items: list[Item], status: dict[Name, str]) -> list[dict[str, Any]]:
    """One for each suite that asked; none of frameworks that cannot start."""
    usable = (item for item in items if not status[item.framework].startswith("not usable"))
    return [{"suite": suite} | row_of(item) for item in usable for suite in item.suites]


def main() -> None:
    settings = tyro.cli(Settings, prog="python -m benchmarks.attention")
    gpu = report.find_gpu()
    if gpu is None:
        print("error: no NVIDIA GPU (nvidia-smi names none); nothing to measure", file=sys.stderr)
        sys.exit(2)
    print(report.tables(run(settings, gpu)))


if __name__ == "__main__":
    main()
