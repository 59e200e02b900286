"""What is measured, and with what: shapes, patterns, frameworks, and the rows of a result."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any, Literal

import s2_jax

Name = Literal["s2_jax", "cudnn", "tokamax", "flash2", "flex", "dkernel"]
Mode = Literal["forward", "train"]
MODES: tuple[Mode, ...] = ("forward", "train")
BLOCK_SIZE = 64
"""Of every pattern: the only one that all the sparse frameworks take."""


@dataclasses.dataclass(frozen=True)
class Framework:
    """packages: what must be installed. module: where its attention is. sparse: takes patterns."""

    packages: tuple[str, ...]
    module: str
    sparse: bool
    what: str


_JAX, _TORCH = "benchmarks.jax_attention", "benchmarks.torch_attention"
FRAMEWORKS: dict[Name, Framework] = {
    "s2_jax": Framework(("jax",), _JAX, True, "s2_jax.s2_attention"),
    "cudnn": Framework(("jax",), _JAX, False, "jax.nn.dot_product_attention, cuDNN, dense"),
    "tokamax": Framework(("tokamax",), _JAX, False, "tokamax, Mosaic GPU, dense"),
    "flash2": Framework(("torch",), _TORCH, False, "PyTorch SDPA, FlashAttention-2, dense"),
    "flex": Framework(("torch",), _TORCH, True, "FlexAttention, same mask, 128-token blocks"),
    "dkernel": Framework(("torch", "dkernel"), _TORCH, True, "dkernel, same pattern"),
}


def missing_package(name: Name) -> str | None:
    """The first package that a framework needs and that is not installed."""
    packages = FRAMEWORKS[name].packages
    return next((p for p in packages if importlib.util.find_spec(p) is None), None)


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape, and the pattern of the frameworks that take one.

    forward_flops, backward_flops: on visible blocks, 2 and 5 matmuls; None where dense.
    """

    length: int
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    local_blocks: int | None = None
    stride: int | None = None
    forward_flops: int | None = None
    backward_flops: int | None = None

    @property
    def pattern(self) -> s2_jax.Pattern:
        if self.local_blocks is None or self.stride is None:
            raise ValueError(f"a dense case has no pattern: {self}")
        return s2_jax.local_stride(self.local_blocks, self.stride, block_size=BLOCK_SIZE)

    def with_pattern(self, local_blocks: int, stride: int) -> Case:
        """The same shape with a pattern and its operations."""
        case = dataclasses.replace(self, local_blocks=local_blocks, stride=stride)
        forward, backward = (
            self.batch * case.pattern.flops(
                self.heads, self.length, self.length, self.kv_heads,
                head_dim=self.head_dim, backward=backward,
            )
            for backward in (False, True)
        )  # fmt: skip
        return dataclasses.replace(case, forward_flops=forward, backward_flops=backward)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """seconds: of one call. memory: bytes at its peak, inputs and results among them.

    first_call: seconds until the first result, compilation included.
    """

    seconds: float
    memory: int
    first_call: float


def row_of(
    name: Name, case: Case, measured: dict[Mode, Measurement], error: str | None
) -> dict[str, Any]:
    """A row of the result's JSON; what was not measured is null.

    train is forward and backward in one program; backward is the difference.
    """
    row: dict[str, Any] = {
        "framework": name,
        "length": case.length,
        "local_blocks": case.local_blocks,
        "stride": case.stride,
        "error": error,
    }
    for mode in MODES:
        one = measured.get(mode)
        row[f"{mode}_ms"] = one and one.seconds * 1e3
        row[f"{mode}_mb"] = one and one.memory / 1e6
        row[f"{mode}_first_call_s"] = one and one.first_call
    row["backward_ms"] = None
    if row["train_ms"] is not None:
        row["backward_ms"] = row["train_ms"] - row["forward_ms"]
    for part, flops in (("forward", case.forward_flops), ("backward", case.backward_flops)):
        ms = row[f"{part}_ms"]
        known = flops is not None and ms is not None and ms > 0
        row[f"{part}_tflops"] = flops / ms / 1e9 if known and flops is not None else None
    return row
