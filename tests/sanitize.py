"""NVIDIA's checkers over the calls of `tests/sanitize_calls.py`; needs a GPU.

    python -m tests.sanitize                                     # memcheck and racecheck
    python -m tests.sanitize packed window --tools synccheck     # some calls, another tool

Each call has a process and a `compute-sanitizer` of its own, for both launchers; only the kernels
of this library are checked. Every array is an allocation of its own, with padding behind it, so
that no access past its end goes unseen. A kernel that reads past the end comes first: it must be
found, or the rest would prove nothing. Ends with 0 if all calls are clean.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.sanitize_calls import CALLS, DECODED, PLANTED_FAULT

TOOLS = ("memcheck", "racecheck", "synccheck")  # initcheck may need to see every kernel
LAUNCHERS = ("triton", "jax_triton")
GOOD = ("clean", "found")
NAMES = (*CALLS, *DECODED)
_ROOT = Path(__file__).resolve().parents[1]
_EXCERPT_LINES = 12
_SUMMARY = {tool: "ERROR SUMMARY: 0 errors" for tool in TOOLS} | {
    "racecheck": "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
}
_FLAGS = "--xla_gpu_enable_command_buffer= --xla_gpu_autotune_level=0"


@dataclasses.dataclass(frozen=True)
class Job:
    tool: str
    launcher: str
    name: str
    port: int
    timeout: float

    def command(self) -> list[str]:
        options = [f"--tool={self.tool}", "--error-exitcode=1", "--kernel-name=kns=s2_attention"]
        options += ["--target-processes=application-only", "--launch-timeout=60"]
        options += [f"--port={self.port}"]  # those side by side must not look for one together
        if self.tool == "memcheck":
            options += ["--padding=4096", "--report-api-errors=no"]
        call = [sys.executable, "-m", "tests.sanitize_calls", self.name, self.launcher]
        # `--option value`, as the manual has it.
        spaced = itertools.chain.from_iterable(option.split("=", 1) for option in options)
        return ["compute-sanitizer", *spaced, *call]


@dataclasses.dataclass(frozen=True)
class Outcome:
    job: Job
    status: str
    seconds: float
    excerpt: list[str]

    def __str__(self) -> str:
        job = self.job
        line = f"{job.tool} {job.launcher} {job.name}: {self.status} ({self.seconds:.0f} s)"
        return "\n    ".join([line, *self.excerpt])


def run_job(job: Job) -> Outcome:
    flags = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()
    environment = os.environ | {
        "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
        "XLA_FLAGS": flags,
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            job.command(), cwd=_ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(job.timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the call as well as the tool
            process.wait()
            code = None
        output.seek(0)
        status, excerpt = read_report(job, code, output.read())
    return Outcome(job, status, time.perf_counter() - start, excerpt)


def read_report(job: Job, code: int | None, text: str) -> tuple[str, list[str]]:
    """What became of a job, and the lines to show; code: None where it ran out of time."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    if code is None:
        return "timed out", lines[-3:]
    if job.name == PLANTED_FAULT:
        found = "Invalid __global__ read" in text and "s2_attention_planted_fault" in text
        return ("found", []) if found else ("missed", lines[-_EXCERPT_LINES:])
    ran = f"{job.name} by {job.launcher} ran" in lines
    if code == 0 and ran and any(_SUMMARY[job.tool] in line for line in lines):
        return "clean", []
    report = [line for line in lines if line.startswith("=========") and "Host Frame" not in line]
    crash = [] if ran else lines[-3:]
    return "errors", [*report[:_EXCERPT_LINES], *(x for x in crash if x not in report)]


def table(outcomes: Sequence[Outcome]) -> str:
    """A line for each call, a column for each tool and launcher."""
    columns = list(dict.fromkeys((o.job.tool, o.job.launcher) for o in outcomes))
    found = {(o.job.name, o.job.tool, o.job.launcher): o.status for o in outcomes}
    rows = [["call", *(f"{tool} {launcher}" for tool, launcher in columns)]]
    for name in dict.fromkeys(o.job.name for o in outcomes):
        rows.append([name, *(found.get((name, *column), "-") for column in columns)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(x.ljust(w) for x, w in zip(row, widths)).rstrip() for row in rows)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.sanitize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", help=f"of {', '.join(NAMES)}; all by default")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=["memcheck", "racecheck"])
    parser.add_argument("--launchers", nargs="+", choices=LAUNCHERS, default=list(LAUNCHERS))
    parser.add_argument("--timeout", type=float, default=90, help="seconds for one call")
    parser.add_argument("--workers", type=int, default=6, help="calls at a time")
    found = parser.parse_args(arguments)
    if unknown := [name for name in found.names if name not in NAMES]:
        parser.error(f"no call is named {', '.join(unknown)}; there are {', '.join(NAMES)}")
    return found


def make_jobs(options: argparse.Namespace) -> list[Job]:
    planted = [("memcheck", launcher, PLANTED_FAULT) for launcher in options.launchers]
    named = itertools.product(options.tools, options.launchers, options.names or NAMES)
    return [
        Job(*what, port=49152 + 16 * place, timeout=options.timeout)
        for place, what in enumerate([*planted, *named])
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if shutil.which("compute-sanitizer") is None:
        print("error: compute-sanitizer, of the CUDA toolkit, is not on PATH", file=sys.stderr)
        return 2
    outcomes = []
    with concurrent.futures.ThreadPoolExecutor(options.workers) as pool:
        for outcome in pool.map(run_job, make_jobs(options)):
            outcomes.append(outcome)
            print(outcome, flush=True)
    print(f"\n{table(outcomes)}")
    bad = sum(outcome.status not in GOOD for outcome in outcomes)
    print(f"{len(outcomes) - bad} of {len(outcomes)} as they should be")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
