"""`python -m train.prepare`: a folder of text becomes shards of tokens."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from jaxtyping import Int
from rich.console import Console

from models.tokenizer import END_TOKEN, ByteTokenizer, TextTokenizer, Tokenizer, train_bpe
from train.documents import (
    Document,
    SplitDocuments,
    find_documents,
    root_and_pattern,
    split_documents,
)
from train.folder import check_apart, write_text
from train.shard_writer import ShardWriter, token_dtype
from train.shards import MANIFEST, SPLITS, TOKENIZER, VERSION, fingerprint
from train.summary import Prepared, printable, summary

_BATCH_CHARACTERS = 1 << 22
_VOCAB_SIZE = 32_768

_Depth = Annotated[int | None, tyro.conf.arg(metavar="DEPTH")]


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """Turn text files into shards of tokens, which --data of `python -m train` then names."""

    source: str
    """Folder of text files, or a quoted pattern such as 'notes/**/*.md'."""
    out: Path
    """Folder for the shards, which must be new or empty."""
    document_per_folder: _Depth = None
    """A document is a file if left out; otherwise a folder, at most so many levels below the
    source, with all its files joined: 1 for the top folders, a large number for every folder."""
    tokenizer: str = "bytes"
    """bytes; bpe, to train a byte-level BPE on the training documents; or the path of a
    tokenizer.json."""
    vocab_size: int | None = None
    """Of the BPE, 32768 if left out; at most that many where the text is short."""
    end_token: str | None = None
    """What ends a document in the tokenizer.json, <|endoftext|> if left out."""
    split_by: Literal["document", "folder"] = "document"
    """Hold out one in twenty documents, or one in twenty top folders with all that is in them."""
    shard_tokens: int = 1 << 27
    """Tokens of a full shard."""

    def __post_init__(self) -> None:
        if (depth := self.document_per_folder) is not None and depth < 1:
            raise ValueError(f"document_per_folder={depth!r} must be positive")
        if self.shard_tokens < 1:
            raise ValueError(f"shard_tokens={self.shard_tokens!r} must be positive")
        if self.vocab_size is not None and self.tokenizer != "bpe":
            raise ValueError(f"vocab_size={self.vocab_size!r} goes with tokenizer='bpe' only")
        if self.vocab_size is not None and self.vocab_size <= 256:
            raise ValueError(f"vocab_size={self.vocab_size!r} must be at least 257")
        if self.end_token is not None and self.tokenizer in ("bytes", "bpe"):
            raise ValueError(f"end_token={self.end_token!r} goes with a tokenizer.json only")


def prepare(config: PrepareConfig) -> Prepared:
    """Reads the text twice (three times for a BPE), a file at a time; writes `shards.json` last.

    Raises:
        ValueError: source, output folder or tokenizer do not allow it.
    """
    if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
        raise ValueError(f"out={str(config.out)!r} must be a new or an empty folder")
    root, pattern = root_and_pattern(config.source)
    if not pattern or any(fnmatch.fnmatch(name, pattern[-1]) for name in (MANIFEST, TOKENIZER)):
        check_apart(config.out, root, f"source={config.source!r}")
    found = find_documents(config.source, config.document_per_folder)
    split = split_documents(found.documents, config.split_by)
    text, tokenizer = _make_tokenizer(config, split)
    config.out.mkdir(parents=True, exist_ok=True)
    if text is not None:
        (config.out / TOKENIZER).write_text(text, encoding="utf-8")
    dtype = token_dtype(tokenizer.vocab_size)
    splits, lengths = {}, {}
    for name, documents in zip(SPLITS, (split.train, split.validation)):
        writer = ShardWriter(config.out, name, dtype, config.shard_tokens)
        for tokens, ends in _encode(documents, tokenizer):
            writer.add(tokens, ends=ends)
        splits[name] = _describe(documents, writer.close(), writer.lengths)
        lengths[name] = writer.lengths
    manifest: dict[str, Any] = {
        "version": VERSION,
        "source": printable(found.source),
        "split_by": config.split_by,
        "document_per_folder": config.document_per_folder,
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype,
        "tokenizer": None if text is None else _describe_tokenizer(text, config.end_token),
        "splits": splits,
        "duplicates": split.duplicates,
        "skipped": len(found.skipped),
    }
    manifest["fingerprint"] = fingerprint(manifest)
    write_text(config.out / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    return Prepared(found, split, lengths, tokenizer.vocab_size, manifest["fingerprint"])


def _make_tokenizer(config: PrepareConfig, split: SplitDocuments) -> tuple[str | None, Tokenizer]:
    """The text of its `tokenizer.json`, None for bytes, and the tokenizer."""
    if config.tokenizer == "bytes":
        return None, ByteTokenizer()
    if config.tokenizer == "bpe":
        pieces = (piece for document in split.train for piece in document.pieces())
        text = train_bpe(pieces, config.vocab_size or _VOCAB_SIZE)
        return text, TextTokenizer(text)
    path = Path(config.tokenizer)
    if not path.is_file():
        raise ValueError(
            f"tokenizer={config.tokenizer!r} must be bytes, bpe or the path of a tokenizer.json"
        )
    text = path.read_text(encoding="utf-8")
    return text, TextTokenizer(text, config.end_token or END_TOKEN)


def _encode(
    documents: Iterable[Document], tokenizer: Tokenizer
) -> Iterator[tuple[Int[np.ndarray, " tokens"], bool]]:
    """Tokens piece by piece, and whether a document ends with them."""
    for batch in _batches(documents):
        for tokens, (_, ends) in zip(tokenizer.encode([piece for piece, _ in batch]), batch):
            yield (np.append(tokens, tokenizer.end_token) if ends else tokens), ends


def _batches(documents: Iterable[Document]) -> Iterator[list[tuple[str, bool]]]:
    """Pieces, some megabytes at a time; an empty one marked True ends each document."""
    batch: list[tuple[str, bool]] = []
    size = 0
    for document in documents:
        for piece in document.pieces():
            batch.append((piece, False))
            size += len(piece)
            if size >= _BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
        batch.append(("", True))
    yield batch


def _describe(
    documents: tuple[Document, ...], shards: list[dict[str, Any]], lengths: np.ndarray
) -> dict[str, Any]:
    return {
        "documents": len(documents),
        "tokens": int(lengths.sum()),
        "bytes": sum(document.num_bytes for document in documents),
        "shards": shards,
    }


def _describe_tokenizer(text: str, end_token: str | None) -> dict[str, str]:
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return {"file": TOKENIZER, "sha256": sha256, "end_token": end_token or END_TOKEN}


def main() -> None:
    console = Console()
    try:
        config = tyro.cli(PrepareConfig, prog="python -m train.prepare")
        prepared = prepare(config)
    except (ValueError, OSError) as error:
        errors = Console(stderr=True, soft_wrap=True)
        errors.print(f"error: {error}", style="red", highlight=False, markup=False)
        sys.exit(2)
    for part in summary(prepared):
        if isinstance(part, str):
            console.print(part, highlight=False, markup=False, soft_wrap=True)
        else:
            console.print(part)


if __name__ == "__main__":
    main()
