"""The scaling of training steps on simulated devices: that it runs, not what it measures."""

import json

import jax
import pytest

from benchmarks import training_scaling
from models import ModelConfig
from models.presets import PRESETS

SMALL = "--platform cpu --preset 125m --length 32 --batch 8 --block-size 16 --local-blocks 1"
SMALL += " --vert-stride 2 --losses 2 --steps 1 --rounds 1"


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    tiny = ModelConfig(num_layers=1, width=16, num_heads=8, num_kv_heads=8, mlp_width=16)
    monkeypatch.setitem(PRESETS, "125m", tiny)
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_all_devices_beside_one(tmp_path, capsys):
    out = tmp_path / "out.json"
    training_scaling.main([*SMALL.split(), "--ways", "tensor", "pmap", "--out", str(out)])
    result, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert result["devices"] == 8
    assert not result["failed"]
    assert [row["way"] for row in result["rows"]] == ["tensor", "pmap"]
    for row in result["rows"]:
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert row["loss_difference"] < 1e-3
        assert f"{row['ratio']:.2f}x" in printed


def test_a_way_that_does_not_divide_is_lost_alone(tmp_path):
    out = tmp_path / "out.json"
    line = SMALL.replace("--batch 8", "--batch 4")
    training_scaling.main([*line.split(), "--ways", "data", "tensor", "--out", str(out)])
    result = json.loads(out.read_text())
    assert "data: " in result["failed"][0]
    assert "batch_size=4 must be a multiple of 8" in result["failed"][0]
    assert [row["way"] for row in result["rows"]] == ["tensor"]


def test_losses_that_are_not_finite_are_a_failure(tmp_path, monkeypatch):
    draw = training_scaling.first_state
    broken = lambda config: jax.tree.map(lambda x: x * float("nan"), draw(config))  # noqa: E731
    monkeypatch.setattr(training_scaling, "first_state", broken)
    with pytest.raises(FloatingPointError, match="not finite"):
        training_scaling.main([*SMALL.split(), "--out", str(tmp_path / "out.json")])


def test_settings_that_are_refused():
    with pytest.raises(ValueError, match=r"ways=\(\) must name at least one"):
        training_scaling.Settings(ways=())
    with pytest.raises(ValueError, match="local_blocks"):
        training_scaling.Settings(local_blocks=0)
