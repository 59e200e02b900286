"""Kernel calls over a mesh of Explicit axes, whose arrays carry their sharding in their type.

A kernel cannot be traced on such arrays, and need not be: the types say what each device holds,
so the call runs inside a `shard_map` over the axes that split batch and heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from pallas_kernels.lowering import vary_alike

Arrays = dict[str, jax.Array]
Spec = tuple[Any, ...]


def explicit_spec(array: jax.Array) -> Spec:
    """The Explicit axes over which each axis of an array is split, or None."""
    spec = tuple(jax.typeof(array).sharding.spec)
    return (*spec, *[None] * (array.ndim - len(spec)))


def check_split(name: str, array: jax.Array) -> None:
    """Raises ValueError where `[..., length, heads, head_dim]` is split along more than heads."""
    spec = explicit_spec(array)
    if spec[-1] or spec[-3]:
        raise ValueError(
            f"{name} is sharded as {P(*spec)} over [..., length, heads, head_dim]; only batch "
            f"and heads may be split: reshard it first"
        )


def is_split(arrays: Any) -> bool:
    """Whether any array of a tree is split over Explicit axes."""
    return any(axis for array in jax.tree.leaves(arrays) for axis in explicit_spec(array))


def explicit_axes() -> set[str]:
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name for name, kind in kinds if kind == jax.sharding.AxisType.Explicit}


def shard_over_explicit_axes(
    function: Callable[[Arrays, Arrays], tuple[jax.Array, ...]],
    axes: dict[str, str],
    results: Sequence[str],
    arrays: Arrays,
    lists: Arrays,
    *,
    summed: Sequence[str],
) -> tuple[jax.Array, ...]:
    """`function(arrays, lists)` on what each device holds.

    The query says how batch and heads are split, and the rest follows it. axes: of each array,
    by name. results: names of arrays that each result is like. summed: those of
    them that are sums over the query heads of a group.

    Raises:
      ValueError: an array is split along its tokens or its head dim, or the heads over more
        devices than go with the groups of the key/value heads.
    """
    for name in ("query", "key", "value"):
        check_split(name, arrays[name])
    *batch, _, heads, _ = explicit_spec(arrays["query"])
    num_heads, kv_heads = arrays["query"].shape[-2], arrays["key"].shape[-2]
    group, shards = num_heads // kv_heads, _size(heads)
    mine, splits_kv = num_heads // shards, kv_heads % shards == 0
    if not splits_kv and mine % group and group % mine:
        raise ValueError(
            f"{num_heads} query heads over {shards} devices leave {mine} on each, which belong to "
            f"no whole number of the {kv_heads} key/value heads' groups of {group}"
        )
    split = {"heads": heads, "kv_heads": heads if splits_kv else None}

    def spec_of(name: str) -> P:
        entries: list[Any] = []
        for axis in axes[name].split():
            entries += batch if axis == "batch" else [split.get(axis)]
        return P(*entries)

    def on_device(arrays: Arrays, lists: Arrays) -> tuple[jax.Array, ...]:
        if splits_kv:
            return function(arrays, lists)
        start = lax.axis_index(heads) * mine // group
        needed = max(1, mine // group)
        held = arrays | {
            name: lax.dynamic_slice_in_dim(arrays[name], start, needed, axis=arrays[name].ndim - 2)
            for name in ("key", "value")
        }
        return tuple(
            lax.psum(_put(arrays[name], part, start), heads) if name in summed else part
            for name, part in zip(results, function(held, lists), strict=True)
        )

    in_specs = ({name: spec_of(name) for name in arrays}, {name: P() for name in lists})
    placed = jax.tree.map(jax.sharding.reshard, (arrays, lists), in_specs)
    found = jax.shard_map(
        on_device,
        in_specs=in_specs,
        out_specs=tuple(spec_of(name) for name in results),
        **_by_hand(),
        check_vma=False,
    )(*placed)
    # Inside a `shard_map` over other axes: that one has forgotten what varies over them.
    found = vary_alike([*arrays.values(), *found])[len(arrays) :]
    return tuple(
        jax.sharding.reshard(result, P(*explicit_spec(arrays[name]))) if name in arrays else result
        for name, result in zip(results, found, strict=True)
    )


def _put(like: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    """Zeros but for the heads from `start` on."""
    return lax.dynamic_update_slice_in_dim(jnp.zeros_like(like), part, start, axis=like.ndim - 2)


def _by_hand() -> dict[str, Any]:
    """Which axes to take by hand, where not all; all are fewer where one is mapped by `vmap`."""
    names = explicit_axes()
    every = len(names) == len(jax.sharding.get_abstract_mesh().axis_names)
    return {} if every else {"axis_names": names}


def _names(axes: Any) -> tuple[str, ...]:
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else tuple(axes)


def _size(axes: Any) -> int:
    size = 1
    for name in _names(axes):
        size *= jax.sharding.get_abstract_mesh().shape[name]
    return size
