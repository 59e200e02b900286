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
from train.metrics import MetricsFile
from train.parallel import Program, check_devices, make_program
from train.progress import Clock, Progress
from train.report import Report, introduce, write_report
from train.step import TrainState, init_state, learning_rate_schedule, make_optimizer


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
    check_devices(config.parallel, config.batch_size)
    folder = check_folder(config)
    data = load_data(config)
    if config.resume:
        with Checkpoints(folder.checkpoints) as checkpoints:
            checkpoints.check_data(data.corpus.fingerprint)
    return Run(config, folder, data)


def train(run: Run, console: Console) -> Report:
    """Trains, or goes on from the last checkpoint."""
    config, data = run.config, run.data
    optimizer = make_optimizer(config.optimizer, config.steps)
    graphdef, state = init_state(config.model, optimizer, config.seed)
    introduce(config, data, state, run.folder, console)
    if not config.resume:
        run.folder.create(config)
    with Checkpoints(run.folder.checkpoints) as checkpoints:
        if config.resume:
            state, position = checkpoints.restore(state)
            data.train.set_state(position)
            console.print(f"resumed after step {int(state.step)}", highlight=False)
        program = make_program(config.parallel, graphdef, optimizer)
        state = _take_steps(run, program, state, checkpoints, console)
    report = write_report(config, graphdef, state, data, run.folder)
    report.show(console)
    return report


def _take_steps(
    run: Run, program: Program, state: TrainState, checkpoints: Checkpoints, console: Console
) -> TrainState:
    """Takes the steps that are left; returns the last state, on the host."""
    config, data = run.config, run.data
    start, steps = int(state.step), config.steps
    metrics_file = MetricsFile(run.folder.metrics)
    metrics_file.keep_until(start)
    schedule = learning_rate_schedule(config.optimizer, steps)
    rates = np.asarray(schedule(jnp.arange(steps)))
    clock = Clock(config.batch_size * config.seq_len)
    state = program.place(state)
    with Progress(console, start=start, steps=steps) as progress:
        for step in range(start + 1, steps + 1):
            state, metrics = program.train_step(state, next(data.train))
            rate = float(rates[step - 1])
            metrics_file.add({"step": step, **metrics._asdict(), "learning_rate": rate})
            due = _due(config.report, step, last=steps)
            if not due and step > start + 1:
                continue
            loss = metrics_file.flush()[-1]["loss"]  # waits for the step
            if not math.isfinite(loss):
                raise FloatingPointError(f"{loss=} at {step=}: lower the learning rate")
            clock.lap(step)
            if "log" in due:
                progress.update(step, loss, clock.speed, clock.left(steps))
            if "eval" in due:
                bits = bits_per_byte(program, state.params, data.validation)
                metrics_file.add({"step": step, "validation": bits})
                metrics_file.flush()
                progress.note(f"step {step}/{steps}  validation {data.entropies.compare(bits)}")
            if "checkpoint" in due:
                checkpoints.save(program.collect(state), data.position(), data.corpus.fingerprint)
            clock.skip()
    return program.collect(state)


def _due(report: ReportConfig, step: int, *, last: int) -> set[str]:
    every = {
        "log": report.log_every,
        "eval": report.eval_every,
        "checkpoint": report.checkpoint_every,
    }
    return {name for name, steps in every.items() if step % steps == 0 or step == last}
