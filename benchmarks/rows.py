"""A row of the result's JSON, from what a worker told of one case."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

from benchmarks.cases import MODES
from benchmarks.suites import Item


def row_of(item: Item) -> dict[str, Any]:
    """What was not measured is null.

    *_ms: the median of the rounds, with the least and the most. *_tflops: on visible blocks.
    *_gb_s: query, key, value and output, to train also their four gradients, over the time.
    *_memory_ratio: peak memory over those same bytes. backward is train less forward.
    """
    case = item.case
    row: dict[str, Any] = {"framework": item.framework} | dataclasses.asdict(case)
    row |= {"error": item.error, "layout_s": item.facts.get("layout_s")}
    row |= {"first_call_s": item.facts.get("first_call_s"), "sm_mhz": item.facts.get("sm_mhz")}
    for mode in MODES:
        found = [one[mode] for one in item.rounds if mode in one]
        ms = [one["seconds"] * 1e3 for one in found]
        middle = statistics.median(ms) if ms else None
        facts = item.facts.get(mode, {})
        size, needed = facts.get("bytes"), case.io_bytes(mode)
        row |= {
            f"{mode}_ms": middle,
            f"{mode}_min_ms": min(ms, default=None),
            f"{mode}_max_ms": max(ms, default=None),
            f"{mode}_rounds": len(ms),
            f"{mode}_clock": "+".join(sorted({one["clock"] for one in found})) or None,
            f"{mode}_clock_why": next((one["why"] for one in found if "why" in one), None),
            f"{mode}_gb_s": middle and needed / middle / 1e6,
            f"{mode}_mb": size and size / 1e6,
            f"{mode}_memory_ratio": size and size / needed,
            f"{mode}_trace_lower_s": facts.get("trace_lower_s"),
            f"{mode}_compile_s": facts.get("compile_s"),
        }
    row["backward_ms"] = None
    if row["train_ms"] is not None and row["forward_ms"] is not None:
        row["backward_ms"] = row["train_ms"] - row["forward_ms"]
    for part, matmuls in (("forward", 2), ("backward", 5), ("train", 7)):
        ms = row[f"{part}_ms"]
        row[f"{part}_tflops"] = ms and case.flops / 2 * matmuls / ms / 1e9 if ms else None
    row["flops"], row["theoretical_speedup"] = case.flops, case.theoretical_speedup
    return row


def shares(rows: list[dict[str, Any]], mode: str) -> dict[int, float]:
    """Index of a row -> share of the theoretical speed-up over FlashAttention-2 that it reaches.

    (FlashAttention-2's time / its time) / (dense operations / operations), on equal shapes.
    """
    dense = {
        shape_key(row): row[f"{mode}_ms"]
        for row in rows if row["framework"] == "flash2" and row[f"{mode}_ms"]
    }  # fmt: skip
    return {
        i: dense[shape_key(row)] / row[f"{mode}_ms"] / row["theoretical_speedup"]
        for i, row in enumerate(rows)
        if row["local_blocks"] and row[f"{mode}_ms"] and shape_key(row) in dense
    }


_SHAPE = ("length", "batch", "heads", "kv_heads", "head_dim", "documents", "padded")


def shape_key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in _SHAPE)


def pattern_key(row: dict[str, Any]) -> tuple[Any, ...]:
    return (row.get("block_size", 64), row["local_blocks"], row["stride"])
