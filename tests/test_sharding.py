"""Batch and heads over a mesh: right, and without a collective that the call itself adds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.meshes import BOTH_KINDS, COLLECTIVE, attend, inputs, place


def gradients(query, key, value, ids, **kwargs):
    def loss(*arrays):
        return jnp.square(attend(*arrays, ids, **kwargs)).sum()

    return jax.grad(loss, (0, 1, 2))(query, key, value)


@functools.cache
def whole(**shape):
    return jax.jit(gradients)(*inputs(**shape))


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=3e-5)


SPLITS = {
    "batch": P("x"),
    "heads": P(None, None, "x"),
    "both": P("x", None, "y"),
    "batch-over-two": P(("x", "y")),
    "heads-over-two": P(None, None, ("x", "y")),
    "not-at-all": P(),
}


def make_mesh(kind):
    return jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind,) * 2)


@BOTH_KINDS
@pytest.mark.parametrize("split", SPLITS)
def test_jit_over_a_mesh_adds_no_collective(split, kind):
    mesh = make_mesh(kind)
    arrays = place(inputs(), mesh, SPLITS[split])
    with jax.set_mesh(mesh):
        compiled = jax.jit(gradients).lower(*arrays).compile()
        found = compiled(*arrays)
    assert_same(found, whole())
    for array, gradient in zip(arrays, found):
        assert gradient.sharding.is_equivalent_to(array.sharding, array.ndim)
    assert not COLLECTIVE.findall(compiled.as_text())


@BOTH_KINDS
@pytest.mark.parametrize("implementation", [None, "reference"])
def test_what_runs_without_a_gpu_is_right_over_a_mesh(implementation, kind):
    mesh = make_mesh(kind)
    arrays = place(inputs(kv_heads=4), mesh, SPLITS["both"])
    run = jax.jit(functools.partial(gradients, implementation=implementation))
    with jax.set_mesh(mesh):
        assert_same(run(*arrays), whole(kv_heads=4))


@BOTH_KINDS
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("implementation", ["interpret", None])
def test_grouped_heads_over_a_mesh(implementation, kv_heads, kind):
    """Query heads over four devices, also where there are fewer key/value heads than devices."""
    mesh = make_mesh(kind)
    spec = P(None, None, "y")
    arrays = place(inputs(kv_heads=kv_heads), mesh, spec, kv_spec=spec if kv_heads == 4 else P())
    run = jax.jit(functools.partial(gradients, implementation=implementation))
    with jax.set_mesh(mesh):
        assert_same(run(*arrays), whole(kv_heads=kv_heads))


def test_a_mesh_that_jit_only_learns_of_from_its_arguments():
    mesh = make_mesh(AxisType.Auto)
    arrays = place(inputs(), mesh, SPLITS["both"])
    compiled = jax.jit(gradients).lower(*arrays).compile()
    assert_same(compiled(*arrays), whole())
    assert not COLLECTIVE.findall(compiled.as_text())


@BOTH_KINDS
def test_vmap_over_a_mesh_adds_no_collective(kind):
    """A mapped axis that is split, and one that is not, each with the heads split as well."""
    mesh = make_mesh(kind)
    arrays = inputs()
    expected = whole()
    for axes, spec in ((P("x", None, None, "y"), P("x")), (P(None, "x", None, "y"), P(None, "x"))):
        q, k, v, ids = (a.reshape(2, 4, *a.shape[1:]) for a in arrays)
        placed = [jax.device_put(a, NamedSharding(mesh, axes)) for a in (q, k, v)]
        placed.append(jax.device_put(ids, NamedSharding(mesh, spec)))
        with jax.set_mesh(mesh):
            compiled = jax.jit(jax.vmap(gradients)).lower(*placed).compile()
            found = compiled(*placed)
        assert_same([np.asarray(a).reshape(8, *a.shape[2:]) for a in found], expected)
        assert not COLLECTIVE.findall(compiled.as_text())


@pytest.mark.parametrize("split", ["batch", "heads"])
def test_vmap_inside_and_outside_of_shard_map(split):
    mesh = make_mesh(AxisType.Auto)
    spec = {"batch": P("x"), "heads": P(None, None, "y")}[split]
    ids_spec = P("x") if split == "batch" else P()
    axis = "y" if split == "heads" else None
    expected = whole()
    q, k, v, ids = (a.reshape(2, 4, *a.shape[1:]) for a in inputs())

    def mapped(function, spec, ids_spec):
        specs = (spec, spec, spec, ids_spec)
        return jax.shard_map(
            function, mesh=mesh, in_specs=specs, out_specs=(spec,) * 3, check_vma=False
        )

    run = functools.partial(gradients, head_axis=axis)
    outside = jax.jit(jax.vmap(mapped(run, spec, ids_spec)))
    inside = jax.jit(mapped(jax.vmap(run), P(None, *spec), P(None, *ids_spec)))
    for function in (outside, inside):
        found = function(q, k, v, ids)
        assert_same([np.asarray(a).reshape(8, *a.shape[2:]) for a in found], expected)


def test_shard_map_over_some_of_the_axes():
    """Batch by hand, heads by the partitioner."""
    mesh = make_mesh(AxisType.Auto)
    arrays = place(inputs(), mesh, SPLITS["both"])
    run = jax.shard_map(
        gradients, mesh=mesh, in_specs=P("x"), out_specs=P("x"), axis_names={"x"}, check_vma=False
    )
    assert_same(jax.jit(run)(*arrays), whole())


def test_pmap():
    arrays = inputs()
    found = jax.pmap(gradients)(*(a[:, None] for a in arrays))
    assert_same([a[:, 0] for a in found], whole())


def test_pmap_of_vmap():
    arrays = inputs()
    found = jax.pmap(jax.vmap(gradients))(*(a.reshape(4, 2, 1, *a.shape[1:]) for a in arrays))
    assert_same([a.reshape(8, *a.shape[3:]) for a in found], whole())


@pytest.mark.parametrize("implementation", ["interpret", None])
def test_rows_that_the_devices_do_not_divide(implementation):
    """Right, if not split: as slicing a split array leaves them."""
    mesh = make_mesh(AxisType.Auto)
    arrays = place(inputs(), mesh, SPLITS["batch-over-two"])

    def some(*arrays):
        return gradients(*(a[:5] for a in arrays), implementation=implementation)

    assert_same(jax.jit(some)(*arrays), [a[:5] for a in whole()])


def test_one_key_head_where_some_axes_are_taken_by_hand():
    mesh = make_mesh(AxisType.Auto)
    q, k, v, ids = inputs(kv_heads=1)
    run = jax.shard_map(
        gradients, mesh=mesh, in_specs=P("x"), out_specs=P("x"), axis_names={"x"}, check_vma=False
    )
    assert_same(jax.jit(run)(q, k, v, ids), whole(kv_heads=1))


@pytest.mark.parametrize("implementation", ["interpret", "reference", None])
def test_everything_follows_the_query_over_explicit_axes(implementation):
    """A whole query with split segments, and a query split over more than one axis by hand."""
    mesh = make_mesh(AxisType.Explicit)
    run = functools.partial(gradients, implementation=implementation)
    q, k, v, ids = inputs()
    with jax.set_mesh(mesh):
        arrays = [jax.device_put(a, P()) for a in (q, k, v)]
        found = jax.jit(run)(*arrays, jax.device_put(ids, P("x")))
        assert_same(found, whole())
        split = [jax.device_put(a, P("x", None, "y")) for a in (q, k, v)]
        by_hand = jax.shard_map(
            run, in_specs=P("x"), out_specs=P("x"), axis_names={"x"}, check_vma=False
        )
        assert_same(jax.jit(by_hand)(*split, jax.device_put(ids, P("x"))), whole())
