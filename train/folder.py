"""The run folder: its files, and who may write into it."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
from pathlib import Path

from models.saved import TOKENIZER, TOKENIZER_SETTINGS
from models.tokenizer import TextTokenizer, Tokenizer
from train.config import TrainConfig, differing_fields
from train.environment import environment


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Where a run keeps what it leaves behind."""

    root: Path

    def create(self, config: TrainConfig, tokenizer: Tokenizer) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        write_text(self.environment, environment())
        if isinstance(tokenizer, TextTokenizer):  # the run's model can be used without its data
            write_text(self.root / TOKENIZER, tokenizer.json)
            settings = {"eos_token": tokenizer.end_text}
            write_text(self.root / TOKENIZER_SETTINGS, json.dumps(settings) + "\n")
        write_text(self.config, config.to_json())

    @property
    def config(self) -> Path:
        return self.root / "config.json"

    @property
    def environment(self) -> Path:
        return self.root / "environment.json"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def profile(self) -> Path:
        return self.root / "profile"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def sample(self) -> Path:
        return self.root / "sample.txt"

    @property
    def loss_curve(self) -> Path:
        return self.root / "loss.png"

    @property
    def pattern(self) -> Path:
        return self.root / "pattern.png"


def check_folder(config: TrainConfig) -> RunFolder:
    """The folder of the run, which nothing is written to yet.

    Raises:
        ValueError: it holds something and the run is new, or holds no run, or one with other
            settings, and the run is to be resumed.
    """
    root = config.out
    if root is None:
        root = Path("runs") / datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
    folder = RunFolder(root)
    if config.resume:
        _check_same_run(folder, config)
    elif root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ValueError(
            f"out={str(root)!r} exists and would be overwritten: name another folder, or continue "
            "the run in it with resume=True (--resume)"
        )
    else:
        _check_writable(root)
    return folder


def check_apart(out: Path, text: Path, name: str) -> None:
    """Raises ValueError where what is written would be read as text; `name` says which text."""
    if out.resolve().is_relative_to(text.resolve()):
        raise ValueError(
            f"out={str(out)!r} lies in {name}: what is written there would be read as text the "
            "next time; name a folder elsewhere"
        )


def _check_writable(root: Path) -> None:
    """Raises ValueError where the folder could not be made."""
    there = next(path for path in (root, *root.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "lets nobody write" if there.is_dir() else "is no folder"
        raise ValueError(f"out={str(root)!r} cannot be written: {str(there)!r} {why}")


def write_text(path: Path, text: str) -> None:
    """Replaces the file as a whole: a reader sees the old text or the new, never half of one."""
    scratch = path.with_name(path.name + ".partial")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def _check_same_run(folder: RunFolder, config: TrainConfig) -> None:
    if not folder.config.is_file():
        raise ValueError(f"out={str(folder.root)!r} holds no run to resume: no config.json in it")
    try:
        differing = differing_fields(folder.config.read_text(encoding="utf-8"), config.to_json())
    except ValueError as error:
        raise ValueError(f"{str(folder.config)!r} does not describe a run: {error}") from error
    if differing:
        raise ValueError(
            "resume=True needs the settings that the run was started with; then != now: "
            + "; ".join(differing)
        )
