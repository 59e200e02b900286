"""What preparing text wrote, as tables."""

from __future__ import annotations

import dataclasses
import heapq

import numpy as np
from jaxtyping import Int
from rich.markup import escape
from rich.table import Table

from train.documents import Document, Found, SplitDocuments
from train.shards import SPLITS

_LONG = {"> 8k": 8_192, "> 32k": 32_768, "> 128k": 131_072}
_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What was written, for people to read."""

    found: Found
    split: SplitDocuments
    lengths: dict[str, Int[np.ndarray, " documents"]]
    """Per split, tokens of every document."""
    vocab_size: int
    fingerprint: str


def summary(prepared: Prepared) -> list[Table | str]:
    """A table of the splits, one of the longest documents, and what was left out."""
    found, split = prepared.found, prepared.split
    sides = dict(zip(SPLITS, (split.train, split.validation)))
    splits = Table(pad_edge=False)
    longest = Table("longest documents", "split")
    splits.add_column("split", no_wrap=True)
    for header in ("documents", "tokens", "bytes/token", *_LONG):
        splits.add_column(header, justify="right", no_wrap=True)
    longest.add_column("tokens", justify="right", no_wrap=True)
    everything: list[tuple[int, str, Document]] = []
    for name, lengths in prepared.lengths.items():
        num_bytes = sum(document.num_bytes for document in sides[name])
        over = [f"{(lengths > bound).sum():,}" for bound in _LONG.values()]
        per_token = f"{num_bytes / lengths.sum():.2f}"
        splits.add_row(name, f"{len(lengths):,}", f"{lengths.sum():,}", per_token, *over)
        everything += zip(lengths.tolist(), [name] * len(lengths), sides[name])
    for length, name, document in heapq.nlargest(_SHOWN, everything, key=lambda row: row[0]):
        longest.add_row(escape(printable(document.name)), name, f"{length:,}")
    notes = [f"vocabulary   {prepared.vocab_size:,} tokens"]
    if split.duplicates:
        notes.append(
            f"duplicates   {split.duplicates:,} documents have the text of an earlier one; "
            f"{split.moved:,} changed sides to be with it"
        )
    if found.skipped:
        names = ", ".join(printable(name) for name in found.skipped[:_SHOWN])
        more = ", ..." if len(found.skipped) > _SHOWN else ""
        notes.append(f"skipped      {len(found.skipped):,} files (not UTF-8 text): {names}{more}")
    return [splits, longest, *notes, f"fingerprint  {prepared.fingerprint}"]


def printable(name: str) -> str:
    """Names of files need not be UTF-8."""
    return name.encode(errors="backslashreplace").decode()
