"""Checkpoints: the whole state of a run, written atomically, the last few kept."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

from train.step import TrainState


class Checkpoints:
    """A folder of checkpoints, numbered by step; a context manager.

    A checkpoint holds the state (step, parameters, optimiser, key), which can be read onto any
    other number of devices, and the position in the data as JSON. It is written while training goes
    on, and counts only once it is whole; leaving the context waits for it.
    """

    def __init__(self, folder: Path, keep: int = 3) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    @property
    def last(self) -> int | None:
        return self._manager.latest_step()

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
        if self.fingerprint() != fingerprint:
            raise ValueError(
                "data: the text has changed since the run was started, so it cannot be resumed"
            )

    def fingerprint(self) -> str:
        """Of the data that the last checkpoint is from; ValueError without one."""
        for step in self._steps():
            try:
                data = self._manager.restore(
                    step, args=ocp.args.Composite(data=ocp.args.JsonRestore())
                ).data
                return data["fingerprint"]
            except Exception:  # damage may show in any way; `restore` says so
                continue
        raise ValueError(
            f"no checkpoint in {str(self._manager.directory)!r}, nothing to resume: start anew in "
            "another folder"
        )

    def restore(
        self, like: TrainState, say: Callable[[str], object], *, put_aside: bool = True
    ) -> tuple[TrainState, dict[str, Any]]:
        """State and data position of the last checkpoint that is whole.

        `say` is told of damaged ones.

        Args:
          like: arrays or `jax.ShapeDtypeStruct`s, which may say where the state is to lie.
          put_aside: damaged ones, so that the run can save those steps again.

        Raises:
          NoCheckpoint: none is whole.
        """
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like), data=ocp.args.JsonRestore())
        for step in self._steps():
            try:
                with _quiet():
                    restored = self._manager.restore(step, args=args)
                    return jax.block_until_ready(restored.state), restored.data["position"]
            except Exception as error:  # damage may show in any way
                why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                say(f"the checkpoint of step {step} is damaged, the one before is used ({why})")
                if put_aside:
                    self._put_aside(step)
        raise NoCheckpoint(f"no whole checkpoint is left in {str(self._manager.directory)!r}")

    def _steps(self) -> list[int]:
        """Last first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def _put_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            folder = Path(self._manager.directory)
            name = f"damaged-checkpoint-{step}"
            names = (name if n == 1 else f"{name}-{n}" for n in itertools.count(1))
            free = next(n for n in names if not (folder.parent / n).exists())
            (folder / str(step)).rename(folder.parent / free)
        self._manager.reload()


class NoCheckpoint(ValueError):
    """A run cannot go on: none of its checkpoints is whole."""


class _quiet:
    """Orbax's own words on a damaged checkpoint stay out of the terminal."""

    def __enter__(self) -> None:
        logging.disable(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        logging.disable(logging.NOTSET)
