"""Trains one small hybrid twice from one seed, by kernels and by reference, and compares losses.

    python -m benchmarks.training --out training.json

Needs an NVIDIA GPU; the data is the source of Python's own standard library.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Literal

import jax
import numpy as np
import tyro

from models import HybridConfig, ModelConfig
from train.batches import load_batches
from train.config import TrainConfig
from train.parallel import make_program
from train.step import make_optimizer


@dataclasses.dataclass(frozen=True)
class Options:
    """A model of four layers, the first dense, in bfloat16 over float32 parameters."""

    steps: int = 50
    seq_len: int = 2048
    batch_size: int = 8
    out: pathlib.Path | None = None


def losses(options: Options, implementation: Literal["triton", "reference"]) -> np.ndarray:
    """The training loss of each step, nats per byte."""
    config = TrainConfig(
        steps=options.steps,
        seq_len=options.seq_len,
        batch_size=options.batch_size,
        model=ModelConfig(
            num_layers=4,
            width=256,
            num_heads=8,
            num_kv_heads=4,
            mlp_width=768,
            dtype="bfloat16",
            implementation=implementation,
            attention=HybridConfig(dense_first=1, block_size=64, local_blocks=4, vert_stride=4),
        ),
    )
    optimizer = make_optimizer(config.optimizer, config.steps)
    program = make_program(config, optimizer)
    state = program.init(config.seed)
    rows, out = load_batches(config).train, []
    for _ in range(config.steps):
        state, metrics = program.train_step(state, next(rows))
        out.append(metrics.loss)
    return np.asarray(jax.device_get(out))


def compare(options: Options) -> dict[str, float]:
    """First and last loss, and the largest difference between the two runs."""
    kernels, reference = losses(options, "triton"), losses(options, "reference")
    return {
        "first": float(reference[0]),
        "last": float(reference[-1]),
        "last_by_kernels": float(kernels[-1]),
        "largest_difference": float(np.abs(kernels - reference).max()),
        "largest_relative_difference": float(np.abs(kernels / reference - 1).max()),
    }


def main(options: Options) -> None:
    result = compare(options)
    device = jax.devices()[0].device_kind
    for name, number in result.items():
        print(f"{name:30s} {number:.5f}")
    if options.out is not None:
        settings = {"device": device, "jax": jax.__version__, "steps": options.steps}
        options.out.write_text(json.dumps(settings | result, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
