"""What is timed on one storage of keys and values, and the rows that come of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.decode_calls import Job, Shape, Step, Storage, copies_for
from benchmarks.programs import compile_all, time_all
from benchmarks.sdpa import Backend, SdpaCase, measure_sdpa
from pallas_kernels.decode import DecodeTile, pick_tile
from s2_jax import Pattern

Row = dict[str, Any]
CUDNN = "jax cuDNN"
_TIMES = ("ms", "min_ms", "max_ms", "busy_ms")
_KERNEL = "s2_attention_decode"
_TRACED_SECONDS = 0.1
_PROGRAMS, _KEYS = (128, 256, 512, 1024, 2048), (16, 32, 64, 128)
_WARPS, _STAGES = (1, 2, 4, 8), (2, 3, 4, 5)


class Cell:
    """A storage, and the steps that read it: one for each pattern, by name."""

    def __init__(self, shape: Shape, patterns: Mapping[str, Pattern], rounds: int) -> None:
        self._shape, self._rounds = shape, rounds
        self._steps = {name: Step(shape, pattern) for name, pattern in patterns.items()}
        steps = list(self._steps.values())
        self._copies = copies_for(min(step.visible for step in steps))
        self._storage = Storage(steps[0].like, self._copies)

    def rows(self, launchers: Sequence[str], cudnn_for: Sequence[str]) -> Iterator[Row]:
        """One for each pattern and way to run: the first launcher's is also timed in parts."""
        first, jobs = launchers[0], dict[tuple[str, str], Job]()
        for name, step in self._steps.items():
            jobs |= {(name, way): step.attend(way) for way in launchers}
            jobs |= {(name, "append"): step.append(first), (name, "lists"): step.list_building()}
            jobs[name, "decode"] = step.decode(first)
            if name in cudnn_for:
                jobs[name, CUDNN] = step.cudnn()
        found = self._timed(jobs)
        for name, way in jobs:
            if way not in (*launchers, CUDNN):
                continue
            row = row_of(self._shape, name, way, self._steps[name].visible, found[name, way])
            row["copies"] = self._copies
            if way == first:
                row |= _parts({part: found[name, part] for part in ("append", "lists", "decode")})
            yield row

    def sweep(self, launcher: str) -> Iterator[Row]:
        """The kernel with other tiles than the heuristic's: first how the work is cut, then how
        the fastest of these is compiled."""
        for name, step in self._steps.items():
            lists = self._shape.batch * self._shape.kv_heads
            usual = pick_tile(2, 2 * max(16, self._shape.head_dim), lists)
            tiles = [usual]
            tiles += [
                dataclasses.replace(usual, programs=programs, keys=keys)
                for programs in _PROGRAMS for keys in _KEYS
            ]  # fmt: skip
            rows = self._tiles(name, step, launcher, tiles)
            yield from rows
            best = min(rows, key=lambda row: row["kernel_us"] or row["us"] or float("inf"))
            cut = DecodeTile(**best["tile"])
            tiles = [
                dataclasses.replace(cut, num_warps=warps, num_stages=stages)
                for warps in _WARPS for stages in _STAGES
            ]  # fmt: skip
            done = [row["tile"] for row in rows]
            rest = [tile for tile in tiles if dataclasses.asdict(tile) not in done]
            yield from self._tiles(name, step, launcher, rest)

    def _tiles(
        self, name: str, step: Step, launcher: str, tiles: Sequence[DecodeTile]
    ) -> list[Row]:
        jobs = {tile: step.decode(launcher, tile) for tile in dict.fromkeys(tiles)}
        return [
            row_of(self._shape, name, launcher, step.visible, times)
            | {"tile": dataclasses.asdict(tile)}
            for tile, times in self._timed(jobs).items()
        ]

    def _timed(self, jobs: Mapping[Any, Job]) -> dict[Any, dict[str, Any]]:
        return time_all(
            compile_all({key: job.lower for key, job in jobs.items()}),
            lambda key, program: self._storage.run(program, jobs[key]),
            rounds=self._rounds,
            traced_below=_TRACED_SECONDS,
        )


def sdpa_rows(
    shapes: Sequence[Shape], name: str, backends: Sequence[Backend], **options: Any
) -> tuple[str, list[Row]]:
    """PyTorch's, on caches of these shapes: the status, and a row for each shape and backend."""
    cases = {
        SdpaCase(
            "FLASH_ATTENTION", shape.batch, shape.heads, shape.kv_heads, shape.head_dim, 1,
            shape.length, copies_for(shape.full_bytes),
        ): shape
        for shape in shapes
    }  # fmt: skip
    status, found = measure_sdpa(list(cases), backends, **options)
    rows = []
    for case, times in found.items():
        shape = cases[dataclasses.replace(case, backend="FLASH_ATTENTION")]
        row = row_of(shape, name, f"torch {case.backend}", shape.full_bytes, times)
        rows.append(row | {"copies": case.copies})
    return status, rows


def row_of(shape: Shape, cache: str, way: str, visible: int, times: Mapping[str, Any]) -> Row:
    """us: of the call; where the profiler saw it busy_us, of the kernels in it, and kernel_us, of
    the decode kernel.
    """
    row = dataclasses.asdict(shape) | {"cache": cache, "way": way, "visible_bytes": visible}
    row |= {name[:-2] + "us": _us(times[name]) for name in _TIMES}
    row["kernel_us"] = _kernel_us(times)
    return row | {k: v for k, v in times.items() if k not in _TIMES}


def _parts(found: dict[str, dict[str, Any]]) -> Row:
    """Microseconds, each in a program of its own. decode is the kernel and the putting together of
    its parts; what of it is not the kernel is combine."""
    us = {f"{part}_us": _us(times["ms"]) for part, times in found.items()}
    decode, kernel = us["decode_us"], _kernel_us(found["decode"])
    us["combine_us"] = decode - kernel if decode is not None and kernel is not None else None
    return us


def _kernel_us(times: Mapping[str, Any]) -> float | None:
    own = [ms for name, ms in times["kernels_ms"].items() if _KERNEL in name]
    return 1e3 * sum(own) if own else None


def _us(ms: float | None) -> float | None:
    return None if ms is None else 1e3 * ms
