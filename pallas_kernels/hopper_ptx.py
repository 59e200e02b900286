"""What Hopper's kernels say in PTX, since Pallas has no words for it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import FragmentedArray
from jax.experimental.pallas import mosaic_gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

from pallas_kernels.hopper_tiles import LAYOUT


def product(weights: jax.Array, grads: jax.Array, raised: int) -> jax.Array:
    """weights * grads / 2**raised, made in float32, as the type of the weights.

    Two weights stay in the register that they share until their turn comes. As a conversion, ptxas
    would unpack all of them first, into registers that are not there.
    """
    dtype = weights.dtype
    kind, unpack = {
        jnp.dtype(jnp.bfloat16): ("bf16x2", "shl.b32 l, $1, 16; and.b32 h, $1, 0xffff0000;"),
        jnp.dtype(jnp.float16): (
            "f16x2", "mov.b32 {a, b}, $1; cvt.f32.f16 l, a; cvt.f32.f16 h, b;",
        ),
    }[dtype]  # fmt: skip
    lower = f"0f{np.float32(2.0**-raised).view(np.uint32):08X}"
    unpack += f" mul.f32 l, l, {lower}; mul.f32 h, h, {lower};" * (raised != 0)
    text = (
        f"{{ .reg .f32 l, h; .reg .b16 a, b; {unpack} mul.f32 l, l, $2; mul.f32 h, h, $3; "
        f"cvt.rn.{kind}.f32 $0, h, l; }}"
    )

    @mgpu.inline_mgpu(
        arg_types=(LAYOUT, LAYOUT),
        return_type=mgpu.ShapeDtypeStruct(weights.shape, dtype, layout=LAYOUT),
    )
    def multiply(_: Any, weights: Any, grads: Any) -> Any:
        i32_type = ir.IntegerType.get_signless(32)
        pair = ir.VectorType.get((1,), i32_type)
        products = np.empty_like(weights.registers)

        for place, (two, factors) in enumerate(
            zip(weights.registers.flat, grads.registers.flat, strict=True)
        ):
            word = _element(vector.bitcast(pair, two), 0)
            made: Any = llvm.inline_asm(
                i32_type, [word, _element(factors, 0), _element(factors, 1)], text, "=r,r,f,f"
            )
            products.flat[place] = vector.bitcast(two.type, vector.broadcast(pair, made))
        return FragmentedArray(_registers=products, _layout=weights.layout, _is_signed=None)

    return multiply(weights, grads)


def rounded(numbers: jax.Array, factors: jax.Array, interpreted: bool) -> jax.Array:
    """numbers * factors, rounded to the nearest int32, of NaN zero."""
    if interpreted:
        return jnp.nan_to_num(jnp.round(numbers * factors)).astype(jnp.int32)
    text = "{ .reg .f32 x; mul.f32 x, $1, $2; cvt.rni.s32.f32 $0, x; }"

    @mgpu.inline_mgpu(
        arg_types=(LAYOUT, LAYOUT),
        return_type=mgpu.ShapeDtypeStruct(numbers.shape, jnp.int32, layout=LAYOUT),
    )
    def convert(_: Any, numbers: Any, factors: Any) -> Any:
        i32_type = ir.IntegerType.get_signless(32)
        pair = ir.VectorType.get((2,), i32_type)
        made = np.empty_like(numbers.registers)

        for place, (two, by) in enumerate(
            zip(numbers.registers.flat, factors.registers.flat, strict=True)
        ):
            words: Any = [
                llvm.inline_asm(i32_type, [_element(two, n), _element(by, n)], text, "=r,f,f")
                for n in range(2)
            ]
            made.flat[place] = vector.from_elements(pair, words)
        return FragmentedArray(_registers=made, _layout=numbers.layout, _is_signed=True)

    return convert(numbers, factors)


def _element(register: Any, number: int) -> Any:
    """Of a vector."""
    at = ir.DenseI64ArrayAttr.get([number])
    return vector.extract(register, dynamic_position=[], static_position=at)
