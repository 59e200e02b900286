"""The tensors of a folder of safetensors: what is there, from the headers, and one at a time."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its shape, and its dtype by the name that safetensors gives it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor by name: of the files that the index names, or else of `model.safetensors`.

    Raises:
      ValueError: no such file, one that is broken, or an index that does not fit its files.
    """
    if not (folder / INDEX).is_file():
        return _headers(folder / SINGLE)
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(x, str) for x in weight_map.values()):
        raise ValueError(f"{folder / INDEX} must have a weight_map from tensors to files")
    found: dict[str, StoredTensor] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise ValueError(f"{folder / INDEX} names {name!r}, which is not a file beside it")
        found |= _headers(folder / name)
    lacking = [name for name, file in weight_map.items() if file != _file_of(found, name)]
    if lacking:
        raise ValueError(f"{folder / INDEX} names tensors that are not there: {listed(lacking)}")
    return found


def read_tensors(tensors: dict[str, StoredTensor]) -> Iterator[tuple[str, np.ndarray]]:
    """Name and float32 values, one file after the other."""
    from safetensors import safe_open

    for path in sorted({tensor.file for tensor in tensors.values()}):
        with safe_open(path, framework="np") as file:
            for name, tensor in tensors.items():
                if tensor.file == path:
                    yield name, file.get_tensor(name).astype(np.float32)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError, with the path, where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def listed(names: list[str], most: int = 8) -> str:
    """The first few, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _headers(path: Path) -> dict[str, StoredTensor]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: StoredTensor(path, tuple(part.get_shape()), part.get_dtype())
                for name, part in slices.items()
            }
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def _file_of(found: dict[str, StoredTensor], name: str) -> str | None:
    return found[name].file.name if name in found else None
