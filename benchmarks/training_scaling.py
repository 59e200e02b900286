"""`python -m benchmarks.training_scaling`: training steps on one GPU and on all GPUs of the host.

Strong scaling: the same batch, its rows or the model's parameters and heads shared out by
`train.parallel`, as `python -m train` does it. The ratio says how many times as fast all GPUs
together are as the first one. First come some steps on random tokens, whose losses are compared.
Needs two NVIDIA GPUs; `--platform cpu` runs the same on what JAX simulates with
XLA_FLAGS=--xla_force_host_platform_device_count=2, whose times mean nothing.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from benchmarks.random_arrays import draw_parameters
from benchmarks.record import Record, read_settings
from models.config import HybridConfig
from models.presets import PRESETS
from train.config import MeshConfig, TrainConfig
from train.parallel import check_devices, make_program
from train.step import TrainState, abstract_state, make_optimizer

Way = Literal["data", "fsdp", "tensor", "pmap"]
Steps = Callable[[int], list[float]]
"""Makes that many steps more and gives their losses."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """A preset's shape with local_stride(local_blocks, vert_stride), and rows of a step."""

    preset: str = "350m"
    layers: int | None = None
    """Of the preset's shape; by default as many as it has."""
    length: int = 8192
    batch: int = 4
    local_blocks: int = 8
    vert_stride: int = 16
    block_size: int = 64
    ways: tuple[Way, ...] = ("data", "fsdp", "tensor", "pmap")
    losses: int = 20
    """Steps whose losses are compared, before anything is timed."""
    steps: int = 5
    """Of a round."""
    rounds: int = 3
    """Of one GPU and of all, in turn; medians count."""
    scan_layers: bool = True
    """Layers that repeat in one loop: compiled once, but one layer's exchanges then cannot hide
    behind the next one's products."""
    budget_s: float = 300
    """Seconds after which no further way is begun."""
    platform: Literal["gpu", "cpu"] = "gpu"
    out: Path = Path("runs/training-scaling.json")
    """Where the result goes."""

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset={self.preset!r} must be one of {', '.join(PRESETS)}")
        for name in ("layers", "length", "batch", "losses", "steps", "rounds"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value!r} must be positive")
        if not self.ways or len(set(self.ways)) < len(self.ways):
            raise ValueError(f"ways={self.ways!r} must name at least one, each once")
        _ = self.config()  # the model checks the rest

    def config(self, **shared: Any) -> TrainConfig:
        """bfloat16 on bytes; attention is kept and all else recomputed, so that several fit."""
        hybrid = HybridConfig(
            block_size=self.block_size, local_blocks=self.local_blocks,
            vert_stride=self.vert_stride,
        )  # fmt: skip
        preset = PRESETS[self.preset]
        model = dataclasses.replace(
            preset, num_layers=self.layers or preset.num_layers, vocab_size=256, dtype="bfloat16",
            remat="attention", scan_layers=self.scan_layers, attention=hybrid,
        )  # fmt: skip
        return TrainConfig(
            steps=1000, batch_size=self.batch, seq_len=self.length, model=model, **shared
        )

    def shared(self, way: Way) -> TrainConfig:
        if way == "pmap":
            return self.config(parallel="pmap")
        return self.config(mesh=MeshConfig(**{way: jax.device_count()}))


def first_state(config: TrainConfig) -> TrainState:
    """On the host; drawn array by array, which compiles faster than the model's own way."""
    _, like = abstract_state(config.model, make_optimizer(config.optimizer, config.steps))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like._replace(params=None))
    return zeros._replace(params=jax.device_get(draw_parameters(like.params)))


def stepper(config: TrainConfig, first: TrainState) -> Steps:
    """Goes on from the state that the last call left, on rows that are the same for every config.

    Raises:
      ValueError: the devices do not divide the rows or the model. FloatingPointError, by what it
        returns: a loss is not finite.
    """
    check_devices(config)
    program = make_program(config, make_optimizer(config.optimizer, config.steps))
    state, rng = [program.place(first)], np.random.default_rng(0)
    shape = (config.batch_size, config.seq_len + 1)

    def steps(count: int) -> list[float]:
        losses = []
        for _ in range(count):
            tokens = rng.integers(0, config.model.vocab_size, shape, np.int32)
            state[0], metrics = program.train_step(state[0], {"tokens": tokens})
            losses.append(metrics.loss)
        found = [float(loss) for loss in losses]
        if not np.isfinite(found).all():
            raise FloatingPointError(f"losses that are not finite: {found}")
        return found

    return steps


def run(settings: Settings) -> Record:
    """Measures every way; the file is complete up to the last one.

    Raises:
      ValueError: there is one device alone.
    """
    record = Record(settings, time.perf_counter())
    if (devices := jax.device_count()) < 2:
        raise ValueError(f"two devices or more are needed to compare with one: JAX sees {devices}")
    record.data["devices"] = devices
    first = first_state(settings.config())
    one = stepper(settings.config(), first)
    alone = one(settings.losses)
    print(
        f"[{record.write():.0f} s] one device: loss {alone[0]:.4f} to {alone[-1]:.4f}", flush=True
    )
    for way in settings.ways:
        if record.spent(way):
            continue
        try:
            many = stepper(settings.shared(way), first)
            losses = many(settings.losses)
            times = [[_seconds(steps, settings.steps) for steps in (one, many)]
                     for _ in range(settings.rounds)]  # fmt: skip
        except Exception as failure:  # out of memory, say: the others go on
            record.fail(way, failure)
            continue
        one_ms, many_ms = (1e3 * statistics.median(column) for column in zip(*times))
        row = {
            "way": way,
            "one_ms": one_ms,
            "many_ms": many_ms,
            "ratio": one_ms / many_ms,
            "ratio_low": min(a / b for a, b in times),
            "ratio_high": max(a / b for a, b in times),
            "loss_difference": max(abs(a - b) / abs(a) for a, b in zip(alone, losses)),
            "losses": [alone[0], alone[-1], losses[0], losses[-1]],
        }
        record.add(row, line(row))
        del many
    return record


def _seconds(steps: Steps, count: int) -> float:
    """Of one step, after another one: GPUs that waited for their turn have slowed down."""
    steps(1)
    start = time.perf_counter()
    steps(count)
    return (time.perf_counter() - start) / count


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['way']:<7} one {row['one_ms']:.1f} ms, all {row['many_ms']:.1f} ms: "
        f"{row['ratio']:.2f}x ({row['ratio_low']:.2f}-{row['ratio_high']:.2f}), losses of "
        f"the first steps differ by {row['loss_difference']:.1e} of themselves"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    record = run(read_settings(Settings, "python -m benchmarks.training_scaling", arguments))
    print("\n".join([*map(line, record.data["rows"]), *record.closing()]))


if __name__ == "__main__":
    main()
