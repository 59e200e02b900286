"""The same pure steps under `jit` over a mesh of devices, or under `pmap` on all local ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from models import ModelConfig
from train.config import TrainConfig
from train.sharding import BATCH, check_mesh, make_mesh, shardings
from train.step import (
    Batch,
    Metrics,
    TrainState,
    abstract_state,
    make_state,
    summed_loss,
    train_step,
)

_AXIS = "devices"
HostBatch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Program:
    """Compiled steps, and the way in and out of the devices that they run on.

    init: the first state, placed, from a seed. train_step: takes a placed state, which it uses up,
    and a batch, of which every process puts its rows on its devices. eval_step: a placed state's
    parameters and a batch, for `summed_loss`. like: what a checkpoint is read as;
    `place` puts that on the devices, and `portable` gives what is saved of a placed state. collect:
    the state on the host.
    """

    graphdef: Any
    init: Callable[[int], TrainState]
    train_step: Callable[[TrainState, HostBatch], tuple[TrainState, Metrics]]
    eval_step: Callable[[Any, HostBatch], tuple[Float[Array, ""], Float[Array, ""]]]
    like: TrainState
    place: Callable[[TrainState], TrainState]
    portable: Callable[[TrainState], TrainState]
    collect: Callable[[TrainState], TrainState]


def make_program(config: TrainConfig, optimizer: optax.GradientTransformation) -> Program:
    """Kept like `jit` keeps what it compiles: a second run of one model compiles nothing."""
    if config.parallel == "pmap":
        return _pmap_program(config.model, optimizer, config.accumulate)
    return _jit_program(config.model, optimizer, config.accumulate, config.mesh)


def check_devices(config: TrainConfig) -> None:
    """Raises ValueError where the run cannot be shared out over the devices."""
    if config.parallel == "jit":
        check_mesh(config.mesh, config.model, config.batch_size, config.accumulate)
        return
    if config.mesh.size > 1:
        raise ValueError("mesh is for parallel='jit': pmap takes all local devices")
    if jax.process_count() > 1:
        raise ValueError("parallel='pmap' is for one process; several need parallel='jit'")
    devices, rows = jax.local_device_count(), jax.local_device_count() * config.accumulate
    if config.batch_size % rows:
        raise ValueError(
            f"batch_size={config.batch_size} must be a multiple of the {devices} devices that pmap "
            f"uses times accumulate={config.accumulate}"
        )


@cache
def _jit_program(
    model: ModelConfig, optimizer: optax.GradientTransformation, accumulate: int, mesh_config: Any
) -> Program:
    graphdef, abstract = abstract_state(model, optimizer)
    mesh = make_mesh(mesh_config)
    lie, whole = shardings(mesh, abstract), NamedSharding(mesh, P())
    rows = NamedSharding(mesh, BATCH)
    step = partial(train_step, graphdef=graphdef, optimizer=optimizer, accumulate=accumulate)
    # What one half of the rows exchanges over axis tensor hides behind the other's products.
    options = {"xla_gpu_enable_latency_hiding_scheduler": True} if mesh_config.tensor > 1 else None
    train = jax.jit(step, donate_argnums=0, out_shardings=(lie, whole), compiler_options=options)
    evaluate = jax.jit(partial(summed_loss, graphdef), out_shardings=whole)
    init = jax.jit(make_state(model, optimizer), out_shardings=lie)
    gather = jax.jit(lambda state: state, out_shardings=whole)

    def share(batch: HostBatch) -> Batch:
        return {
            name: jax.make_array_from_callback(x.shape, rows, x.__getitem__)
            for name, x in batch.items()
        }

    def in_mesh(call: Callable[..., Any]) -> Callable[..., Any]:
        def inside(*args: Any) -> Any:
            with jax.set_mesh(mesh):
                return call(*args)

        return inside

    return Program(
        graphdef,
        init=lambda seed: init(jax.random.key(seed)),
        train_step=in_mesh(lambda state, batch: train(state, share(batch))),
        eval_step=in_mesh(lambda params, batch: evaluate(params, share(batch))),
        like=jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), abstract, lie
        ),
        place=lambda state: jax.device_put(state, lie),
        portable=lambda state: state,
        collect=lambda state: jax.device_get(gather(state)),
    )


@cache
def _pmap_program(
    model: ModelConfig, optimizer: optax.GradientTransformation, accumulate: int
) -> Program:
    graphdef, abstract = abstract_state(model, optimizer)
    devices = jax.local_device_count()
    step = partial(
        train_step,
        graphdef=graphdef,
        optimizer=optimizer,
        accumulate=accumulate,
        axis_name=_AXIS,
    )

    def mean_loss(params: Any, batch: Batch) -> Any:
        return jax.lax.pmean(summed_loss(graphdef, params, batch), _AXIS)

    train = jax.pmap(step, axis_name=_AXIS, donate_argnums=0)
    evaluate = jax.pmap(mean_loss, axis_name=_AXIS)
    init = jax.jit(make_state(model, optimizer))

    def share(batch: HostBatch) -> HostBatch:
        return {name: x.reshape(devices, -1, *x.shape[1:]) for name, x in batch.items()}

    def train_shared(state: TrainState, batch: HostBatch) -> tuple[TrainState, Metrics]:
        state, metrics = train(state, share(batch))
        return state, _first(metrics)

    def place(state: TrainState) -> TrainState:
        return jax.tree.map(lambda x: np.broadcast_to(np.asarray(x), (devices, *x.shape)), state)

    def collect(state: TrainState) -> TrainState:
        return jax.device_get(_first(state))

    return Program(
        graphdef,
        init=lambda seed: place(init(jax.random.key(seed))),
        train_step=train_shared,
        eval_step=lambda params, batch: _first(evaluate(params, share(batch))),
        like=jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract),
        place=place,
        portable=collect,
        collect=collect,
    )


def _first(tree: Any) -> Any:
    """The first device's copy: all are equal."""
    return jax.tree.map(lambda x: x[0], tree)
