"""How fast this device's memory is: what memory-bound calls are compared with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.jax_timing import calls, in_turn

_WAYS: dict[str, tuple[Callable[[jax.Array], jax.Array], int]] = {
    "copy": (jnp.copy, 2),
    "kernel": (lambda x: x + 1, 2),
    "read": (lambda x: x.sum(dtype=x.dtype), 1),
}
"""What is done with a large array, and how often each of its bytes is moved."""


def measure_bandwidth(size: int, rounds: int) -> dict[str, Any]:
    """Bytes a second of arrays of `size` bytes, read and written: copy_gb_s, that of the runtime's
    own copy or of a kernel that adds 1, the faster one; and of reading alone, read_gb_s.
    """
    x = jnp.zeros((size // 4,), jnp.int32)
    runs = {
        way: calls(functools.partial(jax.jit(function), x)) for way, (function, _) in _WAYS.items()
    }
    ways = in_turn(runs, rounds)
    rates = {
        way: found["ms"] and moved * x.nbytes / found["ms"] / 1e6
        for (way, found), (_, moved) in zip(ways.items(), _WAYS.values())
    }
    copies = [rates[way] for way in ("copy", "kernel") if rates[way]]
    return {"copy_gb_s": max(copies), "read_gb_s": rates["read"], "bytes": x.nbytes, "ways": ways}
