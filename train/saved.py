"""A run that was saved: its settings and the parameters of its last whole checkpoint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from models.from_json import build
from train.checkpoint import Checkpoints
from train.config import MeshConfig, TrainConfig
from train.folder import RunFolder
from train.parallel import make_program
from train.step import make_optimizer


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """graphdef, params: `nnx.merge` makes the model of them. step: of the checkpoint.
    fingerprint: of the text that it was trained on.
    """

    folder: RunFolder
    config: TrainConfig
    graphdef: Any
    params: Any
    step: int
    fingerprint: str


def load_run(root: Path, say: Callable[[str], object]) -> SavedRun:
    """Onto the first device.

    Raises:
        ValueError: the folder holds no run, or none of its checkpoints is whole.
    """
    folder = RunFolder(root)
    if not folder.config.is_file():
        raise ValueError(f"{str(root)!r} holds no run: no config.json in it")
    try:
        saved = build(TrainConfig, json.loads(folder.config.read_text(encoding="utf-8")))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{str(folder.config)!r} does not describe a run: {error}") from error
    config = dataclasses.replace(saved, out=root, parallel="jit", mesh=MeshConfig(), accumulate=1)
    program = make_program(config, make_optimizer(config.optimizer, config.steps))
    with Checkpoints(folder.checkpoints, config.report.keep) as checkpoints:
        state, _ = checkpoints.restore(program.like, say, put_aside=False)
        fingerprint = checkpoints.fingerprint()
    return SavedRun(folder, config, program.graphdef, state.params, int(state.step), fingerprint)
