"""Rows to train on: text, and among it rows of questions about what was hidden in text.

Every example of a retrieval row is a document of its own. All is a pure function of the arguments,
whatever model trains on it.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from jaxtyping import Int

from train.packing import Rows, train_rows
from train.retrieval import Haystack, associative_recall, passkey
from train.shard_writer import token_dtype
from train.shards import Shards

_PAIRS = 8  # at most, as in evaluations


@dataclasses.dataclass(frozen=True)
class Mixture:
    """How many rows are retrieval, half of it of either task, and how long the examples are.

    Models find answers far away after they have learnt to from near: examples are short at first.
    """

    share: float = 0.5
    """Of the rows, those that hold retrieval examples."""
    shortest: int = 48
    """Tokens of the shortest example; their logarithms are uniform up to the longest."""
    growing: float = 0.3
    """Share of the steps over which the longest example grows to a whole row."""
    copies: float = 0.3
    """Share of the examples, as long as they grow, that are random tokens said twice instead."""
    whole: float = 0.25
    """Share of the retrieval rows, from then on, that are one example."""

    def __post_init__(self) -> None:
        for name in ("share", "growing", "copies", "whole"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"{name}={value!r} must be a share, from 0 to 1")
        if self.shortest < 1:
            raise ValueError(f"shortest={self.shortest!r} must be positive")

    def longest(self, done: float, row: int) -> int:
        """Tokens of the longest example after a share of the steps, in rows of so many."""
        grown = min(1.0, done / self.growing) if self.growing else 1.0
        return round(self.shortest * (row / self.shortest) ** grown)


def training_rows(
    shards: Shards, *, steps: int, batch_size: int, length: int, seed: int, mixture: Mixture
) -> dict[str, Int[np.ndarray, "steps batch length+1"]]:
    """`tokens` and `segment_ids` of all steps, in small dtypes.

    Raises:
        ValueError: the documents are too short for a batch, or examples for their questions.
    """
    text = train_rows(
        Rows(shards.train, length, "whole"), batch_size=batch_size, seed=seed
    )  # rows cut from documents that fill one
    shape = (steps, batch_size, length + 1)
    tokens = np.empty(shape, token_dtype(shards.vocab_size))
    segment_ids = np.ones(shape, np.uint16)
    haystack = Haystack(shards.train.tokens(0, shards.train.num_tokens), shards.tokenizer)
    for step in range(steps):
        tokens[step] = next(text)["tokens"]
        rng = np.random.default_rng((seed, step))
        longest = mixture.longest(step / steps, length + 1)
        copies = mixture.copies if longest <= length else 0.0
        for row in np.flatnonzero(rng.random(batch_size) < mixture.share):
            at = step, row
            lengths = example_lengths(length + 1, longest, mixture, rng)
            examples = [
                _copy(shards.vocab_size, size, rng)
                if rng.random() < copies
                else _example(haystack, size, rng)
                for size in lengths
            ]
            tokens[at] = np.concatenate(examples)
            segment_ids[at] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return {"tokens": tokens, "segment_ids": segment_ids}


def example_lengths(
    row: int, longest: int, mixture: Mixture, rng: np.random.Generator
) -> list[int]:
    """They fill the row; the last one may be longer than the longest, by less than a short one."""
    if longest >= row and rng.random() < mixture.whole:
        return [row]
    bounds = math.log(mixture.shortest), math.log(longest)
    lengths, left = [], row
    while left:
        drawn = round(math.exp(rng.uniform(*bounds)))
        lengths.append(drawn if left - drawn >= mixture.shortest else left)
        left -= lengths[-1]
    return lengths


def _copy(vocab_size: int, length: int, rng: np.random.Generator) -> Int[np.ndarray, " length"]:
    return np.resize(rng.integers(vocab_size, size=-(-length // 2)), length)


def _example(
    haystack: Haystack, length: int, rng: np.random.Generator
) -> Int[np.ndarray, " length"]:
    """A table of recall is of any size that the example has room for."""
    depth, seed = rng.random(), int(rng.integers(1 << 32))
    if rng.random() < 0.5:
        return passkey(haystack, length=length, depth=depth, seed=seed).tokens
    pairs = int(rng.integers(1, _PAIRS, endpoint=True))
    while True:
        try:
            return associative_recall(
                haystack, length=length, depth=depth, seed=seed, pairs=pairs
            ).tokens
        except ValueError:  # no room
            if pairs == 1:
                raise
            pairs //= 2
