"""What a training run is: frozen settings that check themselves."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from models.config import ModelConfig
from models.presets import PRESETS
from models.sampling import Sampling
from models.tokenizer import NUM_BYTES
from train.shards import is_prepared


def _check_positive(config: Any, *names: str) -> None:
    for name in names:
        if not (value := getattr(config, name)) > 0:
            raise ValueError(f"{name}={value!r} must be positive")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices there are along each axis of the mesh, for `jit`."""

    data: int = 1
    """Each holds all parameters and a share of the batch."""
    fsdp: int = 1
    """Each holds a share of the parameters and of the batch."""
    tensor: int = 1
    """Each holds a share of the heads and of the MLPs' hidden features."""

    def __post_init__(self) -> None:
        _check_positive(self, "data", "fsdp", "tensor")

    @property
    def size(self) -> int:
        return self.data * self.fsdp * self.tensor


@dataclasses.dataclass(frozen=True)
class ProcessConfig:
    """One run over several processes, on one host or several; every process gets the same batch
    settings, and all devices together make the mesh."""

    coordinator: str | None = None
    """HOST:PORT of the first process; None for a run of one process."""
    count: int = 1
    """Processes."""
    index: int = 0
    """Of this process, from 0."""

    def __post_init__(self) -> None:
        _check_positive(self, "count")
        if not 0 <= self.index < self.count:
            raise ValueError(f"index={self.index!r} must be from 0 to below count={self.count}")
        if (self.coordinator is None) != (self.count == 1):
            raise ValueError(
                f"coordinator={self.coordinator!r} and count={self.count} contradict each other: "
                "several processes need a coordinator, and one has none"
            )
        host, _, port = (self.coordinator or "localhost:1").rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"coordinator={self.coordinator!r} must be HOST:PORT")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with clipped gradients; the rate warms up linearly, stays, and falls."""

    learning_rate: float = 3e-3
    """The rate at its peak."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After warming up the rate falls as a cosine; or it stays, and falls linearly at the end."""
    decay: float = 0.2
    """Share of the steps in which "wsd" falls."""
    warmup: float = 0.05
    """Share of the steps that warm up."""
    final: float = 0.1
    """The last rate, as a share of the peak."""
    weight_decay: float = 0.1
    """Of all matrices; the norms' scales do not decay."""
    clip: float = 1.0
    """Largest global norm of a gradient."""
    b1: float = 0.9
    """Decay of the gradients' first moment."""
    b2: float = 0.95
    """Decay of the gradients' second moment."""

    def __post_init__(self) -> None:
        _check_positive(self, "learning_rate", "clip")
        for name in ("warmup", "final", "decay"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"{name}={value!r} must be a share, from 0 to 1")
        for name in ("b1", "b2"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value!r} must be from 0 to below 1")
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(
                f"warmup={self.warmup!r} and decay={self.decay!r} must not be more than all steps"
            )
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay={self.weight_decay!r} must be 0 or more")


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """How often a run reports and saves, in steps, and what it shows."""

    log_every: int = 10
    """Write metrics and show progress."""
    eval_every: int = 100
    """Evaluate on the validation files; the last step always does."""
    eval_batches: int = 16
    """Batches of an evaluation, spread evenly over the validation files."""
    checkpoint_every: int = 100
    """Save a checkpoint; the last step always does."""
    keep: int = 3
    """Checkpoints that are kept, the last ones."""
    sample_bytes: int = 400
    """Tokens of the text generated at the end."""
    temperature: float = 0.8
    """Of that text; 0 takes the likeliest byte every time."""

    profile: bool = False
    """Trace three steps with JAX's profiler, for TensorBoard or Perfetto."""

    def __post_init__(self) -> None:
        _check_positive(
            self,
            "log_every",
            "eval_every",
            "eval_batches",
            "checkpoint_every",
            "keep",
            "sample_bytes",
        )
        _ = Sampling(temperature=self.temperature)  # checks it


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Train a decoder-only transformer with dense and S2 layers on text."""

    data: Path | None = None
    """Folder of text files, or of shards from train.prepare; Python's own library if left out."""
    out: Path | None = None
    """Run folder, which must be new; a folder under runs/ named by the time if left out."""
    resume: bool = False
    """Continue the run in --out from its last checkpoint, with the settings it was started with."""
    parallel: Literal["jit", "pmap"] = "jit"
    """By jit on the devices of the mesh, or by pmap on all local ones, which share the batch."""
    mesh: MeshConfig = MeshConfig()
    """Devices by axis, for jit; one by default."""
    processes: ProcessConfig = ProcessConfig()
    """Processes, for runs over several hosts."""
    steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 16
    """Rows per step, over all devices."""
    accumulate: int = 1
    """Parts of the batch that a step computes one after the other, to save memory."""
    seq_len: int = 512
    """Tokens per row that are predicted; bytes, unless the data is prepared."""
    packing: Literal["packed", "whole"] = "packed"
    """Rows of prepared data: documents packed together, or cut from documents that fill a row."""
    align: int = 1
    """In packed rows, documents begin at multiples of so many tokens, as of the block size."""
    seed: int = 0
    """Of the parameters, the order of the data and the sample."""
    model: ModelConfig = PRESETS["demo"]
    """The model."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimiser."""
    report: ReportConfig = ReportConfig()
    """Reports and checkpoints."""

    def __post_init__(self) -> None:
        _check_positive(self, "steps", "batch_size", "accumulate", "seq_len", "align")
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed={self.seed!r} must be from 0 to below 2**32")
        if self.model.vocab_size != NUM_BYTES and not is_prepared(self.data):
            raise ValueError(
                f"vocab_size={self.model.vocab_size!r} must be 256, as tokens are bytes: "
                f"data={str(self.data)!r} holds no shards.json of train.prepare"
            )
        if self.resume and self.out is None:
            raise ValueError("resume=True needs out, the run folder to continue")
        if self.processes.count > 1 and self.out is None:
            raise ValueError("several processes need out, the run folder that they share")

    def to_json(self) -> str:
        """The settings that make the run what it is: not its folder, nor who takes part."""
        settings = dataclasses.asdict(self)
        del settings["out"], settings["resume"], settings["processes"]
        if self.data is not None:
            settings["data"] = str(self.data.resolve())
        return json.dumps(settings, indent=2) + "\n"


def differing_fields(a: str, b: str) -> list[str]:
    """What two `to_json` texts disagree on: `"steps: 100 != 200"`, nested names dotted."""
    left, right = dict(_flatten(json.loads(a))), dict(_flatten(json.loads(b)))
    return [
        f"{name}: {left.get(name)!r} != {right.get(name)!r}"
        for name in sorted(left.keys() | right.keys())
        if left.get(name) != right.get(name)
    ]


def _flatten(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
