"""What a result of `benchmarks.inference` says in text.

`python -m benchmarks.inference_table RESULT` prints that of a result, also of one cut short.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.report import gigabytes, lined_up, number, ratio, spread

Row = dict[str, Any]


def table(data: dict[str, Any]) -> str:
    """Attention alone, prompts, generation, and what was not run."""
    parts = {"attention": _attention, "prefill": _prefill, "decode": _decode}
    texts = []
    for part, lines in parts.items():
        if rows := [row for row in data["rows"] if row["part"] == part]:
            texts.append(f"{part}\n{lined_up(lines(rows))}")
    settings = data["settings"]
    pattern = f"local_stride({settings['local_blocks']}, {settings['vert_stride']})"
    legend = (
        f"{settings['preset']}, bfloat16 weights, S2 is {pattern}; ms, medians with least and most."
        " GB: needed by the compiler's account. bound: a copy of the bytes that a step reads takes"
        f" so long ({number(data['bandwidth']['copy_gb_s'])} GB/s); share: bound / time. with FA2:"
        " derived, the dense layers' time by cuDNN replaced by that of PyTorch's FlashAttention-2"
        " on one layer's shape."
    )
    return "\n\n".join([*texts, "\n".join([legend, *_failures(data)])])


def _attention(rows: list[Row]) -> Iterator[list[str]]:
    yield ["tokens", "way", "ms", "spread"]
    for row in rows:
        yield [str(row["length"]), row["way"], number(row["ms"]), spread(row)]


def _prefill(rows: list[Row]) -> Iterator[list[str]]:
    yield ["tokens", "model", "ms", "spread", "dense / it", "with FA2", *_COMMON]
    for row in rows:
        name = row["model"] if row["cached"] else f"{row['model']}, no cache"
        times = [number(row["ms"]), spread(row), ratio(row), number(row["with_fa2_ms"])]
        yield [str(row["length"]), name, *times, *_common(row)]


def _decode(rows: list[Row]) -> Iterator[list[str]]:
    head = ["tokens", "model", "batch", "ms a step", "spread", "tokens/s", "dense / it"]
    yield [*head, "GB read", "bound", "share", *_COMMON]
    for row in rows:
        names = [str(row["length"]), row["model"], str(row["batch"])]
        times = [number(row["ms"]), spread(row), number(row["tokens_s"]), ratio(row)]
        share = "-" if row.get("share") is None else f"{row['share']:.0%}"
        bound = [gigabytes(row.get("read_bytes")), number(row.get("bound_ms")), share]
        yield [*names, *times, *bound, *_common(row)]


_COMMON = ("GB", "peak GB", "compile s")


def _common(row: Row) -> list[str]:
    seconds = row.get("compile_s") and row["trace_lower_s"] + row["compile_s"]
    return [gigabytes(row.get("needed_bytes")), gigabytes(row["peak_bytes"]), number(seconds)]


def _failures(data: dict[str, Any]) -> Iterator[str]:
    for row in data["rows"]:
        if row["error"]:
            names = (row["part"], row.get("model"), row["way"])
            what = " ".join(name for name in names if name)
            yield f"{what}, {row['batch']} x {row['length']} tokens: {row['error']}"


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())))
