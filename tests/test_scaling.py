"""The scaling benchmark on simulated devices: that it runs, not what it measures."""

import json

import jax
import pytest

from benchmarks import scaling

SMALL = "--platform cpu --devices 2 --lengths 130 --heads 2 --head-dim 16 --local-blocks 1"
SMALL += " --vert-stride 2 --rounds 2 --round-seconds 0.001"


@pytest.fixture
def run(tmp_path, capsys):
    """The benchmark's result and what it printed, from a line of options."""

    def run(line):
        scaling.main([*f"{SMALL} {line}".split(), "--out", str(tmp_path / "out.json")])
        return json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out

    return run


def test_every_way_to_share_the_work(run):
    result, printed = run("--implementation reference")
    ways = [(row["split"], row["way"]) for row in result["rows"]]
    jit = ["jit-auto", "jit-explicit", "shard_map"]
    assert ways == [*(("batch", x) for x in (*jit, "pmap")), *(("heads", x) for x in jit)]
    for row in result["rows"]:
        assert len(row["rounds_ms"]) == 2
        assert row["ratio_low"] > 0
        assert f"{row['ratio']:.3f}x" in printed
    assert {"gpu", "versions", "commit", "settings", "devices"} <= set(result)
    assert result["devices"] == 2


def test_the_kernels_in_the_interpreter(run):
    result, _ = run("--implementation interpret --splits heads --ways shard_map jit-auto")
    assert [row["way"] for row in result["rows"]] == ["shard_map", "jit-auto"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--devices 1", "two devices or more are needed"),
        ("--devices 99", "two devices or more are needed to compare with one: JAX sees 8"),
        ("--heads 3", "heads=3 must be a multiple of the 2 devices"),
        ("--batch 3", "batch=3 must be a multiple of the 2 devices"),
    ],
)
def test_what_cannot_be_compared(line, message, run, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(f"--implementation reference {line}")
    assert message in capsys.readouterr().err


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    def no_backend(backend):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "local_devices", no_backend)
    with pytest.raises(SystemExit, match="2"):
        scaling.main([])
    assert "JAX sees 0 of platform 'gpu'" in capsys.readouterr().err
