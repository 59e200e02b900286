"""Checkpoints: the whole state of a run, written atomically, the last few kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp

from train.step import TrainState

_KEEP = 3


class Checkpoints:
    """A folder of checkpoints, numbered by step; a context manager.

    A checkpoint holds the state (step, parameters, optimiser, key) as host arrays, so that it is
    the same whatever devices it was made on, and the position in the data as JSON.
    """

    def __init__(self, folder: Path) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=_KEEP, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def save(self, state: TrainState, position: dict[str, Any], fingerprint: str) -> None:
        """`position` is where the data stands, `fingerprint` which data it is."""
        data = {"position": position, "fingerprint": fingerprint}
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data)
            ),
        )

    def check_data(self, fingerprint: str) -> None:
        """Raises ValueError without a checkpoint, or where the last one is from other data."""
        args = ocp.args.Composite(data=ocp.args.JsonRestore())
        if self._manager.restore(self._last(), args=args).data["fingerprint"] != fingerprint:
            raise ValueError(
                "data: the text has changed since the run was started, so it cannot be resumed"
            )

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """State, of the structure of `like`, and data position of the last checkpoint."""
        template = jax.tree.map(np.asarray, like)
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(template), data=ocp.args.JsonRestore()
        )
        restored = self._manager.restore(self._last(), args=args)
        return restored.state, restored.data["position"]

    def _last(self) -> int:
        step = self._manager.latest_step()
        if step is None:
            folder = str(self._manager.directory)
            raise ValueError(
                f"no checkpoint in {folder!r}, nothing to resume: start anew in another folder"
            )
        return step
