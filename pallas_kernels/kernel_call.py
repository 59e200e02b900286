"""A compiled kernel as jaxlib's `triton_kernel_call_ffi` wants it: a compressed protobuf message.

The messages of `jaxlib/gpu/triton.proto`, written by hand: jaxlib's own classes for them come with
its CUDA plugin, and a machine without a GPU has none. A test compares the bytes where it has.
"""

from __future__ import annotations

import zlib

from pallas_kernels.official import Binary
from pallas_kernels.triton_ir import KernelIR

TARGET = "triton_kernel_call_ffi"
# What jaxlib passes after a kernel's own pointers: one for scratch memory, one for a profile.
_EXTRA_POINTERS = 2
_DIVISIBILITY = 16


def opaque(kernel: KernelIR, binary: Binary, compute_capability: int) -> bytes:
    """The attribute that carries a kernel call.

    It holds the machine code and its PTX. jaxlib 0.11.2 and newer load the code, and know it by
    its PTX in a cache; 0.10.2 skips the field it does not know and assembles the PTX.
    """
    pointers = binary.ptx.count(f"{binary.name}_param_", 0, binary.ptx.index(")\n"))
    if pointers != kernel.operands + _EXTRA_POINTERS or binary.scratch_bytes:
        raise NotImplementedError(
            f"{binary.name} takes {pointers} pointers and {binary.scratch_bytes} bytes of scratch "
            f"memory as this Triton compiles it; jaxlib's Triton kernel call passes "
            f"{kernel.operands + _EXTRA_POINTERS} and none: another triton is needed"
        )
    return zlib.compress(message(kernel, binary, compute_capability))


def message(kernel: KernelIR, binary: Binary, compute_capability: int) -> bytes:
    image = _fields((1, binary.cubin), (2, binary.name), (3, binary.shared_bytes))
    code = _fields(
        (1, binary.name), (2, kernel.num_warps), (3, binary.shared_bytes), (4, binary.ptx),
        (6, compute_capability), (10, 1), (11, image if binary.cubin else b""),
    )  # fmt: skip
    array = _fields((1, _fields((2, _DIVISIBILITY))))
    grid = zip((2, 3, 4), kernel.grid, strict=True)
    call = _fields((1, code), *grid, *((5, array) for _ in range(kernel.operands)))
    return _fields((1, call), (4, kernel.name))


def _fields(*fields: tuple[int, int | str | bytes]) -> bytes:
    """A message of numbered integers, texts, or bytes and messages; empty ones are left out."""
    parts = []
    for number, value in fields:
        if not value:
            continue
        if isinstance(value, int):
            parts += [_varint(number << 3), _varint(value)]
        else:
            data = value.encode() if isinstance(value, str) else value
            parts += [_varint(number << 3 | 2), _varint(len(data)), data]
    return b"".join(parts)


def _varint(number: int) -> bytes:
    digits = []
    while number > 0x7F:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*digits, number])
