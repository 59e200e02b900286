"""The JAX frameworks: s2_jax, cuDNN and tokamax."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import s2_jax
from benchmarks.cases import Case, Measurement, Mode, Name
from benchmarks.timing import median_seconds
from s2_jax.layout import block_lists

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def _s2_jax(case: Case) -> Attention:
    block_lists.cache_clear()
    pattern = case.pattern
    return lambda query, key, value: s2_jax.s2_attention(query, key, value, pattern)


def _cudnn(case: Case) -> Attention:
    del case
    return lambda query, key, value: jax.nn.dot_product_attention(
        query, key, value, is_causal=True, implementation="cudnn"
    )


def _tokamax(case: Case) -> Attention:
    del case
    import tokamax  # type: ignore[import-not-found]

    return lambda query, key, value: tokamax.dot_product_attention(
        query, key, value, is_causal=True, implementation="mosaic"
    )


_ATTENTION: dict[str, Callable[[Case], Attention]] = {
    "s2_jax": _s2_jax,
    "cudnn": _cudnn,
    "tokamax": _tokamax,
}


def draw_inputs(case: Case, mode: Mode) -> tuple[jax.Array, ...]:
    """Query, key and value, and to train the output's gradient: standard normal bfloat16."""
    query = (case.batch, case.length, case.heads, case.head_dim)
    key = (case.batch, case.length, case.kv_heads, case.head_dim)
    shapes = (query, key, key) if mode == "forward" else (query, key, key, query)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return tuple(jax.random.normal(k, shape, jnp.bfloat16) for k, shape in zip(keys, shapes))


def make_program(attention: Attention, mode: Mode) -> Callable[..., tuple[jax.Array, ...]]:
    def forward(*inputs: jax.Array) -> tuple[jax.Array, ...]:
        return (attention(*inputs),)

    def train(query: jax.Array, key: jax.Array, value: jax.Array, grad: jax.Array) -> Any:
        return jax.vjp(attention, query, key, value)[1](grad)

    return forward if mode == "forward" else train


def measure(name: Name, case: Case, mode: Mode, repeats: int) -> Measurement:
    """Time, memory and first call of one program.

    Memory is what the compiled program needs by its own account: the allocator's peak cannot
    be reset, so that it would be the largest case's, or that of drawing the inputs.

    Raises:
      FloatingPointError: the results are not finite.
    """
    inputs = jax.block_until_ready(draw_inputs(case, mode))
    program = make_program(_ATTENTION[name](case), mode)
    start = time.perf_counter()
    compiled = jax.jit(program).lower(*inputs).compile()
    results = jax.block_until_ready(compiled(*inputs))
    first_call = time.perf_counter() - start
    if not all(bool(jnp.isfinite(result).all()) for result in results):
        raise FloatingPointError(f"{name} gives results that are not finite for {case}")
    del results

    def run(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            results = compiled(*inputs)
        jax.block_until_ready(results)
        return time.perf_counter() - start

    seconds = median_seconds(run, repeats)
    sizes = compiled.memory_analysis()
    assert sizes is not None
    memory = (
        sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes
    )  # fmt: skip
    return Measurement(seconds, memory, first_call)
