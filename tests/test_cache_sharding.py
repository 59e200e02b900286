"""Caches over a mesh: what heads and sequences hold stays where they are."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import s2_jax
from s2_jax import ContiguousCache, EvictingCache, cached_attention
from tests.calls import AttentionCall
from tests.decoding import CACHES, feed, full_forward, make_cache
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
    [(1, "reference"), (1, "interpret"), (3, "interpret"), (20, "reference")],
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


@pytest.mark.parametrize("kind", [EvictingCache, ContiguousCache])
@pytest.mark.parametrize(("new", "heads"), [(1, 4), (1, 40), (16, 4)])
def test_one_key_value_head_over_a_mesh(kind, new, heads):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    pattern = s2_jax.local_stride(2, 3, block_size=16, homogeneous=True)
    cache = kind.create(
        pattern, batch=1, max_length=70, num_heads=heads, num_kv_heads=1, head_dim=8,
        dtype=jnp.float32,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    shapes = [(1, new, n, 8) for n in (heads, 1, 1)]
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    expected, _ = cached_attention(*arrays, cache, implementation="reference")
    placed = jax.device_put((*arrays, cache), NamedSharding(mesh, P()))
    out, _ = jax.jit(lambda *args: cached_attention(*args, implementation="interpret"))(*placed)
    np.testing.assert_allclose(out, expected, atol=2e-6)


@pytest.mark.parametrize("new", [1, 2])
def test_a_cache_that_devices_share_stays_shared(new):
    """Query heads split, the one key/value head not: the cache varies over no axis."""
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(AxisType.Auto,))
    pattern = s2_jax.local_stride(2, 3, block_size=16, homogeneous=True)
    cache = ContiguousCache.create(
        pattern, batch=2, max_length=70, num_heads=2, num_kv_heads=1, head_dim=8,
        dtype=jnp.float32,
    )  # fmt: skip
    arrays = [jnp.ones((2, new, n, 8)) for n in (4, 1, 1)]
    by_heads = P(None, None, "heads")
    run = jax.shard_map(
        cached_attention, mesh=mesh, in_specs=(by_heads, P(), P(), P()), out_specs=(by_heads, P())
    )
    out, after = jax.jit(run)(*arrays, cache)
    assert out.shape == (2, new, 4, 8)
    np.testing.assert_array_equal(after.length, [new, new])


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


# By head_axis, with every head of eight on a device of its own.


@pytest.fixture(params=CACHES)
def cache_kind(request):
    return request.param


SHARDED = AttentionCall(
    s2_jax.local_stride(2, 8, block_size=16), heads=16, kv_heads=8, batch=2, q_len=64, kv_len=64
)
BY_HEADS = P(None, None, "x")


def specs(cache):
    """How a cache is split by heads."""
    if isinstance(cache, ContiguousCache):
        return dataclasses.replace(cache, key=BY_HEADS, value=BY_HEADS, length=P())
    table = dataclasses.replace(cache.table, page=P(), block=P(None, "x"), length=P())
    return dataclasses.replace(cache, key=P("x"), value=P("x"), table=table)


@pytest.mark.parametrize("first", [False, True], ids=["chunk", "first"])
def test_shard_map_of_a_chunk(cache_kind, first):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    cache = make_cache(cache_kind, SHARDED)
    run = jax.shard_map(
        functools.partial(s2_jax.cached_attention, head_axis="x", first=first),
        mesh=mesh, in_specs=(*[BY_HEADS] * 3, specs(cache)), out_specs=(BY_HEADS, specs(cache)),
    )  # fmt: skip
    inputs = [SHARDED.inputs()[name][:, :40] for name in ("query", "key", "value")]
    out, _ = jax.jit(run)(*inputs, cache)
    np.testing.assert_allclose(out, full_forward(SHARDED)[1][:, :40], rtol=1e-5, atol=2e-6)


def test_pmap(cache_kind):
    """Each device has the pages and the part of the table of its own heads."""
    _, cache = feed(SHARDED, make_cache(cache_kind, SHARDED), [45], None)

    def parts(array, axis):
        shape = array.shape
        return array.reshape(*shape[:axis], 8, shape[axis] // 8, *shape[axis + 1 :])

    if cache_kind == "contiguous":
        axes = dataclasses.replace(cache, key=2, value=2, length=None)
        split = dataclasses.replace(cache, key=parts(cache.key, 2), value=parts(cache.value, 2))
    else:
        table = dataclasses.replace(cache.table, page=None, block=1, length=None)
        axes = dataclasses.replace(cache, key=0, value=0, table=table)
        split = dataclasses.replace(
            cache, key=parts(cache.key, 0), value=parts(cache.value, 0),
            table=dataclasses.replace(cache.table, block=parts(cache.table.block, 1)),
        )  # fmt: skip
    run = jax.pmap(
        functools.partial(s2_jax.cached_attention, head_axis="x"),
        axis_name="x", in_axes=(2, 2, 2, axes), out_axes=(2, axes),
    )  # fmt: skip
    for start in (45, 50):
        new = [SHARDED.inputs()[name][:, start : start + 5] for name in ("query", "key", "value")]
        out, split = run(*(parts(array, 2) for array in new), split)
        expected = full_forward(SHARDED)[1][:, start : start + 5]
        np.testing.assert_allclose(out.reshape(expected.shape), expected, rtol=1e-5, atol=2e-6)
