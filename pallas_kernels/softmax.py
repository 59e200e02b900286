"""The online-softmax step, written once for all kernels.

Scores stay as the matrix product leaves them (or, where they are capped, as tanh does). The
factor that makes log2 weights of them enters with the maximum, in one multiply-add before exp2.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu

LOG2_E = math.log2(math.e)
# Where a row's maximum starts. It is finite, so that a row that sees nothing never subtracts
# infinity from infinity; masked scores are -inf, so that no rounding can make them count.
LOWEST = -1e30
# Sums of weights relative to a pinned peak lie between these. Where the peak is that of scores
# seen, the sum is at least about 1.
LEAST_TOTAL, GREATEST_TOTAL = 0.5, 2.0**100
# A subnormal float16 weight is off by up to 2**-25, which the sum of all must hide.
LEAST_FLOAT16_WEIGHT = 2.0**-14
_LANES = 4
_SQRT_HALF = 0x3F3504F3  # the bits of float32 0.7071


@dataclasses.dataclass(frozen=True)
class Exp2:
    """2 ** (scores * scale - shift) of float32 arrays that broadcast against each other.

    native: as two instructions of an NVIDIA GPU. XLA's Triton would make six of the same, for
    subnormal numbers and for a product rounded by itself; here either is lost in rounding.
    """

    scale: float
    native: bool

    def __call__(self, scores: jax.Array, shift: jax.Array) -> jax.Array:
        if not self.native:
            return jnp.exp2(scores * self.scale - shift)
        factor = f"0f{struct.pack('>f', self.scale).hex()}"
        [weights] = plgpu.elementwise_inline_asm(
            "{ .reg .f32 power, shift; neg.f32 shift, $2; "
            f"fma.rn.f32 power, $1, {factor}, shift; ex2.approx.ftz.f32 $0, power; }}",
            args=[scores, jnp.broadcast_to(shift, scores.shape)],
            constraints="=r,r,r",
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(scores.shape, jnp.float32)],
        )
        return weights


class Softmax(NamedTuple):
    """Running output [rows, dim], largest raw score [rows] and sum [rows], all float32."""

    out: jax.Array
    peak: jax.Array
    total: jax.Array

    @classmethod
    def start(cls, rows: int, dim: int) -> Softmax:
        zeros = jnp.zeros((rows,), jnp.float32)
        return cls(jnp.zeros((rows, dim), jnp.float32), zeros + LOWEST, zeros)

    def step(self, scores: jax.Array, value: jax.Array, exp2: Exp2) -> Softmax:
        """Takes in raw scores [rows, keys], -inf where masked, and their values [keys, dim]."""
        peak = jnp.maximum(self.peak, jnp.max(scores, axis=1))
        weights = exp2(scores, (peak * exp2.scale)[:, None])
        decay = jnp.exp2((self.peak - peak) * exp2.scale)
        total = self.total * decay + jnp.sum(weights, axis=1)
        out = self.out * decay[:, None] + dot(weights.astype(value.dtype), value)
        return Softmax(out, peak, total)

    def pin(self) -> Pinned:
        """From here on the peak stays as it is: 0 in rows that have seen nothing."""
        peak = jnp.where(self.total > 0, self.peak, 0.0)
        return Pinned(self.out, peak, self.total, jnp.zeros((peak.size, _LANES), jnp.float32))

    def out_of_range(self, counts: jax.Array | None, least: Any = LEAST_TOTAL) -> jax.Array:
        """Whether weights relative to a pinned peak were too large or too small for their dtype in
        any row that counts (None: all do): then everything must be taken in again, by `step`.

        least: the smallest sum of weights that is exact enough.
        """
        fits = (self.total >= least) & (self.total <= GREATEST_TOTAL)
        finite = jnp.min(jnp.where(jnp.abs(self.out) < jnp.inf, 1, 0), axis=1) > 0
        good = fits & finite
        if counts is not None:
            good |= ~counts
        return jnp.min(jnp.where(good, 1, 0), axis=0) == 0

    def finish(self, exp2: Exp2) -> tuple[jax.Array, jax.Array]:
        """Output, and LSE in log2: zeros and -inf in rows that saw nothing."""
        seen = self.total != 0  # a NaN was seen too
        total = jnp.where(seen, self.total, 1.0)
        lse = self.peak * exp2.scale + jnp.where(total == total, log2(total), jnp.nan)
        return self.out / total[:, None], jnp.where(seen, lse, -jnp.inf)


class Pinned(NamedTuple):
    """`Softmax` with a peak that stays as it is.

    parts: `[rows, 4]`, what has been added to `total`. Four threads hold a row of a product, two
    columns of every eight each: none waits for another before the end.
    """

    out: jax.Array
    peak: jax.Array
    total: jax.Array
    parts: jax.Array

    def weights(self, scores: jax.Array, exp2: Exp2, exists: jax.Array | None) -> jax.Array:
        """Weights of raw scores relative to the peak; zeros where the scores do not exist."""
        peak = self.peak * exp2.scale
        if exists is not None:
            peak = jnp.where(exists, peak, jnp.inf)
        return exp2(scores, peak[:, None])

    def add(self, weights: jax.Array, value: jax.Array) -> Pinned:
        """Takes in weights [rows, keys] relative to the peak, and their values [keys, dim]."""
        rows, keys = weights.shape
        pairs = jnp.sum(weights.reshape(rows, keys // (2 * _LANES), _LANES, 2), axis=3)
        out = self.out + dot(weights.astype(value.dtype), value)
        return self._replace(out=out, parts=self.parts + jnp.sum(pairs, axis=1))

    def release(self) -> Softmax:
        return Softmax(self.out, self.peak, self.total + jnp.sum(self.parts, axis=1))


def log2(x: jax.Array) -> jax.Array:
    """log2 of positive float32 numbers, to a rounding: that of a GPU errs by 2**-22 of its result,
    which the backward pass would find in all weights of a row.
    """
    bits = lax.bitcast_convert_type(x, jnp.int32)
    exponent = (bits - _SQRT_HALF) >> 23
    mantissa = lax.bitcast_convert_type(bits - (exponent << 23), jnp.float32)  # in [0.7, 1.42)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    # 2 atanh(s) = log((1 + s) / (1 - s)); |s| < 0.172, so that 2 s**11 / 11 is below 2**-28.
    square, series = s * s, jnp.full_like(s, 1.0 / 9.0)
    for power in (7, 5, 3, 1):
        series = series * square + 1.0 / power
    return exponent.astype(jnp.float32) + (2.0 * LOG2_E) * s * series


def add_dot(total: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """total + a @ b, in float32.

    Triton adds a product to its sum term by term, which in float32 leaves the rounding of one long
    chain. A difference it does not take apart: each product is summed by itself.
    """
    return total - dot(-a, b) if a.dtype == jnp.float32 else total + dot(a, b)


def dot(a: jax.Array, b: jax.Array, *, transpose_b: bool = False) -> jax.Array:
    """a @ b (or a @ b.T) in float32; float32 inputs are multiplied in IEEE precision."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    contracting = ((1,), (1,)) if transpose_b else ((1,), (0,))
    return lax.dot_general(
        a, b, (contracting, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
