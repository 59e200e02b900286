"""The pure training step: a state and a batch in, a state and metrics out."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, UInt32

from models import ModelConfig, Transformer
from train.config import OptimizerConfig

_LOGITS_AT_ONCE = 4096  # positions
# tokens, int32 [batch, seq_len + 1], and where rows hold several documents segment_ids, alike
Batch = dict[str, Array]


class TrainState(NamedTuple):
    """Everything a step changes, and the key that later randomness comes from."""

    step: Int[Array, ""]
    params: Any
    opt_state: Any
    key: UInt32[Array, "2"]


class Metrics(NamedTuple):
    """Of one step: mean loss in nats per token, global norm of the gradient before clipping."""

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
    if config.schedule == "wsd":
        decay = max(1, min(round(config.decay * steps), steps - warmup))
        peak = config.learning_rate
        return optax.join_schedules(
            [
                optax.linear_schedule(peak / (warmup + 1), peak, warmup),
                optax.constant_schedule(peak),
                optax.linear_schedule(peak, peak * config.final, decay),
            ],
            [warmup, steps - decay],
        )
    return optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / (warmup + 1),
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=steps,
        end_value=config.learning_rate * config.final,
    )


def target_mask(segment_ids: Int[Array, "*batch row"]) -> Any:
    """Which tokens but the first of a row follow one of their own document; arrays of any kind."""
    after = segment_ids[..., 1:]
    return (after == segment_ids[..., :-1]) & (after > 0)


def make_state(
    config: ModelConfig, optimizer: optax.GradientTransformation
) -> Callable[[Array], TrainState]:
    """A pure function from a key to the first state."""

    def make(key: Array) -> TrainState:
        init_key, key = jax.random.split(key)
        _, params = _split(config, init_key)
        return TrainState(jnp.int32(0), params, optimizer.init(params), jax.random.key_data(key))

    return make


def abstract_state(
    config: ModelConfig, optimizer: optax.GradientTransformation
) -> tuple[Any, TrainState]:
    """The model's static graph, and shapes and dtypes of its state: nothing is computed."""
    graphs = []

    def make(key: Array) -> TrainState:
        graphs.append(_split(config, key)[0])
        return make_state(config, optimizer)(key)

    abstract = jax.eval_shape(make, jax.random.key(0))
    return graphs[0], abstract


def _split(config: ModelConfig, key: Array) -> tuple[Any, Any]:
    return nnx.split(Transformer(config, rngs=nnx.Rngs(params=key)), nnx.Param)


def summed_loss(
    graphdef: Any, params: Any, batch: Batch
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Negative log-likelihood in nats of every token but the first of each document, and how many
    such tokens there are; both divided by the number of all that could be.
    """
    tokens, ids = batch["tokens"], batch.get("segment_ids")
    model = nnx.merge(graphdef, params)
    targets = tokens[:, 1:]
    counts = jnp.ones(targets.shape, bool) if ids is None else target_mask(ids)
    seen = None if ids is None else ids[:, :-1]
    x = model.features(model.embeddings(tokens[:, :-1]), seen)

    @jax.checkpoint
    def loss_of(x: Array, targets: Array, counts: Array) -> Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(model.logits(x), targets)
        return jnp.where(counts, losses, 0.0).sum()

    # The logits of a long row, or of many tokens, would be the largest array of all.
    parts: list[tuple[Any, ...]] = [(x, targets, counts)]
    if x.shape[1] > _LOGITS_AT_ONCE:
        places = range(0, x.shape[1], _LOGITS_AT_ONCE)
        parts = [tuple(array[:, at : at + _LOGITS_AT_ONCE] for array in parts[0]) for at in places]
    loss = jnp.stack([loss_of(*part) for part in parts]).sum() / targets.size
    return loss, counts.mean(dtype=jnp.float32)


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    graphdef: Any,
    optimizer: optax.GradientTransformation,
    accumulate: int = 1,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One optimiser step on the mean loss over all tokens of a batch.

    accumulate: parts of the batch that are computed one after the other, each in less memory.
    axis_name: of the `pmap` whose devices have a part of the batch each.
    """

    def of_part(part: Batch) -> Any:
        """Loss, weight and gradients."""
        (loss, weight), grads = jax.value_and_grad(
            lambda params: summed_loss(graphdef, params, part), has_aux=True
        )(state.params)
        return loss, weight, grads

    if accumulate == 1:
        sums = of_part(batch)
    else:
        # Every part takes rows from all devices.
        parts = jax.tree.map(
            lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch
        )
        like = jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], parts))
        sums, _ = jax.lax.scan(
            lambda sums, part: (jax.tree.map(jnp.add, sums, of_part(part)), None),
            jax.tree.map(jnp.zeros_like, like),
            parts,
        )
    if axis_name is not None:
        sums = jax.lax.psum(sums, axis_name)
    loss, weight, grads = sums
    loss, grads = jax.tree.map(lambda x: x / jnp.maximum(weight, 1e-30), (loss, grads))
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    new = state._replace(step=state.step + 1, params=params, opt_state=opt_state)
    return new, Metrics(loss, optax.tree.norm(grads))
