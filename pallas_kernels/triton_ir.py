"""The Triton IR that Pallas makes of a kernel, read from the custom call it is handed to XLA in.

The one module that knows that call and JAX's private way to parse its IR.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax._src.pallas.triton.lowering import _new_ir_context
from jaxlib.mlir import ir

CALL_TARGET = "__gpu$xla.gpu.triton"


@dataclasses.dataclass(frozen=True)
class KernelIR:
    """A kernel as Pallas leaves it: the text of its module, and how it is to be launched.

    operands: pointers that it takes, inputs first.
    """

    name: str
    text: str
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int
    operands: int


def kernels_of(lowered: jax.stages.Lowered) -> list[KernelIR]:
    """Every kernel of a program lowered for CUDA, in the order of its calls."""
    found: list[KernelIR] = []

    def visit(op: Any) -> ir.WalkResult:
        if is_kernel_call(op):
            found.append(read_kernel(op))
        return ir.WalkResult.ADVANCE

    module: Any = lowered.compiler_ir("stablehlo")
    module.operation.walk(visit)
    return found


def is_kernel_call(op: Any) -> bool:
    if op.name != "stablehlo.custom_call":
        return False
    return ir.StringAttr(op.attributes["call_target_name"]).value == CALL_TARGET


def read_kernel(op: Any) -> KernelIR:
    items: Any = ir.DictAttr(op.attributes["mhlo.backend_config"])
    config = {item.name: item.attr for item in items}
    numbers = {
        name: ir.IntegerAttr(config[name]).value
        for name in ("grid_x", "grid_y", "grid_z", "num_warps", "num_stages")
    }
    with _new_ir_context():
        module = ir.Module.parse(ir.StringAttr(config["ir"]).value_bytes)
        text = str(module.operation.get_asm())
    return KernelIR(
        name=ir.StringAttr(config["name"]).value,
        text=text,
        grid=(numbers["grid_x"], numbers["grid_y"], numbers["grid_z"]),
        num_warps=numbers["num_warps"],
        num_stages=numbers["num_stages"],
        operands=len(op.operands) + len(op.results),
    )
