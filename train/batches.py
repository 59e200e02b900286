"""One kind of batch from either source of text: bytes of a folder, or prepared shards."""

from __future__ import annotations

import dataclasses
from typing import Any

import grain
import numpy as np

from models.tokenizer import ByteTokenizer, Tokenizer
from train.config import TrainConfig
from train.data import load_data
from train.entropy import Entropies
from train.packing import Batch, Rows, train_rows, validation_rows
from train.shards import is_prepared, open_shards


@dataclasses.dataclass(frozen=True)
class Batches:
    """What a run trains on and is evaluated on.

    A batch is a dict of `tokens`, int32 `[batch, seq_len + 1]`, and where rows hold several
    documents their `segment_ids`, of the same shape. `validation` has an axis of batches before.
    """

    train: grain.DatasetIterator
    validation: Batch
    tokenizer: Tokenizer
    fingerprint: str
    """Of the text: a run resumes only on the text that it began with."""
    description: str
    bytes_per_token: float
    """Of the validation text: bits per token over this are bits per byte."""
    entropies: Entropies | None
    """What counting achieves, where tokens are bytes of a folder."""


def load_batches(config: TrainConfig, *, shard_index: int = 0, num_shards: int = 1) -> Batches:
    """The share of host `shard_index` of `num_shards`; `config.batch_size` counts all rows.

    Raises:
        ValueError: the text is missing or too short, or its tokens are not those of the model.
    """
    if is_prepared(config.data):
        return _from_shards(config, shard_index, num_shards)
    return _from_bytes(config, shard_index, num_shards)


def _from_shards(config: TrainConfig, shard_index: int, num_shards: int) -> Batches:
    assert config.data is not None
    shards = open_shards(config.data)
    if (model := config.model.vocab_size) != shards.vocab_size:
        raise ValueError(
            f"vocab_size={model!r} of the model must be the vocab_size={shards.vocab_size!r} of "
            f"data={str(config.data)!r}: pass --model.vocab-size {shards.vocab_size}"
        )
    train, validation = (
        Rows(split, config.seq_len, config.packing, config.align)
        for split in (shards.train, shards.validation)
    )
    host = {"shard_index": shard_index, "num_shards": num_shards}
    batches = train_rows(train, batch_size=config.batch_size, seed=config.seed, **host)
    held_out = validation_rows(
        validation,
        batch_size=config.batch_size,
        num_batches=config.report.eval_batches,
        **host,
    )
    return Batches(
        train=batches,
        validation=held_out,
        tokenizer=shards.tokenizer,
        fingerprint=shards.fingerprint,
        description=(
            f"{shards.source}: {len(shards.train):,} documents, {shards.train.num_tokens:,} tokens "
            f"to train on, {shards.validation.num_tokens:,} to validate with"
        ),
        bytes_per_token=shards.validation.num_bytes / shards.validation.num_tokens,
        entropies=None,
    )


def _from_bytes(config: TrainConfig, shard_index: int, num_shards: int) -> Batches:
    if config.batch_size % num_shards or not 0 <= shard_index < num_shards:
        raise ValueError(
            f"batch_size={config.batch_size!r} must be a multiple of {num_shards=}, and "
            f"{shard_index=} be one of them"
        )
    share = config.batch_size // num_shards
    local = slice(shard_index * share, (shard_index + 1) * share)
    data = load_data(config)
    corpus = data.corpus
    skipped = f"; {len(corpus.skipped)} skipped (not UTF-8)" if corpus.skipped else ""
    return Batches(
        train=_ByteBatches(data.train, local),
        validation={"tokens": data.validation[:, local].astype(np.int32)},
        tokenizer=ByteTokenizer(),
        fingerprint=corpus.fingerprint,
        description=(
            f"{corpus.num_files} files, {len(corpus.train):,} bytes to train on, "
            f"{len(corpus.validation):,} to validate with{skipped}"
        ),
        bytes_per_token=1.0,
        entropies=data.entropies,
    )


class _ByteBatches(grain.DatasetIterator[Batch]):
    """Rows of bytes as dict batches; the state is the parent's."""

    def __init__(self, parent: grain.DatasetIterator, local: slice) -> None:
        super().__init__(parent)
        self._local = local

    def __next__(self) -> Batch:
        return {"tokens": next(self._parent)[self._local].astype(np.int32)}

    def get_state(self) -> dict[str, Any]:
        return self._parent.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state)
