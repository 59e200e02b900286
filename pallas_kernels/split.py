"""A function of one device over a mesh of Auto axes: axes of its arrays that may be split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec


def splittable(
    run: Callable[..., Any],
    operands: Sequence[str],
    results: Sequence[str],
    *,
    whole: Iterable[str],
    members: Mapping[str, tuple[str, int, int]] | None = None,
) -> Any:
    """`run` as XLA's partitioner sees it: each device calls it on what it holds, or on all.

    Args:
      run: takes and returns arrays; each result has more than one axis.
      operands, results: names of the axes of each, as in "batch rows dim".
      whole: axes that may not be split.
      members: axes made of another one: for "programs" ("kv_heads", 8, 4), four stand side by side
        for each of the 8 key/value heads.
    """
    groups = dict(members or {})
    factors, sizes, held = {}, {}, set(whole)
    for name, (of, heads, count) in groups.items():
        if count == 1:
            factors[name] = of
        elif heads == 1:  # Shardy knows no factors of one: an axis of its own
            held.add(name)
        else:
            factors[name] = f"({of} {name}_of)"
            sizes[f"{name}_of"] = count
    held |= sizes.keys()

    def text(arrays: Sequence[str]) -> str:
        return ", ".join(" ".join(factors.get(x, x) for x in axes.split()) for axes in arrays)

    def partition(mesh: Any, inputs: Any, outputs: Any) -> Any:
        arrays = zip((*operands, *results), (*inputs, *outputs), strict=True)
        if not _agree(arrays, groups):
            everything = NamedSharding(mesh, PartitionSpec())
            return mesh, run, (everything,) * len(outputs), (everything,) * len(inputs)
        shardings = [tuple(array.sharding for array in side) for side in (outputs, inputs)]
        return mesh, run, *shardings

    used = text([*operands, *results]).replace("(", " ").replace(")", " ").replace(",", " ").split()
    split = custom_partitioning(run)
    split.def_partition(
        partition,
        sharding_rule=f"{text(operands)} -> {text(results)}",
        decode_shardings=False,
        # In the order in which they occur.
        need_replication_factors=tuple(x for x in dict.fromkeys(used) if x in held),
        **sizes,
    )
    return split


def _agree(arrays: Iterable[tuple[str, Any]], groups: Mapping[str, tuple[str, int, int]]) -> bool:
    """Whether every axis is split alike wherever it occurs, and members as what they belong to."""
    held: dict[str, set[int]] = {}
    for axes, array in arrays:
        try:
            shape = array.sharding.shard_shape(array.shape)
        except ValueError:  # a number that the devices do not divide
            return False
        for name, size in zip(axes.split(), shape, strict=True):
            held.setdefault(name, set()).add(size)
    if any(len(found) > 1 for found in held.values()):
        return False
    return all(held[name] == {n * size for size in held[of]} for name, (of, _, n) in groups.items())
