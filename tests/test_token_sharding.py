"""The tokens of a row over devices, as the README does it: keys are gathered, queries stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tests.meshes import attend, inputs
from tests.test_sharding import assert_same

DEVICES = 4
TOKENS = P(None, "tokens")


def gathered(x):
    return lax.all_gather(x, "tokens", axis=1, tiled=True)


def in_order(query, key, value, ids, implementation):
    """Of this device's queries."""
    start = lax.axis_index("tokens") * query.shape[1]
    return attend(
        query, gathered(key), gathered(value), ids, implementation,
        kv_segment_ids=gathered(ids), query_offset=start,
    )  # fmt: skip


def order(length):
    """Device i holds chunks i and 2n - 1 - i of 2n: the same work for each."""
    chunks = np.arange(length).reshape(2 * DEVICES, -1)
    return np.concatenate([chunks[[i, -1 - i]].ravel() for i in range(DEVICES)])


def balanced(query, key, value, ids, implementation):
    """The same where a device holds an early and a late chunk."""
    key, value, all_ids = (gathered(x) for x in (key, value, ids))
    back = np.argsort(order(all_ids.shape[1]))
    key, value, all_ids = (x[:, back] for x in (key, value, all_ids))
    chunk, device = query.shape[1] // 2, lax.axis_index("tokens")
    outs = [
        attend(
            query[:, part], key, value, ids[:, part], implementation,
            kv_segment_ids=all_ids, query_offset=place * chunk,
        )
        for part, place in (
            (slice(None, chunk), device),
            (slice(chunk, None), 2 * DEVICES - 1 - device),
        )
    ]  # fmt: skip
    return jnp.concatenate(outs, axis=1)


@pytest.mark.parametrize("implementation", ["reference", "interpret"])
@pytest.mark.parametrize("split", [in_order, balanced])
def test_tokens_over_devices(split, implementation):
    *arrays, ids = inputs(heads=4, kv_heads=2, batch=2, q_len=168, kv_len=168)
    weights = jnp.cos(jnp.arange(arrays[0].size, dtype=jnp.float32)).reshape(arrays[0].shape)
    mesh = jax.make_mesh(
        (DEVICES,), ("tokens",), axis_types=(AxisType.Auto,), devices=jax.devices()[:DEVICES]
    )
    local = jax.shard_map(
        lambda *args: split(*args, implementation), mesh=mesh, in_specs=TOKENS, out_specs=TOKENS,
        check_vma=implementation != "interpret",
    )  # fmt: skip

    def sharded(*arrays):
        if split is in_order:
            return local(*arrays, ids)
        there = order(ids.shape[1])
        return local(*(x[:, there] for x in (*arrays, ids)))[:, np.argsort(there)]

    def results(function):
        out, pull_back = jax.vjp(function, *arrays)
        return out, *pull_back(weights)

    expected = jax.jit(lambda: results(lambda *arrays: attend(*arrays, ids, "reference")))()
    assert_same(jax.jit(lambda: results(sharded))(), expected)
