"""What is measured, and with what: shapes, patterns and frameworks."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from s2_jax import Pattern

Name = Literal[
    "s2_jax", "triton", "jax_triton", "cudnn", "tokamax", "flash2", "torch_cudnn", "flex",
    "dkernel", "reference",
]  # fmt: skip
Mode = Literal["forward", "train"]
MODES: tuple[Mode, ...] = ("forward", "train")
"""train is forward and backward in one program."""
GROUP_SECONDS = 0.25
"""The least that a group of calls takes which are timed together; from there on it is one call."""
_ITEM_BYTES = 2


@dataclasses.dataclass(frozen=True)
class Framework:
    """packages: what must be installed. module: where its `Session` is. sparse: takes patterns."""

    packages: tuple[str, ...]
    module: str
    sparse: bool
    what: str


_JAX, _TORCH = "benchmarks.jax_attention", "benchmarks.torch_attention"
FRAMEWORKS: dict[Name, Framework] = {
    "s2_jax": Framework(("jax",), _JAX, True, "s2_jax.s2_attention"),
    "triton": Framework(("jax",), _JAX, True, "s2_jax's kernels by Triton alone"),
    "jax_triton": Framework(
        ("jax", "jax_triton", "triton"), _JAX, True, "the same by the official Triton"
    ),
    "cudnn": Framework(("jax",), _JAX, False, "jax.nn.dot_product_attention, cuDNN, dense"),
    "tokamax": Framework(("tokamax",), _JAX, False, "tokamax, Mosaic GPU, dense"),
    "flash2": Framework(("torch",), _TORCH, False, "PyTorch SDPA, FlashAttention-2, dense"),
    "torch_cudnn": Framework(("torch",), _TORCH, False, "PyTorch SDPA, cuDNN, dense"),
    "flex": Framework(("torch",), _TORCH, True, "FlexAttention, same mask, 128-token blocks"),
    "dkernel": Framework(("torch", "dkernel"), _TORCH, True, "dkernel, same pattern"),
    "reference": Framework(("jax",), _JAX, True, "s2_jax's reference, to try this on a CPU"),
}


def missing_package(name: Name) -> str | None:
    """The first package that a framework needs and that is not installed."""
    packages = FRAMEWORKS[name].packages
    return next((p for p in packages if importlib.util.find_spec(p) is None), None)


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape, and the pattern of the frameworks that take one; causal, bfloat16.

    documents: segments of equal length in a row. padded: of `batch` rows, row i has
    `(i + 1) / batch` of its tokens. Without local_blocks and stride: dense.
    """

    length: int
    batch: int = 1
    heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    documents: int = 1
    padded: bool = False
    local_blocks: int | None = None
    stride: int | None = None
    block_size: int = 64

    @property
    def shape(self) -> Case:
        """The same without a pattern: what dense frameworks compute, once for all patterns."""
        return dataclasses.replace(self, local_blocks=None, stride=None, block_size=64)

    @property
    def pattern(self) -> Pattern:
        from s2_jax import local_stride  # late: not every worker needs JAX

        if self.local_blocks is None or self.stride is None:
            raise ValueError(f"a dense case has no pattern: {self}")
        return local_stride(self.local_blocks, self.stride, block_size=self.block_size)

    @property
    def valid_lengths(self) -> list[int]:
        """Tokens of each sequence that attends to itself alone: rows, or the documents in them."""
        if self.padded:
            return [self.length * (i + 1) // self.batch for i in range(self.batch)]
        return [self.length // self.documents] * (self.documents * self.batch)

    @property
    def flops(self) -> int:
        """Of the forward pass: 2 matmuls on visible blocks, as `Pattern.flops`.

        Counted in closed form: a million tokens would take that half a minute.
        """
        lengths = self.valid_lengths
        visible = sum(
            lengths.count(length) * self._visible_blocks(-(-length // self.block_size))
            for length in set(lengths)
        )
        return visible * 4 * self.block_size**2 * self.head_dim

    def _visible_blocks(self, blocks: int) -> int:
        """Of all heads, in a square of that many blocks."""
        if self.local_blocks is None or self.stride is None:
            return self.heads * blocks * (blocks + 1) // 2
        rows = np.arange(blocks)
        local = self.kv_heads * int(np.minimum(rows + 1, self.local_blocks).sum())
        step = max(1, self.stride // self.kv_heads)
        first = -np.arange(self.kv_heads)[:, None] * step % self.stride
        columns = (rows - self.local_blocks - first + self.stride) // self.stride
        vertical = int(np.maximum(columns, 0).sum())
        return (local + vertical) * (self.heads // self.kv_heads)

    @property
    def theoretical_speedup(self) -> float:
        """Operations of dense causal attention on this shape over those of the pattern."""
        return self.shape.flops / self.flops

    def io_bytes(self, mode: Mode) -> int:
        """Of query, key, value and output; to train also of the gradients of all four."""
        numbers = self.batch * self.length * self.head_dim * 2 * (self.heads + self.kv_heads)
        return numbers * _ITEM_BYTES * (1 if mode == "forward" else 2)
