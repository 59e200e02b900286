"""`python -m benchmarks.layout`: what the layouts cost on the host, next to their budgets.

Exit code 1 where a budget is missed. Needs no GPU.
"""

from __future__ import annotations

import dataclasses
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator

import numpy as np

import s2_jax
from pallas_kernels.tiles import pick_tiles
from s2_jax.layout import PatternLayouts, block_lists

HEADS = 32
BLOCK_SIZE = 64
DENSITY = 0.1
STRUCTURED_LENGTHS = (8192, 32768, 131072, 524288, 1048576)
RANDOM_LENGTHS = (8192, 32768, 131072)
_MB = 1e6


@dataclasses.dataclass(frozen=True)
class Budget:
    """The most a layout may cost; None is no limit."""

    seconds: float | None = None
    host_mb: float | None = None
    program_mb: float | None = None


BUDGETS = {
    ("local_stride(8, 16)", 1048576): Budget(seconds=1.0, host_mb=200.0, program_mb=16.0),
    ("random 10%", 131072): Budget(seconds=5.0),
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of a call's three layouts: CPU seconds to build, peak host memory, what the program holds.

    CPU time, of the one thread that builds: other load on the machine does not count.
    """

    seconds: float
    host_mb: float
    program_mb: float

    def within(self, budget: Budget) -> bool:
        limits = dataclasses.astuple(budget)
        costs = dataclasses.astuple(self)
        return all(limit is None or cost <= limit for cost, limit in zip(costs, limits))


def structured(length: int) -> s2_jax.Pattern:
    del length
    return s2_jax.local_stride(8, 16, block_size=BLOCK_SIZE)


def random_mask(length: int) -> s2_jax.Pattern:
    """Every head sees its own random tenth of the blocks, and its diagonal."""
    blocks = -(-length // BLOCK_SIZE)
    generator = np.random.default_rng(0)
    mask = generator.random((HEADS, blocks, blocks), dtype=np.float32) < DENSITY
    mask |= np.eye(blocks, dtype=bool)
    return s2_jax.block_mask(mask, block_size=BLOCK_SIZE)


def build(pattern: s2_jax.Pattern, length: int) -> int:
    """Bytes of the lists of forward, dq and dkv; lists that kernels share count once."""
    block_lists.cache_clear()
    tiles = pick_tiles(head_dim=128, itemsize=2, q_len=length)
    layouts = PatternLayouts(pattern, HEADS, HEADS, 0, length, length, tiles)
    distinct = {id(lists): lists for lists in (layouts.forward(), layouts.dq(), layouts.dkv())}
    return sum(
        array.nbytes
        for lists in distinct.values()
        for array in (
            lists.order, lists.run_start, lists.runs, lists.partial_start, lists.partial
        )
    )  # fmt: skip


def measure(make_pattern: Callable[[int], s2_jax.Pattern], length: int) -> Cost:
    """Builds twice: tracing memory slows the second time down."""
    pattern = make_pattern(length)
    start = time.process_time()
    program = build(pattern, length)
    seconds = time.process_time() - start
    pattern = make_pattern(length)
    tracemalloc.start()
    try:
        build(pattern, length)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return Cost(seconds, peak / _MB, program / _MB)


def measure_all() -> Iterator[tuple[str, int, Cost]]:
    for length in STRUCTURED_LENGTHS:
        yield "local_stride(8, 16)", length, measure(structured, length)
    for length in RANDOM_LENGTHS:
        yield "random 10%", length, measure(random_mask, length)


def format_row(name: str, length: int, cost: Cost, budget: Budget | None) -> str:
    cells = [f"{name:<20}", f"{length:>9}"]
    limits = dataclasses.astuple(budget or Budget())
    for value, limit in zip(dataclasses.astuple(cost), limits):
        cells.append(f"{value:>10.3f}" + (f" of {limit:<5g}" if limit is not None else " " * 9))
    if budget is not None:
        cells.append("within" if cost.within(budget) else "MISSED")
    return " ".join(cells).rstrip()


def main() -> None:
    columns = ("CPU s", "host MB", "program MB")
    print(f"{'pattern':<20} {'tokens':>9} " + " ".join(f"{name:>10}{'':>9}" for name in columns))
    missed = False
    for name, length, cost in measure_all():
        budget = BUDGETS.get((name, length))
        print(format_row(name, length, cost, budget), flush=True)
        missed |= budget is not None and not cost.within(budget)
    sys.exit(int(missed))


if __name__ == "__main__":
    main()
