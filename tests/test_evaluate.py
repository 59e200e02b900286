"""Evaluation: losses by position add up, and an answer counts only if it is whole."""

import contextlib
import dataclasses
import io
import json
import math
import shutil
import signal

import jax
import numpy as np
import pytest
from rich.console import Console

from models.tokenizer import ByteTokenizer
from tests.test_train_loop import run, settings, write_text
from train.batches import load_batches
from train.evaluate import Settings, accuracies, answered, evaluate, loss_by_position, main
from train.retrieval import Haystack, passkey
from train.saved import load_run
from train.stop import StopSignal


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
    folder = trained.out / "evaluation-7-2"
    assert {path.name for path in folder.iterdir()} == {
        "evaluation.json",
        "loss.png",
        "passkey.png",
    }
    saved = json.loads((folder / "evaluation.json").read_text())
    assert saved["loss"]["400"]["mean"] == result["loss"][400]["mean"]
    assert 0 < result["loss"][300]["mean"] < 8.5
    assert "bits/byte" in output.getvalue()


def small(config, **changes) -> Settings:
    return dataclasses.replace(
        Settings(config.out, lengths=(20,), tasks=("loss",), batches=1, batch_size=2), **changes
    )


def copy(config, folder):
    """The run and its text, where they may be changed."""
    shutil.copytree(config.out, folder / "run")
    shutil.copytree(config.data, folder / "text")
    path = folder / "run" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data": str(folder / "text")}))
    for old in (folder / "run").glob("evaluation-*"):
        shutil.rmtree(old)
    return dataclasses.replace(config, data=folder / "text", out=folder / "run")


def test_a_text_that_has_changed_since_the_training_is_refused(trained, tmp_path):
    config, console = copy(trained, tmp_path), Console(file=io.StringIO())
    evaluate(small(config), console)
    (config.data / "new.txt").write_text("more text\n" * 60)
    with pytest.raises(
        ValueError, match=r"text'?: the text has changed .*fingerprint \w{12} then, \w{12} now"
    ):
        evaluate(small(config), console)


def test_other_text_that_is_named_is_taken_and_said_to_be_other(trained, tmp_path):
    config, output = copy(trained, tmp_path), io.StringIO()
    console = Console(file=output)
    own = evaluate(small(config, data=config.data), console)
    assert "is not the text" not in output.getvalue()
    other = shutil.copytree(config.data, tmp_path / "other")
    (other / "new.txt").write_text("more text\n" * 60)
    found = evaluate(small(config, data=other), console)
    assert "other' is not the text that the run was trained on" in output.getvalue()
    assert found["fingerprint"] == load_batches(settings(other, config.out)).fingerprint
    assert found["fingerprint"] != own["fingerprint"]


def test_other_text_must_have_the_tokens_of_the_run(trained, tmp_path):
    config = copy(trained, tmp_path)
    (config.out / "tokenizer.json").write_text("{}")
    (config.data / "new.txt").write_text("more text\n" * 60)
    with pytest.raises(ValueError, match=r"other tokens than the run: .*run/tokenizer\.json"):
        evaluate(small(config, data=config.data), Console(file=io.StringIO()))


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN], ids=["usual", "ignored"])
def at_ctrl_c(request):
    before = signal.signal(signal.SIGINT, request.param)
    yield request.param
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_that_is_ignored_stays_so(at_ctrl_c):
    """As in a shell's background."""
    with StopSignal(signal.SIGINT) as stop:
        signal.raise_signal(signal.SIGINT)
    assert stop.received == (at_ctrl_c is not signal.SIG_IGN)
    assert signal.getsignal(signal.SIGINT) is at_ctrl_c


@pytest.mark.parametrize("at_ctrl_c", [signal.default_int_handler], indirect=True)
@pytest.mark.parametrize("when", ["first", "last"])
def test_ctrl_c_ends_an_evaluation_as_it_ends_a_run(
    trained, tmp_path, monkeypatch, capsys, when, at_ctrl_c
):
    """Even where the exception gets lost, as it does in a callback of the garbage collector."""
    config, calls = copy(trained, tmp_path), []

    def losses(tokens, ids):
        calls.append(tokens)
        if len(calls) == {"first": 1, "last": 2}[when]:
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        return np.zeros(tokens[:, 1:].shape)

    monkeypatch.setattr("train.evaluate.loss_function", lambda *_: losses)
    line = "--lengths 20 --tasks loss --batch-size 1 --batches 2"
    monkeypatch.setattr("sys.argv", ["evaluate", str(config.out), *line.split()])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 130
    assert capsys.readouterr().out.splitlines()[-1] == "stopped"
    assert len(calls) == {"first": 1, "last": 2}[when]
    assert not list(config.out.glob("evaluation-*/evaluation.json"))
    assert signal.getsignal(signal.SIGINT) is at_ctrl_c


def test_only_the_same_evaluation_is_replaced(trained, tmp_path):
    config, console = copy(trained, tmp_path), Console(file=io.StringIO())
    for lengths in ((20,), (30,), (20,), (30,)):
        evaluate(small(config, lengths=lengths), console)
    found = {
        path.parent.name: json.loads(path.read_text())["settings"]["lengths"]
        for path in config.out.glob("evaluation-*/evaluation.json")
    }
    assert found == {"evaluation-7": [20], "evaluation-7-2": [30]}
    (config.out / "evaluation-7" / "evaluation.json").write_text("[")
    evaluate(small(config), console)
    assert (config.out / "evaluation-7-3" / "evaluation.json").is_file()


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
