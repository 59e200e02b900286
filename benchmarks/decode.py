"""`python -m benchmarks.decode`: one decode step of attention, beside what memory allows.

Every sequence of a batch gets its last token; the call is timed as a whole and in its parts, and
compared with the time that a copy of as many bytes as its queries see takes on this device. The
bound leaves out queries, results and lists. Calls take several caches in turn where one would stay
in the GPU's own cache. Peers read a dense cache: JAX's cuDNN, and PyTorch's SDPA in a process of
its own, which comes first, since JAX gives no memory back.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import s2_jax
from benchmarks import report
from benchmarks.bandwidth import measure_bandwidth
from benchmarks.decode_calls import Kind, Shape
from benchmarks.decode_cells import Cell, sdpa_rows
from benchmarks.decode_table import table
from benchmarks.record import Record, read_settings
from benchmarks.sdpa import BACKENDS, Backend
from pallas_kernels.lowering import missing_packages

Launcher = Literal["triton", "jax_triton", "interpret", "reference"]
What = Literal["evicting-s2", "contiguous-s2", "contiguous-dense"]
_SHARE_OF_MEMORY = 0.7
"""That a cache may take of the GPU; a longer batch is cut to what does."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """bfloat16; the S2 pattern is local_stride(local_blocks, vert_stride)."""

    length: int = 131072
    """Tokens of a sequence, the new one included."""
    batches: tuple[int, ...] = (64, 32, 1)
    heads: int = 32
    kv_heads: tuple[int, ...] = (8, 32)
    head_dim: int = 128
    local_blocks: int = 8
    vert_stride: int = 16
    block_size: int = 64
    caches: tuple[What, ...] = ("contiguous-dense", "contiguous-s2", "evicting-s2")
    launchers: tuple[Launcher, ...] = ("triton", "jax_triton")
    """How the kernel runs; the first one's call is also timed in parts."""
    cudnn: bool = True
    """Time JAX's cuDNN on the dense cache."""
    sdpa: tuple[Backend, ...] = BACKENDS
    """Which of PyTorch's backends to time on a dense cache."""
    sweep: bool = False
    """Also time the kernel with other tiles than the heuristic's."""
    rounds: int = 3
    """Of groups of calls in turn; medians count. Calls that are traced get no more than 3."""
    copy_bytes: int = 2 << 30
    """Of the array whose copy says what memory can do."""
    budget_s: float = 540
    """Seconds after which no further cache is begun."""
    platform: Literal["gpu", "cpu"] = "gpu"
    out: Path = Path("runs/decode.json")
    """Where the result goes; the log of PyTorch's process goes beside it."""

    def __post_init__(self) -> None:
        for name in ("batches", "kv_heads", "caches", "launchers"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one")
        for name in ("length", "heads", "head_dim", "rounds", "copy_bytes"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value!r} must be positive")
        if min(self.batches) < 1 or any(n < 1 or self.heads % n for n in self.kv_heads):
            raise ValueError(
                f"batches={self.batches!r} must be positive, and kv_heads={self.kv_heads!r} "
                f"divide heads={self.heads}"
            )

    def pattern(self, what: What) -> s2_jax.Pattern:
        if what.endswith("dense"):
            return s2_jax.dense(block_size=self.block_size)
        return s2_jax.local_stride(self.local_blocks, self.vert_stride, block_size=self.block_size)

    def shape(self, kind: Kind, batch: int, kv_heads: int) -> Shape:
        return Shape(kind, batch, self.heads, kv_heads, self.head_dim, self.length)

    def shapes(self, memory: int | None) -> list[Shape]:
        """Those that fit, and so that memory taken once serves again: the largest caches first."""
        kinds = dict.fromkeys(kind_of(what) for what in self.caches)
        every = {
            self.fitting(self.shape(kind, batch, kv_heads), memory): None
            for kind in kinds for batch in self.batches for kv_heads in self.kv_heads
        }  # fmt: skip
        return sorted(every, key=lambda shape: (shape.kind, -shape.full_bytes))

    def fitting(self, shape: Shape, memory: int | None) -> Shape:
        """A contiguous cache whose batch is halved until it fits; evicting ones are small."""
        while (
            shape.kind == "contiguous" and memory and shape.batch > 1
            and shape.full_bytes > _SHARE_OF_MEMORY * memory
        ):  # fmt: skip
            shape = dataclasses.replace(shape, batch=shape.batch // 2)
        return shape


def kind_of(what: What) -> Kind:
    return "evicting" if what.startswith("evicting") else "contiguous"


def run(settings: Settings) -> Record:
    """Measures everything; the file is complete up to the last storage."""
    begin, rounds = time.perf_counter(), settings.rounds
    memory = ((report.find_gpu() or {}).get("memory_mb") or 0) << 20
    shapes = settings.shapes(memory or None)
    dense = [shape for shape in shapes if shape.kind == "contiguous"]
    status, rows = sdpa_rows(
        dense if "contiguous-dense" in settings.caches else [], "contiguous-dense", settings.sdpa,
        rounds=rounds, logs=settings.out.with_suffix(""),
    )  # fmt: skip
    record = Record(settings, begin)
    data = record.data
    data["peers"] = {"torch": status}
    if missing := missing_packages():
        data["peers"]["jax_triton"] = f"not installed: {', '.join(missing)}"
    for shape in settings.shapes(None):
        if (cut := settings.fitting(shape, memory or None)) != shape:
            data["notes"].append(f"{_name(dataclasses.asdict(shape))} is cut to batch {cut.batch}")
    data["bandwidth"] = measure_bandwidth(settings.copy_bytes, rounds)
    data["sweep"] = []
    for row in rows:
        _add(record, row)
    for shape in shapes:
        name = _name(dataclasses.asdict(shape))
        if record.spent(name):
            continue
        try:
            _measure(shape, settings, record)
        except Exception as failure:  # out of memory, say: the others go on
            record.fail(name, failure)
        gc.collect()
        record.write()
    return record


def _measure(shape: Shape, settings: Settings, record: Record) -> None:
    """All that reads one storage, which is gone afterwards."""
    whats = [what for what in settings.caches if kind_of(what) == shape.kind]
    cell = Cell(shape, {str(what): settings.pattern(what) for what in whats}, settings.rounds)
    for row in cell.rows(settings.launchers, ["contiguous-dense"] * settings.cudnn):
        _add(record, row)
    if settings.sweep and not record.spent(f"sweep of {_name(dataclasses.asdict(shape))}"):
        for row in cell.sweep(settings.launchers[0]):
            record.data["sweep"].append(row)


def _add(record: Record, row: dict[str, Any]) -> None:
    """With the bound: the time of a copy of as many bytes."""
    bound, us = row["visible_bytes"] / record.data["bandwidth"]["copy_gb_s"] / 1e3, row["us"]
    row |= {"bound_us": bound, "share": us and bound / us, "over_us": us and us - bound}
    row["kernel_share"] = row["kernel_us"] and bound / row["kernel_us"]
    figures = row["error"] or f"{us:.1f} us, bound {bound:.1f} us"
    record.add(row, f"{_name(row)} {row['cache']} {row['way']}: {figures}")


def _name(row: dict[str, Any]) -> str:
    return f"{row['kind']} {row['batch']} x {row['heads']}/{row['kv_heads']}"


def main(arguments: Sequence[str] | None = None) -> None:
    record = run(read_settings(Settings, "python -m benchmarks.decode", arguments))
    print("\n".join([table(record.data), *record.closing()]))


if __name__ == "__main__":
    main()
