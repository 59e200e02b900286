"""Runs that end early: damaged checkpoints, SIGTERM, numbers that are not finite."""

import dataclasses
import gc
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from models.saved import load_model
from tests.test_train_loop import assert_same, last_checkpoint, run, settings, write_text
from train import __main__ as command
from train.checkpoint import Checkpoints, NoCheckpoint
from train.config import OptimizerConfig
from train.loop import prepare
from train.metrics import read_metrics
from train.parallel import make_program
from train.step import learning_rate_schedule, make_optimizer
from train.stop import StopSignal

# Where Orbax fails to read, it leaves its coroutines behind.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def standard_dtypes():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module", autouse=True)
def no_coroutines_left():
    yield
    gc.collect()  # now, and not in another module's test


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    with jax.numpy_dtype_promotion("standard"):
        config = settings(write_text(folder / "text"), folder / "run")
        run(config)
    return config


def copy(config, folder):
    shutil.copytree(config.out, folder)
    return dataclasses.replace(config, out=folder, resume=True)


def files_of_last(config):
    return sorted(p for p in (config.out / "checkpoints" / "7").rglob("*") if p.is_file())


def damage(path: Path, how: str) -> None:
    if how == "gone":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_damaged_checkpoint_is_noticed_whichever_file_is_hurt(whole, tmp_path):
    """Or it did not matter: what is read is then what was saved."""
    program = make_program(whole, make_optimizer(whole.optimizer, whole.steps))
    kept = {}
    for step in (6, 7):
        only = copy(whole, tmp_path / f"only-{step}")
        for other in (only.out / "checkpoints").iterdir():
            if other.name != str(step):
                shutil.rmtree(other)
        with Checkpoints(only.out / "checkpoints") as checkpoints:
            kept[step] = jax.device_get(checkpoints.restore(program.like, pytest.fail))
    noticed = 0
    for number, path in enumerate(files_of_last(whole)):
        hurt = copy(whole, tmp_path / f"hurt-{number}")
        damage(hurt.out / path.relative_to(whole.out), "half")
        said = []
        with Checkpoints(hurt.out / "checkpoints") as checkpoints:
            got = jax.device_get(checkpoints.restore(program.like, said.append))
        assert_same(got, kept[6 if said else 7])
        if said:
            assert "the checkpoint of step 7 is damaged, the one before is used" in said[0]
            assert (hurt.out / "damaged-checkpoint-7").is_dir()
        noticed += bool(said)
    assert noticed


@pytest.mark.parametrize("how", ["half", "empty", "gone"])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(whole, tmp_path, how):
    hurt = copy(whole, tmp_path / "run")
    # Which of the files with data is read, and how much of it, is Orbax's to choose.
    for path in files_of_last(whole):
        if path.parent.name == "d":
            damage(hurt.out / path.relative_to(whole.out), how)
    output = run(hurt)
    assert "the checkpoint of step 7 is damaged" in output
    assert "resumed after step 6" in output
    assert_same(last_checkpoint(whole), last_checkpoint(hurt))


def test_the_same_step_may_be_damaged_twice(whole, tmp_path):
    hurt = copy(whole, tmp_path / "run")
    for name in ("damaged-checkpoint-7", "damaged-checkpoint-7-2"):
        largest = max(files_of_last(hurt), key=lambda path: path.stat().st_size)
        damage(largest, "empty")
        assert "the checkpoint of step 7 is damaged" in run(hurt)
        assert (hurt.out / name).is_dir()


def test_a_run_without_a_whole_checkpoint_says_so(whole, tmp_path):
    hurt = copy(whole, tmp_path / "run")
    for path in (hurt.out / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(ValueError, match="checkpoint"):
        run(hurt)


def test_whoever_loads_the_model_is_told_of_a_damaged_checkpoint(whole, tmp_path):
    config = copy(whole, tmp_path / "run")
    for path in files_of_last(config):
        damage(path, "gone")
    with pytest.warns(UserWarning, match="damaged, 7 .*: that of step 6 is used"):
        load_model(config.out)


def test_the_command_line_says_so_too(whole, monkeypatch, capsys):
    def fails(*_):
        raise NoCheckpoint("no whole checkpoint is left in 'run'")

    monkeypatch.setattr(command, "parse", lambda arguments: dataclasses.replace(whole, resume=True))
    monkeypatch.setattr(command, "train", fails)
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 2
    assert "error: no whole checkpoint is left in 'run'" in capsys.readouterr().err


def test_as_many_checkpoints_are_kept_as_asked_for(whole, tmp_path):
    few = dataclasses.replace(
        whole, out=tmp_path / "run", report=dataclasses.replace(whole.report, keep=1)
    )
    run(few)
    assert [path.name for path in (few.out / "checkpoints").iterdir()] == ["7"]
    assert len(list((whole.out / "checkpoints").iterdir())) == 3


STOPPED_RUN = """
import os, pathlib, signal, sys
sys.path[:0] = {paths!r}
from tests.test_train_loop import settings
from train import __main__ as command
from train.metrics import MetricsFile

add = MetricsFile.add

def add_and_stop(self, record):
    if record["step"] == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    add(self, record)

def flush_and_stop(self):
    records = flush(self)
    if records[-1]["step"] == 3:  # which is no checkpoint's
        os.kill(os.getpid(), signal.SIGTERM)
    return records

flush = MetricsFile.flush
MetricsFile.{method} = {method}_and_stop
command.parse = lambda arguments: settings(pathlib.Path({text!r}), pathlib.Path({out!r}))
command.main()
"""


@pytest.mark.parametrize("method", ["add", "flush"])  # before and after a step was waited for
def test_sigterm_saves_and_the_run_goes_on_as_if_nothing_had_been(whole, tmp_path, method):
    stopped = dataclasses.replace(whole, out=tmp_path / "stopped")
    root = Path(__file__).parents[1]
    script = STOPPED_RUN.format(
        paths=[str(root)], text=str(whole.data), out=str(stopped.out), method=method
    )
    environment = os.environ | {"JAX_NUMPY_DTYPE_PROMOTION": "standard"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 143, done.stderr
    assert "stopped by SIGTERM after step 3; --resume --out" in done.stdout.replace("\n", " ")
    assert read_metrics(stopped.out / "metrics.jsonl")[-1]["step"] == 3
    assert "resumed after step 3" in run(dataclasses.replace(stopped, resume=True))
    assert_same(last_checkpoint(whole), last_checkpoint(stopped))


def test_the_signal_is_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop.received
        signal.raise_signal(signal.SIGTERM)
        assert stop.received
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_rate_that_is_far_too_high_stops_the_run_and_keeps_what_was_saved(whole, tmp_path):
    wild = dataclasses.replace(
        whole,
        out=tmp_path / "run",
        steps=60,
        optimizer=OptimizerConfig(learning_rate=1e18, clip=1e18, warmup=0.0),
    )
    with pytest.raises(FloatingPointError, match=r"(loss|grad_norm)=(nan|inf) at step=\d+, "):
        run(wild)
    program = make_program(wild, make_optimizer(wild.optimizer, wild.steps))
    with Checkpoints(wild.out / "checkpoints") as checkpoints:
        if checkpoints.last is None:
            return
        state, _ = checkpoints.restore(program.like, pytest.fail)
    for x in jax.tree.leaves(jax.device_get(state.params)):
        assert np.isfinite(x).all()


def test_a_rate_that_stays_and_then_falls():
    config = OptimizerConfig(learning_rate=0.1, warmup=0.2, final=0.01, schedule="wsd", decay=0.3)
    rates = np.asarray(learning_rate_schedule(config, 10)(np.arange(11)))
    assert 0 < rates[0] < rates[1] < rates[2]
    np.testing.assert_allclose(rates[2:8], 0.1)
    assert (np.diff(rates[7:]) < 0).all()
    assert rates[10] == pytest.approx(0.001)


def test_a_folder_that_cannot_be_written_fails_before_training(whole, tmp_path):
    locked = tmp_path / "file"
    locked.write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        prepare(dataclasses.replace(whole, out=locked / "run"))
