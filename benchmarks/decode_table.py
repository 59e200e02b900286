"""What a result of `benchmarks.decode` says in text.

`python -m benchmarks.decode_table RESULT` prints that of a result, also of one that was cut short.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.report import lined_up, number, spread

LEAST_SHARE, MOST_OVER_US = 0.8, 15.0
"""What is asked of S2 in large batches, and at batch 1."""
_PARTS = ("busy", "kernel", "combine", "lists", "append")
_SWEPT = 5


def table(data: dict[str, Any]) -> str:
    """A line a way to run, the fastest tiles where there was a sweep, and the answers."""
    bandwidth = data["bandwidth"]
    speeds = f"copy {number(bandwidth['copy_gb_s'])} GB/s, read {number(bandwidth['read_gb_s'])}"
    legend = (
        f"us; bound: the visible bytes at the speed of a copy ({speeds} GB/s); share: bound / time,"
        " of the call and of the kernel alone; busy: all kernels of the call; combine, lists"
        " and append in programs of their own"
    )
    head = ["batch", "heads", "cache", "way", "us", "spread", "bound", "share", "over"]
    lines = [[*head, "kernel share", *_PARTS]]
    for row in data["rows"]:
        names = [str(row["batch"]), f"{row['heads']}/{row['kv_heads']}", row["cache"], row["way"]]
        figures = [
            number(row["us"]),
            spread(row, "us"),
            number(row["bound_us"]),
            _percent(row["share"]),
        ]
        if row["error"]:
            figures[0] = "n/s" if row["error"].startswith("not supported") else "failed"
        parts = [number(row.get(f"{part}_us")) for part in _PARTS]
        over, share = number(row["over_us"]), _percent(row["kernel_share"])
        lines.append([*names, *figures, over, share, *parts])
    return "\n".join([lined_up(lines), legend, *_swept(data), *_failures(data), *answers(data)])


def answers(data: dict[str, Any]) -> Iterator[str]:
    """Whether S2's decode on evicting caches is as near to the bound as is asked."""
    for row in data["rows"]:
        if row["cache"] != "evicting-s2" or row["us"] is None:
            continue
        what = f"{row['batch']} x {row['heads']}/{row['kv_heads']} {row['way']}"
        if row["batch"] == 1:
            kernel = row["kernel_us"] and row["kernel_us"] - row["bound_us"]
            verdict = "yes" if row["over_us"] <= MOST_OVER_US else "no"
            yield (
                f"within {MOST_OVER_US:.0f} us of the bound, {what}: {verdict}, "
                f"{row['over_us']:.1f} us (the kernel alone: {number(kernel)})"
            )
        else:
            verdict = "yes" if row["share"] >= LEAST_SHARE else "no"
            yield (
                f"{LEAST_SHARE:.0%} of the copy's speed, {what}: {verdict}, {row['share']:.0%}"
                f" (the kernel alone: {_percent(row['kernel_share'])})"
            )


def _swept(data: dict[str, Any]) -> Iterator[str]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in data["sweep"]:
        if row["us"] is not None:
            what = f"{row['batch']} x {row['heads']}/{row['kv_heads']} {row['cache']}"
            groups.setdefault(what, []).append(row)
    for what, rows in groups.items():
        usual = rows[0]["kernel_us"] or rows[0]["us"]
        yield f"tiles, {what}; the heuristic's: {number(usual)} us, {_tile(rows[0])}"
        for row in sorted(rows, key=lambda row: row["us"])[:_SWEPT]:
            yield f"  {number(row['us'])} us (kernel {number(row['kernel_us'])}): {_tile(row)}"


def _tile(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in row["tile"].items())


def _failures(data: dict[str, Any]) -> Iterator[str]:
    for row in data["rows"]:
        if row["error"]:
            what = f"{row['batch']} x {row['heads']}/{row['kv_heads']} {row['cache']} {row['way']}"
            yield f"{what}: {row['error']}"
    for why in {row["clock_why"] for row in data["rows"] if row["clock_why"]}:
        yield f"timed by the wall clock: {why}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())))
