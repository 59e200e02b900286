"""`python -m train.evaluate RUN`: does a model use its context?

Loss by position in the row: does it keep falling? And retrieval over depth and length: is what was
hidden found again? At any lengths, whatever the run was trained at.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from rich.console import Console
from rich.table import Table

from models.saved import TOKENIZER
from models.tokenizer import TextTokenizer
from train.batches import Batches, load_batches
from train.evaluation_plots import save_heat_map, save_loss_by_position
from train.folder import write_text
from train.retrieval import Example, Haystack, associative_recall, multi_needle, passkey
from train.saved import SavedRun, load_run
from train.step import target_mask
from train.stop import StopSignal

Task = Literal["loss", "passkey", "needles", "recall"]
_RETRIEVAL: dict[Task, Callable[..., Example]] = {
    "passkey": passkey,
    "needles": multi_needle,
    "recall": associative_recall,
}
_RESULT = "evaluation.json"
# Tokens to predictions, [batch, length] each; argument 2: segment ids or None.
Predict = Callable[[Any, Any], Any]


class Asking(Protocol):
    """How many questions are asked, as in `Settings`."""

    @property
    def depths(self) -> int: ...
    @property
    def samples(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def seed(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class Settings:
    """Evaluates the last checkpoint of a run; writes JSON and pictures into its folder."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""
    lengths: tuple[int, ...] = ()
    """Tokens in a row; that of the training and four times as many if left out."""
    tasks: tuple[Task, ...] = ()
    """What to evaluate; all that fit into the lengths if left out."""
    batches: int = 16
    """Batches for the loss."""
    batch_size: int = 4
    """Rows at a time."""
    depths: int = 5
    """Places in the text where something is hidden, from the start to the end."""
    samples: int = 16
    """Questions for each depth and length."""
    seed: int = 0
    """Of the questions."""
    data: Path | None = None
    """Other text to evaluate on than the run's own, with the same tokens."""

    def __post_init__(self) -> None:
        for name in ("batches", "batch_size", "depths", "samples"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value!r} must be positive")
        if self.lengths and min(self.lengths) < 2:
            raise ValueError(f"lengths={self.lengths!r} must be 2 or more")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed!r} must be 0 or more")


def evaluate(settings: Settings, console: Console) -> dict[str, Any]:
    """What the JSON holds.

    Raises:
        ValueError: there is no run, or its text has changed or is too short for a length.
        KeyboardInterrupt: before the JSON is written.
    """
    saved = load_run(settings.run, console.print)
    if settings.data is not None:
        config = dataclasses.replace(saved.config, data=settings.data.resolve())
        saved = dataclasses.replace(saved, config=config)
    lengths = settings.lengths or (saved.config.seq_len, 4 * saved.config.seq_len)
    if (align := saved.config.align) > min(lengths):
        raise ValueError(
            f"lengths={lengths!r} must be {align} or more, the align={align} of the run"
        )
    data = {length: _text(saved, settings, length) for length in dict.fromkeys(lengths)}
    text = data[lengths[0]]
    _check_text(saved, settings, text, console)
    tasks = _fitting(settings, data, console)
    result: dict[str, Any] = {
        "step": saved.step,
        "trained_at": saved.config.seq_len,
        "fingerprint": text.fingerprint,
        "settings": dataclasses.asdict(settings)
        | {"run": None, "data": _name(saved), "lengths": lengths},
    }
    out = _folder(saved, result)
    out.mkdir(exist_ok=True)
    with StopSignal(signal.SIGINT) as stop:
        if "loss" in tasks:
            losses = _stopping(loss_function(saved.graphdef, saved.params), stop)
            result["loss"] = {
                length: loss_by_position(losses, text, length) for length, text in data.items()
            }
            save_loss_by_position(out / "loss.png", result["loss"], saved.config.seq_len)
        predict = _stopping(predict_function(saved.graphdef, saved.params), stop)
        for task in tasks:
            if task in _RETRIEVAL:
                found = {
                    length: accuracies(predict, _RETRIEVAL[task], text, length, settings)
                    for length, text in data.items()
                }
                result[task] = found
                save_heat_map(out / f"{task}.png", task, found, saved.config.seq_len)
    if stop.received:
        raise KeyboardInterrupt
    write_text(out / _RESULT, json.dumps(result, indent=1) + "\n")
    _show(result, console)
    console.print(f"written to {out}", highlight=False, markup=False, soft_wrap=True)
    return result


def _stopping(compute: Predict, stop: StopSignal) -> Predict:
    """Ends between two calls: within one, JAX's callbacks may swallow a KeyboardInterrupt."""

    def checked(tokens: Any, ids: Any) -> Any:
        if stop.received:
            raise KeyboardInterrupt
        return compute(tokens, ids)

    return checked


def _name(saved: SavedRun) -> str:
    data = saved.config.data
    return "Python's own library" if data is None else str(data)


def _check_text(saved: SavedRun, settings: Settings, text: Batches, console: Console) -> None:
    """Raises ValueError for text that the run was not trained on; where it was named, says so.

    Text of other tokens is always refused.
    """
    if text.fingerprint == saved.fingerprint:
        return
    prints = f"fingerprint {saved.fingerprint[:12]} then, {text.fingerprint[:12]} now"
    if settings.data is None:
        raise ValueError(
            f"data={_name(saved)!r}: the text has changed since the run was trained ({prints}); "
            "--data FOLDER evaluates on other text"
        )
    file = saved.folder.root / TOKENIZER
    tokens = file.read_text(encoding="utf-8") if file.is_file() else None
    if (text.tokenizer.json if isinstance(text.tokenizer, TextTokenizer) else None) != tokens:
        raise ValueError(
            f"data={_name(saved)!r} has other tokens than the run: prepare it with --tokenizer "
            + ("bytes" if tokens is None else str(file))
        )
    console.print(
        f"data={_name(saved)!r} is not the text that the run was trained on ({prints})",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip


def _folder(saved: SavedRun, asked: dict[str, Any]) -> Path:
    """A folder of its own for every evaluation of a step: only the same one is replaced."""
    name = f"evaluation-{saved.step}"
    names = (name if n == 1 else f"{name}-{n}" for n in itertools.count(1))
    return next(f for n in names if _is_free(f := saved.folder.root / n, asked))


def _is_free(folder: Path, asked: dict[str, Any]) -> bool:
    path = folder / _RESULT
    if not path.is_file():
        return True
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        return {name: there[name] for name in asked} == json.loads(json.dumps(asked))
    except (KeyError, TypeError, ValueError):  # of another version
        return False


def _fitting(settings: Settings, data: dict[int, Batches], console: Console) -> tuple[Task, ...]:
    """The tasks; of those that were not asked for by name, those that every length has room for."""
    chosen: list[Task] = []
    for task in settings.tasks or ("loss", *_RETRIEVAL):
        try:
            for length, text in data.items():
                if task in _RETRIEVAL:
                    _RETRIEVAL[task](
                        haystack_of(text), length=length, depth=0.5, seed=settings.seed
                    )
        except ValueError as error:
            if settings.tasks:
                raise ValueError(f"{task}: {error}; `--tasks loss` works at any length") from error
            console.print(f"{task} is left out: {error}", highlight=False, markup=False)
            continue
        chosen.append(task)
    return tuple(chosen)


def haystack_of(text: Batches) -> Haystack:
    return Haystack(text.validation["tokens"].reshape(-1), text.tokenizer)


def _text(saved: SavedRun, settings: Settings, length: int) -> Batches:
    report = dataclasses.replace(saved.config.report, eval_batches=settings.batches)
    return load_batches(
        dataclasses.replace(
            saved.config, seq_len=length, batch_size=settings.batch_size, report=report
        )
    )


def loss_function(graphdef: Any, params: Any) -> Predict:
    """Nats of every token but the first; compiled once for parameters of equal shape."""
    return functools.partial(_losses, graphdef, params)


def predict_function(graphdef: Any, params: Any) -> Predict:
    """The likeliest next token at every position; compiled once, as `loss_function`."""
    return functools.partial(_predict, graphdef, params)


@functools.partial(jax.jit, static_argnums=0)
def _losses(graphdef: Any, params: Any, tokens: Any, ids: Any) -> Any:
    logits = nnx.merge(graphdef, params)(tokens[:, :-1], None if ids is None else ids[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])


@functools.partial(jax.jit, static_argnums=0)
def _predict(graphdef: Any, params: Any, tokens: Any, ids: Any) -> Any:
    return jnp.argmax(nnx.merge(graphdef, params)(tokens), axis=-1)


def loss_by_position(losses: Predict, text: Batches, length: int) -> dict[str, Any]:
    """Mean bits per token between positions that double, and over all.

    Returns:
      edges: bucket i holds positions edges[i] <= t < edges[i + 1]. bits: of each. mean: bits per
      token over all that count; mean_per_byte: the same per byte. tokens: how many those are.
    """
    sums, counts = np.zeros(length), np.zeros(length)
    for i in range(len(text.validation["tokens"])):
        tokens, ids = (
            text.validation[name][i] if name in text.validation else None
            for name in ("tokens", "segment_ids")
        )
        assert tokens is not None
        found = np.asarray(losses(tokens, ids), np.float64)
        counts_here = np.ones(found.shape) if ids is None else target_mask(ids).astype(float)
        sums += (found * counts_here).sum(axis=0)
        counts += counts_here.sum(axis=0)
    edges = [0, *(1 << n for n in range(4, length.bit_length()) if 1 << n < length), length]
    bits = [
        float(sums[a:b].sum() / max(1.0, counts[a:b].sum()) / math.log(2))
        for a, b in itertools.pairwise(edges)
    ]
    mean = float(sums.sum() / counts.sum() / math.log(2))
    return {
        "edges": edges, "bits": bits, "mean": mean, "mean_per_byte": mean / text.bytes_per_token,
        "tokens": int(counts.sum()),
    }  # fmt: skip


def accuracies(
    predict: Predict,
    make: Callable[..., Example],
    text: Batches,
    length: int,
    settings: Asking,
) -> dict[str, Any]:
    """Share of the questions at each depth whose answer greedy decoding would give in full."""
    haystack = haystack_of(text)
    depths = np.linspace(0, 1, settings.depths)
    right = []
    for number, depth in enumerate(depths):
        examples = [
            make(haystack, length=length, depth=float(depth),
                 seed=settings.seed + number * settings.samples + sample)
            for sample in range(settings.samples)
        ]  # fmt: skip
        right.append(sum(answered(predict, examples, settings.batch_size)) / len(examples))
    return {"depths": depths.tolist(), "accuracy": right}


def answered(predict: Predict, examples: list[Example], batch_size: int) -> list[bool]:
    """Whether each answer is the likeliest, token by token."""
    found = []
    for start in range(0, len(examples), batch_size):
        some = examples[start : start + batch_size]
        tokens = np.stack([example.tokens for example in some])
        padded = np.pad(tokens, ((0, batch_size - len(some)), (0, 0)))
        guesses = np.asarray(predict(padded, None))
        for row, example in zip(guesses, some):  # the token before predicts
            at = slice(example.answer.start - 1, example.answer.stop - 1)
            found.append(bool((row[at] == example.tokens[example.answer]).all()))
    return found


def _show(result: dict[str, Any], console: Console) -> None:
    table = Table("tokens", *(name for name in ("loss", *_RETRIEVAL) if name in result))
    lengths = next(result[name] for name in ("loss", *_RETRIEVAL) if name in result)
    for length in lengths:
        cells = [f"{length}" + (" (trained)" if length == result["trained_at"] else "")]
        if "loss" in result:
            cells.append(f"{result['loss'][length]['mean_per_byte']:.3f} bits/byte")
        cells += [
            f"{np.mean(result[name][length]['accuracy']):.0%}"
            for name in _RETRIEVAL
            if name in result
        ]
        table.add_row(*cells)
    console.print(table)


def main() -> None:
    console = Console()
    try:
        evaluate(tyro.cli(Settings, prog="python -m train.evaluate"), console)
    except KeyboardInterrupt:
        console.print("stopped")
        sys.exit(130)  # as python -m train
    except ValueError as error:
        errors = Console(stderr=True, soft_wrap=True)
        errors.print(f"error: {error}", style="red", highlight=False, markup=False)
        sys.exit(2)


if __name__ == "__main__":
    main()
