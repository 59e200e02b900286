"""The model. Axes: b batch, l length, d width, f MLP width, v vocabulary."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, PartitionSpec, get_abstract_mesh
from jaxtyping import Array, Float, Int

from models.cache import LayerCache, ModelCache
from models.config import ModelConfig, Remat
from models.products import RowLinear, row_product
from models.scan import Segment, scan_layers, segments
from s2_jax import Pattern
from s2_jax.nnx import S2Attention

# Made once: a module keeps its initialiser, and two models are equal only if theirs are the same.
_SMALL = nnx.initializers.normal(0.02)
_KEEPS_VARIANCE = nnx.initializers.lecun_normal()


def _by_cudnn(primitive: Any, *_: Any, **__: Any) -> bool:
    """What JAX's attention by cuDNN leaves for its backward pass has no name."""
    return primitive.name == "dot_product_attention_fwd_wrapper"


def _keeping(*names: str) -> Any:
    policies = jax.checkpoint_policies
    return policies.save_from_both_policies(policies.save_only_these_names(*names), _by_cudnn)


# Made once, as the initialisers.
_ATTENDED = ("s2_attention_out", "s2_attention_lse")
_KEEP_ATTENTION = _keeping(*_ATTENDED)
_KEEP_STREAM_TOO = _keeping(*_ATTENDED, "residual_stream")


class RMSNorm(nnx.Module):
    """Divides by the root mean square over the features, in float32; returns `x`'s dtype."""

    def __init__(self, width: int, *, epsilon: float = 1e-6) -> None:
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        return normed(x, self.scale[...], self.epsilon)


def normed(
    x: Float[Array, "*rows d"], scale: Float[Array, " d"], epsilon: float
) -> Float[Array, "*rows d"]:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + epsilon)
    return (y * scale.reshape((1,) * (x.ndim - 1) + scale.shape)).astype(x.dtype)


class SwiGLU(nnx.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.gate = _linear(config, config.width, config.mlp_width, rngs)
        self.up = _linear(config, config.width, config.mlp_width, rngs)
        self.down = _linear(config, config.mlp_width, config.width, rngs)

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, pattern: Pattern, *, rngs: nnx.Rngs) -> None:
        self.attention_norm = RMSNorm(config.width, epsilon=config.norm_epsilon)
        self.attention = S2Attention(
            config.width,
            config.num_heads,
            pattern,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rope_base=config.rope_base,
            dtype=jnp.dtype(config.dtype),
            param_dtype=jnp.dtype(config.param_dtype),
            implementation=config.implementation_of(pattern),
            rngs=rngs,
        )
        self.mlp_norm = RMSNorm(config.width, epsilon=config.norm_epsilon)
        self.mlp = SwiGLU(config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b l d"], segment_ids: Int[Array, "b l"] | None = None
    ) -> Float[Array, "b l d"]:
        attended = self.attention(gather(self.attention_norm(x)), segment_ids=segment_ids)
        x = checkpoint_name(x + scatter(attended), "residual_stream")
        return x + scatter(self.mlp(gather(self.mlp_norm(x))))

    def extend(
        self,
        x: Float[Array, "b l d"],
        cache: LayerCache,
        lengths: Int[Array, " b"] | None,
        first: bool,
    ) -> tuple[Float[Array, "b l d"], LayerCache]:
        """The same for new tokens, which join a cache."""
        attended, cache = self.attention.extend(
            self.attention_norm(x), cache, lengths=lengths, first=first
        )
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), cache


class Transformer(nnx.Module):
    """Token ids to next-token logits.

    Layer i attends by `config.patterns()[i]`. With `segment_ids`, tokens attend within their own
    segment only; positions stay those of the row.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.dtype = jnp.dtype(config.dtype)
        self.remat = config.remat
        shape = (config.vocab_size, config.width)
        self.embed = nnx.Param(_SMALL(rngs.params(), shape, jnp.dtype(config.param_dtype)))
        self.blocks = nnx.List([Block(config, pattern, rngs=rngs) for pattern in config.patterns()])
        each = tuple(Segment(layer, 1, 1) for layer in range(config.num_layers))
        self.segments = tuple(segments(config.patterns())) if config.scan_layers else each
        self.norm = RMSNorm(config.width, epsilon=config.norm_epsilon)
        self.head: nnx.Linear | RowLinear | None = (
            None
            if config.tie_embeddings
            else _linear(config, config.width, config.vocab_size, rngs, _SMALL)
        )

    def __call__(
        self, tokens: Int[Array, "b l"], segment_ids: Int[Array, "b l"] | None = None
    ) -> Float[Array, "b l v"]:
        """Float32 logits; those at position t depend on the tokens up to t only."""
        return self.from_embeddings(self.embeddings(tokens), segment_ids)

    def embeddings(self, tokens: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        return jnp.take(self.embed[...], tokens, axis=0).astype(self.dtype)

    def from_embeddings(
        self, x: Float[Array, "b l d"], segment_ids: Int[Array, "b l"] | None = None
    ) -> Float[Array, "b l v"]:
        """What `__call__` does after the embedding; a gradient with respect to `x` exists."""
        return self.logits(self.features(x, segment_ids))

    def features(
        self, x: Float[Array, "b l d"], segment_ids: Int[Array, "b l"] | None = None
    ) -> Float[Array, "b l d"]:
        """The residual stream after all layers, normed."""
        call = _recomputing(self.remat)
        alike = segment_ids is None or segment_ids.shape[0] == x.shape[0]
        number = 2 if alike and _can_be_halved(x.shape[0]) else 1
        of_rows = _dealt(segment_ids, number)

        def apply(block: Block, rows: list[Array]) -> list[Array]:
            return [call(block, x, ids) for x, ids in zip(rows, of_rows, strict=True)]

        rows = [scatter(x) for x in _dealt(x, number)]
        for segment in self.segments:
            rows = scan_layers(self.blocks, segment, apply, rows)
        return _collected([gather(self.norm(x)) for x in rows])

    def extend(
        self,
        tokens: Int[Array, "b l"],
        cache: ModelCache,
        *,
        lengths: Int[Array, " b"] | None = None,
        first: bool = False,
    ) -> tuple[Float[Array, "b l d"], ModelCache]:
        """What `features` gives at new tokens that follow those of a cache, and the new cache.

        Args:
          tokens: a prompt, a chunk of one, or the next token of each sequence.
          cache: from `ModelCache.create` for this model's config.
          lengths: int32 `[b]`, how many of the tokens count; by default all.
          first: the sequences begin with these tokens, and what the cache held is dropped.

        Raises:
          ValueError, TypeError: the cache of another model, or something else.
        """
        if not isinstance(cache, ModelCache):
            raise TypeError(f"cache must be a ModelCache, got {type(cache).__name__}")
        if len(cache.layers) != len(self.blocks):
            raise ValueError(
                f"the cache is one of {len(cache.layers)} layers, the model has {len(self.blocks)}"
            )
        x, layers = self.embeddings(tokens), []
        for number, block in enumerate(self.blocks):
            x, layer = block.extend(x, cache[number], lengths, first)
            layers.append(layer)
        return self.norm(x), cache.replaced(layers)

    def logits(self, x: Float[Array, "b l d"]) -> Float[Array, "b l v"]:
        """Float32, of what `features` gives, or of some of its positions."""
        if self.head is None:
            logits = row_product(x, self.embed[...], self.dtype)
        else:
            logits = self.head(x)
        return logits.astype(jnp.float32)


def gather(x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
    """From the residual stream, which lies split by tokens over axis tensor, to whole rows.

    Over data and fsdp it is split by batch: parameters come to where rows are. The mesh is the one
    that `jax.set_mesh` put in scope, whose Auto axes count; without, nothing changes.
    """
    return _split(_split(x, "tensor"))  # both, so that gradients go the same way back


def scatter(x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
    """From whole rows to the residual stream.

    What is computed token by token between two products is shared out then too, and a sum over the
    axis brings every device its tokens alone (sequence parallelism, arXiv 2205.05198).
    """
    return _split(_split(x), "tensor")


def _can_be_halved(batch: int) -> bool:
    """Whether tokens are exchanged over axis tensor, for rows that can be dealt out in two.

    One half's exchanges then hide behind the products of the other, where XLA's scheduler is one
    that hides latency (`train.parallel` asks for it).
    """
    sizes = _auto_axes()
    halves = 2 * sizes.get("data", 1) * sizes.get("fsdp", 1)
    return sizes.get("tensor", 1) > 1 and batch > 0 and batch % halves == 0


def _dealt(x: Array | None, number: int) -> list[Any]:
    """Every `number`-th row: what a device holds of the batch stays with it."""
    if x is None or number == 1:
        return [x] * number
    dealt = x.reshape(-1, number, *x.shape[1:])
    return [dealt[:, i] for i in range(number)]


def _collected(rows: list[Array]) -> Array:
    return rows[0] if len(rows) == 1 else jnp.stack(rows, axis=1).reshape(-1, *rows[0].shape[1:])


def _split(x: Array, *axes: str) -> Array:
    there = _auto_axes()
    batch = tuple(axis for axis in ("data", "fsdp") if axis in there)
    rest = [axis for axis in axes if axis in there]
    # What devices cannot share out evenly they all hold: of padded parts, XLA has made gradients
    # that were wrong.
    if x.shape[0] % math.prod(there[axis] for axis in batch):
        batch = ()
    if x.shape[1] % math.prod(there[axis] for axis in rest):
        rest = []
    if not batch and not rest:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(batch, *rest))


def _auto_axes() -> dict[str, int]:
    """Sizes of the axes in scope that XLA splits arrays over."""
    mesh = get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name: mesh.shape[name] for name, kind in kinds if kind == AxisType.Auto}


def _recomputing(remat: Remat) -> Callable[..., Array]:
    """A block's call, under `jax.checkpoint` where the backward pass recomputes it."""
    if remat == "none":
        return Block.__call__
    policy = None
    if remat == "attention":
        # Split by tokens, the stream after attention takes less memory than it takes exchanges.
        policy = _KEEP_STREAM_TOO if _auto_axes().get("tensor", 1) > 1 else _KEEP_ATTENTION
    return nnx.remat(Block.__call__, policy=policy)


def _linear(
    config: ModelConfig,
    inputs: int,
    outputs: int,
    rngs: nnx.Rngs,
    kernel_init: nnx.Initializer = _KEEPS_VARIANCE,
) -> nnx.Linear:
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=False,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        kernel_init=kernel_init,
        rngs=rngs,
    )
