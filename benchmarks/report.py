"""What a result says in text: the machine, and one table a mode."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.cases import FRAMEWORKS, Mode

_PACKAGES = (
    "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13", "torch", "triton", "flash-attn", "dkernel", "tokamax",
)  # fmt: skip
_TITLES: dict[Mode, str] = {"forward": "Forward", "train": "Forward and backward"}


def find_gpu() -> dict[str, str] | None:
    """Name and driver of the first NVIDIA GPU, asked of its tool: no process holds memory."""
    command = ("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    text = _output_of(command)
    if not text:
        return None
    name, _, driver = text.splitlines()[0].partition(",")
    return {"name": name.strip(), "driver": driver.strip()}


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


def tables(result: dict[str, Any]) -> str:
    """Both modes, then what is absent and what failed."""
    return "\n\n".join(
        [*(_table(result["rows"], mode) for mode in _TITLES), "\n".join(_notes(result))]
    )


def _table(rows: list[dict[str, Any]], mode: Mode) -> str:
    """A line for each length and pattern: ms, and how many times as long as s2_jax."""
    names = [name for name in FRAMEWORKS if any(row["framework"] == name for row in rows)]
    found = {(r["framework"], r["length"], r["local_blocks"], r["stride"]): r for r in rows}
    part = "forward" if mode == "forward" else "backward"
    head = ["tokens", "local", "stride", "s2_jax TFLOP/s", *(f"{name} ms" for name in names)]
    lines = [head]
    for length, local_blocks, stride in _keys(rows):
        s2 = found.get(("s2_jax", length, local_blocks, stride), {})
        line = [str(length), *map(_whole, (local_blocks, stride))]
        line.append(_number(s2.get(f"{part}_tflops")))
        for name in names:
            pattern = (local_blocks, stride) if FRAMEWORKS[name].sparse else (None, None)
            row = found.get((name, length, *pattern), {})
            line.append(_cell(row.get(f"{mode}_ms"), s2.get(f"{mode}_ms"), name == "s2_jax"))
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths)) for line in lines)
    return f"{_TITLES[mode]}; TFLOP/s of the {part} pass on visible blocks\n{text}"


def _keys(rows: list[dict[str, Any]]) -> list[tuple[int, int | None, int | None]]:
    """Lengths and patterns, in order of appearance; a length alone where nothing is sparse."""
    sparse = [row for row in rows if FRAMEWORKS[row["framework"]].sparse] or rows
    return list(dict.fromkeys((r["length"], r["local_blocks"], r["stride"]) for r in sparse))


def _whole(value: int | None) -> str:
    return "-" if value is None else str(value)


def _number(value: float | None) -> str:
    """Three significant digits."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def _cell(ms: float | None, s2_ms: float | None, is_s2: bool) -> str:
    if ms is None or s2_ms is None or is_s2:
        return _number(ms)
    return f"{_number(ms)} ({ms / s2_ms:.1f}x)"


def _notes(result: dict[str, Any]) -> list[str]:
    gpu = result["gpu"]
    notes = [f"{gpu['name']}, driver {gpu['driver']}; N x: N times as long as s2_jax"]
    for name, status in result["frameworks"].items():
        notes.append(f"{name}: {status} ({FRAMEWORKS[name].what})")
    for row in result["rows"]:
        if row["error"] is not None:
            where = f"{row['length']} tokens"
            if row["stride"] is not None:
                where += f", {row['local_blocks']} local blocks, stride {row['stride']}"
            notes.append(f"{row['framework']} at {where}: {row['error']}")
    return notes
