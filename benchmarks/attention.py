"""`python -m benchmarks.attention`: s2_attention and its peers on one NVIDIA GPU.

Every framework runs in a process of its own, on the same shapes. Times are device time, dense
frameworks once a length. The result is JSON, and tables on the terminal.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tyro

from benchmarks import report
from benchmarks.cases import BLOCK_SIZE, FRAMEWORKS, Case, Name, missing_package

_ROOT = Path(__file__).resolve().parents[1]
_TIMEOUT_SECONDS = 300


@dataclasses.dataclass(frozen=True)
class Settings:
    """Measures forward and backward of causal attention in bfloat16."""

    lengths: tuple[int, ...] = (8192, 32768, 131072)
    """Tokens in a sequence."""
    local_blocks: tuple[int, ...] = (8, 16)
    """Windows, in blocks of 64 tokens; every one is measured with every stride."""
    strides: tuple[int, ...] = (8, 16, 32)
    """Vertical strides, in blocks."""
    batch: int = 1
    """Sequences."""
    heads: int = 32
    """Query heads."""
    kv_heads: int = 32
    """Key/value heads."""
    head_dim: int = 128
    """Numbers in a head."""
    repeats: int = 5
    """Groups of calls whose median counts; at most 3 where one call takes over 0.3 s."""
    frameworks: tuple[Name, ...] = tuple(FRAMEWORKS)
    """Which to run."""
    out: Path = Path("runs/attention.json")
    """Where the result goes."""

    def __post_init__(self) -> None:
        for name in ("lengths", "local_blocks", "strides"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise ValueError(f"{name}={values!r} must be one or more positive numbers")
        for name in ("batch", "heads", "kv_heads", "head_dim", "repeats"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value!r} must be positive")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads=} must be a multiple of {self.kv_heads=}")
        if not self.frameworks:
            raise ValueError("frameworks must name at least one")

    def recorded(self) -> dict[str, Any]:
        """What the result says of them."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "out"} | {
            "dtype": "bfloat16"
        }


def make_cases(settings: Settings) -> tuple[list[Case], list[Case]]:
    """The dense cases, one a length, and the sparse ones; shortest first."""
    shape = (settings.batch, settings.heads, settings.kv_heads, settings.head_dim)
    dense = [Case(length, *shape) for length in sorted(set(settings.lengths))]
    patterns = list(itertools.product(settings.local_blocks, settings.strides))
    return dense, [case.with_pattern(*pattern) for case in dense for pattern in patterns]


def run_framework(name: Name, cases: list[Case], repeats: int) -> dict[str, Any]:
    """What its worker wrote, and what became of it: {"status", "rows"}."""
    missing = missing_package(name)
    if missing is not None:
        return {"status": f"not installed: {missing}", "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        job, result = Path(folder, "job.json"), Path(folder, "result.json")
        fields = [dataclasses.asdict(case) for case in cases]
        job.write_text(json.dumps({"framework": name, "repeats": repeats, "cases": fields}))
        status = _run_worker(job, result)
        written = json.loads(result.read_text()) if result.exists() else {"error": None, "rows": []}
    if written["error"] is not None:
        status = f"failed: {written['error']}"
    elif status is None:
        failed = sum(row["error"] is not None for row in written["rows"])
        status = f"failed in {failed} of {len(cases)} cases" if failed else "ok"
    return {"status": status, "rows": written["rows"]}


def _run_worker(job: Path, result: Path) -> str | None:
    """None, or how the process ended badly."""
    command = [sys.executable, "-m", "benchmarks.attention_worker", str(job), str(result)]
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    try:
        done = subprocess.run(command, cwd=_ROOT, env=environment, timeout=_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        return f"failed: stopped after {_TIMEOUT_SECONDS} s"
    return f"failed: exit code {done.returncode}" if done.returncode else None


def run(settings: Settings, gpu: dict[str, str]) -> dict[str, Any]:
    """Measures everything; the file is complete up to the last framework that ended."""
    dense, sparse = make_cases(settings)
    result: dict[str, Any] = {
        "gpu": gpu,
        "versions": report.versions(),
        "commit": report.commit(),
        "settings": settings.recorded(),
        "block_size": BLOCK_SIZE,
        "frameworks": {},
        "rows": [],
    }
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys(settings.frameworks):
        start = time.perf_counter()
        cases = sparse if FRAMEWORKS[name].sparse else dense
        outcome = run_framework(name, cases, settings.repeats)
        result["frameworks"][name] = outcome["status"]
        result["rows"] += outcome["rows"]
        settings.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{name}: {outcome['status']} ({time.perf_counter() - start:.0f} s)", flush=True)
    return result


def main() -> None:
    settings = tyro.cli(Settings, prog="python -m benchmarks.attention")
    gpu = report.find_gpu()
    if gpu is None:
        print("error: no NVIDIA GPU (nvidia-smi names none); nothing to measure", file=sys.stderr)
        sys.exit(2)
    print(report.tables(run(settings, gpu)))


if __name__ == "__main__":
    main()
