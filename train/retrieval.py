"""Can a model find it again? Questions about what was hidden in held-out text.

Every example is `length` tokens: text with something hidden in it `depth` of the way through,
and at the end a question whose answer stands nowhere else. All is a pure function of the
arguments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Int, Int32

from models.tokenizer import Tokenizer

_DIGITS = 7
_ATTEMPTS = 100
_NAMES = (
    *("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron"),
    *("iris", "jade", "koala", "lotus", "maple", "nectar", "otter", "pearl"),
)


@dataclasses.dataclass(frozen=True)
class Example:
    """Text, a question and its answer; the model reads `tokens[:answer.start]` to begin with."""

    tokens: Int32[np.ndarray, " length"]
    answer: slice
    """Where the answer stands after the question: the last tokens."""
    hidden: slice
    """Where it stands in the text."""

    @property
    def loss_mask(self) -> Bool[np.ndarray, " length"]:
        """The tokens of the answer, as what is to be predicted."""
        mask = np.zeros(len(self.tokens), bool)
        mask[self.answer] = True
        return mask


@dataclasses.dataclass(frozen=True)
class Haystack:
    """Tokens of held-out text to hide things in, and the tokenizer that they are from."""

    tokens: Int[np.ndarray, " tokens"]
    tokenizer: Tokenizer

    def encode(self, text: str) -> Int32[np.ndarray, " tokens"]:
        return self.tokenizer.encode([text])[0]


@dataclasses.dataclass(frozen=True)
class _Fact:
    """What is hidden: `before`, `value` and `after` are tokenised apart, `value` as asked for."""

    before: str
    value: str
    after: str
    depth: float


@dataclasses.dataclass(frozen=True)
class _Task:
    """What is hidden, which of it is asked for, and how."""

    facts: list[_Fact]
    asked: int
    question: str


def passkey(haystack: Haystack, *, length: int, depth: float, seed: int) -> Example:
    """One number in the text, and the question what it was.

    Raises:
        ValueError: `depth` is not a share, the haystack is too short for `length`, or `length`
            for the question.
    """

    def draw(rng: np.random.Generator) -> _Task:
        fact = _Fact("\nThe pass key is", _number(rng), ". Remember it.\n", depth)
        return _Task([fact], 0, "\nWhat is the pass key? The pass key is")

    return _build(haystack, draw, length=length, depth=depth, seed=seed)


def multi_needle(
    haystack: Haystack, *, length: int, depth: float, seed: int, needles: int = 4
) -> Example:
    """Named numbers all over the text; the question is for the one at `depth`.

    Raises:
        ValueError: as `passkey`; or `needles` is not from 1 to 16.
    """
    _check_count("needles", needles)

    def draw(rng: np.random.Generator) -> _Task:
        names = rng.permutation(_NAMES)[:needles]
        depths = [depth, *rng.random(needles - 1)]
        facts = [
            _Fact(f"\nThe number of {name} is", _number(rng), ".\n", at)
            for name, at in zip(names, depths)
        ]
        name = names[0]
        return _Task(facts, 0, f"\nWhat is the number of {name}? The number of {name} is")

    return _build(haystack, draw, length=length, depth=depth, seed=seed)


def associative_recall(
    haystack: Haystack, *, length: int, depth: float, seed: int, pairs: int = 8
) -> Example:
    """A table of keys and values in one place of the text; the question is for one of its keys.

    Raises:
        ValueError: as `passkey`; or `pairs` is not from 1 to 16.
    """
    _check_count("pairs", pairs)

    def draw(rng: np.random.Generator) -> _Task:
        names = rng.permutation(_NAMES)[:pairs]
        facts = [_Fact(f"\n{name} =", _number(rng), ";", depth) for name in names]
        asked = int(rng.integers(pairs))
        return _Task(facts, asked, f"\n{names[asked]} =")

    return _build(haystack, draw, length=length, depth=depth, seed=seed)


def _build(
    haystack: Haystack,
    draw: Callable[[np.random.Generator], _Task],
    *,
    length: int,
    depth: float,
    seed: int,
) -> Example:
    """Draws numbers until the one that is asked for stands in the text and as the answer only."""
    if not 0 <= depth <= 1:
        raise ValueError(f"{depth=} must be a share, from 0 to 1")
    rng = np.random.default_rng(seed)
    for _ in range(_ATTEMPTS):
        task = draw(rng)
        example = _lay_out(haystack, task, length, rng)
        text = haystack.tokenizer.decode(example.tokens)
        if text.count(task.facts[task.asked].value) == 2:
            return example
    raise ValueError(f"{_ATTEMPTS} numbers in turn are in the text of the haystack already")


def _lay_out(haystack: Haystack, task: _Task, length: int, rng: np.random.Generator) -> Example:
    facts = task.facts
    parts = [[haystack.encode(text) for text in (f.before, f.value, f.after)] for f in facts]
    asked, answer = haystack.encode(task.question), parts[task.asked][1]
    fill = length - len(asked) - len(answer) - sum(len(part) for fact in parts for part in fact)
    if fill < 0 or fill > len(haystack.tokens):
        raise ValueError(
            f"{length=} must be from {length - fill}, for what is hidden and the question, to "
            f"{length - fill + len(haystack.tokens)}, for a haystack of "
            f"{len(haystack.tokens)} tokens"
        )
    start = int(rng.integers(0, len(haystack.tokens) - fill, endpoint=True))
    text = np.asarray(haystack.tokens[start : start + fill], np.int32)
    laid: list[np.ndarray] = []
    used, hidden = 0, slice(0)
    for number in sorted(range(len(facts)), key=lambda n: facts[n].depth):
        at = round(facts[number].depth * fill)
        laid.append(text[used:at])
        used = at
        if number == task.asked:
            begin = sum(map(len, laid)) + len(parts[number][0])
            hidden = slice(begin, begin + len(answer))
        laid += parts[number]
    tokens = np.concatenate([*laid, text[used:], asked, answer]).astype(np.int32)
    return Example(tokens, answer=slice(length - len(answer), length), hidden=hidden)


def _number(rng: np.random.Generator) -> str:
    return f" {rng.integers(10 ** (_DIGITS - 1), 10**_DIGITS)}"


def _check_count(name: str, value: int) -> None:
    if not 1 <= value <= len(_NAMES):
        raise ValueError(f"{name}={value!r} must be from 1 to {len(_NAMES)}")
