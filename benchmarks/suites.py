"""The named sets of cases, and how they are put together: what runs in turn is one cell."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Literal

from benchmarks.cases import FRAMEWORKS, Case, Name

SuiteName = Literal[
    "main", "batch", "paper", "gqa", "head_dim_64", "small_blocks", "packed", "million"
]
_OWN: tuple[Name, ...] = ("s2_jax", "triton", "jax_triton")
_ALL: tuple[Name, ...] = (*_OWN, "cudnn", "tokamax", "flash2", "torch_cudnn", "flex", "dkernel")
_NO_FLEX = tuple(name for name in _ALL if name != "flex")
_TOKENS = 131072
_LONG = (_TOKENS, 8192, 32768)


@dataclasses.dataclass(frozen=True)
class Suite:
    """cases: those of given lengths. sweeps: any lengths will do; else only those it has."""

    frameworks: tuple[Name, ...]
    lengths: tuple[int, ...]
    cases: Callable[[int], list[Case]]
    sweeps: bool = True


def _with(case: Case, *patterns: tuple[int, int]) -> list[Case]:
    return [dataclasses.replace(case, local_blocks=n, stride=v) for n, v in patterns]


def _small_blocks(length: int) -> list[Case]:
    """As many tokens visible as in blocks of 64: the same window, one block in 16."""
    return [
        Case(length, local_blocks=512 // size, stride=16, block_size=size) for size in (16, 32, 64)
    ]


def _packed(length: int) -> list[Case]:
    """Documents of 2048 in a row and as rows; a length that no tile divides; right padding."""
    shapes = {
        _TOKENS: [Case(length, documents=length // 2048)],
        _TOKENS - 1: [Case(length)],
        _TOKENS // 4: [Case(length, batch=4, padded=True)],
        2048: [Case(length, batch=_TOKENS // length)],
    }
    return [case for shape in shapes[length] for case in _with(shape, (8, 16))]


SUITES: dict[SuiteName, Suite] = {
    "main": Suite(
        _ALL,
        tuple(_TOKENS >> i for i in range(7)),
        lambda n: _with(Case(n), (8, 16), (8, 32), (16, 8)),
    ),
    "batch": Suite(
        _NO_FLEX,
        (2048, 8192, 4096, 16384),
        lambda n: _with(Case(n, batch=max(1, 32768 // n)), (8, 16)),
    ),
    "paper": Suite(
        (*_OWN, "flash2", "dkernel"),
        (_TOKENS,),
        lambda n: [
            *_with(Case(n), (8, 16), (8, 32)),
            *_with(Case(n, heads=64, kv_heads=64), (8, 64)),
        ],
        sweeps=False,
    ),
    "gqa": Suite(_ALL, _LONG, lambda n: _with(Case(n, kv_heads=8), (8, 16))),
    "head_dim_64": Suite(_NO_FLEX, _LONG, lambda n: _with(Case(n, head_dim=64), (8, 16))),
    "small_blocks": Suite((*_OWN, "dkernel"), (32768,), _small_blocks),
    "packed": Suite(_OWN, (_TOKENS, _TOKENS - 1, _TOKENS // 4, 2048), _packed, sweeps=False),
    "million": Suite(("s2_jax",), (1 << 20,), lambda n: _with(Case(n), (8, 64)), sweeps=False),
}


@dataclasses.dataclass
class Item:
    """One framework on one case, for all suites that ask for it, and what is known of it.

    facts: what preparing told. rounds: for each, mode -> {"seconds", "clock"}.
    """

    framework: Name
    case: Case
    suites: list[SuiteName] = dataclasses.field(default_factory=list)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    rounds: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    error: str | None = None


LARGE_BYTES = 4 << 30
"""Arrays of a case from which on only one worker at a time holds inputs."""
_LEAST_CLASS = 8 << 30


def memory_class(cell: list[Item]) -> int:
    """Bytes, a power of two; within a class JAX's workers stay. One for all but very large ones."""
    return max(_LEAST_CLASS, 1 << (cell[0].case.io_bytes("train") - 1).bit_length())


def plan(
    suites: Iterable[SuiteName], lengths: tuple[int, ...], frameworks: tuple[Name, ...]
) -> list[list[Item]]:
    """Cells: one pattern on one shape, each in the order in which rounds visit it.

    They come as they are asked for, suite by suite and length by length; but those of one shape
    follow each other, and so do those of one memory class. What several suites ask for is measured
    once; the dense frameworks once a shape, in its first cell.
    """
    items: dict[tuple[Name, Case], Item] = {}
    cells: dict[Case, list[Item]] = {}
    for suite in suites:
        known = SUITES[suite]
        chosen = [n for n in lengths if known.sweeps or n in known.lengths] or []
        for length in chosen if lengths else known.lengths:
            for case in known.cases(length):
                for name in frameworks:
                    if name in known.frameworks or name == "reference":
                        of = case if FRAMEWORKS[name].sparse else case.shape
                        if (name, of) not in items:
                            items[name, of] = Item(name, of)
                            cells.setdefault(case, []).append(items[name, of])
                        suites_of = items[name, of].suites
                        suites_of += [suite] * (suite not in suites_of)
    ordered = _together(list(cells.values()), lambda cell: cell[0].case.shape)
    return [sorted(cell, key=_turn) for cell in _together(ordered, memory_class)]


def _together(cells: list[list[Item]], key: Callable[[list[Item]], Any]) -> list[list[Item]]:
    """Those of equal key follow each other; otherwise the order stays."""
    ranks: dict[Any, int] = {}
    for cell in cells:
        ranks.setdefault(key(cell), len(ranks))
    return sorted(cells, key=lambda cell: ranks[key(cell)])


def _turn(item: Item) -> tuple[int, ...]:
    """The dense frameworks first."""
    return (item.case.local_blocks is not None, list(FRAMEWORKS).index(item.framework))
