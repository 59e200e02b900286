"""Rows of tokens from documents: a plan per epoch, and an iterator that stands in one."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import grain
import numpy as np
from jaxtyping import Int32

from train.plan import Plan, packed_plan, whole_plan
from train.shards import Split

Batch = dict[str, Int32[np.ndarray, "... seq_len+1"]]
"""`tokens`, and `segment_ids`: the pieces of a row counted from 1, and 0 for padding."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """How documents become rows of `seq_len + 1` tokens."""

    split: Split
    seq_len: int
    packing: Literal["packed", "whole"] = "packed"
    align: int = 1
    """In packed rows, pieces begin at multiples of it; padding stands between them."""

    def __post_init__(self) -> None:
        if not 1 <= self.align <= self.seq_len:
            raise ValueError(f"align={self.align!r} must be from 1 to seq_len={self.seq_len!r}")
        if self.packing == "whole" and self.align != 1:
            raise ValueError(f"align={self.align!r} goes with packing='packed' only")

    def plan(self, seed: int, epoch: int) -> Plan:
        """The rows of an epoch: a pure function of the two numbers."""
        return self._plan(np.random.default_rng((seed, epoch)))

    def plan_in_order(self) -> Plan:
        """The rows without any chance in them."""
        return self._plan(None)

    def read(self, plan: Plan, rows: np.ndarray) -> Batch:
        """These rows of the plan, `[len(rows), seq_len + 1]`."""
        tokens = np.zeros((len(rows), self.seq_len + 1), np.int32)
        segment_ids = np.zeros_like(tokens)
        for i, row in enumerate(rows):
            pieces = range(plan.first[row], plan.first[row + 1])
            for number, piece in enumerate(pieces, start=1):
                start = int(self.split.starts[plan.document[piece]] + plan.offset[piece])
                length, column = int(plan.length[piece]), int(plan.column[piece])
                at = np.s_[i, column : column + length]
                tokens[at] = self.split.tokens(start, start + length)
                segment_ids[at] = number
        return {"tokens": tokens, "segment_ids": segment_ids}

    def _plan(self, rng: np.random.Generator | None) -> Plan:
        row_length = self.seq_len + 1
        if self.packing == "whole":
            return whole_plan(self.split.lengths, row_length, rng=rng)
        return packed_plan(self.split.lengths, row_length, align=self.align, rng=rng)


def train_rows(
    rows: Rows, *, batch_size: int, seed: int, shard_index: int = 0, num_shards: int = 1
) -> grain.DatasetIterator:
    """Endless batches; every epoch has every row once, in packed rows newly packed.

    `batch_size` counts the rows of all hosts: host `shard_index` of `num_shards` gets its share of
    each batch, and the batch is the same however many hosts share it. A batch may hold the last
    rows of one epoch and the first of the next. `get_state`, plain JSON, and `set_state` of the
    iterator continue it exactly, on any number of hosts.

    Raises:
        ValueError: the documents fill too few rows for a batch, or hosts cannot share one.
    """
    if not 0 <= shard_index < num_shards or batch_size % num_shards:
        raise ValueError(
            f"{batch_size=} rows must be a multiple of {num_shards=}, and {shard_index=} be one "
            "of them"
        )
    first = rows.plan(seed, 0)
    check_enough("training", rows, first, batch_size)
    share = batch_size // num_shards
    local = slice(shard_index * share, (shard_index + 1) * share)
    return iter(_RowBatches(rows, batch_size, seed, local))


def validation_rows(
    rows: Rows, *, batch_size: int, num_batches: int, shard_index: int = 0, num_shards: int = 1
) -> Batch:
    """`[num_batches, batch_size, seq_len + 1]`, or fewer batches where there are too few rows.

    The rows are the same in every run, spread evenly over all there are; of each batch, host
    `shard_index` of `num_shards` gets its share.

    Raises:
        ValueError: the documents fill too few rows for a batch.
    """
    plan = rows.plan_in_order()
    check_enough("validation", rows, plan, batch_size)
    num_batches = min(num_batches, len(plan) // batch_size)
    chosen = np.linspace(0, len(plan) - 1, num_batches * batch_size).astype(np.int64)
    chosen = chosen.reshape(num_batches, num_shards, -1)[:, shard_index]
    batch = rows.read(plan, chosen.ravel())
    return {name: values.reshape(*chosen.shape, -1) for name, values in batch.items()}


def check_enough(kind: str, rows: Rows, plan: Plan, batch_size: int) -> None:
    if len(plan) >= batch_size:
        return
    lengths = rows.split.lengths
    if rows.packing == "whole":
        have = f"; the longest of the {len(lengths)} has {lengths.max(initial=0)}"
    else:
        have = f", and hold {rows.split.num_tokens} in all"
    raise ValueError(
        f"the {kind} documents fill {len(plan)} rows of seq_len + 1 = {rows.seq_len + 1} tokens "
        f"(packing={rows.packing!r}), too few for one batch of {batch_size}{have}"
    )


class _RowBatches(grain.IterDataset[Batch]):
    def __init__(self, rows: Rows, batch_size: int, seed: int, local: slice) -> None:
        super().__init__()
        self._arguments = rows, batch_size, seed, local

    def __iter__(self) -> grain.DatasetIterator[Batch]:
        return _RowIterator(*self._arguments)


class _RowIterator(grain.DatasetIterator[Batch]):
    """Its state is the epoch and the row of the first row of the next batch, over all hosts."""

    def __init__(self, rows: Rows, batch_size: int, seed: int, local: slice) -> None:
        super().__init__()
        self._rows = rows
        self._batch_size = batch_size
        self._seed = seed
        self._local = local
        self._row = 0
        self._enter(0)

    def __next__(self) -> Batch:
        wanted, taken = self._batch_size, 0
        parts = []
        while taken < wanted:
            if self._row == len(self._plan):
                self._enter(self._epoch + 1)
                self._row = 0
            count = min(wanted - taken, len(self._plan) - self._row)
            local = range(taken, taken + count)[
                max(0, self._local.start - taken) : max(0, self._local.stop - taken)
            ]
            if local:
                numbers = np.arange(local.start, local.stop) + (self._row - taken)
                parts.append(self._rows.read(self._plan, numbers))
            self._row += count
            taken += count
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def get_state(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "row": self._row}

    def set_state(self, state: dict[str, Any]) -> None:
        if state["epoch"] != self._epoch:
            self._enter(state["epoch"])
        self._row = state["row"]

    def _enter(self, epoch: int) -> None:
        self._epoch = epoch
        self._plan = self._rows.plan(self._seed, epoch)
