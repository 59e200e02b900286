"""Streams of bytes as batches: shuffled windows to train on, evenly spread ones to evaluate."""

from __future__ import annotations

import dataclasses
from typing import Any

import grain
import numpy as np
from jaxtyping import UInt8

from train.config import TrainConfig
from train.corpus import Corpus, load_corpus
from train.entropy import Entropies, count_entropies
from train.shards import is_prepared


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run trains on, what it is evaluated on, and what counting achieves there."""

    corpus: Corpus
    train: grain.DatasetIterator
    validation: UInt8[np.ndarray, "batches batch seq_len+1"]
    entropies: Entropies

    def position(self) -> dict[str, Any]:
        """Where the training data stands, for `train.set_state`; plain JSON."""
        return self.train.get_state()


def load_data(config: TrainConfig) -> Data:
    """Raises ValueError where the text is missing, too short, or not a folder of files."""
    if is_prepared(config.data):
        raise ValueError(f"data={str(config.data)!r} is prepared: its batches are not plain bytes")
    if config.packing != "packed" or config.align != 1:
        raise ValueError(
            f"packing={config.packing!r} and align={config.align!r} go with prepared data only"
        )
    corpus = load_corpus(config.data)
    seq_len, batch_size, seed = config.seq_len, config.batch_size, config.seed
    batches = train_batches(corpus.train, seq_len=seq_len, batch_size=batch_size, seed=seed)
    validation = validation_batches(
        corpus.validation,
        seq_len=seq_len,
        batch_size=batch_size,
        num_batches=config.report.eval_batches,
    )
    return Data(corpus, batches, validation, count_entropies(corpus.train, validation))


class Windows:
    """Rows of `seq_len + 1` bytes: inputs and, one further on, targets.

    Neighbouring rows share one byte, so that every byte but the first is a target once. What is
    left at the end, shorter than a row, is not used.
    """

    def __init__(self, stream: UInt8[np.ndarray, " length"], seq_len: int) -> None:
        self._stream = stream
        self._seq_len = seq_len

    def __len__(self) -> int:
        return max(0, (len(self._stream) - 1) // self._seq_len)

    def __getitem__(self, index: Any) -> UInt8[np.ndarray, " seq_len+1"]:
        start = int(index) * self._seq_len
        return self._stream[start : start + self._seq_len + 1]


def train_batches(
    stream: UInt8[np.ndarray, " length"], *, seq_len: int, batch_size: int, seed: int
) -> grain.DatasetIterator:
    """Endless `[batch_size, seq_len + 1]` batches, shuffled anew in every epoch.

    The order depends on `seed` alone; `get_state` and `set_state` of the iterator continue it.

    Raises:
        ValueError: the text is too short for one batch.
    """
    windows = Windows(stream, seq_len)
    _check_enough("training", stream, len(windows), batch_size, seq_len)
    rows = grain.MapDataset.source(windows).seed(seed).shuffle().repeat()
    batches = rows.batch(batch_size, drop_remainder=True)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)))


def validation_batches(
    stream: UInt8[np.ndarray, " length"], *, seq_len: int, batch_size: int, num_batches: int
) -> UInt8[np.ndarray, "batches batch seq_len+1"]:
    """`num_batches` batches, or as many as the text gives, of rows spread evenly over it.

    Raises:
        ValueError: the text is too short for one batch.
    """
    windows = Windows(stream, seq_len)
    _check_enough("validation", stream, len(windows), batch_size, seq_len)
    num_batches = min(num_batches, len(windows) // batch_size)
    rows = np.linspace(0, len(windows) - 1, num_batches * batch_size).astype(np.int64)
    chosen = np.stack([windows[row] for row in rows])
    return chosen.reshape(num_batches, batch_size, seq_len + 1)


def _check_enough(
    kind: str, stream: np.ndarray, windows: int, batch_size: int, seq_len: int
) -> None:
    if windows < batch_size:
        raise ValueError(
            f"the {kind} files hold {len(stream)} bytes, too few for one batch: "
            f"{batch_size=} rows of {seq_len=} need {batch_size * seq_len + 1}"
        )
