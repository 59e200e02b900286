"""Two processes train as one."""

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.test_train_loop import last_checkpoint, run, settings, write_text
from train.config import MeshConfig, ProcessConfig, TrainConfig
from train.metrics import read_metrics

MESH = MeshConfig(data=2, fsdp=2)

PROCESS = """
import pathlib, sys
sys.path[:0] = {paths!r}
import dataclasses
from tests.test_train_loop import settings
from train import __main__ as command
from train.config import MeshConfig, ProcessConfig

config = settings(pathlib.Path({text!r}), pathlib.Path({out!r}), mesh=MeshConfig(data=2, fsdp=2))
processes = ProcessConfig(coordinator={coordinator!r}, count=2, index=int(sys.argv[1]))
command.parse = lambda arguments: dataclasses.replace(
    config, processes=processes, resume=len(sys.argv) > 2
)
command.main()
"""


@pytest.fixture(autouse=True)
def standard_dtypes():
    with jax.numpy_dtype_promotion("standard"):
        yield


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def run_two(config, *arguments):
    """What the first and the second print."""
    script = PROCESS.format(
        paths=[str(Path(__file__).parents[1])], text=str(config.data), out=str(config.out),
        coordinator=f"localhost:{free_port()}",
    )  # fmt: skip
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2",
        "JAX_NUMPY_DTYPE_PROMOTION": "standard",
    }
    both = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(index), *arguments], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for index in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=240) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    return [out for out, _ in outputs]


def test_two_processes_compute_what_one_does(tmp_path):
    text = write_text(tmp_path / "text")
    one = settings(text, tmp_path / "one", mesh=MESH)
    run(one)
    two = dataclasses.replace(one, out=tmp_path / "two")
    first, second = run_two(two)
    assert "step 7/7" in first
    assert "step 7" not in second
    for a, b in zip(
        *(read_metrics(config.out / "metrics.jsonl") for config in (one, two)), strict=True
    ):
        assert a == pytest.approx(b, rel=1e-5)
    (a, position_a), (b, position_b) = last_checkpoint(one), last_checkpoint(two)
    assert position_a == position_b
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
    # What two have written, two go on with, and one does too.
    assert "resumed after step 7" in run_two(two, "resume")[0]
    assert "resumed after step 7" in run(dataclasses.replace(two, resume=True))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"coordinator": "localhost:1"}, "contradict each other"),
        ({"count": 2}, "contradict each other"),
        ({"coordinator": "localhost:1", "count": 2, "index": 2}, "index=2 must be from 0"),
        ({"count": 0}, "count=0 must be positive"),
        ({"coordinator": "junk", "count": 2}, "coordinator='junk' must be HOST:PORT"),
    ],
    ids=str,
)
def test_processes_that_contradict_themselves(wrong, message):
    with pytest.raises(ValueError, match=message):
        ProcessConfig(**wrong)


def test_several_processes_need_one_folder():
    with pytest.raises(ValueError, match="several processes need out"):
        TrainConfig(processes=ProcessConfig("localhost:1", 2))
