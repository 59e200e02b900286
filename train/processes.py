"""Several processes that train together."""

from __future__ import annotations

import io

import jax
from jax.experimental import multihost_utils
from rich.console import Console

from train.config import ProcessConfig


def join(config: ProcessConfig) -> Console:
    """Meets the other processes, before JAX is used; the first one's console shows something."""
    if config.count == 1:
        return Console()
    jax.distributed.initialize(config.coordinator, config.count, config.index)
    return Console() if config.index == 0 else Console(file=io.StringIO())


def wait_for_all(what: str) -> None:
    """Until every process has come here: none writes before all have looked."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
