"""A `local_stride` pattern as FlexAttention's `BlockMask`. Imports PyTorch late."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.cases import Case

FLEX_BLOCK_SIZE = 128
"""FlexAttention's default, and all that its backward takes on Hopper at head dims up to 128."""


def flex_block_mask(case: Case, device: str) -> Any:
    """FlexAttention's `BlockMask` of a pattern, without a token mask on the way.

    Blocks of 128 tokens that every part sees and that lie below the diagonal need no mask.
    """
    import torch  # type: ignore[import-not-found]
    from torch.nn.attention.flex_attention import (  # type: ignore[import-not-found]
        BlockMask,
    )

    rows, parts = -(-case.length // FLEX_BLOCK_SIZE), FLEX_BLOCK_SIZE // case.block_size
    blocks = case.pattern.block_mask_at(
        num_heads=case.heads, q_blocks=rows * parts, kv_blocks=rows * parts,
        num_kv_heads=case.kv_heads,
    )  # fmt: skip
    seen = torch.from_numpy(blocks).to(device).view(case.heads, rows, parts, rows, parts)
    some, every = seen.any(4).any(2), seen.all(4).all(2)
    full = every & torch.ones_like(every).tril(-1)
    return BlockMask.from_kv_blocks(
        *_ordered(some & ~full),
        *_ordered(full),
        BLOCK_SIZE=FLEX_BLOCK_SIZE,
        mask_mod=_mask_mod(case, device),
        seq_lengths=(case.length, case.length),
    )


def _ordered(blocks: Any) -> tuple[Any, Any]:
    """Of a block mask [heads, rows, columns]: how many a row, and which, these first."""
    import torch  # type: ignore[import-not-found]

    count = blocks.sum(-1, dtype=torch.int32)
    index = torch.argsort(blocks.to(torch.int8), dim=-1, descending=True, stable=True)
    return count[None], index.to(torch.int32)[None]


def _mask_mod(case: Case, device: str) -> Callable[[Any, Any, Any, Any], Any]:
    """`local_stride` token by token."""
    import torch  # type: ignore[import-not-found]

    assert case.local_blocks is not None
    assert case.stride is not None
    group = case.heads // case.kv_heads
    numbers = (case.local_blocks, case.stride, max(1, case.stride // case.kv_heads))
    local, stride, step = (torch.tensor(n, dtype=torch.int32, device=device) for n in numbers)

    def mask_mod(batch: Any, head: Any, query: Any, key: Any) -> Any:
        key_block = key // case.block_size
        near = query // case.block_size - key_block < local
        column = (key_block + (head // group) * step) % stride == 0
        return (query >= key) & (near | column)

    return mask_mod
