"""Text files as two streams of bytes, one to train on and one to validate with."""

from __future__ import annotations

import dataclasses
import hashlib
import sysconfig
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

_VALIDATION_SHARE = 0.05
# Tests outweigh what they test, pydoc_data is one huge generated file, the rest is no library.
_NOT_LIBRARY = frozenset({"test", "tests", "idle_test", "pydoc_data", "site-packages"})


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Files one after the other, a zero byte after each; a file is in one stream only."""

    train: np.ndarray
    validation: np.ndarray
    num_files: int
    skipped: tuple[str, ...]
    """Files that are not UTF-8 text."""

    @cached_property
    def fingerprint(self) -> str:
        """A digest of both streams: a run resumes only on the text that it began with."""
        digest = hashlib.sha256(self.train.tobytes())
        digest.update(self.validation.tobytes())
        return digest.hexdigest()


def load_corpus(folder: Path | None) -> Corpus:
    """Reads every text file under `folder`, or Python's standard library for None.

    Names that start with a dot are left out; so are files that are not UTF-8, which are listed
    in `skipped`. A file is validation text if a hash of its path inside the folder says so,
    whatever else is there; about one in twenty is, and at least one.

    Raises:
        ValueError: the folder is missing or holds fewer than two text files.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if folder is None else folder
    if not root.is_dir():
        raise ValueError(f"data={str(root)!r} must be a folder with text files")
    texts: dict[str, bytes] = {}
    skipped = []
    for name, path in _files(root, library=folder is None):
        content = path.read_bytes()
        if not is_text(content):
            skipped.append(name)
        elif content:
            texts[name] = content
    if len(texts) < 2:
        raise ValueError(
            f"data={str(root)!r} must hold at least two text files, one to train on and one to "
            f"validate with; found {len(texts)}, and {len(skipped)} files that are not UTF-8 text"
        )
    held_out = validation_names(list(texts))
    return Corpus(
        train=_stream([text for name, text in texts.items() if name not in held_out]),
        validation=_stream([text for name, text in texts.items() if name in held_out]),
        num_files=len(texts),
        skipped=tuple(skipped),
    )


def validation_names(names: list[str]) -> set[str]:
    """The files to validate with: those of low hash, or else the one of the lowest."""
    shares = {name: _hash_share(name) for name in names}
    low = {name for name, share in shares.items() if share < _VALIDATION_SHARE}
    if len(low) == len(names):
        low.remove(max(low, key=shares.__getitem__))
    return low or {min(names, key=shares.__getitem__)}


def _hash_share(name: str) -> float:
    digest = hashlib.sha256(name.encode(errors="surrogateescape"))  # a name need not be UTF-8
    return int.from_bytes(digest.digest()[:8], "big") / 2**64


def _files(root: Path, *, library: bool) -> Iterator[tuple[str, Path]]:
    for path in sorted(root.rglob("*.py" if library else "*")):
        parts = path.relative_to(root).parts
        hidden = any(part.startswith(".") for part in parts)
        left_out = library and not _NOT_LIBRARY.isdisjoint(parts)
        if not hidden and not left_out and path.is_file():
            yield "/".join(parts), path


def is_text(content: bytes) -> bool:
    """UTF-8 without a zero byte."""
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return b"\0" not in content


def _stream(texts: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(text + b"\0" for text in texts), dtype=np.uint8)
