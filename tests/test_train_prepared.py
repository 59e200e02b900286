"""Runs on prepared text: tokens of a BPE, documents packed into rows, resumed in mid-epoch."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from rich.console import Console

from models import GeneratorConfig
from models.generate import Options
from models.generate import run as write_on
from models.presets import PRESETS
from models.saved import load_model
from tests.test_train_loop import MODEL, assert_same, last_checkpoint, run, settings
from train.__main__ import parse
from train.evaluate import Settings, evaluate
from train.prepare import PrepareConfig, prepare


@pytest.fixture(autouse=True)
def standard_dtypes():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    rng, text = np.random.default_rng(0), folder / "text"
    text.mkdir()
    for i in range(60):
        words = rng.choice(["sparse", "heads", "share", "the", "context", "out"], 20 + 5 * i)
        (text / f"{i}.txt").write_text(" ".join(words) + f" {i}.\n")
    prepare(PrepareConfig(str(text), folder / "shards", tokenizer="bpe", vocab_size=300))
    return folder / "shards"


def config_of(shards, out, **changes):
    model = dataclasses.replace(MODEL, vocab_size=300)
    return settings(shards, out, model=model, seq_len=24, **changes)


@pytest.mark.parametrize("changes", [{}, {"packing": "whole"}, {"align": 16}], ids=str)
def test_a_run_on_prepared_text(shards, tmp_path, changes):
    output = run(config_of(shards, tmp_path / "run", **changes))
    assert "documents" in output
    assert "step 7/7  validation" in output
    assert "bits/byte" in output
    assert (tmp_path / "run" / "sample.txt").read_text().startswith("import")


def test_an_evaluation_shorter_than_the_alignment_names_its_lengths(shards, tmp_path):
    config = config_of(shards, tmp_path / "run", steps=2, align=16)
    run(config)
    asked = Settings(config.out, lengths=(15, 24), tasks=("loss",), batch_size=2)
    message = r"lengths=\(15, 24\) must be 16 or more, the align=16 of the run"
    with pytest.raises(ValueError, match=message):
        evaluate(asked, Console())
    found = evaluate(dataclasses.replace(asked, lengths=(16,)), Console())
    assert found["loss"][16]["tokens"] > 0


def test_it_resumes_in_mid_epoch_as_if_it_had_not_stopped(shards, tmp_path):
    whole = config_of(shards, tmp_path / "whole")
    run(whole)
    first = last_checkpoint(whole)
    for step in (6, 7):
        shutil.rmtree(whole.out / "checkpoints" / str(step))
    assert "resumed after step 4" in run(dataclasses.replace(whole, resume=True))
    assert_same(first, last_checkpoint(whole))


def test_another_vocabulary_is_refused(shards, tmp_path):
    with pytest.raises(ValueError, match="vocab_size=256 of the model must be the vocab_size=300"):
        run(settings(shards, tmp_path / "run", seq_len=24))


def test_the_command_line_takes_the_vocabulary_of_the_data(shards):
    assert parse(["--data", str(shards), "--preset", "125m"]).model == dataclasses.replace(
        PRESETS["125m"], vocab_size=300
    )
    given = parse(["--model.vocab-size", "301", f"--data={shards}"])
    assert given.model.vocab_size == 301


def test_a_run_can_generate_without_its_data(shards, tmp_path, capsys):
    config = config_of(shards, tmp_path / "run", steps=2)
    run(config)
    options = Options(
        checkpoint=config.out,
        prompt=("the context",),
        max_tokens=8,
        generator=GeneratorConfig(max_length=64),
    )
    write_on(options)
    assert capsys.readouterr().out.startswith("the context")
    text = load_model(config.out).text
    assert text.decode(text.encode("share the heads")) == "share the heads"
    assert len(text.stop) == 1
