"""The run from its settings to its report. It orchestrates; the step computes."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from train.batches import Batches, load_batches
from train.board import Board
from train.checkpoint import Checkpoints
from train.config import ReportConfig, TrainConfig
from train.folder import RunFolder, check_apart, check_folder
from train.metrics import MetricsFile, Record
from train.parallel import Program, check_devices, make_program
from train.progress import Clock, Progress
from train.report import Report, describe, introduce, write_report
from train.shards import is_prepared
from train.step import TrainState, learning_rate_schedule, make_optimizer
from train.stop import Stopped, StopSignal
from train.validation import bits_per_byte


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that is known to be possible: its settings, its files and its data."""

    config: TrainConfig
    folder: RunFolder
    data: Batches


def prepare(config: TrainConfig) -> Run:
    """Checks everything that can be checked before anything is compiled or written.

    Raises:
        ValueError: settings, run folder or data do not allow the run.
    """
    check_devices(config)
    if config.model.implementation in ("triton", "jax_triton") and jax.default_backend() != "gpu":
        raise ValueError(
            f"implementation={config.model.implementation!r} needs an NVIDIA GPU; JAX sees "
            f"{jax.default_backend()}"
        )
    folder = check_folder(config)
    if config.data is not None and not is_prepared(config.data):
        check_apart(folder.root, config.data, f"data={str(config.data)!r}")
    data = load_batches(config)
    if config.resume:
        with Checkpoints(folder.checkpoints) as checkpoints:
            checkpoints.check_data(data.fingerprint)
    return Run(config, folder, data)


def train(run: Run, console: Console) -> Report | None:
    """Trains, or goes on from the last checkpoint that is whole.

    Of several processes the first one writes all but the checkpoints, and has the report.

    Raises:
        FloatingPointError: a loss or a gradient is not finite; the checkpoints before it stay.
        Stopped: SIGTERM came; the last step has been saved.
    """
    config, data = run.config, run.data
    program = make_program(config, make_optimizer(config.optimizer, config.steps))
    introduce(config, data, program.like, run.folder, console)
    first = jax.process_index() == 0
    if first and not config.resume:
        run.folder.create(config, data.tokenizer)
    with Checkpoints(run.folder.checkpoints, config.report.keep) as checkpoints:
        if config.resume:
            restored, position = checkpoints.restore(
                program.like, lambda line: console.print(line, highlight=False, markup=False)
            )
            state = program.place(restored)
            data.train.set_state(position)
            console.print(f"resumed after step {int(restored.step)}", highlight=False)
            start = int(restored.step)
        else:
            state, start = program.init(config.seed), 0
        state = _take_steps(run, program, state, start, checkpoints, console)
    if not first:
        return None
    report = write_report(config, program.graphdef, state, data, run.folder)
    report.show(console)
    return report


def _take_steps(
    run: Run,
    program: Program,
    state: TrainState,
    start: int,
    checkpoints: Checkpoints,
    console: Console,
) -> TrainState:
    """Takes the steps that are left; returns the last state, on the host."""
    config, data, steps = run.config, run.data, run.config.steps
    first = jax.process_index() == 0
    metrics_file = MetricsFile(run.folder.metrics, writes=first)
    metrics_file.keep_until(start)
    schedule = learning_rate_schedule(config.optimizer, steps)
    rates = np.asarray(schedule(jnp.arange(steps)))
    clock = Clock(config.batch_size * config.seq_len)
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(console, start=start, steps=steps))
        stop = stack.enter_context(StopSignal())
        board = stack.enter_context(_board(run, start)) if first else None
        trace = stack.enter_context(_Trace(run.folder, config.report.profile and first, start))
        for step in range(start + 1, steps + 1):
            trace.before(step)
            state, metrics = program.train_step(state, next(data.train))
            rate = float(rates[step - 1])
            metrics_file.add({"step": step, **metrics._asdict(), "learning_rate": rate})
            due = _due(config.report, step, last=steps)
            if not due and not stop.received and step > start + 1:
                continue
            records = metrics_file.flush()  # waits for the step
            _check_finite(records, checkpoints.last)
            clock.lap(step)
            if board is not None:
                board.add(records)
                board.add_speed(step, clock.speed)
            if "log" in due:
                progress.update(
                    step, records[-1]["loss"] / data.bytes_per_token, clock.speed, clock.left(steps)
                )
            if "eval" in due:
                bits = bits_per_byte(program, state.params, data)
                metrics_file.add({"step": step, "validation": bits})
                records = metrics_file.flush()
                if board is not None:
                    board.add(records)
                progress.note(f"step {step}/{steps}  validation {describe(bits, data.entropies)}")
            stopping = stop.received and step < steps  # what comes later ends the next step
            if stopping or "checkpoint" in due:
                checkpoints.save(program.portable(state), data.train.get_state(), data.fingerprint)
            if stopping:
                raise Stopped(f"stopped by SIGTERM after step {step}")
            clock.skip()
    return program.collect(state)


def _board(run: Run, start: int) -> Board:
    config = run.config
    devices = jax.local_device_count() if config.parallel == "pmap" else config.mesh.size
    return Board(run.folder.tensorboard, config, start, devices)


class _Trace:
    """JAX's profiler over a few steps, past those that compile; a context manager."""

    def __init__(self, folder: RunFolder, wanted: bool, start: int) -> None:
        self._folder, self._first = folder.profile, start + 4 if wanted else None
        self._running = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:
            jax.profiler.stop_trace()

    def before(self, step: int) -> None:
        if step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif self._running and self._first is not None and step == self._first + 3:
            jax.profiler.stop_trace()
            self._running = False


def _check_finite(records: list[Record], saved: int | None) -> None:
    for record in records:
        for name in ("loss", "grad_norm"):
            if not math.isfinite(value := record[name]):
                kept = "no checkpoint was written" if saved is None else f"step {saved} is saved"
                raise FloatingPointError(
                    f"{name}={value} at step={record['step']}, {kept}: lower the learning rate"
                )


def _due(report: ReportConfig, step: int, *, last: int) -> set[str]:
    every = {
        "log": report.log_every,
        "eval": report.eval_every,
        "checkpoint": report.checkpoint_every,
    }
    return {name for name, steps in every.items() if step % steps == 0 or step == last}
