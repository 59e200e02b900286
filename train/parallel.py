"""The same pure steps under `jit` on one device, or under `pmap` on all local ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Array, Float

from train.step import Metrics, TrainState, next_byte_loss, train_step

_AXIS = "devices"


@dataclasses.dataclass(frozen=True)
class Program:
    """Compiled steps, and the way in and out of the devices that they run on.

    `train_step` takes a placed state, which it uses up, and a batch of rows; `eval_step` a placed
    state's parameters and a batch, for the mean loss in nats per byte. `collect` undoes `place`.
    """

    train_step: Callable[[TrainState, np.ndarray], tuple[TrainState, Metrics]]
    eval_step: Callable[[Any, np.ndarray], Float[Array, ""]]
    place: Callable[[TrainState], TrainState]
    collect: Callable[[TrainState], TrainState]


@cache
def make_program(parallel: str, graphdef: Any, optimizer: optax.GradientTransformation) -> Program:
    """Kept like `jit` keeps what it compiles: a second run of one model compiles nothing."""
    return {"jit": _jit_program, "pmap": _pmap_program}[parallel](graphdef, optimizer)


def check_devices(parallel: str, batch_size: int) -> None:
    """Raises ValueError where the batch cannot be shared out over the devices."""
    devices = jax.local_device_count()
    if parallel == "pmap" and batch_size % devices:
        raise ValueError(
            f"{batch_size=} must be a multiple of the {devices} devices that pmap uses"
        )


def _jit_program(graphdef: Any, optimizer: optax.GradientTransformation) -> Program:
    step = partial(train_step, graphdef=graphdef, optimizer=optimizer)
    return Program(
        train_step=jax.jit(step, donate_argnums=0),
        eval_step=jax.jit(partial(next_byte_loss, graphdef)),
        place=jax.device_put,
        collect=jax.device_get,
    )


def _pmap_program(graphdef: Any, optimizer: optax.GradientTransformation) -> Program:
    devices = jax.local_device_count()
    step = partial(train_step, graphdef=graphdef, optimizer=optimizer, axis_name=_AXIS)

    def mean_loss(params: Any, batch: Array) -> Float[Array, ""]:
        return jax.lax.pmean(next_byte_loss(graphdef, params, batch), _AXIS)

    train = jax.pmap(step, axis_name=_AXIS, donate_argnums=0)
    evaluate = jax.pmap(mean_loss, axis_name=_AXIS)

    def share(batch: np.ndarray) -> np.ndarray:
        return batch.reshape(devices, -1, *batch.shape[1:])

    def train_shared(state: TrainState, batch: np.ndarray) -> tuple[TrainState, Metrics]:
        state, metrics = train(state, share(batch))
        return state, _first(metrics)

    return Program(
        train_step=train_shared,
        eval_step=lambda params, batch: evaluate(params, share(batch))[0],
        place=lambda state: jax.tree.map(
            lambda x: np.broadcast_to(np.asarray(x), (devices, *x.shape)), state
        ),
        collect=lambda state: jax.device_get(_first(state)),
    )


def _first(tree: Any) -> Any:
    """The first device's copy: all are equal."""
    return jax.tree.map(lambda x: x[0], tree)
