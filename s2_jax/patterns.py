"""What a head may see: the rule that every layout, kernel call and reference call reads.

A pattern answers one question, "may a query in block i of head h attend to key block j?", as a
frozen dataclass of a few numbers: hashable, compared by value, static under `jit`. Blocks are
absolute positions in the row. The pieces are in `pieces.py` and `block_mask.py`, how they are
combined is here, and what can be measured of them is in `measures.py`.

Source: S2-Attention (arXiv 2407.17678), section 3; conventions of `dkernel` 0.0.2.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Hashable
from typing import Any

import numpy as np

from pallas_kernels.masks import Window
from s2_jax import measures
from s2_jax.structure import HeadKind, Heads, Structure, boolean, integer

BLOCK_SIZES = (16, 32, 64, 128)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pattern(abc.ABC):
    """A rule over blocks of `block_size` tokens; `causal` also forbids keys after the query.

    `a | b` sees what either sees, `a & b` what both see; both sides need the same `block_size`
    and `causal`. `a.at_distance(near, far)` keeps near <= d < far (|d| where not causal).
    """

    block_size: int = 64
    causal: bool = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # NumPy's integers overflow and promote
            if isinstance(number := getattr(self, field.name), np.integer):
                object.__setattr__(self, field.name, int(number))
        if integer("block_size", self.block_size) not in BLOCK_SIZES:
            raise ValueError(f"block_size={self.block_size!r} must be one of {BLOCK_SIZES}")
        boolean("causal", self.causal)

    # The rule. `heads.index`, `q_block` and `kv_block` are integer arrays that broadcast.

    @abc.abstractmethod
    def _sees(self, heads: Heads, q_block: Any, kv_block: Any) -> Any:
        """Whether the blocks are visible, causality left aside."""

    def _sees_tokens(self, heads: Heads, q_position: Any, kv_position: Any) -> Any:
        """The same, token by token; only a token window differs from its blocks."""
        return self._sees(heads, q_position // self.block_size, kv_position // self.block_size)

    # What a layout may know about it.

    @abc.abstractmethod
    def _structure(self) -> Structure | None:
        """Where the rule changes; None where nothing is known."""

    @abc.abstractmethod
    def _head_key(self, heads: Heads, head: int) -> Hashable:
        """Equal for two query heads that see the same."""

    def _check(self, heads: Heads, q_blocks: int, kv_blocks: int) -> None:  # noqa: B027
        """Raises ValueError where the pattern does not fit the heads or lengths of a call."""

    def token_window(self) -> tuple[Pattern | None, Window | None]:
        """The rule over blocks that a token window joins (None: all blocks), and the window."""
        return self, None

    @property
    def _has_token_window(self) -> bool:
        return self.token_window()[1] is not None

    @property
    def q_block_limit(self) -> int | None:
        """Query blocks from here on are not defined; None where all are."""
        return None

    def visible(self, heads: Heads, q_block: Any, kv_block: Any) -> Any:
        """Whether blocks are visible, causality applied; arrays broadcast against each other."""
        seen = self._sees(heads, q_block, kv_block)
        return seen & (q_block >= kv_block) if self.causal else seen

    def visible_tokens(self, heads: Heads, q_position: Any, kv_position: Any) -> Any:
        """Whether tokens are visible, causality applied; arrays broadcast against each other."""
        seen = self._sees_tokens(heads, q_position, kv_position)
        return seen & (q_position >= kv_position) if self.causal else seen

    def structure(self) -> Structure | None:
        """`Structure` of the rule with causality, or None for an arbitrary mask."""
        structure = self._structure()
        if structure is None or not self.causal:
            return structure
        return structure.merge(Structure(edges=frozenset({0})))

    def check(self, num_heads: int, num_kv_heads: int, q_blocks: int, kv_blocks: int) -> None:
        """Raises ValueError where the pattern does not fit these heads and blocks."""
        self._check(Heads(None, num_heads, num_kv_heads), q_blocks, kv_blocks)

    def head_keys(self, num_heads: int, num_kv_heads: int) -> tuple[Hashable, ...]:
        """One key a query head; heads with equal keys see the same."""
        heads = Heads(None, num_heads, num_kv_heads)
        return tuple(self._head_key(heads, head) for head in range(num_heads))

    # Composition.

    def __or__(self, other: Pattern) -> Pattern:
        return Union(parts=_parts(Union, self, other), **_common("|", self, other))

    def __and__(self, other: Pattern) -> Pattern:
        return Intersection(parts=_parts(Intersection, self, other), **_common("&", self, other))

    __array_ufunc__ = None  # NumPy's arrays leave | and & to the two below

    def __ror__(self, other: Any) -> Pattern:
        raise TypeError(f"cannot combine {type(other).__name__} | a pattern")

    def __rand__(self, other: Any) -> Pattern:
        raise TypeError(f"cannot combine {type(other).__name__} & a pattern")

    def at_distance(self, near: int, far: int | None) -> Pattern:
        """Keeps what lies at `near <= d < far` blocks; `far=None` means any distance."""
        return AtDistance(
            pattern=self, near=near, far=far, block_size=self.block_size, causal=self.causal
        )

    def __bool__(self) -> bool:
        raise TypeError("a pattern has no truth value; combine patterns with | and &")

    # Measures (see measures.py).

    def block_mask_at(
        self, *, num_heads: int, q_blocks: int, kv_blocks: int, num_kv_heads: int | None = None
    ) -> np.ndarray:
        """The blocks seen, NumPy bool `[num_heads, q_blocks, kv_blocks]`, causality applied."""
        return measures.block_mask_at(self, num_heads, q_blocks, kv_blocks, num_kv_heads)

    def density(
        self, num_heads: int, q_len: int, kv_len: int, num_kv_heads: int | None = None
    ) -> float:
        """Visible blocks over causally possible blocks, all heads together."""
        return measures.density(self, num_heads, q_len, kv_len, num_kv_heads)

    def flops(
        self,
        num_heads: int,
        q_len: int,
        kv_len: int,
        num_kv_heads: int | None = None,
        *,
        head_dim: int,
        backward: bool = False,
    ) -> int:
        """Operations on whole visible blocks: 2 matmuls forward, 5 backward; batch 1."""
        return measures.flops(
            self, num_heads, q_len, kv_len, num_kv_heads, head_dim=head_dim, backward=backward
        )

    def coverage(
        self, num_heads: int, q_len: int, kv_len: int, num_kv_heads: int | None = None
    ) -> float:
        """The share of the last query's causally possible blocks that some head sees."""
        return measures.coverage(self, num_heads, q_len, kv_len, num_kv_heads)

    def kv_footprint(
        self, num_heads: int, q_len: int, kv_len: int, num_kv_heads: int | None = None
    ) -> np.ndarray:
        """Tokens that each key/value head must keep to decode, int `[num_kv_heads]`."""
        return measures.kv_footprint(self, num_heads, q_len, kv_len, num_kv_heads)

    def is_kv_efficient(
        self, num_heads: int, q_len: int, kv_len: int, num_kv_heads: int | None = None
    ) -> bool:
        """Whether a key block that a query drops is never needed again by a later one."""
        return measures.is_kv_efficient(self, num_heads, q_len, kv_len, num_kv_heads)


def _common(symbol: str, a: Pattern, b: Pattern) -> dict[str, Any]:
    """The settings that both sides must share."""
    if not isinstance(b, Pattern):
        raise TypeError(f"cannot combine a pattern {symbol} {type(b).__name__}")
    for name in ("block_size", "causal"):
        if getattr(a, name) != getattr(b, name):
            raise ValueError(
                f"both sides of {symbol} need the same {name}, "
                f"got {getattr(a, name)!r} and {getattr(b, name)!r}"
            )
    return {"block_size": a.block_size, "causal": a.causal}


def _smallest(patterns: tuple[Pattern, ...]) -> int | None:
    return min((p.q_block_limit for p in patterns if p.q_block_limit is not None), default=None)


def _parts(kind: type, a: Pattern, b: Pattern) -> tuple[Pattern, ...]:
    """Flattens a | (b | c), so that equal rules compare equal more often."""
    parts: tuple[Pattern, ...] = ()
    for side in (a, b):
        parts += side.parts if isinstance(side, kind) else (side,)  # type: ignore[attr-defined]
    return parts


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Combination(Pattern):
    parts: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        windows = [part for part in self.parts if part._has_token_window]
        if len(windows) > 1 or any(isinstance(part, _Combination) for part in windows):
            raise ValueError("a token_window joins the rest once, at the top level")

    def token_window(self) -> tuple[Pattern | None, Window | None]:
        found = (part.token_window()[1] for part in self.parts if part._has_token_window)
        if (window := next(found, None)) is None:
            return self, None
        rest = tuple(part for part in self.parts if not part._has_token_window)
        joined = rest[0] if len(rest) == 1 else dataclasses.replace(self, parts=rest)
        return joined, Window(window.size, adds=isinstance(self, Union))

    @property
    def q_block_limit(self) -> int | None:
        return _smallest(self.parts)

    def _structure(self) -> Structure | None:
        merged = Structure()
        for part in self.parts:
            structure = part._structure()
            if structure is None:
                return None
            merged = merged.merge(structure)
        return merged

    def _head_key(self, heads: Heads, head: int) -> Hashable:
        return tuple(part._head_key(heads, head) for part in self.parts)

    def _check(self, heads: Heads, q_blocks: int, kv_blocks: int) -> None:
        for part in self.parts:
            part._check(heads, q_blocks, kv_blocks)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Union(_Combination):
    """What any of the parts sees."""

    def _sees(self, heads: Heads, q_block: Any, kv_block: Any) -> Any:
        seen = self.parts[0]._sees(heads, q_block, kv_block)
        for part in self.parts[1:]:
            seen = seen | part._sees(heads, q_block, kv_block)
        return seen

    def _sees_tokens(self, heads: Heads, q_position: Any, kv_position: Any) -> Any:
        seen = self.parts[0]._sees_tokens(heads, q_position, kv_position)
        for part in self.parts[1:]:
            seen = seen | part._sees_tokens(heads, q_position, kv_position)
        return seen


@dataclasses.dataclass(frozen=True, kw_only=True)
class Intersection(_Combination):
    """What all of the parts see."""

    def _sees(self, heads: Heads, q_block: Any, kv_block: Any) -> Any:
        seen = self.parts[0]._sees(heads, q_block, kv_block)
        for part in self.parts[1:]:
            seen = seen & part._sees(heads, q_block, kv_block)
        return seen

    def _sees_tokens(self, heads: Heads, q_position: Any, kv_position: Any) -> Any:
        seen = self.parts[0]._sees_tokens(heads, q_position, kv_position)
        for part in self.parts[1:]:
            seen = seen & part._sees_tokens(heads, q_position, kv_position)
        return seen


@dataclasses.dataclass(frozen=True, kw_only=True)
class AtDistance(Pattern):
    """`pattern` where `near <= d < far`, d in blocks (|d| where not causal)."""

    pattern: Pattern
    near: int
    far: int | None

    def __post_init__(self) -> None:
        super().__post_init__()
        integer("near", self.near)
        if self.far is not None:
            integer("far", self.far)
        if self.near < 0 or (self.far is not None and self.far <= self.near):
            near, far = self.near, self.far
            raise ValueError(f"at_distance needs 0 <= near < far, got {near=}, {far=}")
        if self.pattern._has_token_window:
            raise ValueError("a token_window joins the rest once, at the top level")

    def _sees(self, heads: Heads, q_block: Any, kv_block: Any) -> Any:
        distance = q_block - kv_block
        if not self.causal:
            distance = abs(distance)
        seen = self.pattern._sees(heads, q_block, kv_block) & (distance >= self.near)
        return seen if self.far is None else seen & (distance < self.far)

    @property
    def q_block_limit(self) -> int | None:
        return self.pattern.q_block_limit

    def _structure(self) -> Structure | None:
        structure = self.pattern._structure()
        if structure is None:
            return None
        edges = {self.near} if self.far is None else {self.near, self.far}
        if not self.causal:
            edges |= {1 - edge for edge in edges}
        return structure.merge(Structure(edges=frozenset(edges)))

    def _head_key(self, heads: Heads, head: int) -> Hashable:
        return self.pattern._head_key(heads, head)

    def _check(self, heads: Heads, q_blocks: int, kv_blocks: int) -> None:
        self.pattern._check(heads, q_blocks, kv_blocks)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerHead(Pattern):
    """One pattern a head: as many as there are key/value heads, or as there are query heads."""

    patterns: tuple[Pattern, ...]

    def _kind(self, heads: Heads) -> HeadKind:
        return "kv" if len(self.patterns) == heads.num_kv_heads else "query"

    def _sees(self, heads: Heads, q_block: Any, kv_block: Any) -> Any:
        index = heads.pattern_head(self._kind(heads))
        members: dict[Pattern, list[int]] = {}
        for number, pattern in enumerate(self.patterns):
            members.setdefault(pattern, []).append(number)
        seen: Any = False
        for pattern, numbers in members.items():
            mine = index == numbers[0]
            for number in numbers[1:]:
                mine = mine | (index == number)
            seen = seen | (mine & pattern._sees(heads, q_block, kv_block))
        return seen

    @property
    def q_block_limit(self) -> int | None:
        return _smallest(self.patterns)

    def _structure(self) -> Structure | None:
        merged = Structure()
        for pattern in dict.fromkeys(self.patterns):
            structure = pattern._structure()
            if structure is None:
                return None
            merged = merged.merge(structure)
        return merged

    def _head_key(self, heads: Heads, head: int) -> Hashable:
        one = Heads(head, heads.num_heads, heads.num_kv_heads)
        pattern = self.patterns[one.pattern_head(self._kind(heads))]
        return pattern, pattern._head_key(heads, head)

    def _check(self, heads: Heads, q_blocks: int, kv_blocks: int) -> None:
        if len(self.patterns) not in (heads.num_kv_heads, heads.num_heads):
            raise ValueError(
                f"per_head got {len(self.patterns)} patterns; it needs one for each of the "
                f"{heads.num_kv_heads} key/value heads or of the {heads.num_heads} query heads"
            )
        for pattern in dict.fromkeys(self.patterns):
            pattern._check(heads, q_blocks, kv_blocks)


def per_head(patterns: tuple[Pattern, ...] | list[Pattern]) -> Pattern:
    """One pattern a head.

    Args:
      patterns: as many as the call has key/value heads (a group shares its pattern) or query
        heads. All need the same `block_size` and `causal`; a pattern with head offsets keeps
        the head numbers of the whole call.

    Raises:
      ValueError: none given, settings that differ, or a token_window among them.
      TypeError: an entry that is not a pattern.
    """
    if not isinstance(patterns, (tuple, list)):
        raise TypeError(f"per_head takes a tuple of patterns, got {type(patterns).__name__}")
    patterns = tuple(patterns)
    if not patterns:
        raise ValueError("per_head needs at least one pattern")
    for pattern in patterns:
        if not isinstance(pattern, Pattern):
            raise TypeError(f"per_head takes patterns, got {type(pattern).__name__}")
        if pattern._has_token_window:
            raise ValueError("a token_window joins the rest once, at the top level")
    settings = {"block_size": patterns[0].block_size, "causal": patterns[0].causal}
    for pattern in patterns[1:]:
        settings = _common("per_head", patterns[0], pattern)
    return PerHead(patterns=patterns, **settings)  # type: ignore[arg-type]
