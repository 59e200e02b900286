"""How cells of the attention benchmark are measured with a pool of workers."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Iterator
from typing import Any

from benchmarks import report
from benchmarks.cases import FRAMEWORKS, Name
from benchmarks.suites import LARGE_BYTES, Item, memory_class
from benchmarks.workers import Hung, Lost, Pool, Unusable

_FEWEST_ROUNDS = 2
_MOST_HANGS = 2


@dataclasses.dataclass(frozen=True)
class Taken:
    """Seconds of a cell. work: operations of all of its frameworks."""

    work: int
    prepare_s: float
    rounds_s: float


def work(cell: list[Item]) -> int:
    return sum(item.case.flops for item in cell)


def expected_seconds(cell: list[Item], taken: list[Taken]) -> float:
    """Of the next one: to prepare what most took, to time it what the one took most like it.

    The first cell says little of preparing: there everything starts.
    """
    if len(taken) < 2:
        return 0.0
    like = min(taken, key=lambda one: abs(math.log(one.work / work(cell))))
    return statistics.median(one.prepare_s for one in taken[1:]) + like.rounds_s


class Bench:
    """Measures cells; remembers what they took, and which frameworks are of no use."""

    def __init__(self, pool: Pool, status: dict[Name, str]) -> None:
        self._pool, self.status = pool, status
        self._hangs: collections.Counter[Name] = collections.Counter()
        self.taken: list[Taken] = []

    def _request(self, name: Name, do: str, **fields: Any) -> dict[str, Any]:
        """The answer. Raises `Lost` if the worker is gone."""
        try:
            return self._pool.ask(name, do=do, **fields)
        except Lost as lost:
            self._hangs[name] += isinstance(lost, Hung)
            if isinstance(lost, Unusable):
                self.status[name] = f"not usable: {lost}"
            elif self._hangs[name] == _MOST_HANGS:
                self.status[name] = f"given up, it hung {_MOST_HANGS} times: {lost}"
            raise

    def _ask(self, item: Item, do: str, keep: bool) -> dict[str, Any] | None:
        """The answer, or None with the item's error set. Raises `Lost` if the worker is gone."""
        fields = dataclasses.asdict(item.case)
        try:
            reply = self._request(item.framework, do, case=fields, keep=keep)
        except Lost as lost:
            item.error = f"{do}: {lost}"
            raise
        if "unsupported" in reply:
            item.error = f"not supported: {reply['unsupported']}"
            return None
        return reply

    def _compile(self, name: Name, ahead: list[Item], seconds: float) -> None:
        """What a worker can compile before it is asked for; one that is lost starts anew later."""
        cases = [dataclasses.asdict(item.case) for item in ahead if item.framework == name]
        if not cases or self.status[name] != "ok":
            return
        start = time.perf_counter()
        try:
            self._request(name, "compile", cases=cases, seconds=seconds)
            how = "ready"
        except Lost as lost:
            how = f"lost, compiling ahead: {lost}"
        print(f"{name} is {how}, after {time.perf_counter() - start:.0f} s", flush=True)

    def _prepare(self, item: Item, keep: bool) -> None:
        if (why := self.status[item.framework]) != "ok":
            item.error = why
        else:
            with contextlib.suppress(Lost):  # the item says so, and the worker starts anew
                item.facts |= self._ask(item, "prepare", keep) or {}

    def measure(
        self, cell: list[Item], rounds: int, limit_s: float, ahead: list[Item], ahead_s: float
    ) -> Iterator[None]:
        """One cell: prepares side by side, then times in turn, until `limit_s` have passed.

        Yields whenever more is known. ahead: what workers may compile before, as far as they come
        in `ahead_s`. All of it is done when timing begins: nothing else runs on the GPU then, or
        keeps a worker from launching.
        """
        keep, start = cell[0].case.io_bytes("train") < LARGE_BYTES, time.perf_counter()
        of = {item.framework: item for item in cell}  # a framework has one in a cell, or none

        def prepare(name: Name) -> None:
            self._compile(name, ahead, ahead_s)
            if name in of:
                self._prepare(of[name], keep)

        with concurrent.futures.ThreadPoolExecutor(len(self.status)) as threads:
            list(threads.map(prepare, self.status))
        prepared = time.perf_counter()
        yield
        for number in range(rounds):
            if number >= _FEWEST_ROUNDS and time.perf_counter() - prepared > limit_s:
                break
            for item in cell:
                if item.error is not None:
                    continue
                with contextlib.suppress(Lost):
                    if (times := self._ask(item, "round", keep)) is not None:
                        item.rounds.append(times)
            if number == 0:
                clock = report.gpu_clock()
                for item in cell:
                    item.facts["sm_mhz"] = clock
            yield
        self.taken.append(Taken(work(cell), prepared - start, time.perf_counter() - prepared))


def environments_of(
    cell: list[Item], gpu: dict[str, Any], caches: str
) -> dict[Name, dict[str, str]]:
    """Of the workers for a cell. JAX never returns memory, so that it gets a limit."""
    fraction, limit = 0.95, 1.3 * memory_class(cell) + (2 << 30)
    if gpu.get("memory_mb"):
        fraction = min(fraction, limit / (gpu["memory_mb"] * 2**20))
    common = {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # as nvidia-smi counts
        "CUDA_VISIBLE_DEVICES": report.gpu_id(),
        "TRITON_CACHE_DIR": f"{caches}/triton",
        "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor",
    }
    jax = {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{fraction:.3f}",
        # Times of the first call are those of a first call.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    return {
        name: common if "torch" in framework.packages else common | jax
        for name, framework in FRAMEWORKS.items()
    }
