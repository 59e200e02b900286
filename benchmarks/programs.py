"""Programs compiled ahead of time, several side by side, and what they need."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import jax

from benchmarks.attention_worker import first_line
from benchmarks.jax_timing import Run, in_turn
from benchmarks.timing import summary

Lower = Callable[[], Any]
"""Gives what `jax.jit(...).lower(...)` gives; arguments may be shapes."""
K = TypeVar("K", bound=Hashable)
_THREADS = 4


@dataclasses.dataclass(frozen=True)
class Program:
    """facts: seconds to trace_lower and to compile, beside others; by the compiler's own account
    needed_bytes (arguments, results and intermediates at once) and temp_bytes (the last alone)."""

    run: Callable[..., Any]
    facts: dict[str, Any]


def compile_all(jobs: Mapping[K, Lower]) -> dict[K, Program | str]:
    """Every job's program, or why there is none. They are traced one after the other."""
    found: dict[K, Program | str] = {}
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        waiting = {}
        for key, lower in jobs.items():
            start = time.perf_counter()
            try:
                lowered = lower()
            except Exception as failure:  # whatever it is, the others go on
                found[key] = first_line(failure)
            else:
                waiting[key] = pool.submit(_compile, lowered, time.perf_counter() - start)
        for key, future in waiting.items():
            try:
                found[key] = future.result()
            except Exception as failure:  # likewise
                found[key] = first_line(failure)
    return {key: found[key] for key in jobs}


def _compile(lowered: Any, trace_lower_s: float) -> Program:
    start = time.perf_counter()
    compiled = lowered.compile()
    facts = {"trace_lower_s": trace_lower_s, "compile_s": time.perf_counter() - start}
    if (sizes := compiled.memory_analysis()) is not None:
        parts = ("argument", "output", "temp")
        argument, output, temp = (getattr(sizes, f"{part}_size_in_bytes") for part in parts)
        facts["needed_bytes"] = argument + output + temp - sizes.alias_size_in_bytes
        facts["temp_bytes"] = temp
    return Program(compiled, facts)


def time_all(
    programs: Mapping[K, Program | str], run_of: Callable[[K, Program], Run], **options: Any
) -> dict[K, dict[str, Any]]:
    """What each took, as `in_turn` with its options says, with its facts; or why it did not run."""
    there = {key: program for key, program in programs.items() if isinstance(program, Program)}
    times = in_turn({key: run_of(key, program) for key, program in there.items()}, **options)
    return {
        key: times[key] | program.facts
        if isinstance(program, Program)
        else summary([]) | {"error": program}
        for key, program in programs.items()
    }


def memory_limit() -> int | None:
    """Bytes that JAX may use on its device; None where the device does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")


def peak_memory() -> int | None:
    """Bytes at most in use since the start of the process."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
