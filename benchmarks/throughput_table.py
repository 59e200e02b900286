"""What a result of `benchmarks.throughput` says in text.

`python -m benchmarks.throughput_table RESULT` prints that of a result, also of one cut short.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.report import gigabytes, lined_up, number, ratio, spread


def table(data: dict[str, Any]) -> str:
    """A line a preset, length and model."""
    settings = data["settings"]
    pattern = f"local_stride({settings['local_blocks']}, {settings['vert_stride']})"
    legend = (
        f"ms of a step of AdamW, medians with least and most; S2 is {pattern}, hybrids have"
        f" {settings['dense_first']} dense layers, dense ones run by"
        f" {settings['dense_implementation']}. dense / it: how many times as long the dense model"
        " takes. MFU: operations on visible blocks, without what is recomputed. GB: needed by the"
        " compiler's account."
    )
    failures = [
        f"{row['preset']} {row['model']}, {row['batch']} x {row['length']}: {row['error']}"
        for row in data["rows"] if row["error"]
    ]  # fmt: skip
    return "\n".join([lined_up(_lines(data["rows"])), legend, *failures])


def _lines(rows: list[dict[str, Any]]) -> Iterator[list[str]]:
    head = ["preset", "batch", "model", "remat", "ms", "spread", "tokens/s", "dense / it", "MFU"]
    yield [*head, "TFLOP/s", "GB", "peak GB", "compile s"]
    for row in rows:
        shape = f"{row['batch']} x {row['length']}"
        ms = number(row["ms"]) if not row["error"] else "failed"
        times = [ms, spread(row), number(row["tokens_s"]), ratio(row)]
        mfu = "-" if row["mfu"] is None else f"{row['mfu']:.0%}"
        memory = [gigabytes(row.get("needed_bytes")), gigabytes(row["peak_bytes"])]
        seconds = row.get("compile_s") and row["trace_lower_s"] + row["compile_s"]
        names = [row["preset"], shape, row["model"], row["remat"]]
        yield [*names, *times, mfu, number(row["tflops"]), *memory, number(seconds)]


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())))
