"""Times each kernel alone over a list of tiles: what the heuristics in `tiles.py` rest on.

    python -m benchmarks.tune --lengths 8192 131072 --out tune.json

Prints milliseconds and TFLOP/s of visited blocks (2 matmuls forward, 3 for dq, 4 for dk/dv), and
at last the `TileConfig` to pass as `tiles=`, with its gain over the default.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import math
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
from pallas_kernels import backward, forward, lowering
from pallas_kernels.call import Settings
from pallas_kernels.tiles import LEAST_MOSAIC_QUERIES, Tile, TileConfig, pick_tiles
from s2_jax.layout import PatternLayouts, number_patterns

# block_q, block_kv, num_warps, num_stages, unroll
_FORWARD = [
    (64, 32, 4, 3, 1), (64, 64, 4, 2, 1), (64, 64, 4, 3, 1), (128, 32, 4, 3, 1),
    (128, 64, 4, 2, 1), (128, 64, 4, 3, 1), (128, 64, 8, 3, 1), (128, 64, 8, 3, 2),
]  # fmt: skip
_DQ = [
    (64, 32, 4, 2, 1), (64, 32, 4, 3, 1), (64, 64, 4, 2, 1), (128, 64, 8, 2, 2), (128, 64, 8, 3, 1),
]  # fmt: skip
_DKV = [
    (32, 64, 4, 2, 1), (32, 64, 4, 3, 1), (64, 64, 4, 2, 1), (64, 128, 8, 3, 1), (64, 128, 8, 4, 1),
    (128, 64, 4, 2, 1), (128, 128, 8, 2, 1),
]  # fmt: skip
_BY_QUERY = (64, 2), (64, 3), (64, 4), (128, 2)
_KEYS_AND_STAGES = {
    "forward": _BY_QUERY, "dq": _BY_QUERY, "dkv": ((128, 2), (128, 3), (128, 4)),
}  # fmt: skip
_MOSAIC = {
    kernel: [Tile(128, keys, 8, stages, lowering="mosaic") for keys, stages in several]
    for kernel, several in _KEYS_AND_STAGES.items()
}
_LISTS = {"forward": _FORWARD, "dq": _DQ, "dkv": _DKV}
CANDIDATES = {kernel: [Tile(*sizes) for sizes in tiles] for kernel, tiles in _LISTS.items()}
MATMULS = {"forward": 2, "dq": 3, "dkv": 4}
_FUNCTIONS = {"forward": forward.forward, "dq": backward.dq, "dkv": backward.dkv}
_GROUP_SECONDS = 0.03


@dataclasses.dataclass(frozen=True)
class Options:
    """A pattern and shapes; bfloat16, causal."""

    lengths: tuple[int, ...] = (8192, 131072)
    batch: int = 1
    local_blocks: int = 8
    vert_stride: int = 16
    block_size: int = 64
    heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    documents: int = 0
    """Segments of equal length in a row; 0: no segments."""
    kernels: tuple[Literal["forward", "dq", "dkv"], ...] = ("forward", "dq", "dkv")
    launchers: tuple[Literal["pallas", "jax_triton"], ...] = ("pallas",)
    rounds: int = 5
    out: pathlib.Path | None = None

    @property
    def pattern(self) -> s2_jax.Pattern:
        return s2_jax.local_stride(self.local_blocks, self.vert_stride, block_size=self.block_size)


def draw(options: Options, length: int) -> dict[str, jax.Array]:
    """What the kernels take, by name."""

    def normal(seed: int, heads: int) -> jax.Array:
        shape = (options.batch, length, heads, options.head_dim)
        return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)

    heads, kv_heads, batch = options.heads, options.kv_heads, options.batch
    names = ("query", "key", "value", "grad_out")
    numbers = (heads, kv_heads, kv_heads, heads)
    arrays = {name: normal(i, n) for i, (name, n) in enumerate(zip(names, numbers))}
    lse = jnp.full((batch, heads, length), 8.0)
    pattern_of_head = number_patterns(options.pattern.head_keys(heads, kv_heads))
    arrays |= {
        "lse": lse,
        "delta": jnp.zeros_like(lse),
        "pattern_of_head": jnp.broadcast_to(
            jnp.asarray(pattern_of_head, jnp.int32), (batch, heads)
        ),
        "offset": jnp.zeros((batch,), jnp.int32),
    }
    if options.documents:
        ids = jnp.arange(length, dtype=jnp.int32) // -(-length // options.documents)
        arrays |= dict.fromkeys(("q_ids", "kv_ids"), jnp.broadcast_to(ids, (batch, length)))
    return arrays


def program(
    kernel: str, tile: Tile, launcher: Any, options: Options, length: int
) -> tuple[Any, dict[str, jax.Array]]:
    """The kernel's function, jitted, and its lists."""
    tiles = _with(kernel, tile)
    settings = Settings(
        layouts=PatternLayouts(
            options.pattern, options.heads, options.kv_heads, 0, length, length, tiles
        ),
        tiles=tiles,
        scale=options.head_dim**-0.5,
        causal=True,
        block_size=options.block_size,
        query_offset=0,
        q_limit=length,
        launcher=launcher,
    )
    lists = getattr(settings.layouts, kernel)().arrays
    return jax.jit(functools.partial(_FUNCTIONS[kernel], settings)), lists


def seconds(run: Callable[[], Any], calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        result = run()
    jax.block_until_ready(result)
    return (time.perf_counter() - begin) / calls


def time_tiles(options: Options, length: int) -> list[dict[str, Any]]:
    """A row for each kernel, launcher and tile: all compiled first, then timed in turn."""
    arrays = draw(options, length)
    flops = options.batch * options.pattern.flops(
        options.heads, length, length, options.kv_heads, head_dim=options.head_dim
    )
    rows: list[dict[str, Any]] = []
    programs = []
    for kernel, launcher in itertools.product(options.kernels, options.launchers):
        for tile in candidates(options, length, kernel, launcher):
            rows.append({"length": length, "kernel": kernel, "launcher": launcher, "tile": tile})
            programs.append(program(kernel, tile, launcher, options, length))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        compiled = list(pool.map(functools.partial(_compile, arrays), programs))
    runs = {}
    for i, run in enumerate(compiled):
        try:
            if isinstance(run, Exception):
                raise run
            jax.block_until_ready(run())
            runs[i] = run, max(1, math.ceil(_GROUP_SECONDS / seconds(run, 1)))
        except (RuntimeError, ValueError) as error:  # does not fit this GPU
            rows[i]["error"] = str(error).splitlines()[0][:200]
    times: dict[int, list[float]] = {i: [] for i in runs}
    for _ in range(options.rounds):
        for i, (run, calls) in runs.items():
            times[i].append(seconds(run, calls))
    for i, taken in times.items():
        median = statistics.median(taken)
        rate = flops / 2 * MATMULS[rows[i]["kernel"]] / median / 1e12
        rows[i] |= {"ms": median * 1e3, "spread_ms": [min(taken) * 1e3, max(taken) * 1e3]}
        rows[i] |= {"tflops": rate}
    return rows


def _compile(
    arrays: dict[str, jax.Array], program: tuple[Any, dict[str, jax.Array]]
) -> Callable[[], Any] | Exception:
    """A call of the compiled program, or why there is none."""
    run, lists = program
    try:
        return functools.partial(run.lower(arrays, lists).compile(), arrays, lists)
    except (RuntimeError, ValueError) as error:
        return error


def takes_mosaic(options: Options) -> bool:
    """Whether Mosaic's kernels do, on this GPU."""
    ids_fit = not options.documents or options.block_size >= 32
    return options.head_dim in (64, 128) and ids_fit and lowering.has_mosaic()


def candidates(options: Options, length: int, kernel: str, launcher: str) -> list[Tile]:
    mosaic = launcher == "pallas" and takes_mosaic(options)
    usual, tiles = default(options, length, kernel, mosaic), []
    if mosaic and (kernel != "dkv" or options.block_size >= LEAST_MOSAIC_QUERIES):
        tiles = [tile for tile in _MOSAIC[kernel] if _fits(options, kernel, tile)]
    return list(dict.fromkeys([usual, *CANDIDATES[kernel], *tiles]))


def _fits(options: Options, kernel: str, tile: Tile) -> bool:
    try:
        _with(kernel, tile).check_mosaic_memory(options.head_dim, options.documents > 0)
    except ValueError:
        return False
    return True


def _with(kernel: str, tile: Tile) -> TileConfig:
    """A tile for one kernel, beside some for the others."""
    return TileConfig(**{name: CANDIDATES[name][0] for name in CANDIDATES} | {kernel: tile})


def default(options: Options, length: int, kernel: str, mosaic: bool = False) -> Tile:
    tiles = pick_tiles(
        head_dim=options.head_dim,
        itemsize=2,
        q_len=length,
        block_size=options.block_size,
        group=options.heads // options.kv_heads,
        cut_short=options.documents > 0,
        compute_capability=lowering.compute_capability() or 90,
        mosaic=mosaic,
    )
    found: Tile = getattr(tiles, kernel)
    return found


def report_rows(options: Options, length: int, rows: list[dict[str, Any]]) -> None:
    """A table, fastest first, and the configuration to take."""
    for row in sorted(rows, key=lambda row: (row["kernel"], row["launcher"], row.get("ms", 1e9))):
        figures = row.get("error") or f"{row['ms']:9.3f} ms {row['tflops']:7.1f} TFLOP/s"
        sizes = f"{dataclasses.astuple(row['tile'])!s:34s}"
        name = f"{length:8d} {row['kernel']:8s} {row['launcher']:10s} {sizes}"
        print(f"{name} {figures}")
    for launcher in options.launchers:
        best, gains = {}, []
        for kernel in options.kernels:
            timed = {
                row["tile"]: row["ms"] for row in rows
                if (row["kernel"], row["launcher"]) == (kernel, launcher) and "ms" in row
            }  # fmt: skip
            if timed:
                tile = min(timed, key=lambda tile: timed[tile])
                best[kernel] = f"{kernel}={tile}"
                usual = timed.get(candidates(options, length, kernel, launcher)[0])
                gains.append(f"{kernel} {usual / timed[tile]:.2f}x" if usual else kernel)
        print(f"{length} tokens, {launcher}: TileConfig({', '.join(best.values())})")
        print(f"  faster than the default: {', '.join(gains)}", flush=True)


def _plain(value: Any) -> Any:
    return dataclasses.astuple(value) if isinstance(value, Tile) else str(value)


def main(options: Options) -> None:
    rows = []
    for length in options.lengths:
        found = time_tiles(options, length)
        report_rows(options, length, found)
        rows += found
    if options.out is not None:
        facts = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
        facts |= {"commit": report.commit()}
        facts |= {"options": dataclasses.asdict(options) | {"out": None}}
        text = json.dumps(facts | {"rows": rows}, default=_plain)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
