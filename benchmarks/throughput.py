"""`python -m benchmarks.throughput`: training steps of models that differ in attention alone.

One step of `train.step` under `jit` on one device, on random tokens: tokens a second, the share of
the device's operations that they are (as in training, on visible blocks), and memory. For every
preset and length the models are compiled side by side, then run one after the other.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.attention_worker import first_line
from benchmarks.jax_timing import calls, in_turn
from benchmarks.programs import Lower, Program, compile_all, peak_memory
from benchmarks.random_arrays import draw_parameters
from benchmarks.record import Record, read_settings
from benchmarks.report import number
from benchmarks.throughput_table import table
from benchmarks.timing import summary
from models.config import HybridConfig, ModelConfig, Remat
from models.presets import PRESETS
from train.config import OptimizerConfig
from train.step import abstract_state, make_optimizer, train_step
from train.throughput import attention_flops, matmul_flops, peak_flops

Attention = Literal["dense", "hybrid", "s2"]
_LONG = 131072
_STEPS = 1000  # of the schedule of the learning rate


@dataclasses.dataclass(frozen=True)
class Settings:
    """A preset's shape with other attention: local_stride(local_blocks, vert_stride)."""

    presets: tuple[str, ...] = ("125m", "350m", "1.3b")
    lengths: tuple[int, ...] = (8192, 32768, 131072)
    """Tokens of a row."""
    models: tuple[Attention, ...] = ("dense", "hybrid", "s2")
    tokens: int = 32768
    """Of a step, at least: a batch has as many rows as that takes."""
    vocab_size: int = 32000
    local_blocks: int = 8
    vert_stride: int = 16
    block_size: int = 64
    dense_first: int = 2
    """Dense layers of the hybrid."""
    dense_implementation: Literal["cudnn", "kernels"] = "cudnn"
    """How dense layers attend."""
    implementation: Literal["triton", "jax_triton", "interpret", "reference"] | None = None
    """How all else attends."""
    remat: Literal["auto", "none", "attention", "full"] = "auto"
    """What is recomputed; auto: what the preset says, but "attention" from 131072 tokens on."""
    scan_layers: bool = False
    """Compile layers that repeat once."""
    rounds: int = 4
    cell_s: float = 20
    """Seconds after which a cell gets no further round, but two."""
    budget_s: float = 540
    """Seconds after which no further cell is begun."""
    platform: Literal["gpu", "cpu"] = "gpu"
    out: Path = Path("runs/throughput.json")
    """Where the result goes."""

    def __post_init__(self) -> None:
        for name in ("presets", "lengths", "models"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one")
        for preset in self.presets:
            if preset not in PRESETS:
                raise ValueError(f"presets has {preset!r}, must be of {', '.join(PRESETS)}")
        if min(self.lengths) < 1:
            raise ValueError(f"lengths={self.lengths!r} must be positive")
        for name in ("tokens", "rounds"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value!r} must be positive")
        for model in self.models:
            _ = self.config(self.presets[0], self.lengths[0], model)  # it checks the rest

    def config(self, preset: str, length: int, attention: Attention) -> ModelConfig:
        hybrid = HybridConfig(
            kind="dense" if attention == "dense" else "s2",
            dense_first=self.dense_first if attention == "hybrid" else 0,
            block_size=self.block_size,
            local_blocks=self.local_blocks,
            vert_stride=self.vert_stride,
        )
        own: Remat = "attention" if length >= _LONG else PRESETS[preset].remat
        return dataclasses.replace(
            PRESETS[preset],
            vocab_size=self.vocab_size,
            dtype="bfloat16",
            implementation=self.implementation,
            dense_implementation="cudnn" if self.dense_implementation == "cudnn" else None,
            remat=own if self.remat == "auto" else self.remat,
            scan_layers=self.scan_layers,
            attention=hybrid,
        )


class Training(NamedTuple):
    """A model's step on batches of one shape."""

    config: ModelConfig
    batch: int
    length: int

    @property
    def _optimizer(self) -> Any:
        return make_optimizer(OptimizerConfig(), _STEPS)

    def lower(self) -> Any:
        graphdef, state = abstract_state(self.config, self._optimizer)
        step = partial(train_step, graphdef=graphdef, optimizer=self._optimizer)
        batch = {"tokens": jax.ShapeDtypeStruct((self.batch, self.length + 1), jnp.int32)}
        return jax.jit(step, donate_argnums=0).lower(state, batch)

    def measure(self, program: Program | str, how: Settings) -> dict[str, Any]:
        """ms: of a step. mfu: of the device's bfloat16 operations, where those are known."""
        config = self.config
        row: dict[str, Any] = {"batch": self.batch, "length": self.length, "remat": config.remat}
        row |= {"tokens_s": None, "mfu": None, "tflops": None, "peak_bytes": None}
        if not isinstance(program, Program):
            return row | summary([]) | {"error": program}
        before = peak_memory()
        try:
            run = calls(self._call(program))
            times = in_turn({0: run}, how.rounds, limit_s=how.cell_s, profile=True)[0]
        except Exception as failure:  # out of memory, say: the others go on
            times = summary([]) | {"error": first_line(failure)}
        row |= times | program.facts
        if before != (after := peak_memory()):
            row["peak_bytes"] = after
        if row["ms"]:
            row["tokens_s"] = 1e3 * self.batch * self.length / row["ms"]
            flops = matmul_flops(config) + attention_flops(config, self.length)
            row["tflops"] = flops * row["tokens_s"] / 1e12
            peak = peak_flops(jax.devices()[0])
            row["mfu"] = peak and row["tflops"] * 1e12 / peak
        return row

    def _call(self, program: Program) -> Any:
        """Queues a step, which goes on with the state that the last one left."""
        _, like = abstract_state(self.config, self._optimizer)
        params = draw_parameters(like.params)  # first: what drawing needs leaves gaps in memory
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like._replace(params=None))
        state = [zeros._replace(params=params)]
        del params, zeros
        shape = (self.batch, self.length + 1)
        tokens = jax.random.randint(jax.random.key(0), shape, 0, self.config.vocab_size, jnp.int32)

        def step() -> Any:
            state[0], metrics = program.run(state[0], {"tokens": tokens})
            return metrics

        if not bool(jnp.isfinite(step().loss)):
            raise FloatingPointError("a loss that is not finite")
        return step


def run(settings: Settings) -> Record:
    """Measures everything; the file is complete up to the last cell."""
    record = Record(settings, time.perf_counter(), ("preset", "batch", "length"))
    for preset in settings.presets:
        for length in settings.lengths:
            batch = max(1, -(-settings.tokens // length))
            if record.spent(f"{preset} {batch} x {length}"):
                continue
            cells = {
                name: Training(settings.config(preset, length, name), batch, length)
                for name in settings.models
            }
            jobs: dict[Attention, Lower] = {name: cell.lower for name, cell in cells.items()}
            programs = compile_all(jobs)
            for name, cell in cells.items():
                what = f"{preset} {name} {batch} x {length}"
                if record.spent(what):
                    continue
                row: dict[str, Any] = {"preset": preset, "model": name}
                row |= cell.measure(programs.pop(name), settings)
                figures = f"{number(row['ms'])} ms, {number(row['tokens_s'])} tokens/s"
                record.add(row, f"{what}: {row['error'] or figures}")
                gc.collect()
    return record


def main(arguments: Sequence[str] | None = None) -> None:
    record = run(read_settings(Settings, "python -m benchmarks.throughput", arguments))
    print("\n".join([table(record.data), *record.closing()]))


if __name__ == "__main__":
    main()
