"""Text files as documents: a file each, or all files of a folder as one."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from train.corpus import is_text, validation_names

_PIECE_BYTES = 1 << 18


@dataclasses.dataclass(frozen=True)
class Document:
    """A text that is read when it is asked for; `name` is relative to the source."""

    name: str
    paths: tuple[Path, ...]
    joined: bool
    """Whether it is a folder, every file of which is ended by a newline."""
    num_bytes: int
    digest: str

    def pieces(self) -> Iterator[str]:
        """The text in pieces of 256 KiB, cut after a line where there is one.

        Raises:
            ValueError: the text is no longer what it was when the document was found.
        """
        digest = hashlib.sha256()
        for path in self.paths:
            content = _content(path, self.joined)
            digest.update(content)
            for piece in _cut(content):
                yield piece.decode("utf-8", errors="replace")
        if digest.hexdigest() != self.digest:
            raise ValueError(f"the document {self.name!r} changed while it was being read")

    @property
    def top_folder(self) -> str:
        """The first folder of the name; `""` for what lies in the source itself."""
        folder, slash, _ = self.name.partition("/")
        return folder if slash else ""


@dataclasses.dataclass(frozen=True)
class Found:
    """All documents of a source, sorted by name."""

    source: str
    """Name of the folder, without where it lies, and of the pattern if there was one."""
    documents: tuple[Document, ...]
    skipped: tuple[str, ...]
    """Files that are not UTF-8 text."""


def find_documents(source: str, folder_depth: int | None = None) -> Found:
    """Reads every file once; `source` is a folder, or a glob pattern such as `"notes/**/*.md"`.

    With `folder_depth`, a document is a folder of at most that many levels under the source, and
    what lies deeper belongs to it. Its files are joined in the order of their names, each ended
    by a newline. Names that start with a dot and empty files are left out.

    Raises:
        ValueError: the source does not exist.
    """
    root, label, paths = _list_files(source)
    joined = folder_depth is not None
    groups: dict[str, _Group] = {}
    skipped = []
    for parts in sorted(path.relative_to(root).parts for path in paths):
        path, name = root.joinpath(*parts), "/".join(parts)
        if any(part.startswith(".") for part in parts) or not path.is_file():
            continue
        content = _content(path, joined)
        if not is_text(content):
            skipped.append(name)
        elif content:
            folders = "".join(f"{part}/" for part in parts[:-1][:folder_depth])
            groups.setdefault((folders or "./") if joined else name, _Group()).add(path, content)
    documents = [
        Document(name, tuple(group.paths), joined, group.num_bytes, group.digest.hexdigest())
        for name, group in sorted(groups.items())
    ]
    return Found(label, tuple(documents), tuple(skipped))


class _Group:
    """A document in the making."""

    def __init__(self) -> None:
        self.paths: list[Path] = []
        self.num_bytes = 0
        self.digest = hashlib.sha256()

    def add(self, path: Path, content: bytes) -> None:
        self.paths.append(path)
        self.num_bytes += len(content)
        self.digest.update(content)


@dataclasses.dataclass(frozen=True)
class SplitDocuments:
    """Documents to train on and to validate with; equal texts are on the same side."""

    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    duplicates: int
    """Documents whose text an earlier one has."""
    moved: int
    """Of these, how many changed sides to be with that one."""


def split_documents(documents: Iterable[Document], by: str) -> SplitDocuments:
    """By a hash of the name of each document, or (`by="folder"`) of its top folder.

    A document whose text an earlier one has goes where that one goes.

    Raises:
        ValueError: there are fewer than two different texts, or top folders, to tell apart.
    """
    documents = tuple(documents)
    first: dict[str, Document] = {}
    for document in documents:
        first.setdefault(document.digest, document)
    units = {_unit(document, by) for document in first.values()}
    if len(units) < 2:
        what = "different text documents" if by == "document" else "top folders with text"
        raise ValueError(
            f"source: at least two {what} are needed, one to train on and one to validate with; "
            f"found {len(units)}"
        )
    held_out = validation_names(sorted(units))
    sides: tuple[list[Document], list[Document]] = ([], [])
    duplicates = moved = 0
    for document in documents:
        original = first[document.digest]
        side = _unit(original, by) in held_out
        sides[side].append(document)
        duplicates += document is not original
        moved += side != (_unit(document, by) in held_out)
    return SplitDocuments(tuple(sides[False]), tuple(sides[True]), duplicates, moved)


def _unit(document: Document, by: str) -> str:
    return document.name if by == "document" else document.top_folder


def root_and_pattern(source: str) -> tuple[Path, tuple[str, ...]]:
    """The folder that everything lies in, and the parts of the pattern there; () for a folder."""
    root = Path(source)
    if root.is_dir():
        return root, ()
    parts = root.parts
    magic = [i for i, part in enumerate(parts) if glob.has_magic(part)]
    first = magic[0] if magic else len(parts) - 1
    return Path(*parts[:first]), parts[first:]


def _list_files(source: str) -> tuple[Path, str, list[Path]]:
    """Root, printable name of the source, and the files under it."""
    root, pattern = root_and_pattern(source)
    if not pattern:
        found = [Path(folder, name) for folder, _, names in os.walk(root) for name in names]
        return root, root.resolve().name, found
    found = [Path(path) for path in glob.iglob(source, recursive=True)]
    if not found:
        raise ValueError(f"{source=} must be a folder, or a pattern that files match")
    return root, "/".join((root.resolve().name, *pattern)), found


def _content(path: Path, ended: bool) -> bytes:
    content = path.read_bytes()
    return content + b"\n" if ended and content and not content.endswith(b"\n") else content


def _cut(content: bytes) -> Iterator[bytes]:
    start = 0
    while len(content) - start > _PIECE_BYTES:
        end = content.rfind(b"\n", start, start + _PIECE_BYTES) + 1
        if end <= start:
            end = start + _PIECE_BYTES
            while content[end] & 0xC0 == 0x80:  # inside a character
                end -= 1
        yield content[start:end]
        start = end
    yield content[start:]
