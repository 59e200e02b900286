"""Frozen dataclasses from the JSON that `dataclasses.asdict` of them gives."""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any


def build(cls: type[Any], values: dict[str, Any]) -> Any:
    """A dataclass of plain JSON values, nested ones too.

    Raises:
        KeyError, TypeError, ValueError: values that do not describe one.
    """
    hints = typing.get_type_hints(cls)
    return cls(**{name: _value(hints[name], value) for name, value in values.items()})


def _value(kind: Any, value: Any) -> Any:
    if isinstance(kind, types.UnionType) and value is not None:
        [kind] = [one for one in kind.__args__ if one is not type(None)][:1]
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return build(kind, value)
    return Path(value) if kind is Path and value is not None else value
