"""The caches of all layers of a model, in one pytree."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from models.config import ModelConfig
from s2_jax import ContiguousCache, EvictingCache, Pattern
from s2_jax.structure import at_least_one

Kind = Literal["evicting", "contiguous"]
LayerCache = ContiguousCache | EvictingCache


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["layers", "tables"],
    meta_fields=["table_of_layer"],
)
@dataclasses.dataclass(frozen=True)
class ModelCache:
    """What layers of one pattern have in common is stored once, and computed once a step.

    layers: keys and values, without tables. tables: one for each kind of layer. table_of_layer:
    which of them a layer has.
    """

    layers: tuple[LayerCache, ...]
    tables: tuple[Any, ...]
    table_of_layer: tuple[int, ...]

    @classmethod
    def create(
        cls,
        config: ModelConfig,
        *,
        batch: int,
        max_length: int,
        kind: Kind = "evicting",
        num_pages: int | None = None,
    ) -> Self:
        """An empty cache, in the dtype that the model computes in.

        Args:
          batch: sequences. max_length: tokens that each can have.
          kind: "evicting" keeps what a head can still see where the pattern of a layer is
            KV-efficient and leaves something out; "contiguous" keeps everything in every layer.
          num_pages: pages of an evicting layer, which sequences are then given by `with_pages`; by
            default every sequence has as many as it can need.

        Raises:
          ValueError, TypeError: numbers that are not positive integers, or too large for a
            pattern; an unknown kind.
        """
        if kind not in ("evicting", "contiguous"):
            raise ValueError(f"{kind=} must be evicting or contiguous")
        at_least_one("batch", batch)
        at_least_one("max_length", max_length)
        kinds: dict[tuple[type, Pattern], int] = {}
        layers: list[LayerCache] = []
        tables: list[Any] = []
        table_of_layer = []
        for pattern in config.patterns():
            options: dict[str, Any] = {
                "batch": batch,
                "max_length": max_length,
                "num_heads": config.num_heads,
                "num_kv_heads": config.num_kv_heads,
                "head_dim": config.head_features,
                "dtype": jnp.dtype(config.dtype),
            }
            if kind == "evicting" and _evicts(config, pattern, max_length):
                layer: LayerCache = EvictingCache.create(pattern, num_pages=num_pages, **options)
            else:
                layer = ContiguousCache.create(pattern, **options)
            number = kinds.setdefault((type(layer), pattern), len(kinds))
            if number == len(tables):
                tables.append(layer.table)
            layers.append(layer.with_table(None))
            table_of_layer.append(number)
        return cls(tuple(layers), tuple(tables), tuple(table_of_layer))

    def __getitem__(self, layer: int) -> LayerCache:
        """The cache of a layer, with its table."""
        return self.layers[layer].with_table(self.tables[self.table_of_layer[layer]])

    def replaced(self, layers: list[LayerCache]) -> Self:
        """With new caches for all layers, those of one kind being equally far along."""
        firsts = [self.table_of_layer.index(number) for number in range(len(self.tables))]
        return dataclasses.replace(
            self,
            layers=tuple(layer.with_table(None) for layer in layers),
            tables=tuple(layers[first].table for first in firsts),
        )

    def mapped(self, function: Any) -> Self:
        """With `function(cache)` of every layer."""
        return self.replaced([function(self[layer]) for layer in range(len(self.layers))])

    @property
    def length(self) -> Int[Array, " batch"]:
        """Tokens that each sequence has so far."""
        return self[0].length

    def row(self, index: Any) -> Self:
        """The sequence `index` alone, possibly traced, as a cache of batch 1."""
        return self.mapped(lambda layer: layer.row(index))

    def with_row(self, index: Any, one: Self) -> Self:
        """With the sequence `index` replaced by that of a cache of batch 1, from `row`."""
        pairs = [(self[i], one[i]) for i in range(len(self.layers))]
        return self.replaced([mine.with_row(index, other) for mine, other in pairs])

    def pages_needed(self, length: int) -> int:
        """Pages that a sequence of `length` tokens takes of every evicting layer, at most."""
        evicting = (layer for layer in self.layers if isinstance(layer, EvictingCache))
        return max((layer.pages_needed(length) for layer in evicting), default=0)

    @property
    def slots(self) -> int:
        """Pages that the longest sequence takes."""
        return max((t.page.shape[1] for t in self.tables if hasattr(t, "page")), default=0)

    def with_pages(self, index: Any, pages: Int[Array, " slots"]) -> Self:
        """With an empty sequence `index` that has these pages (padded by -1) in all layers."""

        def give(layer: LayerCache) -> LayerCache:
            if isinstance(layer, EvictingCache):
                return layer.with_pages(index, pages[: layer.table.page.shape[1]])
            return layer.with_table(layer.length.at[index].set(0))

        return self.mapped(give)


def _evicts(config: ModelConfig, pattern: Pattern, max_length: int) -> bool:
    """Whether a layer would keep less than everything."""
    try:
        slots = EvictingCache.slots_for(pattern, config.num_heads, config.num_kv_heads, max_length)
    except ValueError:  # not KV-efficient
        return False
    return slots * pattern.block_size < max_length
