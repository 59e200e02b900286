"""Arrays of a call laid over a mesh, for simulated devices and for GPUs."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import s2_jax
from tests.calls import SMALL_TILES, AttentionCall

PATTERN = s2_jax.local_stride(1, 8, block_size=16)
COLLECTIVE = re.compile(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter")
BOTH_KINDS = pytest.mark.parametrize(
    "kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"]
)


def attend(query, key, value, ids, implementation="interpret", pattern=PATTERN, **kwargs):
    return s2_jax.s2_attention(
        query, key, value, pattern, segment_ids=ids, implementation=implementation,
        tiles=SMALL_TILES if implementation == "interpret" else None, **kwargs,
    )  # fmt: skip


def inputs(heads=8, kv_heads=8, batch=8, **changes):
    """Query, key, value and segment ids."""
    call = AttentionCall(
        PATTERN, heads=heads, kv_heads=kv_heads, batch=batch, segments="packed", **changes
    )
    arrays = [jnp.asarray(call.inputs()[name]) for name in ("query", "key", "value")]
    return [*arrays, jnp.asarray(call.ids()[0])]


def place(arrays, mesh, spec, kv_spec=None):
    """The four arrays of `inputs` on the devices of a mesh; ids as the query's batch."""
    q, k, v, ids = arrays
    specs = [spec, *[spec if kv_spec is None else kv_spec] * 2, P(spec[0] if len(spec) else None)]
    return [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip((q, k, v, ids), specs)]
