"""Metrics as JSON lines: one per step, one per evaluation, none lost or doubled by a kill."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from train.folder import write_text

Record = dict[str, Any]


class MetricsFile:
    """Collects records and appends them to the file when told to; with `writes=False` to none."""

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self._path, self._writes = path, writes
        self._pending: list[Record] = []

    def add(self, record: Record) -> None:
        """`record` has a `"step"`; its values may be arrays of one number, read at `flush`."""
        self._pending.append(record)

    def flush(self) -> list[Record]:
        """Writes what was added, durably, and returns it as plain numbers."""
        records = [{name: _number(x) for name, x in rec.items()} for rec in self._pending]
        self._pending = []
        if not self._writes:
            return records
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())
        return records

    def keep_until(self, step: int) -> None:
        """Drops what was written after `step`; a resumed run takes those steps again."""
        if not self._writes:
            return
        kept = [record for record in read_metrics(self._path) if record["step"] <= step]
        write_text(self._path, "".join(json.dumps(record) + "\n" for record in kept))


def read_metrics(path: Path) -> list[Record]:
    """All whole records; a kill can leave the last line unfinished, without its line end."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _number(value: Any) -> int | float:
    return value if isinstance(value, int) else float(value)
