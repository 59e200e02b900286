"""Writes the shards of one split, token by token, in bounded memory."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Int


def token_dtype(vocab_size: int) -> str:
    """Little-endian uint16 where every token fits, or else uint32."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


@dataclasses.dataclass
class ShardWriter:
    """Takes documents in pieces; `close` returns what `shards.json` says about the shards."""

    folder: Path
    split: str
    dtype: str
    shard_tokens: int
    """A shard is full with so many tokens; a document goes on in the next one."""

    def __post_init__(self) -> None:
        self._lengths: list[int] = []
        self._shards: list[dict[str, Any]] = []
        self._file: IO[bytes] | None = None
        self._digest = hashlib.sha256()
        self._starts: list[int] = []
        self._used = 0
        self._document = 0

    @property
    def lengths(self) -> Int[np.ndarray, " documents"]:
        """In tokens, of the documents that have ended."""
        return np.array(self._lengths, np.int64)

    def add(self, tokens: Int[np.ndarray, " length"], *, ends: bool) -> None:
        """More tokens of the current document; `ends` if they are its last ones."""
        while len(tokens):
            if self._used == self.shard_tokens:
                self._close_shard()
            if self._file is None:
                self._file = (self.folder / self._name("bin")).open("wb")
            if self._document == 0:
                self._starts.append(self._used)
            part = tokens[: self.shard_tokens - self._used]
            content = part.astype(self.dtype).tobytes()
            self._file.write(content)
            self._digest.update(content)
            self._used += len(part)
            self._document += len(part)
            tokens = tokens[len(part) :]
        if ends:
            self._lengths.append(self._document)
            self._document = 0

    def close(self) -> list[dict[str, Any]]:
        if self._file is not None:
            self._close_shard()
        return self._shards

    def _close_shard(self) -> None:
        assert self._file is not None
        self._file.close()
        index = self.folder / self._name("idx.npy")
        np.save(index, np.array(self._starts, np.int64))
        self._shards.append(
            {
                "file": self._name("bin"),
                "tokens": self._used,
                "documents": len(self._starts),
                "sha256": self._digest.hexdigest(),
                "index_sha256": hashlib.sha256(index.read_bytes()).hexdigest(),
            }
        )
        self._file, self._digest, self._starts, self._used = None, hashlib.sha256(), [], 0

    def _name(self, kind: str) -> str:
        return f"{self.split}-{len(self._shards):05d}.{kind}"
