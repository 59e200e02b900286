"""A kernel call under `vmap` and over a mesh: batch and heads may be split, and nothing moves.

`vmap` adds leading batch axes, which are folded into one only where the kernel is called, so
that each may be split on its own. Under `jit` with Auto axes, XLA's partitioner is told which
axes may be split (Shardy's rules); arrays over Explicit axes say it themselves (explicit.py);
inside `shard_map` and `pmap` the call is local already.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning

from pallas_kernels.call import Arrays, Settings
from pallas_kernels.explicit import is_split, shard_over_explicit_axes

_AXES = {
    "query": "batch q_len heads dim",
    "key": "batch kv_len kv_heads dim",
    "value": "batch kv_len kv_heads value_dim",
    "out": "batch q_len heads value_dim",
    "grad_out": "batch q_len heads value_dim",
    "lse": "batch heads q_len",
    "delta": "batch heads q_len",
    "pattern_of_head": "batch heads",
    "offset": "batch",
    "q_ids": "batch q_len",
    "kv_ids": "batch kv_len",
    "q_length": "batch",
    "kv_length": "batch",
}


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """A function of one kernel, and what its arrays are.

    function(settings, arrays, lists) -> results, with one batch axis. Arrays have the axes of
    their names; lists go whole to every device. results: names. summed: those of them that are
    sums over the query heads of a group.
    """

    function: Callable[[Settings, Arrays, Arrays], tuple[jax.Array, ...]]
    settings: Settings
    results: tuple[str, ...]
    summed: tuple[str, ...] = ()

    def __call__(self, arrays: Arrays, lists: Arrays) -> tuple[jax.Array, ...]:
        return _undifferentiable(self, arrays, lists)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _undifferentiable(call: KernelCall, arrays: Arrays, lists: Arrays) -> tuple[jax.Array, ...]:
    return _mappable(call)(arrays, lists)


@_undifferentiable.defjvp
def _(call: KernelCall, primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        'the kernels have no second derivatives; implementation="reference" has'
    )


@functools.lru_cache(maxsize=512)
def _mappable(call: KernelCall) -> Any:
    @custom_vmap
    def run(arrays: Arrays, lists: Arrays) -> tuple[jax.Array, ...]:
        if not is_split(arrays):
            return _run(call, arrays, lists)
        return shard_over_explicit_axes(
            functools.partial(_run, call), _AXES, call.results, arrays, lists,
            summed=call.summed,
        )  # fmt: skip

    @run.def_vmap
    def _(size: int, batched: Any, arrays: Arrays, lists: Arrays) -> Any:
        mapped = {
            name: array if batched[0][name] else jnp.broadcast_to(array, (size, *array.shape))
            for name, array in arrays.items()
        }
        return run(mapped, lists), (True,) * len(call.results)

    return run


def _run(call: KernelCall, arrays: Arrays, lists: Arrays) -> tuple[jax.Array, ...]:
    lead = arrays["query"].ndim - 4
    if not may_be_split():
        return _local(call, lead, arrays, lists)
    sums_parts = bool(call.summed) and arrays["key"].shape[-2] == 1
    split = _splittable(call, lead, tuple(arrays), tuple(lists), sums_parts)
    return split(*arrays.values(), *lists.values())


def _local(call: KernelCall, lead: int, arrays: Arrays, lists: Arrays) -> tuple[jax.Array, ...]:
    """Folds the leading axes into one batch axis around the call."""
    batch = arrays["offset"].shape
    assert len(batch) == lead + 1
    if 0 in batch:  # as vmap over an axis without entries makes it
        return tuple(_zeros(name, arrays) for name in call.results)

    def fold(array: jax.Array) -> jax.Array:
        return array.reshape(math.prod(batch), *array.shape[lead + 1 :])

    folded = {name: fold(array) for name, array in arrays.items()}
    results = call.function(call.settings, folded, lists)
    return tuple(result.reshape(*batch, *result.shape[1:]) for result in results)


def _zeros(name: str, arrays: Arrays) -> jax.Array:
    query, value = arrays["query"], arrays["value"]
    if name == "out":
        return jnp.zeros((*query.shape[:-1], value.shape[-1]), query.dtype)
    if name == "lse":
        return jnp.zeros((*query.shape[:-3], query.shape[-2], query.shape[-3]), jnp.float32)
    return jnp.zeros_like(arrays[name])


def may_be_split() -> bool:
    """Whether XLA may split this call: not on one device, nor inside `shard_map` over all axes."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or (mesh.size > 1 and jax.sharding.AxisType.Auto in mesh.axis_types)


@functools.lru_cache(maxsize=512)
def _splittable(
    call: KernelCall,
    lead: int,
    names: tuple[str, ...],
    list_names: tuple[str, ...],
    sums_parts: bool,
) -> Any:
    """The call as XLA's partitioner sees it.

    sums_parts: one key/value head serves query heads on several devices, each with a part of
    its sum.
    """

    def run(*flat: jax.Array) -> tuple[jax.Array, ...]:
        arrays = dict(zip(names, flat, strict=False))
        lists = dict(zip(list_names, flat[len(names) :], strict=True))
        return _local(call, lead, arrays, lists)

    def partition(mesh: Any, inputs: Any, results: Any) -> Any:
        lower = run
        if not _agree(zip((*names, *call.results), (*inputs[: len(names)], *results))):
            whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
            return mesh, run, (whole,) * len(results), (whole,) * len(inputs)
        query = inputs[names.index("query")]
        if sums_parts and query.sharding.shard_shape(query.shape)[-2] < query.shape[-2]:
            if not isinstance(query.sharding, jax.sharding.NamedSharding):
                raise ValueError(
                    "query heads that share one key/value head are split over an axis without a "
                    "name here; use shard_map over all axes of the mesh"
                )
            members = query.sharding.spec[-2]

            def lower(*flat: jax.Array) -> tuple[jax.Array, ...]:
                return tuple(
                    lax.psum(result, members) if name in call.summed else result
                    for name, result in zip(call.results, run(*flat), strict=True)
                )

        shardings = lambda arrays: tuple(array.sharding for array in arrays)  # noqa: E731
        return mesh, lower, shardings(results), shardings(inputs)

    def rule(mesh: Any, inputs: Any, results: Any) -> Any:
        shapes = [tuple(kind.shape) for kind in inputs]
        named = dict(zip(names, shapes, strict=False))
        heads, kv_heads = named["query"][-2], named["key"][-2]
        whole = shapes[len(names) :]
        keeps_groups = bool(call.summed) and (kv_heads > 1 or mesh.empty)
        return _rule(names, call.results, lead, heads, kv_heads, whole, keeps_groups)

    split = custom_partitioning(run)
    # Names of axes are only asked for where they are needed: what is split over a part of an axis,
    # as key/value heads over more devices than there are of them, has none.
    split.def_partition(partition, sharding_rule=rule, decode_shardings=sums_parts)
    return split


def _agree(arrays: Iterable[tuple[str, Any]]) -> bool:
    """Whether every axis is split alike wherever it occurs, and heads lie with their groups."""
    local: dict[str, set[Any]] = {}
    whole: dict[str, set[Any]] = {}
    for name, array in arrays:
        axes = _AXES[name].split()
        lead = array.ndim - len(axes) + 1
        try:
            held = array.sharding.shard_shape(array.shape)
        except ValueError:  # a number of rows or heads that the devices do not divide
            return False
        for sizes, shape in ((local, held), (whole, array.shape)):
            for axis, size in zip(axes, (shape[:lead], *shape[lead:]), strict=True):
                sizes.setdefault(axis, set()).add(size)
    if any(len(found) > 1 for found in local.values()):
        return False
    (mine,), (my_kv) = local["heads"], local["kv_heads"]
    group = min(whole["heads"]) // min(whole["kv_heads"])
    return mine == min(my_kv) * group or (my_kv == {1} and group % mine == 0)


def _rule(
    names: tuple[str, ...],
    results: tuple[str, ...],
    lead: int,
    heads: int,
    kv_heads: int,
    whole: Sequence[tuple[int, ...]],
    keeps_groups: bool,
) -> tuple[str, dict[str, Any]]:
    """Shardy's rule: batch axes and heads may be split, everything else is whole.

    A query head is (key/value head, member of its group). keeps_groups: members stay together.
    """
    group = heads // kv_heads
    query_heads, sizes = "g" if kv_heads == 1 else "k", {}
    if group > 1 and kv_heads > 1:
        query_heads, sizes = "(k g)", {"g": group}
    factors = {"heads": query_heads, "kv_heads": "k", "q_len": "t", "kv_len": "s", "dim": "d"}
    factors["value_dim"] = "v"
    batch = " ".join(f"b{i}" for i in range(lead + 1))

    def axes(name: str) -> str:
        return " ".join(batch if x == "batch" else factors[x] for x in _AXES[name].split())

    lists = [" ".join(f"w{i}x{j}" for j in range(len(shape))) for i, shape in enumerate(whole)]
    text = ", ".join([*map(axes, names), *lists]) + " -> " + ", ".join(map(axes, results))
    used = text.replace(",", " ").replace("(", " ").replace(")", " ").split()
    fixed = "tsdv" + "k" * (kv_heads == 1) + "g" * keeps_groups
    kept = [x for x in dict.fromkeys(used) if x in fixed or x.startswith("w")]
    return text, {"need_replication_factors": tuple(kept), **sizes}
