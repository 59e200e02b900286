"""Layers that repeat, as one loop: what is compiled is one of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

X = TypeVar("X")


class Segment(NamedTuple):
    """Layers from `start` on: `repeats` times the same `period` of them."""

    start: int
    period: int
    repeats: int


def segments(kinds: Sequence[Hashable]) -> Iterator[Segment]:
    """Cuts layers into segments, from the bottom up, each as long as it can be."""
    start = 0
    while start < len(kinds):
        found = Segment(start, 1, 1)
        for period in range(1, (len(kinds) - start) // 2 + 1):
            repeats = 1
            while _repeats(kinds, start, period, repeats):
                repeats += 1
            if repeats > 1 and period * repeats > found.period * found.repeats:
                found = Segment(start, period, repeats)
        yield found
        start += found.period * found.repeats


def _repeats(kinds: Sequence[Hashable], start: int, period: int, times: int) -> bool:
    """Whether the period that begins at `start` comes once more after so many times."""
    again = start + times * period
    return list(kinds[again : again + period]) == list(kinds[start : start + period])


def scan_layers(
    layers: Sequence[nnx.Module],
    segment: Segment,
    apply: Callable[[Any, X], X],
    x: X,
) -> X:
    """`apply(layer, x)` for the layers of a segment, one after the other; `x` is any pytree."""
    start, period, repeats = segment
    if repeats == 1:
        return apply(layers[start], x)
    parts = [nnx.split(layer) for layer in layers[start : start + period * repeats]]
    graphdefs = [graphdef for graphdef, _ in parts[:period]]
    rounds = [[state for _, state in parts[i::period]] for i in range(period)]
    stacked = [jax.tree.map(lambda *each: jnp.stack(each), *states) for states in rounds]

    def step(x: X, states: Any) -> tuple[X, None]:
        for graphdef, state in zip(graphdefs, states, strict=True):
            x = apply(nnx.merge(graphdef, state), x)
        return x, None

    return jax.lax.scan(step, x, stacked)[0]
