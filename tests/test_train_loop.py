"""Runs: resuming is exact, pmap computes what jit does, and nothing is overwritten."""

import dataclasses
import io
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from models import HybridConfig, ModelConfig
from train.checkpoint import Checkpoints
from train.config import MeshConfig, OptimizerConfig, ReportConfig, TrainConfig
from train.environment import flags
from train.loop import prepare, train
from train.metrics import MetricsFile, read_metrics
from train.parallel import make_program
from train.step import learning_rate_schedule, make_optimizer

MODEL = ModelConfig(
    num_layers=1,
    width=12,
    num_heads=2,
    num_kv_heads=1,
    mlp_width=20,
    attention=HybridConfig(dense_first=0, block_size=16, local_blocks=1, vert_stride=2),
)
REPORT = ReportConfig(log_every=1, eval_every=2, eval_batches=2, checkpoint_every=2, sample_bytes=3)


@pytest.fixture(autouse=True)
def standard_dtypes():
    """Optax mixes integers and floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path / "text")


def write_text(folder: Path) -> Path:
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.txt").write_text(f"{i} bottles of beer on the wall\n" * 40)
    return folder


def settings(text: Path, out: Path, **changes) -> TrainConfig:
    config = TrainConfig(
        data=text,
        out=out,
        steps=7,
        batch_size=8,
        seq_len=37,
        model=MODEL,
        optimizer=OptimizerConfig(learning_rate=1e-2),
        report=REPORT,
    )
    return dataclasses.replace(config, **changes)


def run(config: TrainConfig) -> str:
    """Trains; returns what it printed."""
    output = io.StringIO()
    train(prepare(config), Console(file=output, width=200))
    return output.getvalue()


def last_checkpoint(config: TrainConfig):
    plain = dataclasses.replace(config, parallel="jit", mesh=MeshConfig())
    program = make_program(plain, make_optimizer(config.optimizer, config.steps))
    with Checkpoints(config.out / "checkpoints") as checkpoints:
        return checkpoints.restore(program.like, pytest.fail)


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


KILLED_RUN = """
import os, pathlib, signal, sys
sys.path[:0] = {paths!r}
from test_train_loop import run, settings
from train.metrics import MetricsFile

add = MetricsFile.add

def add_or_die(self, record):
    if record["step"] == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, record)

MetricsFile.add = add_or_die
run(settings(pathlib.Path({text!r}), pathlib.Path({out!r})))
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted, its text, and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    with jax.numpy_dtype_promotion("standard"):
        config = settings(write_text(folder / "text"), folder / "run")
        return config, run(config)


def test_a_killed_run_resumes_as_if_it_had_not_been_killed(whole, tmp_path):
    config, _ = whole
    killed = dataclasses.replace(config, out=tmp_path / "killed")
    tests = Path(__file__).parent
    script = KILLED_RUN.format(
        paths=[str(tests.parent), str(tests)], text=str(killed.data), out=str(killed.out)
    )
    result = subprocess.run([sys.executable, "-c", script], env=os.environ, check=False)
    assert result.returncode == -signal.SIGKILL
    assert read_metrics(killed.out / "metrics.jsonl")[-1]["step"] == 5

    # The checkpoint of step 4 may not have been whole yet: it is written meanwhile.
    resumed = run(dataclasses.replace(killed, resume=True))
    assert "resumed after step 4" in resumed or "resumed after step 2" in resumed
    assert_same(last_checkpoint(config), last_checkpoint(killed))
    for name in ("metrics.jsonl", "sample.txt", "config.json"):
        assert (config.out / name).read_text() == (killed.out / name).read_text()


def test_pmap_computes_what_jit_does(whole, tmp_path):
    assert jax.local_device_count() > 1
    jitted, _ = whole
    mapped = dataclasses.replace(jitted, out=tmp_path / "pmap", parallel="pmap")
    run(mapped)
    (a, position_a), (b, position_b) = last_checkpoint(jitted), last_checkpoint(mapped)
    assert position_a == position_b
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    metrics_a, metrics_b = (read_metrics(c.out / "metrics.jsonl") for c in (jitted, mapped))
    for x, y in zip(metrics_a, metrics_b, strict=True):
        assert x == pytest.approx(y, rel=1e-4)
    assert "resumed after step 7" in run(dataclasses.replace(mapped, resume=True))


def test_training_lowers_the_loss_step_by_step(whole):
    records = read_metrics(whole[0].out / "metrics.jsonl")
    trained = [record for record in records if "loss" in record]
    assert [record["step"] for record in trained] == [1, 2, 3, 4, 5, 6, 7]
    assert trained[0]["loss"] == pytest.approx(math.log(256), rel=0.02)
    assert trained[-1]["loss"] < 0.9 * trained[0]["loss"]
    assert [record["step"] for record in records if "validation" in record] == [2, 4, 6, 7]


def test_a_run_leaves_a_full_folder_and_says_how_it_went(whole):
    config, output = whole
    assert {path.name for path in config.out.iterdir()} == {
        "checkpoints", "config.json", "environment.json", "loss.png", "metrics.jsonl",
        "pattern.png", "sample.txt", "tensorboard",
    }  # fmt: skip
    facts = json.loads((config.out / "environment.json").read_text())
    assert facts["versions"]["jax"] == jax.__version__
    assert facts["flags"] == flags()
    events = b"".join(p.read_bytes() for p in (config.out / "tensorboard").iterdir())
    for name in ("loss", "grad_norm", "learning_rate", "validation", "tokens_per_second"):
        assert name.encode() in events
    assert (config.out / "sample.txt").read_text().startswith("import ")
    assert "step 7/7  validation" in output
    assert "H(x_t | x_(t-1))" in output
    assert "layer 0     S2, skips" in output


def test_three_steps_can_be_traced(whole, tmp_path):
    config = dataclasses.replace(
        whole[0], out=tmp_path / "run", report=dataclasses.replace(REPORT, profile=True)
    )
    run(config)
    assert list((config.out / "profile").rglob("*.xplane.pb"))


def test_every_implementation_trains_from_the_same_start():
    tokens = np.random.default_rng(0).integers(0, 256, (2, 33)).astype(np.int32)
    batch = {"tokens": tokens, "segment_ids": np.repeat([[1] * 20 + [2] * 13], 2, axis=0)}
    losses = []
    for implementation in ("reference", "interpret"):
        model = dataclasses.replace(MODEL, implementation=implementation)
        optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1), 2)
        program = make_program(TrainConfig(model=model), optimizer)
        step = program.train_step
        state, first = step(program.init(0), batch)
        losses.append([float(first.loss), float(step(state, batch)[1].loss)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][1] < losses[0][0]


def test_a_loss_that_is_no_number_stops_the_run(whole, tmp_path, monkeypatch):
    config = dataclasses.replace(whole[0], out=tmp_path / "run")
    flush = MetricsFile.flush
    nan = {"loss": float("nan")}
    monkeypatch.setattr(MetricsFile, "flush", lambda self: [r | nan for r in flush(self)])
    with pytest.raises(FloatingPointError, match="loss=nan at step=1"):
        run(config)


def test_the_rate_warms_up_and_falls_to_its_last_share():
    config = OptimizerConfig(learning_rate=0.1, warmup=0.2, final=0.01)
    rates = np.asarray(learning_rate_schedule(config, 10)(jnp.arange(11)))
    assert rates[2] == pytest.approx(0.1)
    assert 0 < rates[0] < rates[1] < rates[2]
    assert (np.diff(rates[2:]) < 0).all()
    assert rates[10] == pytest.approx(0.001)


def test_metrics_survive_a_torn_line_and_later_steps_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 3, "lo')
    file = MetricsFile(path)
    file.keep_until(1)
    file.add({"step": 2, "loss": jnp.float32(1.5)})
    file.flush()
    assert read_metrics(path) == [{"step": 1, "loss": 3}, {"step": 2, "loss": 1.5}]


def test_a_folder_that_holds_something_is_not_overwritten(text, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    prepare(settings(text, out))
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and would be overwritten"):
        prepare(settings(text, out))


@pytest.fixture
def started(text, tmp_path):
    """A run that stopped before its first checkpoint."""
    config = settings(text, tmp_path / "run")
    config.out.mkdir()
    (config.out / "config.json").write_text(config.to_json())
    return config


def test_resuming_needs_a_run(text, tmp_path):
    with pytest.raises(ValueError, match="holds no run to resume"):
        prepare(settings(text, tmp_path, resume=True))


def test_resuming_needs_a_checkpoint(started):
    with pytest.raises(ValueError, match="no checkpoint in"):
        prepare(dataclasses.replace(started, resume=True))


def test_resuming_with_other_settings_names_them(started):
    other = dataclasses.replace(
        started, resume=True, steps=9, model=dataclasses.replace(MODEL, mlp_width=10)
    )
    with pytest.raises(ValueError, match=r"model\.mlp_width: 20 != 10; steps: 7 != 9"):
        prepare(other)


def test_resuming_on_other_text_is_refused(started):
    state = make_program(started, make_optimizer(started.optimizer, started.steps)).init(0)
    with Checkpoints(started.out / "checkpoints") as checkpoints:
        checkpoints.save(state, {"next_index": 0}, "fingerprint of other text")
    with pytest.raises(ValueError, match="the text has changed"):
        prepare(dataclasses.replace(started, resume=True))


def test_pmap_needs_a_batch_that_the_devices_can_share(text, tmp_path):
    devices = jax.local_device_count()
    config = settings(text, tmp_path / "run", parallel="pmap", batch_size=devices + 1)
    with pytest.raises(ValueError, match=f"batch_size={devices + 1} must be a multiple of the"):
        prepare(config)


def test_a_refused_run_writes_nothing(text, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="too few for one batch"):
        prepare(settings(text, out, seq_len=10_000))
    assert not out.exists()


def test_the_saved_settings_are_plain_json(text, tmp_path):
    saved = json.loads(settings(text, tmp_path / "run").to_json())
    assert saved["data"] == str(text)
    assert saved["model"]["attention"]["vert_stride"] == 2
    assert "out" not in saved
