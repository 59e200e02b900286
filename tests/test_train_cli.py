"""The command line, and the settings that are refused."""

import dataclasses
from pathlib import Path

import pytest

from models import HybridConfig
from models.presets import PRESETS
from train.__main__ import main, parse
from train.config import OptimizerConfig, ReportConfig, TrainConfig
from train.demo import demo_config
from train.loop import prepare


def test_without_arguments_the_defaults_hold():
    assert parse([]) == TrainConfig()


def test_options_reach_the_settings():
    line = (
        "--data texts --out runs/a --resume --parallel pmap --steps 50 "
        "--model.implementation triton --model.attention.dense-every 3"
    )
    config = parse(line.split())
    attention = dataclasses.replace(PRESETS["demo"].attention, dense_every=3)
    model = dataclasses.replace(PRESETS["demo"], implementation="triton", attention=attention)
    assert config == TrainConfig(
        data=Path("texts"),
        out=Path("runs/a"),
        resume=True,
        parallel="pmap",
        steps=50,
        model=model,
    )


def test_a_preset_is_a_model_that_options_change():
    config = parse(["--model.num-layers", "3", "--preset", "125m"])
    assert config.model == dataclasses.replace(PRESETS["125m"], num_layers=3)


@pytest.mark.parametrize("name", PRESETS)
def test_the_heads_of_a_sparse_layer_cover_the_context_together(name):
    model, length = PRESETS[name], 8192
    coverage = model.attention.sparse.coverage(model.num_heads, length, length, model.num_kv_heads)
    assert coverage == 1
    assert min(model.densities(length)) < 0.5


def test_the_demo_mixes_dense_layers_with_ones_that_see_less_than_half():
    config = demo_config(Path("out"))
    first, *others = config.model.densities(config.seq_len)
    assert first == 1
    assert max(others) < 0.5


def test_help_names_what_a_user_looks_for(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse(["--help"])
    text = capsys.readouterr().out
    for words in ("--data", "--resume", "--preset", "--model.attention.vert-stride", "pmap"):
        assert words in text


def test_a_refused_run_says_why_and_exits(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["train", "--data", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "must be a folder with text files" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps=0 must be positive"),
        ({"batch_size": 0}, "batch_size=0 must be positive"),
        ({"seq_len": -1}, "seq_len=-1 must be positive"),
        ({"seed": -1}, "seed=-1"),
        ({"resume": True}, "resume=True needs out"),
        ({"model": dataclasses.replace(PRESETS["demo"], vocab_size=300)}, "vocab_size=300"),
    ],
)
def test_a_run_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**change)


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (OptimizerConfig, {"learning_rate": 0.0}, "learning_rate=0.0 must be positive"),
        (OptimizerConfig, {"learning_rate": float("nan")}, "learning_rate=nan must be positive"),
        (OptimizerConfig, {"warmup": 1.5}, "warmup=1.5"),
        (OptimizerConfig, {"final": -0.1}, "final=-0.1"),
        (OptimizerConfig, {"weight_decay": -1.0}, "weight_decay=-1.0"),
        (OptimizerConfig, {"b2": 1.0}, "b2=1.0"),
        (ReportConfig, {"eval_every": 0}, "eval_every=0 must be positive"),
        (ReportConfig, {"temperature": -1.0}, "temperature=-1.0"),
        (ReportConfig, {"temperature": 1e-9}, "temperature=1e-09 must be 0, or 1e-6 or more"),
        (HybridConfig, {"block_size": 10}, "block_size"),
    ],
)
def test_parts_of_a_run_refuse(make, change, message):
    with pytest.raises(ValueError, match=message):
        make(**change)


def test_a_run_does_not_write_into_its_own_text(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text("some text")
    config = TrainConfig(data=tmp_path, out=tmp_path / "runs" / "a")
    with pytest.raises(ValueError, match=r"lies in data=.*: what is written there would be read"):
        prepare(config)
