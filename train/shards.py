"""Prepared text: documents as tokens in memory-mapped shards, and what describes them.

A folder of shards holds, for both splits, `train-00000.bin` ... with the tokens of all documents
one after the other, little-endian, and beside each a `train-00000.idx.npy`, int64: where in this
shard the documents begin that begin in it. All shards of a split but its last one are equally
long, and a document may go on in the next one. `shards.json` describes them and is written last.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

from models.tokenizer import ByteTokenizer, TextTokenizer, Tokenizer

VERSION = 1
MANIFEST = "shards.json"
SPLITS = ("train", "validation")
TOKENIZER = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class Split:
    """The documents of one split, each ended by the end token."""

    shards: tuple[np.ndarray, ...]
    """Tokens; all but the last are equally long."""
    starts: Int64[np.ndarray, " documents+1"]
    """Where documents begin in all shards together; the last number is where they end."""
    num_bytes: int
    """Of the text, without the end tokens."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def num_tokens(self) -> int:
        return int(self.starts[-1])

    @property
    def lengths(self) -> Int64[np.ndarray, " documents"]:
        return np.diff(self.starts)

    def document(self, index: int) -> Int32[np.ndarray, " length"]:
        """All tokens of a document; IndexError where there is none of this number."""
        if not 0 <= index < len(self):
            raise IndexError(f"{index=} must be from 0 to below {len(self)}")
        return self.tokens(int(self.starts[index]), int(self.starts[index + 1]))

    def tokens(self, start: int, stop: int) -> Int32[np.ndarray, " length"]:
        """A copy of tokens of all documents, counted from the first of the first."""
        size = len(self.shards[0])
        parts = []
        while start < stop:
            shard, offset = divmod(start, size)
            parts.append(self.shards[shard][offset : offset + stop - start])
            start += len(parts[-1])
        return np.concatenate(parts, dtype=np.int32, casting="unsafe") if parts else _NOTHING


_NOTHING = np.empty(0, np.int32)


@dataclasses.dataclass(frozen=True)
class Shards:
    """An open folder of shards."""

    folder: Path
    source: str
    vocab_size: int
    fingerprint: str
    """A digest of everything in the folder."""
    tokenizer: Tokenizer
    train: Split
    validation: Split


def is_prepared(folder: Path | None) -> bool:
    return folder is not None and (folder / MANIFEST).is_file()


def open_shards(folder: Path) -> Shards:
    """Maps the tokens into memory; checks all sizes, and the contents of all but the tokens.

    Raises:
        ValueError: a file is missing, cut short or changed, or of another version of the format.
    """
    manifest = read_manifest(folder)
    if manifest["tokenizer"] is None:
        tokenizer: Tokenizer = ByteTokenizer()
    else:
        text = _read_checked(folder / TOKENIZER, manifest["tokenizer"]["sha256"])
        tokenizer = TextTokenizer(text.decode(), manifest["tokenizer"]["end_token"])
    train, validation = (_open_split(folder, manifest, name) for name in SPLITS)
    return Shards(
        folder=folder,
        source=manifest["source"],
        vocab_size=manifest["vocab_size"],
        fingerprint=manifest["fingerprint"],
        tokenizer=tokenizer,
        train=train,
        validation=validation,
    )


def fingerprint(manifest: dict[str, Any]) -> str:
    """Of all of `shards.json` but the fingerprint in it, and so of the digests that it lists."""
    rest = {name: value for name, value in manifest.items() if name != "fingerprint"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises ValueError where the folder holds none that this code wrote."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"folder={str(folder)!r} holds no {MANIFEST}: it is not from "
            "`python -m train.prepare`, or that was interrupted"
        )
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or "version" not in manifest:
        raise ValueError(f"{str(path)!r} does not describe shards")
    if (version := manifest["version"]) != VERSION:
        raise ValueError(
            f"{str(path)!r} has version {version!r} of the format, this code reads {VERSION}: "
            "prepare the text again"
        )
    if manifest.get("fingerprint") != fingerprint(manifest):
        raise ValueError(f"{str(path)!r} has been changed since the shards were written")
    return manifest


def _open_split(folder: Path, manifest: dict[str, Any], name: str) -> Split:
    split = manifest["splits"][name]
    tokens, starts, base = [], [], 0
    for shard in split["shards"]:
        index = folder / shard["file"].replace(".bin", ".idx.npy")
        _read_checked(index, shard["index_sha256"])
        starts.append(np.load(index, allow_pickle=False) + base)
        tokens.append(_map_tokens(folder / shard["file"], manifest["dtype"], shard["tokens"]))
        base += shard["tokens"]
    return Split(tuple(tokens), np.concatenate([*starts, [base]]), split["bytes"])


def _map_tokens(path: Path, dtype: str, length: int) -> np.ndarray:
    expected = length * np.dtype(dtype).itemsize
    size = path.stat().st_size if path.is_file() else None
    if size != expected:
        found = "is missing" if size is None else f"has {size} bytes"
        raise ValueError(f"{str(path)!r} {found} and must have {expected}: prepare the text again")
    return np.memmap(path, dtype=dtype, mode="r")


def _read_checked(path: Path, sha256: str) -> bytes:
    if not path.is_file():
        raise ValueError(f"{str(path)!r} is missing: prepare the text again")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{str(path)!r} is not the file that the shards were written with")
    return content
