"""The pieces that patterns are built from. In the pictures, rows are query blocks, columns key
blocks; `#` is visible and causality is already applied.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any

from pallas_kernels.masks import Window
from s2_jax.patterns import Pattern
from s2_jax.structure import HeadKind, Heads, Structure, at_least_one, boolean, integer


@dataclasses.dataclass(frozen=True, kw_only=True)
class _SameForAllHeads(Pattern):
    def _head_key(self, heads: Heads, head: int) -> Hashable:
        return ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense(_SameForAllHeads):
    def _sees(self, heads: Heads, q_block: Any, kv_block: Any) -> Any:
        return (q_block >= 0) & (kv_block >= 0)

    def _structure(self) -> Structure:
        return Structure()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Local(_SameForAllHeads):
    local_blocks: int

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one("local_blocks", self.local_blocks)

    def _sees(self, heads: Heads, q_block: Any, kv_block: Any) -> Any:
        return abs(q_block - kv_block) < self.local_blocks

    def _structure(self) -> Structure:
        return Structure(edges=frozenset({self.local_blocks, 1 - self.local_blocks}))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sink(_SameForAllHeads):
    sink_blocks: int

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one("sink_blocks", self.sink_blocks)

    def _sees(self, heads: Heads, q_block: Any, kv_block: Any) -> Any:
        return (q_block >= 0) & (kv_block < self.sink_blocks)

    def _structure(self) -> Structure:
        return Structure(kv_edges=frozenset({self.sink_blocks}))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DilatedStride(_SameForAllHeads):
    stride: int

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one("stride", self.stride)

    def _sees(self, heads: Heads, q_block: Any, kv_block: Any) -> Any:
        return (q_block - kv_block) % self.stride == 0

    def _structure(self) -> Structure:
        return Structure(q_period=self.stride, kv_period=self.stride)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenWindow(_SameForAllHeads):
    window: int

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one("window", self.window)

    def token_window(self) -> tuple[Pattern | None, Window | None]:
        return None, Window(self.window, adds=False)

    @property
    def _block_reach(self) -> int:
        """Block distances below this hold at least one visible pair of tokens."""
        return (self.window + self.block_size - 2) // self.block_size + 1

    def _sees(self, heads: Heads, q_block: Any, kv_block: Any) -> Any:
        return abs(q_block - kv_block) < self._block_reach

    def _sees_tokens(self, heads: Heads, q_position: Any, kv_position: Any) -> Any:
        return abs(q_position - kv_position) < self.window

    def _structure(self) -> Structure:
        return Structure(edges=frozenset({self._block_reach, 1 - self._block_reach}))


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerticalStride(Pattern):
    vert_stride: int
    heads: HeadKind = "kv"
    homogeneous: bool = False
    head_offset: int = 0
    head_step: int | None = None
    dense_heads: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one("vert_stride", self.vert_stride)
        boolean("homogeneous", self.homogeneous)
        integer("head_offset", self.head_offset)
        if not isinstance(self.heads, str) or self.heads not in ("kv", "query"):
            raise ValueError(f'heads={self.heads!r} must be "kv" or "query"')
        if self.head_step is not None:
            integer("head_step", self.head_step)
        if integer("dense_heads", self.dense_heads) < 0:
            raise ValueError(f"dense_heads={self.dense_heads} must not be negative")
        if self.homogeneous and (self.head_step is not None or self.dense_heads):
            raise ValueError(
                "homogeneous=True gives every head the same columns: it takes no head_step and no "
                f"dense_heads, got head_step={self.head_step}, dense_heads={self.dense_heads}"
            )

    def _step(self, heads: Heads) -> int:
        if self.homogeneous:
            return 0
        if self.head_step is not None:
            return self.head_step
        return max(1, self.vert_stride // heads.count(self.heads))

    def _sees(self, heads: Heads, q_block: Any, kv_block: Any) -> Any:
        head = heads.pattern_head(self.heads)
        shift = self._step(heads) % self.vert_stride
        column = kv_block + head * shift + self.head_offset % self.vert_stride
        dense = head >= heads.count(self.heads) - self.dense_heads
        return ((column % self.vert_stride == 0) | dense) & (q_block >= 0)

    def _structure(self) -> Structure:
        return Structure(kv_period=self.vert_stride)

    def _head_key(self, heads: Heads, head: int) -> Hashable:
        one = Heads(head, heads.num_heads, heads.num_kv_heads)
        number = one.pattern_head(self.heads)
        if number >= heads.count(self.heads) - self.dense_heads:
            return "dense"
        return (number * self._step(heads) + self.head_offset) % self.vert_stride

    def _check(self, heads: Heads, q_blocks: int, kv_blocks: int) -> None:
        if self.dense_heads > heads.count(self.heads):
            raise ValueError(
                f"dense_heads={self.dense_heads} is more than the "
                f"{heads.count(self.heads)} {self.heads} heads of the call"
            )


def dense(*, block_size: int = 64, causal: bool = True) -> Pattern:
    """Everything: ordinary (causal) attention in the same kernels."""
    return Dense(block_size=block_size, causal=causal)


def local(local_blocks: int, *, block_size: int = 64, causal: bool = True) -> Pattern:
    """The window: the query's own block and the `local_blocks - 1` before it.

    Where `causal=False` it reaches as far ahead as back. `local(2)`, causal::

        # . . .
        # # . .
        . # # .
        . . # #
    """
    return Local(local_blocks=local_blocks, block_size=block_size, causal=causal)


def sink(sink_blocks: int = 1, *, block_size: int = 64, causal: bool = True) -> Pattern:
    """The first `sink_blocks` key blocks of the row, for every query."""
    return Sink(sink_blocks=sink_blocks, block_size=block_size, causal=causal)


def dilated_stride(stride: int, *, block_size: int = 64, causal: bool = True) -> Pattern:
    """Every `stride`-th block counted back from the query's own; the same for all heads.

    `dilated_stride(2)`, causal::

        # . . .
        . # . .
        # . # .
        . # . #
    """
    return DilatedStride(stride=stride, block_size=block_size, causal=causal)


def token_window(window: int, *, block_size: int = 64, causal: bool = True) -> Pattern:
    """The last `window` tokens, exactly: q - k < window (|q - k| where not causal).

    `|` or `&` joins it with the rest once, at the top level.
    """
    return TokenWindow(window=window, block_size=block_size, causal=causal)


def vertical_stride(
    vert_stride: int,
    *,
    block_size: int = 64,
    causal: bool = True,
    heads: HeadKind = "kv",
    homogeneous: bool = False,
    head_offset: int = 0,
    head_step: int | None = None,
    dense_heads: int = 0,
) -> Pattern:
    """One key block in `vert_stride`, at an absolute position that depends on the head.

    Pattern head h sees key block j where `(j + h * head_step + head_offset) % vert_stride == 0`.
    Heads 0 and 1 of `vertical_stride(2)`, causal::

        # . . .    . . . .
        # . . .    . # . .
        # . # .    . # . .
        # . # .    . # . #

    Args:
      vert_stride: distance between visible blocks, in blocks.
      block_size: tokens in a block: 16, 32, 64 or 128.
      causal: forbid keys after the query, token by token.
      heads: "kv": the key/value heads are the pattern heads, and the query heads of a group
        share a pattern; "query": every query head has its own.
      homogeneous: all heads share one offset (`head_step` 0).
      head_offset: shifts all heads.
      head_step: shift from one head to the next, in blocks; by default
        `max(1, vert_stride // pattern_heads)`.
      dense_heads: so many of the last pattern heads see every block.

    Raises:
      ValueError, TypeError: a number out of range or of the wrong kind, named.

    Source: arXiv 2407.17678, section 3; the rule of dkernel 0.0.2's `get_sparse_attn_mask` (which
    divides by the query heads for its default step, also with fewer key/value heads).
    """
    return VerticalStride(
        vert_stride=vert_stride,
        block_size=block_size,
        causal=causal,
        heads=heads,
        homogeneous=homogeneous,
        head_offset=head_offset,
        head_step=head_step,
        dense_heads=dense_heads,
    )


def local_stride(
    local_blocks: int,
    vert_stride: int,
    *,
    block_size: int = 64,
    causal: bool = True,
    heads: HeadKind = "kv",
    homogeneous: bool = False,
    head_offset: int = 0,
    head_step: int | None = None,
    dense_heads: int = 0,
) -> Pattern:
    """The S2 pattern: `local(local_blocks) | vertical_stride(vert_stride, ...)`.

    Every head sees the window and its own columns; together the heads see the whole context
    where there are at least `vert_stride` of them. Arguments as for `vertical_stride`.
    """
    return local(local_blocks, block_size=block_size, causal=causal) | vertical_stride(
        vert_stride,
        block_size=block_size,
        causal=causal,
        heads=heads,
        homogeneous=homogeneous,
        head_offset=head_offset,
        head_step=head_step,
        dense_heads=dense_heads,
    )
