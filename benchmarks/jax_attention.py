"""The JAX frameworks: s2_jax by its implementations, cuDNN and tokamax."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import s2_jax
from benchmarks.cases import MODES, Case, Mode, Name
from benchmarks.jax_timing import Stopwatch
from benchmarks.random_arrays import draw
from pallas_kernels import lowering
from pallas_kernels.tiles import pick_tiles
from s2_jax.layout import PatternLayouts, block_lists

Arrays = tuple[jax.Array, ...]
Attention = Callable[..., jax.Array]


def _attention(name: Name, case: Case) -> Attention:
    if name in ("s2_jax", "jax_triton", "reference"):
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


def _layout_seconds(case: Case) -> float:
    """Builds the block lists of all kernels, which tracing then finds."""
    block_lists.cache_clear()
    start = time.perf_counter()
    tiles = pick_tiles(
        head_dim=case.head_dim, itemsize=2, q_len=case.length, block_size=case.block_size,
        group=case.heads // case.kv_heads,
        compute_capability=lowering.compute_capability() or 90,
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
    """Compiled ahead of time."""

    def __init__(self, attention: Attention, case: Case, mode: Mode) -> None:
        *inputs, grad = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in _shapes(case))
        start = time.perf_counter()
        lowered = jax.jit(_program(attention, mode)).lower(tuple(inputs), grad, _masks(case))
        traced = time.perf_counter()
        self._compiled = lowered.compile()
        self.facts = {"trace_lower_s": traced - start, "compile_s": time.perf_counter() - traced}
        # The compiler's own account: the allocator's peak cannot be reset.
        if (sizes := self._compiled.memory_analysis()) is not None:
            parts = ("argument", "output", "temp")
            self.facts["bytes"] = sum(getattr(sizes, f"{part}_size_in_bytes") for part in parts)
        self._watch = Stopwatch()
        self._checked = False

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
            if not bool(_all_finite(self._compiled(*inputs))):
                raise FloatingPointError("results that are not finite")
            self._checked = True
        return self._watch.time(run)


class Session:
    """What the worker holds: programs by case, and the inputs of one shape."""

    def __init__(self, name: Name) -> None:
        self._name = name
        self._programs: dict[Case, dict[Mode, Program]] = {}
        self._inputs: tuple[Case, tuple[Any, ...]] | None = None

    def prepare(self, case: Case) -> dict[str, Any]:
        """Compiles; inputs come with the first round."""
        attention = _attention(self._name, case)
        facts = {}
        if self._name in ("s2_jax", "jax_triton"):
            facts["layout_s"] = _layout_seconds(case)
        programs = {mode: Program(attention, case, mode) for mode in MODES}
        self._programs[case] = programs
        return facts | {mode: program.facts for mode, program in programs.items()}

    def round(self, case: Case) -> dict[str, Any]:
        if self._inputs is None or self._inputs[0] != case.shape:
            self.forget_inputs()
            keys = jax.random.split(jax.random.key(0), 4)
            *drawn, grad = (draw(key, shape) for key, shape in zip(keys, _shapes(case)))
            arrays = (tuple(drawn), grad, jax.device_put(_masks(case)))
            self._inputs = case.shape, jax.block_until_ready(arrays)
        inputs = self._inputs[1]
        times = {mode: program.time(inputs) for mode, program in self._programs[case].items()}
        return {mode: found for mode, found in times.items() if found}

    def forget_inputs(self) -> None:
        self._inputs = None

    def clear(self) -> None:
        self._programs = {}
        self.forget_inputs()
        block_lists.cache_clear()
        jax.clear_caches()
        gc.collect()
