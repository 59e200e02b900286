"""`python -m benchmarks.quality`: small models that differ in attention alone, trained and tested.

All models begin with the same parameters, for a seed, and are trained on the same rows in the same
order: text of prepared shards, and questions about what was hidden in it. Then, on text held out,
at the trained length and at others: the loss by position, and whether what was hidden is found. A
cell, a model and a seed, is written as it ends; `benchmarks.quality_table` puts several results
together.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.attention_worker import first_line
from benchmarks.quality_models import NAMES, Name, Shape, dense_layers
from benchmarks.quality_rows import Mixture, training_rows
from benchmarks.quality_table import accuracy, table
from benchmarks.record import Record, read_settings
from benchmarks.report import number
from models.config import ModelConfig
from train.batches import Batches, load_batches
from train.config import OptimizerConfig, ReportConfig, TrainConfig
from train.evaluate import (
    accuracies,
    haystack_of,
    loss_by_position,
    loss_function,
    predict_function,
)
from train.retrieval import associative_recall, passkey
from train.shards import Shards, open_shards
from train.step import abstract_state, make_optimizer, make_state, train_step


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What is asked of a trained model."""

    lengths: tuple[int, ...] = ()
    """Tokens in a row; that of the training and four times as many if left out."""
    long_rope_bases: tuple[float, ...] = (40_000.0,)
    """Rows longer than the trained ones are evaluated with these as well as the trained base."""
    batches: int = 32
    """Batches for the loss, or as many as the text gives."""
    batch_size: int = 4
    """Rows at a time."""
    depths: int = 5
    """Places in the text where something is hidden, from the start to the end."""
    samples: int = 40
    """Questions of a task for each depth and length."""
    seed: int = 1
    """Of the questions."""

    def __post_init__(self) -> None:
        for name in ("batches", "batch_size", "depths", "samples"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value!r} must be positive")


_SHAPE, _MIXTURE, _EVALUATION = Shape(), Mixture(), Evaluation()
_OPTIMIZER = OptimizerConfig(learning_rate=2e-3)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Trains models on shards from `python -m train.prepare`, and evaluates them."""

    data: Path = Path("data/linux")
    """Folder of the shards."""
    models: tuple[Name, ...] = NAMES
    seeds: tuple[int, ...] = (0,)
    """Of the parameters; every one trains every model."""
    data_seed: int = 0
    """Of the rows, which all models and seeds are trained on."""
    steps: int = 2000
    batch_size: int = 16
    """Rows of a step."""
    length: int = 2048
    """Tokens of a row that are predicted."""
    shape: Shape = _SHAPE
    """The models."""
    mixture: Mixture = _MIXTURE
    """Retrieval among the text."""
    optimizer: OptimizerConfig = _OPTIMIZER
    """The optimiser."""
    evaluation: Evaluation = _EVALUATION
    """What is asked of them."""
    log_every: int = 20
    """Steps of a point of the loss curve, which is their mean."""
    budget_s: float = 540
    """Seconds after which no further cell is begun."""
    platform: Literal["gpu", "cpu"] = "gpu"
    out: Path = Path("runs/quality.json")
    """Where the result goes."""

    def __post_init__(self) -> None:
        for name in ("models", "seeds"):
            if not (values := getattr(self, name)) or len(set(values)) < len(values):
                raise ValueError(f"{name}={values!r} must name at least one, each once")
        for name in ("seeds", "data_seed"):
            if np.min(value := getattr(self, name)) < 0:
                raise ValueError(f"{name}={value!r} must not be negative")
        for base in self.evaluation.long_rope_bases:
            _ = ModelConfig(rope_base=base)  # it checks that
        for name in ("steps", "batch_size", "length", "log_every"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value!r} must be positive")
        if self.mixture.shortest > self.length:
            raise ValueError(
                f"shortest={self.mixture.shortest!r} must be at most length={self.length!r}"
            )

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.evaluation.lengths or (self.length, 4 * self.length)


class Training:
    """A model's step, compiled once for all seeds."""

    def __init__(self, config: ModelConfig, settings: Settings) -> None:
        self._settings = settings
        optimizer = make_optimizer(settings.optimizer, settings.steps)
        self.graphdef, like = abstract_state(config, optimizer)
        self._init = jax.jit(make_state(config, optimizer))
        step = jax.jit(
            partial(train_step, graphdef=self.graphdef, optimizer=optimizer), donate_argnums=0
        )
        rows = jax.ShapeDtypeStruct((settings.batch_size, settings.length + 1), jnp.int32)
        begin = time.perf_counter()
        self._step = step.lower(like, {"tokens": rows, "segment_ids": rows}).compile()
        self.facts = {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(like.params)),
            "compile_s": time.perf_counter() - begin,
        }

    def init(self, seed: int) -> Any:
        return self._init(jax.random.key(seed))

    def run(self, seed: int, rows: dict[str, np.ndarray]) -> tuple[Any, dict[str, Any]]:
        """The parameters, and what training them was like.

        Raises:
          FloatingPointError: a loss that is not finite.
        """
        settings, state = self._settings, self.init(seed)
        jax.block_until_ready(state)
        begin = time.perf_counter()
        curve: list[tuple[int, float]] = []
        waiting: list[jax.Array] = []
        for step in range(settings.steps):
            batch = {name: values[step].astype(np.int32) for name, values in rows.items()}
            state, metrics = self._step(state, batch)
            waiting.append(metrics.loss)
            if len(waiting) == 2 * settings.log_every:  # the device goes on with the later half
                curve.append(_point(curve, waiting, settings.log_every))
        while waiting:
            curve.append(_point(curve, waiting, settings.log_every))
        seconds = time.perf_counter() - begin
        tokens = settings.steps * settings.batch_size * settings.length
        facts = {"loss": curve[-1][1], "curve": curve, "train_s": seconds}
        return state.params, facts | {"tokens": tokens, "tokens_s": tokens / seconds}


def _point(
    curve: list[tuple[int, float]], waiting: list[jax.Array], count: int
) -> tuple[int, float]:
    """The next of a curve: the last of `count` steps, which wait no more, and their mean loss."""
    losses = np.asarray(jax.device_get(waiting[:count]), np.float64)
    del waiting[:count]
    before = curve[-1][0] if curve else 0
    if not (finite := np.isfinite(losses)).all():
        first = int(finite.argmin())
        raise FloatingPointError(
            f"loss={losses[first]} at step={before + first + 1}: lower the learning rate"
        )
    return before + len(losses), float(losses.mean())


def evaluate(
    config: ModelConfig, params: Any, texts: dict[int, Batches], settings: Settings
) -> list[dict[str, Any]]:
    """At every length; at those beyond the trained one also with other bases of the positions."""
    found = []
    for length, text in texts.items():
        longer = settings.evaluation.long_rope_bases if length > settings.length else ()
        for base in dict.fromkeys((config.rope_base, *longer)):
            graphdef = _graph(dataclasses.replace(config, rope_base=base))
            ask: Callable[..., dict[str, Any]] = partial(
                accuracies, predict_function(graphdef, params), text=text, length=length,
                settings=settings.evaluation,
            )  # fmt: skip
            losses = loss_by_position(loss_function(graphdef, params), text, length)
            found.append({
                "length": length, "rope_base": base, "loss": losses,
                "passkey": ask(make=passkey), "recall": ask(make=associative_recall),
            })  # fmt: skip
    return found


def _graph(config: ModelConfig) -> Any:
    return abstract_state(config, make_optimizer(OptimizerConfig(), 1))[0]


def held_out(settings: Settings, vocab_size: int) -> dict[int, Batches]:
    """Text to evaluate with, for every length.

    Raises:
      ValueError: the documents are too short, or rows for the questions.
    """
    asked = settings.evaluation
    texts = {}
    for length in settings.lengths:
        config = TrainConfig(
            data=settings.data,
            seq_len=length,
            batch_size=asked.batch_size,
            packing="whole",
            model=ModelConfig(vocab_size=vocab_size),
            report=ReportConfig(eval_batches=asked.batches),
        )
        text = texts[length] = load_batches(config)
        for task in (passkey, associative_recall):
            task(haystack_of(text), length=length, depth=0.5, seed=asked.seed)
    return texts


def run(settings: Settings) -> Record:
    """Trains and evaluates everything; the file is complete up to the last cell.

    Raises:
      ValueError: the data, or what is asked, does not fit; nothing is trained.
    """
    record = Record(settings, time.perf_counter())
    shards = open_shards(settings.data)
    configs = {
        name: settings.shape.config(name, vocab_size=shards.vocab_size, length=settings.length)
        for name in settings.models
    }
    texts = held_out(settings, shards.vocab_size)
    record.data |= {"lengths": settings.lengths, "text": _describe(shards)}
    rows = training_rows(
        shards, steps=settings.steps, batch_size=settings.batch_size, length=settings.length,
        seed=settings.data_seed, mixture=settings.mixture,
    )  # fmt: skip
    print(f"[{record.write():.0f} s] the rows are made", flush=True)
    for name, config in configs.items():
        if record.spent(f"{name}, seeds {', '.join(map(str, settings.seeds))}"):
            continue
        row: dict[str, Any] = {
            "model": name,
            "density": float(np.mean(config.densities(settings.length))),
            "dense_layers": dense_layers(config),
            "window": config.attention.window,
        }
        try:
            training = Training(config, settings)
        except Exception as failure:  # the others go on
            record.fail(name, failure)
            continue
        for seed in settings.seeds:
            if record.spent(what := f"{name}, seed {seed}"):
                continue
            cell = row | training.facts | {"seed": seed, "error": None, "evaluations": []}
            try:
                params, facts = training.run(seed, rows)
                cell |= facts
                begin = time.perf_counter()
                cell["evaluations"] = evaluate(config, params, texts, settings)
                cell["evaluate_s"] = time.perf_counter() - begin
                del params
            except Exception as failure:
                cell["error"] = first_line(failure)
            record.add(cell, f"{what}: {cell['error'] or _figures(cell)}")
            gc.collect()
    return record


def _describe(shards: Shards) -> dict[str, Any]:
    return {
        "fingerprint": shards.fingerprint,
        "train_tokens": shards.train.num_tokens,
        "validation_tokens": shards.validation.num_tokens,
    }


def _figures(cell: dict[str, Any]) -> str:
    first = cell["evaluations"][0]
    return (
        f"{number(cell['tokens_s'])} tokens/s; at {first['length']} tokens "
        f"{first['loss']['mean']:.3f} bits a token, passkey {accuracy(first, 'passkey'):.0%}, "
        f"recall {accuracy(first, 'recall'):.0%}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    record = run(read_settings(Settings, "python -m benchmarks.quality", arguments))
    print("\n".join([table(record.data), *record.closing("means over seeds")]))


if __name__ == "__main__":
    main()
