"""What counting bytes and pairs of bytes achieves: the bars a trained model has to clear."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int, UInt8

_PAIRS_AT_ONCE = 1 << 22


@dataclasses.dataclass(frozen=True)
class Entropies:
    """Cross-entropies in bits per byte, counted on training text, evaluated on other text."""

    unigram: float
    """H(x_t): every byte by its frequency."""
    bigram: float
    """H(x_t | x_(t-1)): every byte by its frequency after the byte before it."""

    def compare(self, bits: float) -> str:
        return (
            f"{bits:.3f} bits/byte; by counting: H(x_t) {self.unigram:.3f}, "
            f"H(x_t | x_(t-1)) {self.bigram:.3f}"
        )


def count_entropies(
    train: UInt8[np.ndarray, " length"], rows: UInt8[np.ndarray, "... row"]
) -> Entropies:
    """Counts on `train`, evaluates on every byte but the first of each row of `rows`.

    Smoothing: P(b) = (n(b) + 1) / (n + 256), add-one; P(b | a) = (n(a, b) + P(b)) / (n(a) + 1), one
    further count after every byte a, shared out as P(b).
    """
    pairs = _count_pairs(train)
    singles = np.bincount(train, minlength=256)
    unigram = (singles + 1) / (singles.sum() + 256)
    bigram = (pairs + unigram[None, :]) / (pairs.sum(axis=1, keepdims=True) + 1)
    before, after = rows[..., :-1].ravel(), rows[..., 1:].ravel()
    return Entropies(_mean_bits(unigram[after]), _mean_bits(bigram[before, after]))


def _count_pairs(stream: UInt8[np.ndarray, " length"]) -> Int[np.ndarray, "before after"]:
    counts = np.zeros(256 * 256, dtype=np.int64)
    for start in range(0, len(stream) - 1, _PAIRS_AT_ONCE):
        chunk = stream[start : start + _PAIRS_AT_ONCE + 1].astype(np.int64)
        counts += np.bincount(chunk[:-1] * 256 + chunk[1:], minlength=256 * 256)
    return counts.reshape(256, 256)


def _mean_bits(probabilities: Float[np.ndarray, " bytes"]) -> float:
    return float(-np.log2(probabilities).mean())
