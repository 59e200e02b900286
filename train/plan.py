"""Which piece of which document stands where: rows of one epoch, from lengths alone."""

from __future__ import annotations

import bisect
import dataclasses

import numpy as np
from jaxtyping import Int64

_OPEN_ROWS = 1024


@dataclasses.dataclass(frozen=True)
class Plan:
    """Row r holds the pieces `first[r]` to `first[r + 1]`, in the order of their columns."""

    first: Int64[np.ndarray, " rows+1"]
    document: Int64[np.ndarray, " pieces"]
    offset: Int64[np.ndarray, " pieces"]
    """Where in the document a piece begins."""
    length: Int64[np.ndarray, " pieces"]
    column: Int64[np.ndarray, " pieces"]
    """Where in the row it begins."""

    def __len__(self) -> int:
        return len(self.first) - 1


def packed_plan(
    lengths: Int64[np.ndarray, " documents"],
    row_length: int,
    *,
    align: int = 1,
    rng: np.random.Generator | None = None,
) -> Plan:
    """Every token of every document once.

    A document that is longer than a row fills rows of its own, and what is left of it is packed
    like the short ones: whole, each into the open row in which it leaves least room. Pieces
    begin at multiples of `align`. With `rng`, documents are packed and rows ordered at random.
    """
    order = np.arange(len(lengths)) if rng is None else rng.permutation(len(lengths))
    full, rest = np.divmod(lengths[order], row_length)
    of_full = np.repeat(order, full)
    nth = np.arange(len(of_full)) - np.repeat(np.cumsum(full) - full, full)
    some = rest > 0
    row, column = _best_fit(rest[some], row_length, align)
    lone = np.arange(len(of_full))
    return _arrange(
        row=np.concatenate([lone, row + len(of_full)]),
        document=np.concatenate([of_full, order[some]]),
        offset=np.concatenate([nth * row_length, (full * row_length)[some]]),
        length=np.concatenate([np.full(len(of_full), row_length), rest[some]]),
        column=np.concatenate([np.zeros_like(lone), column]),
        rng=rng,
    )


def whole_plan(
    lengths: Int64[np.ndarray, " documents"],
    row_length: int,
    *,
    rng: np.random.Generator | None = None,
) -> Plan:
    """Rows cut from documents that fill at least one, as many as each of them fills.

    The rows of a document follow each other from an offset that `rng` draws, or 0 without it.
    """
    document = np.flatnonzero(lengths >= row_length)
    full, slack = np.divmod(lengths[document], row_length)
    start = np.zeros_like(slack) if rng is None else rng.integers(0, slack, endpoint=True)
    nth = np.arange(full.sum()) - np.repeat(np.cumsum(full) - full, full)
    return _arrange(
        row=np.arange(len(nth)),
        document=np.repeat(document, full),
        offset=np.repeat(start, full) + nth * row_length,
        length=np.full(len(nth), row_length),
        column=np.zeros(len(nth), np.int64),
        rng=rng,
    )


def _best_fit(
    lengths: Int64[np.ndarray, " pieces"], row_length: int, align: int
) -> tuple[Int64[np.ndarray, " pieces"], Int64[np.ndarray, " pieces"]]:
    """Row and column of every piece; of the open rows, the fullest is closed when they are many."""
    rows, columns = np.empty_like(lengths), np.empty_like(lengths)
    open_rows: list[tuple[int, int]] = []  # (room left, row), the least room first
    count = 0
    for piece, length in enumerate(lengths.tolist()):
        found = bisect.bisect_left(open_rows, (length, -1))
        if found < len(open_rows):
            room, row = open_rows.pop(found)
        else:
            room, row, count = row_length, count, count + 1
        rows[piece], columns[piece] = row, row_length - room
        room -= -(-length // align) * align
        if room > 0:
            bisect.insort(open_rows, (room, row))
            if len(open_rows) > _OPEN_ROWS:
                del open_rows[0]
    return rows, columns


def _arrange(*, row: np.ndarray, rng: np.random.Generator | None, **pieces: np.ndarray) -> Plan:
    """Sorts the pieces by row, the rows in an order that `rng` draws."""
    num_rows = int(row.max(initial=-1)) + 1
    if rng is not None:
        row = rng.permutation(num_rows)[row]
    order = np.argsort(row, kind="stable")
    first = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=num_rows))])
    return Plan(first, **{name: values[order].astype(np.int64) for name, values in pieces.items()})
