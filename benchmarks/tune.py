"""Times each kernel alone over a list of tiles: what the heuristics in `tiles.py` rest on.

    python -m benchmarks.tune --lengths 8192 131072 --out tune.json

Prints milliseconds and TFLOP/s of visited blocks (2 matmuls forward, 3 for dq, 4 for dk/dv).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro

import s2_jax
from benchmarks import report
from pallas_kernels import backward, forward
from pallas_kernels.call import Settings
from pallas_kernels.tiles import Tile, TileConfig
from s2_jax.layout import PatternLayouts, number_patterns

FORWARD = [
    Tile(64, 64, 4, 2),
    Tile(64, 64, 4, 3),
    Tile(128, 64, 4, 2),
    Tile(128, 64, 4, 3),
    Tile(128, 64, 8, 2),
    Tile(128, 64, 8, 3),
    Tile(128, 32, 4, 2),
    Tile(128, 32, 4, 3),
    Tile(64, 32, 4, 2),
]
DQ = [
    Tile(64, 64, 4, 2),
    Tile(64, 64, 8, 2),
    Tile(128, 64, 8, 2),
    Tile(128, 64, 8, 3),
    Tile(64, 32, 4, 2),
    Tile(64, 64, 8, 1),
]
DKV = [
    Tile(64, 64, 4, 2),
    Tile(64, 64, 4, 3),
    Tile(32, 64, 4, 3),
    Tile(64, 64, 8, 1),
    Tile(64, 64, 8, 2),
    Tile(32, 64, 8, 2),
    Tile(64, 128, 8, 2),
]
KERNELS = {"forward": (FORWARD, 2), "dq": (DQ, 3), "dkv": (DKV, 4)}


@dataclasses.dataclass(frozen=True)
class Options:
    """A pattern and shapes; bfloat16, batch 1, causal."""

    lengths: tuple[int, ...] = (8192, 131072)
    local_blocks: int = 8
    vert_stride: int = 16
    block_size: int = 64
    heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    kernels: tuple[str, ...] = ("forward", "dq", "dkv")
    launcher: Literal["pallas", "jax_triton"] = "pallas"
    out: pathlib.Path | None = None


def seconds(run: Callable[[], Any], groups: int = 3) -> float:
    """Median over groups of back-to-back calls, each group about 60 ms."""
    jax.block_until_ready(run())
    begin = time.perf_counter()
    jax.block_until_ready(run())
    calls = max(1, int(0.06 / (time.perf_counter() - begin)))
    times = []
    for _ in range(groups):
        begin = time.perf_counter()
        for _ in range(calls):
            result = run()
        jax.block_until_ready(result)
        times.append((time.perf_counter() - begin) / calls)
    return statistics.median(times)


def time_tile(kernel: str, tile: Tile, options: Options, length: int, arrays: Any) -> float:
    pattern = s2_jax.local_stride(
        options.local_blocks, options.vert_stride, block_size=options.block_size
    )
    tiles = TileConfig(tile, tile, tile)
    heads = (options.heads, options.kv_heads)
    settings = Settings(
        layouts=PatternLayouts(pattern, *heads, 0, length, length, tiles),
        tiles=tiles,
        scale=options.head_dim**-0.5,
        causal=True,
        block_size=options.block_size,
        query_offset=0,
        q_limit=length,
        launcher=options.launcher,
    )
    numbers = jnp.asarray([number_patterns(pattern.head_keys(*heads))], jnp.int32)
    named = dict(zip(("query", "key", "value", "grad_out", "lse", "delta"), arrays, strict=True))
    named |= {"pattern_of_head": numbers, "offset": jnp.zeros((1,), jnp.int32)}
    function = {"forward": forward.forward, "dq": backward.dq, "dkv": backward.dkv}[kernel]
    lists = getattr(settings.layouts, kernel)().arrays
    run = jax.jit(functools.partial(function, settings))
    return seconds(functools.partial(run, named, lists))


def draw(options: Options, length: int) -> tuple[jax.Array, ...]:
    def normal(seed: int, heads: int) -> jax.Array:
        shape = (1, length, heads, options.head_dim)
        return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)

    query, key, value, grad_out = (
        normal(i, n) for i, n in enumerate((options.heads, *[options.kv_heads] * 2, options.heads))
    )
    lse = jnp.full((1, options.heads, length), 8.0)
    return query, key, value, grad_out, lse, jnp.zeros_like(lse)


def main(options: Options) -> None:
    pattern = s2_jax.local_stride(
        options.local_blocks, options.vert_stride, block_size=options.block_size
    )
    rows = []
    for length, kernel in itertools.product(options.lengths, options.kernels):
        tiles, matmuls = KERNELS[kernel]
        arrays = draw(options, length)
        flops = pattern.flops(
            options.heads, length, length, options.kv_heads, head_dim=options.head_dim
        )
        for tile in tiles:
            row = {"length": length, "kernel": kernel, "tile": dataclasses.astuple(tile)}
            try:
                taken = time_tile(kernel, tile, options, length, arrays)
            except jax.errors.JaxRuntimeError as error:  # does not fit this GPU
                row["error"] = str(error).splitlines()[0][:200]
            else:
                row |= {"ms": taken * 1e3, "tflops": flops / 2 * matmuls / taken / 1e12}
            rows.append(row)
            figures = row.get("error") or f"{row['ms']:9.3f} ms {row['tflops']:7.1f} TFLOP/s"
            print(f"{length:8d} {kernel:8s} {row['tile']!s:18s} {figures}", flush=True)
    if options.out is not None:
        device = jax.devices()[0].device_kind
        versions = {"device": device, "jax": jax.__version__, "launcher": options.launcher}
        versions |= {"commit": report.commit()}
        options.out.write_text(json.dumps(versions | {"rows": rows}))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
