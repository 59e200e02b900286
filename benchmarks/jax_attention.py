"""The JAX frameworks: s2_jax by its implementations, cuDNN and tokamax."""

from __future__ import annotations

import concurrent.futures
import gc
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import s2_jax
from benchmarks.cases import GROUP_SECONDS, MODES, Case, Mode, Name
from benchmarks.jax_timing import Stopwatch
from benchmarks.phases import Phases
from benchmarks.random_arrays import draw
from pallas_kernels import lowering
from pallas_kernels.tiles import pick_tiles
from s2_jax.layout import PatternLayouts, block_lists

Arrays = tuple[jax.Array, ...]
Attention = Callable[..., jax.Array]
Future = concurrent.futures.Future
_THREADS = 8
"""That compile, which they do side by side: it is C++. Tracing is Python, one by one."""


def _attention(name: Name, case: Case) -> Attention:
    if name in ("s2_jax", "triton", "jax_triton", "reference"):
        pattern, implementation = case.pattern, None if name == "s2_jax" else name
        return lambda query, key, value, **masks: s2_jax.s2_attention(
            query, key, value, pattern, implementation=implementation, **masks
        )
    if case.documents > 1 or case.padded:
        raise NotImplementedError(f"{name} is measured on whole rows only")
    if name == "cudnn":
        return lambda query, key, value: jax.nn.dot_product_attention(
            query, key, value, is_causal=True, implementation="cudnn"
        )
    assert name == "tokamax"
    import tokamax  # type: ignore[import-not-found]

    return lambda query, key, value: tokamax.dot_product_attention(
        query, key, value, is_causal=True, implementation="mosaic"
    )


def _layout_seconds(name: Name, case: Case) -> float:
    """Builds the block lists of all kernels, which tracing then finds."""
    block_lists.cache_clear()
    mosaic = name == "s2_jax" and case.documents == 1 and not case.padded and lowering.has_mosaic()
    start = time.perf_counter()
    tiles = pick_tiles(
        head_dim=case.head_dim, itemsize=2, q_len=case.length, block_size=case.block_size,
        group=case.heads // case.kv_heads,
        compute_capability=lowering.compute_capability() or 90, mosaic=mosaic,
    )  # fmt: skip
    numbers = (case.heads, case.kv_heads, 0, case.length, case.length)
    layouts = PatternLayouts(case.pattern, *numbers, tiles)
    for lists in (layouts.forward, layouts.dq, layouts.dkv):
        lists()
    return time.perf_counter() - start


def _shapes(case: Case) -> tuple[tuple[int, ...], ...]:
    """Of query, key, value, and the output's gradient."""
    heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    return tuple((case.batch, case.length, n, case.head_dim) for n in heads)


def _masks(case: Case) -> dict[str, np.ndarray]:
    """What else `s2_attention` takes: arguments of the program, as in training."""
    if case.padded:
        lengths = np.array(case.valid_lengths, np.int32)
        return {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths}
    if case.documents == 1:
        return {}
    ids = np.arange(case.length, dtype=np.int32) // (case.length // case.documents)
    return {"segment_ids": np.tile(ids, (case.batch, 1))}


def _draw_inputs(case: Case) -> tuple[Any, ...]:
    """What a program takes."""
    keys = jax.random.split(jax.random.key(0), 4)
    *drawn, grad = (draw(key, shape) for key, shape in zip(keys, _shapes(case)))
    return jax.block_until_ready((tuple(drawn), grad, jax.device_put(_masks(case))))


@jax.jit
def _all_finite(results: Arrays) -> jax.Array:
    return jnp.stack([jnp.isfinite(result).all() for result in results]).all()


def _program(attention: Attention, mode: Mode) -> Callable[..., Arrays]:
    def forward(inputs: Arrays, grad: jax.Array, masks: dict[str, jax.Array]) -> Arrays:
        del grad
        return (attention(*inputs, **masks),)

    def train(inputs: Arrays, grad: jax.Array, masks: dict[str, jax.Array]) -> Any:
        return jax.vjp(lambda *inputs: attention(*inputs, **masks), *inputs)[1](grad)

    return forward if mode == "forward" else train


class Program:
    """Traced and lowered; `compile` does the rest, and may run in another thread."""

    def __init__(self, attention: Attention, case: Case, mode: Mode, phases: Phases) -> None:
        *inputs, grad = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in _shapes(case))
        self._phases, start = phases, time.perf_counter()
        with phases("trace"):
            traced = jax.jit(_program(attention, mode)).trace(tuple(inputs), grad, _masks(case))
        with phases("lower"):
            self._lowered: Any = traced.lower()
        self.facts = {"trace_lower_s": time.perf_counter() - start}
        self._compiled: Any = None
        self._watch = Stopwatch(group_seconds=GROUP_SECONDS)
        self._checked = False

    def compile(self) -> Program:
        start = time.perf_counter()
        self._compiled = self._lowered.compile()
        self._lowered = None
        self.facts["compile_s"] = time.perf_counter() - start
        # The compiler's own account: the allocator's peak cannot be reset.
        if (sizes := self._compiled.memory_analysis()) is not None:
            parts = ("argument", "output", "temp")
            self.facts["bytes"] = sum(getattr(sizes, f"{part}_size_in_bytes") for part in parts)
        return self

    def time(self, inputs: tuple[Any, ...]) -> dict[str, Any]:
        """Seconds of one call, from a group of them, and the clock; nothing after enough traces.

        Raises:
          FloatingPointError: the results are not finite.
        """

        def run(count: int) -> None:
            for _ in range(count):
                results = None  # freed before the next call asks for memory
                results = self._compiled(*inputs)
            jax.block_until_ready(results)

        if not self._checked:
            with self._phases("check"):
                if not bool(_all_finite(self._compiled(*inputs))):
                    raise FloatingPointError("results that are not finite")
            self._checked = True
        with self._phases("warm-up"):
            self._watch.warm_up(run, loaded=True)
        start = time.perf_counter()
        found = self._watch.time(run)
        name = "profiler" if found.get("clock") == "profiler" else "timing"
        self._phases.add(name, time.perf_counter() - start)
        return found


class Session:
    """What the worker holds: programs by case, and the inputs of one shape."""

    def __init__(self, name: Name) -> None:
        self._name = name
        self._threads = concurrent.futures.ThreadPoolExecutor(_THREADS)
        self._facts: dict[Case, dict[str, Any]] = {}
        self._programs: dict[Case, dict[Mode, Future[Program]]] = {}
        self._inputs: tuple[Case, tuple[Any, ...]] | None = None
        self.phases = Phases()
        jax.devices()  # takes seconds, which count as those of the start

    def _begin(self, case: Case) -> None:
        """Traces and lowers here; compiles in other threads."""
        attention, facts = _attention(self._name, case), {}
        if self._name in ("s2_jax", "triton", "jax_triton"):
            facts["layout_s"] = _layout_seconds(self._name, case)
            self.phases.add("layout", facts["layout_s"])
        self._facts[case], self._programs[case] = facts, {}
        for mode in MODES:
            program = Program(attention, case, mode, self.phases)
            self._programs[case][mode] = self._threads.submit(program.compile)

    def compile(self, cases: list[Case], seconds: float) -> None:
        """In this order, all at once; what is not begun within `seconds`, `prepare` does."""
        start, begun = time.perf_counter(), list[Future[Program]]()
        for case in cases:
            if time.perf_counter() - start > seconds:
                break
            try:
                self._begin(case)
            except Exception:  # `prepare` meets it again, and tells
                self._programs.pop(case, None)
            else:
                begun += self._programs[case].values()
        with self.phases("compile"):  # none is left running when something is timed
            concurrent.futures.wait(begun)

    def prepare(self, case: Case) -> dict[str, Any]:
        """Compiles, where `compile` has not; inputs come with the first round."""
        if case not in self._programs:
            self._begin(case)
        with self.phases("compile"):
            programs = {mode: made.result() for mode, made in self._programs[case].items()}
        return self._facts[case] | {mode: program.facts for mode, program in programs.items()}

    def round(self, case: Case) -> dict[str, Any]:
        if self._inputs is None or self._inputs[0] != case.shape:
            self.forget_inputs()
            with self.phases("arrays"):
                self._inputs = case.shape, _draw_inputs(case)
        inputs = self._inputs[1]
        programs = {mode: made.result() for mode, made in self._programs[case].items()}
        times = {mode: program.time(inputs) for mode, program in programs.items()}
        return {mode: found for mode, found in times.items() if found}

    def forget_inputs(self) -> None:
        self._inputs = None

    def clear(self) -> None:
        """Programs stay: those of other shapes may be compiled already, and they are small."""
        self.forget_inputs()
        gc.collect()
