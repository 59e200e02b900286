"""Evaluation: losses by position add up, and an answer counts only if it is whole."""

import dataclasses
import io
import json
import math

import jax
import numpy as np
import pytest
from rich.console import Console

from models.tokenizer import ByteTokenizer
from tests.test_train_loop import run, settings, write_text
from train.batches import load_batches
from train.evaluate import Settings, accuracies, answered, evaluate, loss_by_position
from train.retrieval import Haystack, passkey
from train.saved import load_run


@pytest.fixture(autouse=True)
def standard_dtypes():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    text = write_text(folder / "text")
    for name in "abcdef":
        (text / f"{name}.txt").write_text(f"{name} green bottles hanging on the wall\n" * 60)
    with jax.numpy_dtype_promotion("standard"):
        config = settings(text, folder / "run")
        run(config)
    return config


def test_a_saved_run_is_read_as_it_was(trained):
    saved = load_run(trained.out, pytest.fail)
    assert saved.config == dataclasses.replace(trained, data=trained.data.resolve())
    assert saved.step == 7


def test_losses_by_position_add_up(trained):
    text = load_batches(trained)
    length = trained.seq_len

    def losses(tokens, ids):
        return np.broadcast_to(np.arange(length) * math.log(2), tokens[:, 1:].shape)

    found = loss_by_position(losses, text, length)
    assert found["edges"] == [0, 16, 32, 37]
    assert found["bits"] == pytest.approx([7.5, 23.5, 34.0])
    assert found["mean"] == pytest.approx(18)
    assert found["tokens"] == text.validation["tokens"][..., 1:].size


def test_an_answer_counts_if_it_is_whole():
    haystack = Haystack(np.frombuffer(b"all work and no play. " * 40, np.uint8), ByteTokenizer())
    examples = [passkey(haystack, length=300, depth=0.5, seed=seed) for seed in range(5)]

    def knows(tokens, ids):
        return np.roll(tokens, -1, axis=1)

    def misses_one(tokens, ids):
        guesses = np.roll(tokens, -1, axis=1)
        guesses[:, examples[0].answer.start] += 1
        return guesses

    assert answered(knows, examples, 2) == [True] * 5
    assert answered(misses_one, examples, 2) == [False] * 5


def test_accuracy_is_by_depth(trained):
    text = load_batches(dataclasses.replace(trained, batch_size=4, seq_len=200))
    found = accuracies(
        lambda tokens, ids: np.roll(tokens, -1, axis=1), passkey, text, 200,
        Settings(trained.out, depths=3, samples=2, batch_size=2),
    )  # fmt: skip
    assert found == {"depths": [0.0, 0.5, 1.0], "accuracy": [1.0, 1.0, 1.0]}


def test_everything_at_two_lengths(trained):
    output = io.StringIO()
    chosen = Settings(
        trained.out, lengths=(37, 400), tasks=("loss", "passkey"), batches=2, batch_size=2,
        depths=2, samples=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="passkey: length=37 must be from"):  # no room to ask
        evaluate(chosen, Console(file=output))
    short = dataclasses.replace(chosen, lengths=(37,), tasks=())
    assert set(evaluate(short, Console(file=output))) >= {"loss"}
    assert "passkey is left out" in output.getvalue()
    result = evaluate(
        dataclasses.replace(chosen, lengths=(300, 400)), Console(file=output, width=200)
    )
    folder = trained.out / "evaluation-7"
    assert {path.name for path in folder.iterdir()} == {
        "evaluation.json",
        "loss.png",
        "passkey.png",
    }
    saved = json.loads((folder / "evaluation.json").read_text())
    assert saved["loss"]["400"]["mean"] == result["loss"][400]["mean"]
    assert 0 < result["loss"][300]["mean"] < 8.5
    assert "bits/byte" in output.getvalue()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"samples": 0}, "samples=0 must be positive"),
        ({"lengths": (1,)}, "lengths=\\(1,\\) must be 2 or more"),
        ({"seed": -1}, "seed=-1 must be 0 or more"),
    ],
    ids=str,
)
def test_settings_that_are_refused(trained, wrong, message):
    with pytest.raises(ValueError, match=message):
        Settings(trained.out, **wrong)


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(ValueError, match="holds no run: no config"):
        load_run(tmp_path, print)
