"""The decode kernel over a mesh of Auto axes: sequences and key/value heads may be split."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.decode import DecodeLists, DecodeSettings, decode
from pallas_kernels.partition import may_be_split

# A program is (key/value head, part of its rows): those of a head are side by side.
_LISTS = "batch programs entries"
_ROWS = "batch programs rows"
_STORAGE = {True: "kv_heads pages block dim", False: "batch length kv_heads dim"}
_FACTORS = {
    "batch": "b", "programs": "(k p)", "kv_heads": "k", "rows": "r", "dim": "d", "value_dim": "v",
    "entries": "e", "pages": "n", "block": "s", "length": "s",
}  # fmt: skip


def decode_over_mesh(
    settings: DecodeSettings,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    position: jax.Array,
    lists: DecodeLists,
) -> tuple[jax.Array, jax.Array]:
    """`decode`, which XLA may split as the query and the storage are split."""
    if not may_be_split():
        return decode(settings, query, key, value, position, lists)
    kv_heads = key.shape[0 if settings.paged else 2]
    split = _splittable(settings, query.shape[1] // kv_heads)
    return split(query, key, value, position, *lists)


def _axes(paged: bool) -> tuple[list[str], list[str]]:
    """Of the operands and of the results."""
    storage = _STORAGE[paged]
    operands = [f"{_ROWS} dim", storage, storage.replace("dim", "value_dim"), _ROWS]
    return [*operands, *[_LISTS] * 3, "batch programs"], [f"{_ROWS} value_dim", _ROWS]


@functools.lru_cache(maxsize=64)
def _splittable(settings: DecodeSettings, programs_of_head: int) -> Any:
    operands, results = _axes(settings.paged)

    def run(query: Any, key: Any, value: Any, position: Any, *lists: Any) -> Any:
        return decode(settings, query, key, value, position, DecodeLists(*lists))

    def partition(mesh: Any, inputs: Any, outputs: Any) -> Any:
        arrays = zip((*operands, *results), (*inputs, *outputs), strict=True)
        if not _agree(arrays, programs_of_head):
            whole = NamedSharding(mesh, PartitionSpec())
            return mesh, run, (whole,) * len(outputs), (whole,) * len(inputs)
        shardings = [tuple(array.sharding for array in side) for side in (outputs, inputs)]
        return mesh, run, *shardings

    def text(axes: list[str]) -> str:
        factors = dict(_FACTORS)
        if programs_of_head == 1:
            factors["programs"] = "k"
        return ", ".join(" ".join(factors[name] for name in one.split()) for one in axes)

    rule = f"{text(operands)} -> {text(results)}"
    sizes = {"p": programs_of_head} if programs_of_head > 1 else {}
    split = custom_partitioning(run)
    split.def_partition(
        partition,
        sharding_rule=rule,
        decode_shardings=False,
        # In the order in which they occur.
        need_replication_factors=tuple(x for x in dict.fromkeys(rule) if x in "prdnsve"),
        **sizes,
    )
    return split


def _agree(arrays: Iterable[tuple[str, Any]], programs_of_head: int) -> bool:
    """Whether every axis is split alike wherever it occurs, and programs as their heads are."""
    held: dict[str, set[int]] = {}
    for axes, array in arrays:
        try:
            shape = array.sharding.shard_shape(array.shape)
        except ValueError:  # a number of heads or sequences that the devices do not divide
            return False
        for name, size in zip(axes.split(), shape, strict=True):
            held.setdefault(name, set()).add(size)
    if any(len(found) > 1 for found in held.values()):
        return False
    (programs,), (kv_heads,) = held["programs"], held["kv_heads"]
    return programs == kv_heads * programs_of_head
