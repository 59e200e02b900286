"""What a result says in text: the machine, and one table a suite.

`python -m benchmarks.report RESULT` prints that of a result, also of one that was cut short.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import FRAMEWORKS, MODES, Case
from benchmarks.phases import PHASES
from benchmarks.rows import pattern_key, shape_key, shares

_PACKAGES = (
    "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13", "jax-triton", "torch", "triton", "dkernel", "tokamax",
)  # fmt: skip
_PASSES = dict(zip(MODES, ("fwd", "f+b")))


def gpu_id() -> str:
    """The first GPU that may be used, as CUDA and nvidia-smi name it."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"


def find_gpu() -> dict[str, Any] | None:
    """What nvidia-smi says of it: this process holds no memory there. None without a GPU."""
    found = _query_gpu("name", "driver_version", "memory.total", "clocks.max.sm", "power.limit")
    if found is None:
        return None
    return {
        "name": found[0],
        "driver": found[1],
        "memory_mb": _whole_or_none(found[2]),
        "max_sm_mhz": _whole_or_none(found[3]),
        "power_limit_w": found[4],
    }


def gpu_clock() -> int | None:
    """MHz of its multiprocessors now."""
    found = _query_gpu("clocks.sm")
    return _whole_or_none(found[0]) if found else None


def _query_gpu(*fields: str) -> list[str] | None:
    query = f"--query-gpu={','.join(fields)}"
    text = _output_of(("nvidia-smi", query, "--format=csv,noheader,nounits", f"--id={gpu_id()}"))
    found = [field.strip() for field in (text or "").split(",")]
    return found if text and len(found) == len(fields) else None


def _whole_or_none(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def versions() -> dict[str, str | None]:
    """Of every package that may matter; null where it is not installed."""
    found: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str | None:
    """What the variable COMMIT says, for a copy of the files; otherwise that of the checkout."""
    return os.environ.get("COMMIT") or _output_of(("git", "rev-parse", "HEAD"))


def _output_of(command: tuple[str, ...]) -> str | None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None


def describe(of: Case | dict[str, Any]) -> str:
    """Shape and pattern of a case or a row in words."""
    row = of if isinstance(of, dict) else dataclasses.asdict(of)
    heads, kv_heads = row["heads"], row["kv_heads"]
    words = [f"{row['batch']} x {row['length']} tokens"]
    words.append(f"{heads}{'' if heads == kv_heads else f'/{kv_heads}'} x {row['head_dim']}")
    if row["documents"] > 1:
        words.append(f"{row['documents']} documents")
    words += ["padded"] * row["padded"]
    if row["local_blocks"]:
        words.append(f"({row['local_blocks']}, {row['stride']}) of {row['block_size']}")
    return ", ".join(words)


def tables(result: dict[str, Any]) -> str:
    """A table a suite, then what is absent and what failed."""
    suites: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        suites.setdefault(row["suite"], []).append(row)
    parts = [f"{suite}\n{_table(rows)}" for suite, rows in suites.items()]
    parts.append("\n".join(_notes(result)))
    return "\n\n".join([*parts, *_phases(result)])


def _table(rows: list[dict[str, Any]]) -> str:
    """Two lines a shape and pattern: ms, and how many times as long as s2_jax the others take."""
    names = [name for name in FRAMEWORKS if any(row["framework"] == name for row in rows)]
    share = {mode: shares(rows, mode) for mode in MODES}
    sparse = [row for row in rows if row["local_blocks"]] or rows
    keys = dict.fromkeys((shape_key(row), pattern_key(row)) for row in sparse)
    columns = ["pass", "TFLOP/s", "share", "memory", *names]
    lines = [["shape", *columns]]
    for shape, pattern in keys:
        found = {}
        for i, row in enumerate(rows):
            if shape_key(row) == shape and (not row["local_blocks"] or pattern_key(row) == pattern):
                found[row["framework"]] = i, row
        index, first = found.get("s2_jax") or next(iter(found.values()))
        for mode in MODES:
            line = [describe(first), _PASSES[mode]]
            line.append(number(first[f"{mode}_tflops"]))
            line.append(f"{share[mode][index]:.0%}" if index in share[mode] else "-")
            line.append(number(first[f"{mode}_memory_ratio"]))
            for name in names:
                row = found[name][1] if name in found else {}
                line.append(_cell(row, f"{mode}_ms", first))
            lines.append(line)
    return lined_up(lines)


def _phases(result: dict[str, Any]) -> list[str]:
    """A table of the seconds of every worker, where they were counted; the rest it waited."""
    found: dict[str, dict[str, float]] = result.get("phases", {})
    names = [phase for phase in PHASES if any(phase in seconds for seconds in found.values())]
    lines = [["seconds", *names, "waited"]]
    for framework in (name for name in FRAMEWORKS if name in found):  # they begin in any order
        seconds = found[framework]
        waited = result["seconds"] - sum(seconds.values())
        numbers = [*(seconds.get(name, 0.0) for name in names), waited]
        lines.append([framework, *(f"{number:.1f}" for number in numbers)])
    return [lined_up(lines)] if found else []


def lined_up(lines: Iterable[Sequence[str]]) -> str:
    """A table, the first line being its head."""
    lines = list(lines)
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths)) for line in lines)


def number(value: float | None) -> str:
    """Three significant digits."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def gigabytes(size: int | None) -> str:
    return number(size and size / 1e9)


def spread(row: dict[str, Any], unit: str = "ms") -> str:
    """The least and the most."""
    return f"{number(row[f'min_{unit}'])}-{number(row[f'max_{unit}'])}"


def ratio(row: dict[str, Any]) -> str:
    """How many times as long the dense model takes."""
    found = row.get("dense_over_it")
    return "-" if found is None else f"{found:.2f}x"


def _cell(row: dict[str, Any], name: str, first: dict[str, Any]) -> str:
    if row.get(name) is None:
        error = row.get("error") or ""
        return "n/s" if error.startswith("not supported") else "failed" if error else "-"
    if row is first or first[name] is None:
        return number(row[name])
    return f"{number(row[name])} ({row[name] / first[name]:.2f}x)"


def _notes(result: dict[str, Any]) -> list[str]:
    gpu = result["gpu"]
    notes = [
        f"{gpu['name']}, driver {gpu['driver']}. ms, medians of rounds; N x: N times as long as "
        "s2_jax. Of s2_jax: TFLOP/s of visited blocks; share of the theoretical speed-up over "
        "FlashAttention-2; peak memory over inputs and results.",
    ]
    for name, status in result["frameworks"].items():
        notes.append(f"{name}: {status} ({FRAMEWORKS[name].what})")
    notes += [f"not measured, the budget was spent: {what}" for what in result["not_measured"]]
    failed = {
        f"{row['framework']} on {describe(row)}: {row['error']}": None
        for row in result["rows"] if row["error"] is not None
    }  # fmt: skip
    clocks = {
        f"{row['framework']}: {row[f'{mode}_clock_why']}; wall clock instead": None
        for row in result["rows"] for mode in MODES if row[f"{mode}_clock_why"]
    }  # fmt: skip
    return [*notes, *failed, *clocks]


if __name__ == "__main__":
    print(tables(json.loads(Path(sys.argv[1]).read_text())))
