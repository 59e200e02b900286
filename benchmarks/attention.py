"""`python -m benchmarks.attention`: s2_attention and its peers on one NVIDIA GPU.

Every framework has a worker process. A cell is one pattern on one shape: all workers prepare it
side by side; then they are timed in turn, round by round, so that a drifting clock meets all alike.
The result is JSON, written after every round, a line a cell, and at last tables.

JAX's workers compile all cells ahead, in threads, while PyTorch's start and make the first cell's
first calls, which take longer. PyTorch compiles in its first call, which also runs: it cannot be
done while others are timed, so it is done cell by cell. Once timing begins nothing else runs on
the GPU, and no worker compiles.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tyro

from benchmarks import report
from benchmarks.attention_cells import Bench, environments_of, expected_seconds
from benchmarks.cases import FRAMEWORKS, Name, missing_package
from benchmarks.rows import row_of
from benchmarks.suites import SUITES, Item, SuiteName, memory_class, plan
from benchmarks.workers import Pool, Timeouts


@dataclasses.dataclass(frozen=True)
class Settings:
    """Measures forward and backward of causal attention in bfloat16."""

    suites: tuple[SuiteName, ...] = tuple(SUITES)
    """Which sets of cases, in this order."""
    lengths: tuple[int, ...] = ()
    """Tokens of a sequence, in this order, instead of each suite's own; paper, packed and million
    only have their own."""
    frameworks: tuple[Name, ...] = tuple(name for name in FRAMEWORKS if name != "reference")
    """Which to run."""
    rounds: int = 5
    """Timed groups of calls, whose median counts. Slow cells get fewer, but 2."""
    budget_s: float = 540
    """Seconds that all may take: no cell is begun that likely does not fit, and no worker is
    waited for much longer. A cell's rounds may take a twentieth."""
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


def run(
    settings: Settings, gpu: dict[str, Any], timeouts: Timeouts | None = None
) -> dict[str, Any]:
    """Measures everything; the file is complete up to the last round. Phases are printed last."""
    begin = time.perf_counter()
    missing = {name: missing_package(name) for name in settings.frameworks}
    status = {name: f"not installed: {why}" if why else "ok" for name, why in missing.items()}
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {
        "gpu": gpu,
        "versions": report.versions(),
        "commit": report.commit(),
        "settings": dataclasses.asdict(settings) | {"out": None, "dtype": "bfloat16"},
        "frameworks": status,
        "not_measured": [],
    }

    def write(cell: list[Item]) -> None:
        """What there is, with what is known of a cell."""
        result["rows"] = rows + _rows(cell, status)
        result["phases"] = pool.phases
        result["seconds"] = time.perf_counter() - begin
        part = settings.out.with_suffix(".part")  # a run that is killed leaves a whole file
        part.write_text(json.dumps(result, indent=1) + "\n")
        part.replace(settings.out)

    settings.out.parent.mkdir(parents=True, exist_ok=True)
    installed = tuple(name for name in status if status[name] == "ok")
    cells = plan(settings.suites, settings.lengths, installed)
    with tempfile.TemporaryDirectory() as caches:
        end = begin + settings.budget_s
        pool = Pool(settings.out.with_suffix(""), timeouts or Timeouts(), deadline=end)
        bench = Bench(pool, status)
        try:
            before: list[Item] | None = None
            for i, cell in enumerate(cells):
                left, what = end - time.perf_counter(), report.describe(cell[-1].case)
                if left < expected_seconds(cell, bench.taken) or left <= 0:
                    result["not_measured"].append(what)
                    continue
                if before and cell[0].case.shape != before[0].case.shape:
                    pool.clear()
                pool.renew(environments_of(cell, gpu, caches))
                limit_s, ahead_s = settings.budget_s / 20, left / 8
                ahead = _ahead(cells[i:], before)
                for _ in bench.measure(cell, settings.rounds, limit_s, ahead, ahead_s):
                    write(cell)
                before = cell
                taken = bench.taken[-1]
                rows += _rows(cell, status)
                print(
                    f"[{time.perf_counter() - begin:.0f} s] {what}: {_times(cell)}; "
                    f"prepared in {taken.prepare_s:.0f} s, timed in {taken.rounds_s:.0f} s",
                    flush=True,
                )
        finally:
            pool.close()
    write([])
    return result


def _ahead(cells: list[list[Item]], before: list[Item] | None) -> list[Item]:
    """What workers that start with the first of these cells will be asked for."""
    alike = memory_class(cells[0])
    if before and memory_class(before) == alike:
        return []
    return [item for cell in cells if memory_class(cell) == alike for item in cell]


def _times(cell: list[Item]) -> str:
    """Forward, and forward and backward."""
    words = []
    for row in map(row_of, cell):
        ms = f"{report.number(row['forward_ms'])}, {report.number(row['train_ms'])} ms"
        words.append(f"{row['framework']} {row['error'] or ms}")
    return "; ".join(words)


def _rows(cell: list[Item], status: dict[Name, str]) -> list[dict[str, Any]]:
    """One for each suite that asked; none of frameworks that cannot start."""
    usable = (item for item in cell if not status[item.framework].startswith("not usable"))
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
