"""Caches over a mesh: what heads and sequences hold stays where they are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import s2_jax
from s2_jax import ContiguousCache, EvictingCache, cached_attention
from tests.meshes import COLLECTIVE

PATTERN = s2_jax.local_stride(2, 4, block_size=16)
BATCH, HEADS, KV_HEADS, HEAD_DIM, LONGEST = 2, 8, 4, 16, 200


def tokens(new: int, seed: int):
    rng = np.random.default_rng(seed)
    shapes = [(BATCH, new, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def held(kind):
    """A cache that holds 70 tokens of each sequence."""
    cache = kind.create(
        PATTERN, batch=BATCH, max_length=LONGEST, num_heads=HEADS, num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM, dtype=jnp.float32,
    )  # fmt: skip
    return cached_attention(*tokens(70, 0), cache, first=True, implementation="reference")[1]


def spread(cache, mesh):
    """The cache and how new tokens lie: by heads, and a contiguous one by sequences as well."""

    def put(array, *spec):
        return jax.device_put(array, NamedSharding(mesh, P(*spec)))

    if isinstance(cache, ContiguousCache):
        rows = P("data", None, "heads")
        key, value = put(cache.key, *rows), put(cache.value, *rows)
        length = put(cache.length, "data")
        return dataclasses.replace(cache, key=key, value=value, length=length), rows
    table = dataclasses.replace(
        cache.table,
        page=put(cache.table.page),
        block=put(cache.table.block, None, "heads"),
        length=put(cache.table.length),
    )
    key, value = put(cache.key, "heads"), put(cache.value, "heads")
    return dataclasses.replace(cache, key=key, value=value, table=table), P(None, None, "heads")


@pytest.mark.parametrize("kind", [EvictingCache, ContiguousCache])
@pytest.mark.parametrize(
    ("new", "implementation"),
    [(1, "reference"), (3, "interpret"), (20, "reference")],
)
def test_a_step_over_a_mesh_adds_no_collective(kind, new, implementation):
    mesh = jax.make_mesh((2, 4), ("data", "heads"), axis_types=(AxisType.Auto,) * 2)
    cache, arrays = held(kind), tokens(new, 1)
    expected, _ = cached_attention(*arrays, cache, implementation="reference")
    cache, spec = spread(cache, mesh)
    arrays = [jax.device_put(array, NamedSharding(mesh, spec)) for array in arrays]

    @jax.jit
    def step(cache, *arrays):
        return cached_attention(*arrays, cache, implementation=implementation)

    with jax.set_mesh(mesh):
        compiled = step.lower(cache, *arrays).compile()
        out, after = compiled(cache, *arrays)
    assert not COLLECTIVE.search(compiled.as_text())
    assert out.sharding.spec == spec
    assert after.key.sharding.is_equivalent_to(cache.key.sharding, cache.key.ndim)
    np.testing.assert_allclose(out, expected, atol=2e-6)


def test_heads_that_the_devices_do_not_divide():
    """They are gathered, and the result is right all the same."""
    mesh = jax.make_mesh((8,), ("heads",), axis_types=(AxisType.Auto,))
    cache, arrays = held(EvictingCache), tokens(1, 1)
    expected, _ = cached_attention(*arrays, cache, implementation="reference")
    query = jax.device_put(arrays[0], NamedSharding(mesh, P(None, None, "heads")))
    with jax.set_mesh(mesh):
        step = jax.jit(lambda *args: cached_attention(*args, implementation="interpret"))
        out, _ = step(query, *arrays[1:], cache)
    np.testing.assert_allclose(out, expected, atol=2e-6)


@pytest.mark.parametrize("kind", [EvictingCache, ContiguousCache])
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_by_heads(kind, check_vma):
    mesh = jax.make_mesh((4,), ("heads",), axis_types=(AxisType.Auto,))
    cache, arrays = held(kind), tokens(2, 1)
    expected, _ = cached_attention(*arrays, cache, implementation="reference")
    by_heads = P(None, None, "heads")
    if kind is ContiguousCache:
        specs = dataclasses.replace(cache, key=by_heads, value=by_heads, length=P())
    else:
        table = dataclasses.replace(cache.table, page=P(), block=P(None, "heads"), length=P())
        specs = dataclasses.replace(cache, key=P("heads"), value=P("heads"), table=table)

    def step(cache, *arrays):
        implementation = "reference" if check_vma else "interpret"
        return cached_attention(*arrays, cache, head_axis="heads", implementation=implementation)[0]

    run = jax.shard_map(
        step, mesh=mesh, in_specs=(specs, *[by_heads] * 3), out_specs=by_heads,
        check_vma=check_vma,
    )  # fmt: skip
    np.testing.assert_allclose(jax.jit(run)(cache, *arrays), expected, atol=2e-6)
