"""`python -m train`: the command line."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import tyro
from rich.console import Console

from models.presets import PRESETS
from train.checkpoint import NoCheckpoint
from train.config import TrainConfig
from train.loop import prepare, train
from train.processes import join, wait_for_all
from train.shards import is_prepared, read_manifest
from train.stop import Stopped


def parse(arguments: list[str]) -> TrainConfig:
    """`--preset` picks the model that the other options change; `--data` its vocabulary.

    Raises:
        SystemExit: help was asked for, or an option is unknown or malformed.
        ValueError: the settings contradict each other.
    """
    preset = argparse.ArgumentParser(prog="python -m train", add_help=False, allow_abbrev=False)
    preset.add_argument("--preset", choices=sorted(PRESETS), default="demo")
    chosen, others = preset.parse_known_args(arguments)
    data = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    data.add_argument("--data", type=Path, nargs="?")
    folder, model = data.parse_known_args(arguments)[0].data, PRESETS[chosen.preset]
    defaults = TrainConfig(model=model)
    if is_prepared(folder):
        model = dataclasses.replace(model, vocab_size=read_manifest(folder)["vocab_size"])
        defaults = TrainConfig(data=folder, model=model)
    return tyro.cli(
        TrainConfig,
        prog="python -m train",
        description=(
            f"{TrainConfig.__doc__} --preset {{{','.join(PRESETS)}}} picks the model that the "
            "--model options change (demo by default), with the vocabulary of prepared data."
        ),
        args=others,
        default=defaults,
    )


def main() -> None:
    try:
        config = parse(sys.argv[1:])
        console = join(config.processes)
        run = prepare(config)
        wait_for_all("prepared")
    except (ValueError, OSError) as error:
        _say_error(error)
        sys.exit(2)
    try:
        train(run, console)
    except (KeyboardInterrupt, Stopped) as stop:
        what = str(stop) or "stopped"
        saved = any(path.name.isdigit() for path in run.folder.checkpoints.glob("*"))
        then = f"--resume --out {run.folder.root} and the same settings continue"
        console.print(f"{what}; {then if saved else 'nothing was saved yet'}", markup=False)
        sys.exit(143 if isinstance(stop, Stopped) else 130)
    except NoCheckpoint as error:
        _say_error(error)
        sys.exit(2)
    except (FloatingPointError, OSError) as error:
        _say_error(error)
        sys.exit(1)


def _say_error(error: Exception) -> None:
    errors = Console(stderr=True, soft_wrap=True)
    errors.print(f"error: {error}", style="red", highlight=False, markup=False)


if __name__ == "__main__":
    main()
