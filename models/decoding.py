"""The form of a model that decodes: the same results, weights laid out for products of one row.

A token's step at batch 1 takes as long as it takes to read the weights. They are read fastest row
by row (`models.products`), in few and large matrices.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models.cache import LayerCache
from models.products import RowLinear
from models.transformer import Block, RMSNorm, SwiGLU, Transformer, normed
from pallas_kernels.add_norm import add_norm_over_mesh
from s2_jax.implementations import KERNEL_DTYPES, run
from s2_jax.nnx import S2Attention
from s2_jax.rope import rotate_from

_MOST_ROWS = 64  # that a norm's kernel is for; XLA is as fast with many


def for_decoding(model: Transformer) -> Transformer:
    """The same model with kernels transposed, `[outputs, inputs]`, and those of one input joined.

    It is called as before and gives the same but for the order of sums; its parameters have other
    names and shapes, so that checkpoints do not fit. Embedding and norms are shared with `model`,
    everything else is copied: `model` can be dropped. Works under `jit` and `nnx.eval_shape`.

    Args:
      model: with parameters of any dtype, which they keep.

    Raises:
      TypeError: not a `Transformer`, or one with layers of other classes, as the result has.
      ValueError: biases, or heads split over a mesh axis (`head_axis`).
    """
    if not isinstance(model, Transformer):
        raise TypeError(f"model must be a Transformer, got {type(model).__name__}")
    if model.head is not None:
        _check("head", model.head, nnx.Linear)
    for number, block in enumerate(model.blocks):
        _check(f"blocks[{number}].attention", block.attention, S2Attention)
        _check(f"blocks[{number}].mlp", block.mlp, SwiGLU)
    decoding = nnx.clone(model)  # modules of its own; the arrays are the same ones
    decoding.blocks = nnx.List([DecodingBlock(block) for block in decoding.blocks])
    last = decoding.blocks[-1].attention.implementation
    decoding.norm = DecodingNorm(decoding.norm, last)
    if decoding.head is not None:
        decoding.head = _joined(decoding.head)
    return decoding


class Stream(NamedTuple):
    """The residual stream, and what the last layer adds to it, as a sum over parts."""

    x: Float[Array, "b l d"]
    added: Float[Array, "parts b l d"]


class DecodingNorm(RMSNorm):
    """`RMSNorm`, also of what a `Stream` is the sum of.

    implementation: of the attention that the norm belongs to; what runs its kernels runs the
    norm's.
    """

    def __init__(self, norm: RMSNorm, implementation: str | None) -> None:
        self.epsilon = norm.epsilon
        self.scale = norm.scale
        self.implementation = implementation

    def __call__(self, x: Float[Array, "b l d"] | Stream) -> Float[Array, "b l d"]:
        return self.joined(x)[1]

    def joined(
        self, stream: Float[Array, "b l d"] | Stream
    ) -> tuple[Float[Array, "b l d"], Float[Array, "b l d"]]:
        """The sum of a stream, and its norm."""
        if not isinstance(stream, Stream):
            return stream, normed(stream, self.scale[...], self.epsilon)
        x, added = stream
        rows = x.size // x.shape[-1]
        if not 0 < rows <= _MOST_ROWS or x.dtype not in KERNEL_DTYPES:
            return self._joined(x, added, self.scale[...])
        arrays = x.reshape(rows, -1), added.reshape(-1, rows, x.shape[-1]), self.scale[...]
        kernel = functools.partial(add_norm_over_mesh, epsilon=self.epsilon)
        found = run(self.implementation, kernel, self._joined, *arrays)
        return found[0].reshape(x.shape), found[1].reshape(x.shape)

    def _joined(self, x: Array, added: Array, scale: Array) -> tuple[Array, Array]:
        x = x + added.sum(axis=0).astype(x.dtype)
        return x, normed(x, scale, self.epsilon)


class DecodingBlock(Block):
    """`Block` whose layers hand on what they add to the residual stream: the next norm adds it."""

    attention_norm: DecodingNorm
    mlp_norm: DecodingNorm
    mlp: DecodingSwiGLU

    def __init__(self, block: Block) -> None:
        implementation = block.attention.implementation
        self.attention_norm = DecodingNorm(block.attention_norm, implementation)
        self.attention = DecodingAttention(block.attention)
        self.mlp_norm = DecodingNorm(block.mlp_norm, implementation)
        self.mlp = DecodingSwiGLU(block.mlp)

    def extend(
        self,
        x: Float[Array, "b l d"] | Stream,
        cache: LayerCache,
        lengths: Int[Array, " b"] | None,
        first: bool,
    ) -> tuple[Any, LayerCache]:
        """The same for a `Stream`, which it returns."""
        x, y = self.attention_norm.joined(x)
        attended, cache = self.attention.extend(y, cache, lengths=lengths, first=first)
        x, y = self.mlp_norm.joined(Stream(x, attended[None]))
        return Stream(x, self.mlp.sums(y)), cache


class DecodingAttention(S2Attention):
    """`S2Attention` with one kernel for queries, keys and values.

    Parameters: `query_key_value`, `[(num_heads + 2 num_kv_heads) * head_dim, in_features]`, and
    `out`, `[in_features, num_heads * head_dim]`.
    """

    query_key_value: RowLinear
    out: Any

    def __init__(self, attention: S2Attention) -> None:
        self.in_features = attention.in_features
        self.num_heads = attention.num_heads
        self.num_kv_heads = attention.num_kv_heads
        self.head_dim = attention.head_dim
        self.pattern = attention.pattern
        self.rope_base = attention.rope_base
        self.implementation = attention.implementation
        self.head_axis = None
        self.query_key_value = _joined(attention.query, attention.key, attention.value)
        self.out = _joined(attention.out, inputs=self.num_heads * self.head_dim)

    def project(
        self, x: Float[Array, "*batch length in_features"], offset: Any = 0
    ) -> tuple[
        Float[Array, "*batch length heads head_dim"],
        Float[Array, "*batch length kv_heads head_dim"],
        Float[Array, "*batch length kv_heads head_dim"],
    ]:
        query, key, value = self._project(x)
        query, key = (rotate_from(each, offset, self.rope_base) for each in (query, key))
        return query, key, value

    def _new(
        self, x: Float[Array, "*batch length in_features"], offset: Any
    ) -> tuple[Array, Array, Array, float | None]:
        return *self._project(x), self.rope_base  # the kernel that they are taken in by turns them

    def _project(self, x: Float[Array, "*batch length in_features"]) -> tuple[Array, Array, Array]:
        ends = [self.num_heads, self.num_heads + self.num_kv_heads]
        heads = self.query_key_value(x)
        heads = heads.reshape(*x.shape[:-1], ends[1] + self.num_kv_heads, self.head_dim)
        query, key, value = jnp.split(heads, ends, axis=-2)
        return query, key, value

    def project_query(
        self, x: Float[Array, "*batch length in_features"], query_offset: Any = 0
    ) -> Float[Array, "*batch length heads head_dim"]:
        return self.project(x, query_offset)[0]

    def project_key_value(
        self, x: Float[Array, "*batch length in_features"], offset: Any = 0
    ) -> tuple[
        Float[Array, "*batch length kv_heads head_dim"],
        Float[Array, "*batch length kv_heads head_dim"],
    ]:
        return self.project(x, offset)[1:]

    def _project_out(
        self, attended: Float[Array, "*batch length heads head_dim"]
    ) -> Float[Array, "*batch length in_features"]:
        return self.out(attended.reshape(*attended.shape[:-2], self.num_heads * self.head_dim))


class DecodingSwiGLU(SwiGLU):
    """`SwiGLU` with one kernel for gate and up.

    Parameters: `gate_up`, `[2 * mlp_width, width]`, and `down`, `[width, mlp_width]`.
    """

    gate_up: RowLinear
    down: Any

    def __init__(self, mlp: SwiGLU) -> None:
        self.gate_up = _joined(mlp.gate, mlp.up)
        self.down = _joined(mlp.down)

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        return self.down(self._inner(x))

    def sums(self, x: Float[Array, "b l d"]) -> Float[Array, "parts b l d"]:
        """The same as `RowLinear.sums`."""
        return self.down.sums(self._inner(x))

    def _inner(self, x: Float[Array, "b l d"]) -> Float[Array, "b l f"]:
        gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        return nnx.silu(gate) * up


def _joined(*linears: Any, inputs: int | None = None) -> RowLinear:
    """One layer for several of one input; inputs: its size, if kernels have several axes for it."""
    kernels = [linear.kernel[...] for linear in linears]
    transposed = [kernel.reshape(inputs or kernel.shape[0], -1).T for kernel in kernels]
    return RowLinear(jnp.concatenate(transposed), linears[0].dtype)


def _check(name: str, module: Any, kind: type) -> None:
    if type(module) is not kind:
        raise TypeError(f"{name} must be {kind.__name__}, got {type(module).__name__}")
    if (axis := getattr(module, "head_axis", None)) is not None:
        raise ValueError(f"{name} splits its heads over head_axis={axis!r}")
    for part in (module, *vars(module).values()):
        if getattr(part, "bias", None) is not None:
            raise ValueError(f"{name} has biases")
