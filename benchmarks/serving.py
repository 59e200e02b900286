"""A model in shapes, and the programs that serve it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.filled_caches import visible_bytes
from benchmarks.programs import Lower
from models.cache import ModelCache
from models.config import ModelConfig
from models.decoding import for_decoding
from models.sampling import Sampling
from models.steps import Rows, decode_steps
from models.transformer import Transformer

_ALWAYS = 1 << 30
"""Tokens that are left to every row: more than are generated."""


@dataclasses.dataclass(frozen=True, eq=False)
class Served:
    """In the form for decoding. shapes: of the parameters."""

    config: ModelConfig
    graphdef: Any
    shapes: Any

    @classmethod
    def of(cls, config: ModelConfig) -> Served:
        model = nnx.eval_shape(lambda: for_decoding(Transformer(config, rngs=nnx.Rngs(0))))
        return cls(config, *nnx.split(model, nnx.Param))

    def cache_shapes(self, batch: int, max_length: int) -> ModelCache:
        return jax.eval_shape(
            lambda: ModelCache.create(self.config, batch=batch, max_length=max_length)
        )

    def prefill(self, length: int) -> Lower:
        """A prompt and an empty cache: the token that follows, by the last position's logits alone,
        and the cache, whose memory is used again."""

        def prefill(params: Any, tokens: jax.Array, cache: ModelCache) -> Any:
            model = nnx.merge(self.graphdef, params)
            x, cache = model.extend(tokens, cache, first=True)
            return jnp.argmax(model.logits(x[:, -1:]), axis=-1), cache

        program = jax.jit(prefill, donate_argnums=2)
        return lambda: program.lower(self.shapes, _tokens(length), self.cache_shapes(1, length))

    def prefill_alone(self, length: int) -> Lower:
        """The same without a cache, for one that does not fit."""

        def prefill(params: Any, tokens: jax.Array) -> Any:
            model = nnx.merge(self.graphdef, params)
            x = model.features(model.embeddings(tokens))
            return jnp.argmax(model.logits(x[:, -1:]), axis=-1)

        return lambda: jax.jit(prefill).lower(self.shapes, _tokens(length))

    def decode(self, batch: int, max_length: int, steps: int) -> Lower:
        """The generator's own loop: the likeliest token, `steps` times."""
        return lambda: decode_steps.lower(
            self.shapes,
            self.cache_shapes(batch, max_length),
            jax.eval_shape(lambda: rows_of(batch)),
            jax.random.key(0),
            jnp.zeros((0,), jnp.int32),
            graphdef=self.graphdef,
            sampling=Sampling(temperature=0),
            steps=steps,
        )

    @property
    def weight_bytes(self) -> int:
        return bytes_of(self.shapes)

    def read_bytes(self, cache: ModelCache) -> int:
        """Of a decode step: parameters, but of an embedding that is not the head too only the rows
        of the tokens, and what is seen of the cache."""
        weights = self.weight_bytes
        if not self.config.tie_embeddings:
            rows, width = self.config.vocab_size, self.config.width
            each = width * jnp.dtype(self.config.param_dtype).itemsize
            weights -= (rows - cache.length.shape[0]) * each
        kinds = {n: cache.table_of_layer.index(n) for n in range(len(cache.tables))}
        seen = {n: visible_bytes(cache[layer]) for n, layer in kinds.items()}
        return weights + sum(seen[n] for n in cache.table_of_layer)

    def cache_bytes(self, length: int) -> int:
        """Of one sequence."""
        return bytes_of(self.cache_shapes(1, length))

    def prefill_bytes(self, length: int) -> int:
        """Roughly, of what a layer has beside the cache: its MLP's, and copies of the stream."""
        return 2 * length * (3 * self.config.mlp_width + 6 * self.config.width)


def rows_of(batch: int) -> Rows:
    """Rows in the middle of generating."""
    each = (jnp.zeros((batch,), jnp.int32), jnp.full((batch,), _ALWAYS), jnp.arange(batch))
    return Rows(*(x.astype(jnp.int32) for x in each))


def _tokens(length: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, length), jnp.int32)


def bytes_of(tree: Any) -> int:
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
