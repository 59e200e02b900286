"""The second way to launch a kernel: compiled by the official Triton, called as jax-triton calls.

A primitive that holds the very `pallas_call`. Where it is lowered for CUDA, Pallas' own lowering
gives the Triton IR, and its custom call is replaced by one of the kernel compiled from that IR.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Primitive
from jax.interpreters import batching, mlir

from pallas_kernels import kernel_call
from pallas_kernels.official import compile_kernel
from pallas_kernels.triton_ir import is_kernel_call, read_kernel

_launch_p = Primitive("s2_triton_kernel_call")
_launch_p.multiple_results = True


def launch(call: Any, operands: tuple[jax.Array, ...], compute_capability: int) -> Any:
    """Runs `call`, the function that a `pl.pallas_call` gives."""
    closed = jax.make_jaxpr(call)(*operands)
    return _launch_p.bind(*operands, jaxpr=closed, compute_capability=compute_capability)


@_launch_p.def_impl
def _run(*operands: jax.Array, **params: Any) -> Any:
    return jax.jit(lambda *arrays: _launch_p.bind(*arrays, **params))(*operands)


@_launch_p.def_abstract_eval
def _results(*_: Any, jaxpr: ClosedJaxpr, **__: Any) -> Any:
    return jaxpr.out_avals


def _lower(ctx: Any, *operands: Any, jaxpr: ClosedJaxpr, compute_capability: int) -> Any:
    # Registers the call with XLA, where the CUDA plugin is installed.
    import jaxlib.gpu_triton  # noqa: F401

    [call] = (eqn for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == "pallas_call")
    lower = mlir.lower_fun(lambda *args: call.primitive.bind(*args, **call.params))
    op = lower(ctx, *operands)[0].owner
    if not is_kernel_call(op):
        raise NotImplementedError(f"this JAX lowers a Pallas kernel to {op.name}")
    kernel = read_kernel(op)
    op.erase()
    binary = compile_kernel(kernel, compute_capability)
    opaque = kernel_call.opaque(kernel, binary, compute_capability)
    aliases = dict(call.params["input_output_aliases"])
    rule = jax.ffi.ffi_lowering(kernel_call.TARGET, operand_output_aliases=aliases)
    return rule(ctx, *operands, name=kernel.name, opaque=opaque)


def _batch(*_: Any, **__: Any) -> Any:
    raise NotImplementedError('implementation="jax_triton" cannot be mapped by vmap yet')


mlir.register_lowering(_launch_p, _lower, platform="cuda")
batching.primitive_batchers[_launch_p] = _batch
