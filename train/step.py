"""The pure training step: a state and a batch in, a state and metrics out."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8, UInt32

from models import ModelConfig, Transformer
from train.config import OptimizerConfig


class TrainState(NamedTuple):
    """Everything a step changes, and the key that later randomness comes from."""

    step: Int[Array, ""]
    params: Any
    opt_state: Any
    key: UInt32[Array, "2"]


class Metrics(NamedTuple):
    """Of one step: mean loss in nats per byte, global norm of the gradient before clipping."""

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]


@cache
def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Equal settings give the same object, which is all that optax compares by."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            learning_rate_schedule(config, steps),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
        ),
    )


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    warmup = min(round(config.warmup * steps), steps - 1)
    return optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / (warmup + 1),
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=steps,
        end_value=config.learning_rate * config.final,
    )


def init_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, seed: int
) -> tuple[Any, TrainState]:
    """The model's static graph and its first state, from one seed."""
    init_key, key = jax.random.split(jax.random.key(seed))
    model = Transformer(config, rngs=nnx.Rngs(params=init_key))
    graphdef, params = nnx.split(model, nnx.Param)
    opt_state = optimizer.init(params)
    return graphdef, TrainState(jnp.int32(0), params, opt_state, jax.random.key_data(key))


def next_byte_loss(
    graphdef: Any, params: Any, batch: UInt8[Array, "batch seq_len+1"]
) -> Float[Array, ""]:
    """Mean negative log-likelihood, nats per byte, of every byte but the first of each row."""
    tokens = batch.astype(jnp.int32)
    logits = nnx.merge(graphdef, params)(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def train_step(
    state: TrainState,
    batch: UInt8[Array, "batch seq_len+1"],
    *,
    graphdef: Any,
    optimizer: optax.GradientTransformation,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One optimiser step; inside a `pmap` over `axis_name`, gradients and loss are averaged."""
    loss, grads = jax.value_and_grad(lambda params: next_byte_loss(graphdef, params, batch))(
        state.params
    )
    if axis_name is not None:
        loss, grads = jax.lax.pmean((loss, grads), axis_name)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    new = state._replace(step=state.step + 1, params=params, opt_state=opt_state)
    return new, Metrics(loss, optax.tree.norm(grads))
