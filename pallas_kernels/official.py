"""Kernels compiled by the official Triton, which needs no GPU: PTX, machine code, resources.

Stage by stage, as `triton.compile` does for a Python function. Given an IR file, that would leave
out the passes over Triton's own IR, without which sums are not fused into the matrix products.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import pathlib
import re
import tempfile
from typing import Any

from pallas_kernels.triton_ir import KernelIR


@dataclasses.dataclass(frozen=True)
class Binary:
    """A kernel compiled for one GPU generation. scratch_bytes: global memory a program wants."""

    name: str
    ptx: str
    cubin: bytes
    shared_bytes: int
    scratch_bytes: int


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a kernel takes on the GPU. spill_bytes: registers that a thread stores to memory.

    wgmma: whether it multiplies by Hopper's asynchronous instruction.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    wgmma: bool


@functools.lru_cache(maxsize=256)
def compile_kernel(kernel: KernelIR, compute_capability: int) -> Binary:
    """Compiles for one GPU generation: 80, 86, 89, 90, 100, 120."""
    from triton import knobs
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget, Language
    from triton.compiler import make_backend

    backend = make_backend(GPUTarget("cuda", compute_capability, 32))
    options = backend.parse_options(
        {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages, "enable_fp_fusion": True}
    )
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, f"{kernel.name}.ttir")
        path.write_text(kernel.text)
        module = ir.parse_mlir_module(str(path), context)
    module.context = context

    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, Language.TRITON)
    results: dict[str, Any] = {}
    metadata: dict[str, Any] = {}
    with knobs.compilation.scope():  # lines of a temporary file would make each result another
        knobs.compilation.disable_line_info = True
        for name, stage in stages.items():
            module = results[name] = stage(module, metadata)
    scratch = metadata.get("global_scratch_size", 0)
    return Binary(metadata["name"], results["ptx"], results["cubin"], metadata["shared"], scratch)


@functools.lru_cache(maxsize=1024)
def measure(kernel: KernelIR, compute_capability: int) -> Resources:
    """Compiles and listens to the assembler, `ptxas`. For one thread: it prints to stdout."""
    from triton import knobs

    log = io.StringIO()
    with knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        binary = compile_kernel.__wrapped__(kernel, compute_capability)
    return Resources(
        registers=_number(r"Used (\d+) registers", log.getvalue()),
        spill_bytes=_number(r"(\d+) bytes spill stores", log.getvalue()),
        shared_bytes=binary.shared_bytes,
        wgmma="wgmma.mma_async" in binary.ptx,
    )


def _number(pattern: str, log: str) -> int:
    found = re.search(pattern, log)
    if found is None:
        raise RuntimeError(f"ptxas says nothing like {pattern!r}: {log!r}")
    return int(found[1])
