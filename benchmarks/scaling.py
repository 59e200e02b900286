"""`python -m benchmarks.scaling`: the same work on one GPU and on all GPUs of the host.

Strong scaling: forward and backward of one bfloat16 batch, of which every GPU takes its part, by
batch or by heads. The ratio says how many times as fast all GPUs together are as the first one:
at best their number. Calls are queued back to back with one wait, and the rounds of one and of
all GPUs take turns. Needs two NVIDIA GPUs; `--platform cpu` runs the same code on what JAX
simulates with XLA_FLAGS=--xla_force_host_platform_device_count=2, whose times mean nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import s2_jax
from benchmarks import report

Split = Literal["batch", "heads"]
Way = Literal["jit-auto", "jit-explicit", "shard_map", "pmap"]
Call = Callable[[], Any]
SPECS: dict[Split, P] = {"batch": P("x"), "heads": P(None, None, "x")}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Shapes of the whole work, a causal pattern in blocks of 64, and the ways to share it."""

    lengths: tuple[int, ...] = (32768, 131072)
    batch: int = 2
    heads: int = 32
    head_dim: int = 128
    local_blocks: int = 8
    vert_stride: int = 16
    splits: tuple[Split, ...] = ("batch", "heads")
    ways: tuple[Way, ...] = ("jit-auto", "jit-explicit", "shard_map", "pmap")
    """`pmap` shares the batch alone."""
    implementation: Literal["triton", "jax_triton", "interpret", "reference"] = "triton"
    rounds: int = 7
    """Of one and of all GPUs, in turn; medians count."""
    round_seconds: float = 0.5
    """How long a round of back-to-back calls lasts at least."""
    devices: int | None = None
    """How many to use, the first ones; all by default."""
    platform: Literal["gpu", "cpu"] = "gpu"
    out: Path = Path("runs/scaling.json")
    """Where the result goes."""

    def __post_init__(self) -> None:
        for name in ("batch", "heads", "head_dim", "local_blocks", "vert_stride", "rounds"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value!r} must be positive")
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths={self.lengths!r} must be one or more positive numbers")
        if not self.pairs():
            raise ValueError(f"splits={self.splits!r} and ways={self.ways!r} leave nothing to run")

    def recorded(self) -> dict[str, Any]:
        """What the result says of them."""
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k != "out"}
        return fields | {"dtype": "bfloat16"}

    @property
    def pattern(self) -> s2_jax.Pattern:
        return s2_jax.local_stride(self.local_blocks, self.vert_stride)

    def pairs(self) -> list[tuple[Split, Way]]:
        every = itertools.product(self.splits, self.ways)
        return [(split, way) for split, way in every if (split, way) != ("heads", "pmap")]


def find_devices(settings: Settings) -> list[jax.Device]:
    """Those to share the work.

    Raises:
      ValueError: there are fewer than two, or they do not divide the work.
    """
    try:
        found = jax.local_devices(backend=settings.platform)
    except RuntimeError:  # no such backend
        found = []
    wanted = len(found) if settings.devices is None else settings.devices
    if wanted < 2 or len(found) < wanted:
        raise ValueError(
            f"two devices or more are needed to compare with one: JAX sees {len(found)} of "
            f"platform {settings.platform!r}, and {settings.devices=}"
        )
    for name in settings.splits:
        if (size := settings.batch if name == "batch" else settings.heads) % wanted:
            raise ValueError(f"{name}={size} must be a multiple of the {wanted} devices")
    return list(found[:wanted])


def _train(settings: Settings, head_axis: str | None = None) -> Callable[..., Any]:
    attention = functools.partial(
        s2_jax.s2_attention, pattern=settings.pattern, head_axis=head_axis,
        implementation=settings.implementation,
    )  # fmt: skip

    def train(query: jax.Array, key: jax.Array, value: jax.Array, grad_out: jax.Array) -> Any:
        return jax.vjp(attention, query, key, value)[1](grad_out)

    return train


def _draw(settings: Settings, length: int) -> list[jax.Array]:
    """Query, key, value and the output's gradient: standard normal."""
    shape = (settings.batch, length, settings.heads, settings.head_dim)
    return [jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(4)]


def _shared(
    settings: Settings,
    split: Split,
    way: Way,
    inputs: Sequence[jax.Array],
    devices: list[jax.Device],
) -> Call:
    """Queues one call on all devices, where its inputs lie already."""
    if way == "pmap":
        parts = [x.reshape(len(devices), -1, *x.shape[1:]) for x in inputs]
        placed = jax.pmap(lambda *arrays: arrays, devices=devices)(*parts)
        mapped = jax.pmap(_train(settings), devices=devices)
        return lambda: mapped(*placed)
    kind = AxisType.Explicit if way == "jit-explicit" else AxisType.Auto
    mesh = jax.make_mesh((len(devices),), ("x",), axis_types=(kind,), devices=devices)
    spec = SPECS[split]
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x in inputs]
    if way == "shard_map":
        by_hand = _train(settings, "x" if split == "heads" else None)
        # Pallas' interpreter cannot run under check_vma.
        check_vma = settings.implementation != "interpret"
        program = jax.jit(
            jax.shard_map(by_hand, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma)
        )
        return lambda: program(*placed)
    program = jax.jit(_train(settings))

    def call() -> Any:
        with jax.set_mesh(mesh) if way == "jit-explicit" else contextlib.nullcontext():
            return program(*placed)

    return call


def _seconds(call: Call, count: int) -> float:
    """Of one call, among `count` that are waited for together."""
    start = time.perf_counter()
    for _ in range(count):
        results = call()
    jax.block_until_ready(results)
    return (time.perf_counter() - start) / count


def compare(settings: Settings, one: Call, many: Call) -> dict[str, Any]:
    """Milliseconds of both, and the ratio with that of its rounds which are furthest off.

    Raises:
      FloatingPointError: results are not finite.
    """
    counts = []
    for call in (one, many):
        if not all(bool(jnp.isfinite(x).all()) for x in jax.block_until_ready(call())):
            raise FloatingPointError("results are not finite")
        counts.append(max(1, math.ceil(settings.round_seconds / _seconds(call, 3))))
    rounds = [(_seconds(one, counts[0]), _seconds(many, counts[1])) for _ in range(settings.rounds)]
    ratios = sorted(a / b for a, b in rounds)
    one_ms, many_ms = (1e3 * statistics.median(times) for times in zip(*rounds))
    return {
        "one_ms": one_ms,
        "many_ms": many_ms,
        "ratio": one_ms / many_ms,
        "ratio_low": ratios[0],
        "ratio_high": ratios[-1],
        "rounds_ms": [[1e3 * a, 1e3 * b] for a, b in rounds],
    }


def run(settings: Settings, devices: list[jax.Device]) -> dict[str, Any]:
    """Measures everything; the file holds what is done so far."""
    result: dict[str, Any] = {
        "gpu": report.find_gpu() if settings.platform == "gpu" else None,
        "devices": len(devices),
        "device_kind": devices[0].device_kind,
        "versions": report.versions(),
        "commit": report.commit(),
        "settings": settings.recorded(),
        "rows": [],
    }
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    for length in settings.lengths:
        flops = settings.batch * sum(
            settings.pattern.flops(
                settings.heads, length, length, head_dim=settings.head_dim, backward=backward
            )
            for backward in (False, True)
        )
        with jax.default_device(devices[0]):
            inputs = jax.block_until_ready(_draw(settings, length))
        one = functools.partial(jax.jit(_train(settings)), *inputs)
        for split, way in settings.pairs():
            many = _shared(settings, split, way, inputs, devices)
            row: dict[str, Any] = {"length": length, "split": split, "way": way}
            row |= compare(settings, one, many)
            del many  # and with it its share of the inputs
            row["tflops"] = flops / row["many_ms"] / 1e9
            result["rows"].append(row)
            settings.out.write_text(json.dumps(result, indent=1) + "\n")
            print(f"{length} {split} {way}: {row['ratio']:.2f}x", flush=True)
    return result


def table(result: dict[str, Any]) -> str:
    """A line for each length, split and way."""
    n = result["devices"]
    lines = [["tokens", "split", "way", "1 ms", f"{n} ms", "ratio", "rounds", "TFLOP/s"]]
    for row in result["rows"]:
        numbers = (f"{row['one_ms']:.2f}", f"{row['many_ms']:.2f}", f"{row['ratio']:.3f}x")
        spread = f"{row['ratio_low']:.3f}-{row['ratio_high']:.3f}"
        names = (str(row["length"]), row["split"], row["way"])
        lines.append([*names, *numbers, spread, f"{row['tflops']:.0f}"])
    text, kind = report.lined_up(lines), result["device_kind"]
    return f"{text}\n{n} x {kind} against 1; TFLOP/s of visited blocks, all devices together"


def main(arguments: Sequence[str] | None = None) -> None:
    settings = tyro.cli(Settings, prog="python -m benchmarks.scaling", args=arguments)
    try:
        devices = find_devices(settings)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(table(run(settings, devices)))


if __name__ == "__main__":
    main()
