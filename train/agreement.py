"""How far the interpreted kernels are from the exact result, and how far they may be."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

import s2_jax
from s2_jax import Pattern

_LENGTH, _HEADS, _KV_HEADS, _HEAD_DIM = 200, 4, 2, 32
_RESULTS = ("out", "lse", "dq", "dk", "dv")


def demo_patterns() -> dict[str, Pattern]:
    near_and_far = (
        s2_jax.local(2, block_size=16)
        | s2_jax.vertical_stride(2, head_step=1, block_size=16).at_distance(2, 6)
        | s2_jax.vertical_stride(4, head_step=1, block_size=16).at_distance(6, None)
    )
    return {
        "dense": s2_jax.dense(block_size=32),
        "local_stride": s2_jax.local_stride(2, 4, block_size=16),
        "sink | local": s2_jax.sink(1, block_size=32) | s2_jax.local(2, block_size=32),
        "by distance": near_and_far,
    }


def agreement_table(patterns: dict[str, Pattern]) -> Table:
    """One row per pattern: what it skips, error and allowed error of results and gradients."""
    table = Table(
        "pattern", "skips", *_RESULTS, caption="float32: largest error; below, the allowed"
    )
    for name, pattern in patterns.items():
        skips = 1 - pattern.density(_HEADS, _LENGTH, _LENGTH, _KV_HEADS)
        cells = []
        for error, allowed in errors(pattern).values():
            style = "green" if error <= allowed else "bold red"
            cells.append(f"[{style}]{error:.1e}[/]\n[dim]{allowed:.1e}[/]")
        table.add_row(name, f"{skips:.0%}", *cells)
    return table


def errors(pattern: Pattern) -> dict[str, tuple[float, float]]:
    """Per result, the kernels' largest error in float32 and the largest that is allowed.

    Errors are against the reference in float64. Allowed is twice the error of the reference in
    float32, plus four units of rounding of the largest value.
    """
    inputs = _inputs()
    with jax.enable_x64(True):
        exact = _results(pattern, "reference", [x.astype(np.float64) for x in inputs])
    reference = _results(pattern, "reference", inputs)
    kernels = _results(pattern, "interpret", inputs)
    bounds = {}
    for name, oracle, ref, kernel in zip(_RESULTS, exact, reference, kernels):
        rounding = 4 * float(np.finfo(np.float32).eps) * _largest(oracle)
        bounds[name] = (_largest(kernel - oracle), 2 * _largest(ref - oracle) + rounding)
    return bounds


def _inputs() -> list[np.ndarray]:
    """Query, key and value, and the gradients that arrive at output and LSE."""
    rng = np.random.default_rng(0)
    query = (1, _LENGTH, _HEADS, _HEAD_DIM)
    key = (1, _LENGTH, _KV_HEADS, _HEAD_DIM)
    shapes = (query, key, key, query, (1, _HEADS, _LENGTH))
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def _results(pattern: Pattern, implementation: str, inputs: list[np.ndarray]) -> list[np.ndarray]:
    def attend(query: Any, key: Any, value: Any) -> Any:
        return s2_jax.s2_attention(
            query, key, value, pattern, implementation=implementation, return_lse=True
        )

    @jax.jit
    def run(query: Any, key: Any, value: Any, *cotangents: Any) -> Any:
        results, backward = jax.vjp(attend, query, key, value)
        return *results, *backward(cotangents)

    return [np.asarray(x) for x in run(*map(jnp.asarray, inputs))]


def _largest(x: np.ndarray) -> float:
    return float(np.abs(x).max())
