"""The run from its settings to its report. It orchestrates; the step computes."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from train.checkpoint import Checkpoints
from train.config import ReportConfig, TrainConfig
from train.data import Data, load_data
from train.evaluate import bits_per_byte
from train.folder import RunFolder, check_folder
from train.metrics import MetricsFile, Record
from train.parallel import Program, check_devices, make_program
from train.progress import Clock, Progress
from train.report import Report, introduce, write_report
from train.step import TrainState, learning_rate_schedule, make_optimizer
from train.stop import Stopped, StopSignal


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that is known to be possible: its settings, its files and its data."""

    config: TrainConfig
    folder: RunFolder
    data: Data


def prepare(config: TrainConfig) -> Run:
    """Checks everything that can be checked before anything is compiled or written.

    Raises:
        ValueError: settings, run folder or data do not allow the run.
    """
    check_devices(config)
    folder = check_folder(config)
    data = load_data(config)
    if config.resume:
        with Checkpoints(folder.checkpoints) as checkpoints:
            checkpoints.check_data(data.corpus.fingerprint)
    return Run(config, folder, data)


def train(run: Run, console: Console) -> Report:
    """Trains, or goes on from the last checkpoint that is whole.

    Raises:
        FloatingPointError: a loss or a gradient is not finite; the checkpoints before it stay.
        Stopped: SIGTERM came; the last step has been saved.
    """
    config, data = run.config, run.data
    program = make_program(config, make_optimizer(config.optimizer, config.steps))
    introduce(config, data, program.like, run.folder, console)
    if not config.resume:
        run.folder.create(config)
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
    metrics_file = MetricsFile(run.folder.metrics)
    metrics_file.keep_until(start)
    schedule = learning_rate_schedule(config.optimizer, steps)
    rates = np.asarray(schedule(jnp.arange(steps)))
    clock = Clock(config.batch_size * config.seq_len)
    with Progress(console, start=start, steps=steps) as progress, StopSignal() as stop:
        for step in range(start + 1, steps + 1):
            state, metrics = program.train_step(state, next(data.train))
            rate = float(rates[step - 1])
            metrics_file.add({"step": step, **metrics._asdict(), "learning_rate": rate})
            due = _due(config.report, step, last=steps)
            if stop.received:
                due = due | {"checkpoint"}
            if not due and step > start + 1:
                continue
            records = metrics_file.flush()  # waits for the step
            _check_finite(records, checkpoints.last)
            clock.lap(step)
            if "log" in due:
                progress.update(step, records[-1]["loss"], clock.speed, clock.left(steps))
            if "eval" in due:
                bits = bits_per_byte(program, state.params, data.validation)
                metrics_file.add({"step": step, "validation": bits})
                metrics_file.flush()
                progress.note(f"step {step}/{steps}  validation {data.entropies.compare(bits)}")
            if "checkpoint" in due:
                checkpoints.save(program.portable(state), data.position(), data.corpus.fingerprint)
            if stop.received and step < steps:
                raise Stopped(f"stopped by SIGTERM after step {step}")
            clock.skip()
    return program.collect(state)


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
