"""One suite for every implementation: outputs, LSE and gradients against the dense oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import s2_jax
from s2_jax import Tile, TileConfig
from tests.calls import AttentionCall, check, small_tiles, unrolled_tiles

S2_16 = s2_jax.local_stride(2, 3, block_size=16)
RANDOM_MASK = np.random.default_rng(7).random((4, 14, 14)) < 0.3

CALLS = {
    "causal": AttentionCall(S2_16, heads=3, kv_heads=3),
    "heuristic-tiles": AttentionCall(S2_16, q_len=211, kv_len=211, tiles=None),
    "bidirectional": AttentionCall(s2_jax.local_stride(2, 3, block_size=16, causal=False)),
    "gqa": AttentionCall(S2_16, heads=6, kv_heads=2, batch=2),
    "mqa": AttentionCall(S2_16, heads=5, kv_heads=1),
    "query-heads-in-gqa": AttentionCall(
        s2_jax.local_stride(2, 3, block_size=16, heads="query"), heads=6, kv_heads=2
    ),
    "more-keys": AttentionCall(S2_16, q_len=37, kv_len=131, query_offset=94),
    "more-queries": AttentionCall(S2_16, q_len=131, kv_len=37),
    "unaligned-offset": AttentionCall(S2_16, q_len=71, kv_len=149, query_offset=53),
    "keys-after-queries": AttentionCall(S2_16, q_len=29, kv_len=149, query_offset=31),
    "traced-offset": AttentionCall(S2_16, q_len=71, kv_len=149, batch=3, query_offset=(5, 53, 78)),
    "traced-offset-bidirectional": AttentionCall(
        s2_jax.local_stride(2, 3, block_size=16, causal=False),
        q_len=71,
        kv_len=149,
        batch=2,
        query_offset=(0, 61),
    ),
    "traced-offset-one-query": AttentionCall(
        S2_16, q_len=1, kv_len=149, batch=2, query_offset=(17, 148)
    ),
    "one-token": AttentionCall(S2_16, q_len=1, kv_len=1),
    "block-32": AttentionCall(s2_jax.local_stride(1, 2, block_size=32), tiles=small_tiles(32, 16)),
    "block-64-in-small-tiles": AttentionCall(
        s2_jax.local_stride(1, 2, block_size=64), q_len=201, kv_len=201, tiles=small_tiles(32, 16)
    ),
    "block-128": AttentionCall(
        s2_jax.local_stride(1, 2, block_size=128), q_len=301, kv_len=301, tiles=small_tiles(64, 64)
    ),
    "merge-q-4": AttentionCall(S2_16, q_len=203, kv_len=203, tiles=small_tiles(64, 16)),
    "merge-q-8": AttentionCall(S2_16, q_len=203, kv_len=203, tiles=small_tiles(128, 16)),
    "gathered-keys": AttentionCall(S2_16, q_len=203, kv_len=203, tiles=small_tiles(16, 64)),
    "merge-and-gather": AttentionCall(S2_16, q_len=331, kv_len=331, tiles=small_tiles(64, 64)),
    "gathered-columns": AttentionCall(
        s2_jax.local_stride(2, 4, block_size=16), q_len=1100, kv_len=1091, tiles=small_tiles(32, 64)
    ),
    "gathered-columns-gqa": AttentionCall(
        s2_jax.local_stride(1, 3, block_size=16),
        q_len=811,
        kv_len=811,
        heads=4,
        kv_heads=2,
        tiles=small_tiles(16, 64),
    ),
    "two-tiles-a-turn": AttentionCall(S2_16, q_len=331, kv_len=331, tiles=unrolled_tiles(2)),
    "three-tiles-a-turn": AttentionCall(
        S2_16, q_len=71, kv_len=149, batch=2, query_offset=(5, 78), tiles=unrolled_tiles(3)
    ),
    "dilated": AttentionCall(s2_jax.dilated_stride(3, block_size=16)),
    "sink": AttentionCall(
        s2_jax.local(2, block_size=16) | s2_jax.sink(1, block_size=16), q_len=163, kv_len=163
    ),
    "dense": AttentionCall(s2_jax.dense(block_size=16)),
    "dense-heads": AttentionCall(
        s2_jax.local_stride(1, 4, block_size=16, dense_heads=1), heads=3, kv_heads=3
    ),
    "per-head": AttentionCall(
        s2_jax.per_head((s2_jax.dense(block_size=16), S2_16, s2_jax.local(1, block_size=16))),
        heads=3,
        kv_heads=3,
    ),
    "block-mask": AttentionCall(
        s2_jax.block_mask(RANDOM_MASK, block_size=16), q_len=211, kv_len=199, heads=4, kv_heads=2
    ),
    "block-mask-bidirectional": AttentionCall(
        s2_jax.block_mask(RANDOM_MASK, block_size=16, causal=False),
        q_len=211,
        kv_len=199,
        heads=4,
        kv_heads=4,
    ),
    "masked-rows": AttentionCall(s2_jax.dense(block_size=16).at_distance(2, 4)),
    "all-masked": AttentionCall(
        s2_jax.block_mask(np.zeros((1, 7, 7), bool), block_size=16), heads=1
    ),
    "scale": AttentionCall(S2_16, scale=0.7),
    "scale-zero": AttentionCall(S2_16, scale=0.0),
    "scale-negative": AttentionCall(S2_16, scale=-0.5),
    "head-dim-24": AttentionCall(S2_16, head_dim=24, tiles=None),
    "head-dim-80": AttentionCall(S2_16, head_dim=80, tiles=None),
    "head-dim-96": AttentionCall(S2_16, head_dim=96, dtype="bfloat16", tiles=None),
    "head-dim-128": AttentionCall(S2_16, head_dim=128, dtype="float16", tiles=None),
    "head-dim-192": AttentionCall(S2_16, head_dim=192, tiles=None),
    "head-dim-256": AttentionCall(S2_16, head_dim=256, dtype="bfloat16", tiles=None),
    "head-dim-1": AttentionCall(S2_16, head_dim=1, tiles=None),
    "bfloat16": AttentionCall(S2_16, q_len=203, kv_len=203, head_dim=64, dtype="bfloat16"),
    "float16": AttentionCall(S2_16, q_len=203, kv_len=203, head_dim=64, dtype="float16"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_agrees_with_the_oracle(call, implementation):
    check(call, implementation)


def test_no_query_depends_on_later_tokens(implementation):
    """Causality, proven by gradients: d out[:, t] / d key[:, t'] is exactly 0 for t' > t."""
    call = AttentionCall(S2_16, q_len=67, kv_len=67)
    inputs = {name: jnp.asarray(array) for name, array in call.inputs().items()}

    @jax.jit
    def upto(t):
        def loss(key, value):
            out = s2_jax.s2_attention(
                inputs["query"], key, value, S2_16, implementation=implementation
            )
            return jnp.where(jnp.arange(67)[:, None, None] <= t, out[0], 0.0).sum()

        return jax.grad(loss, argnums=(0, 1))(inputs["key"], inputs["value"])

    for t in (0, 15, 16, 40):
        d_key, d_value = map(np.asarray, upto(t))
        assert d_value[:, : t + 1].any()
        assert d_key[:, : t + 1].any() or t == 0  # alone, a key does not matter
        assert not d_key[:, t + 1 :].any()
        assert not d_value[:, t + 1 :].any()


def test_a_query_that_sees_nothing_gives_zeros(implementation):
    """Blocks 0 and 1 see nothing at distance 2 or more."""
    pattern = s2_jax.dense(block_size=16).at_distance(2, None)
    call = AttentionCall(pattern, q_len=50, kv_len=50)
    got = call.run(implementation)
    assert not got["out"][:, :32].any()
    assert np.isneginf(got["lse"][:, :, :32]).all()
    assert not got["dq"][:, :32].any()
    assert all(np.isfinite(got[name]).all() for name in ("out", "dq", "dk", "dv"))
    assert got["out"][:, 32:].any()


def test_an_infinite_lse_gradient_stays_out(implementation):
    """What a user's logsumexp sends back to an LSE of -inf must not become a NaN."""
    pattern = s2_jax.dense(block_size=16).at_distance(1, None)
    query = jnp.ones((1, 40, 1, 16))

    def loss(query, key):
        _, lse = s2_jax.s2_attention(
            query, key, key, pattern, return_lse=True, implementation=implementation
        )
        return jnp.where(jnp.isneginf(lse), jnp.nan, 1.0 * lse).sum()

    for gradient in jax.grad(loss, argnums=(0, 1))(query, query):
        assert np.isfinite(np.asarray(gradient)[:, 16:]).all()
        assert not np.isnan(np.asarray(gradient)).any()


def test_a_nan_in_a_query_is_not_taken_for_a_query_that_sees_nothing(implementation):
    inputs = AttentionCall(S2_16).inputs()
    inputs["query"][0, 33] = np.nan
    out, lse = s2_jax.s2_attention(
        *(jnp.asarray(inputs[name]) for name in ("query", "key", "value")), S2_16,
        return_lse=True, implementation=implementation,
    )  # fmt: skip
    assert np.isnan(np.asarray(out)[0, 33]).all()
    assert np.isnan(np.asarray(lse)[0, :, 33]).all()
    assert np.isfinite(np.delete(np.asarray(out)[0], 33, axis=0)).all()


def test_positions_past_the_call_leave_the_gradients_of_others_alone(implementation):
    """Row 1 starts past what its block lists cover: NaN there, and nowhere in dk and dv."""
    pattern = s2_jax.block_mask(np.ones((1, 7, 7), bool), block_size=16)
    call = AttentionCall(pattern, q_len=23, kv_len=97, batch=2)
    query, key, value = (jnp.asarray(call.inputs()[n]) for n in ("query", "key", "value"))

    @jax.jit
    def gradients(offset):
        def total(*arrays):
            return s2_jax.s2_attention(
                *arrays, pattern, query_offset=offset, implementation=implementation
            ).sum()

        return jax.grad(total, (0, 1, 2))(query, key, value)

    for gradient in gradients(jnp.asarray([74, 101], jnp.int32)):
        assert np.isfinite(np.asarray(gradient)).all()


def test_64_bit_mode_changes_nothing(kernels):
    call = AttentionCall(S2_16, heads=4, kv_heads=2, batch=2, query_offset=(0, 40), kv_len=140)
    with jax.enable_x64(True):
        wide = call.run(kernels)
    narrow = call.run(kernels)
    for name in wide:
        assert wide[name].dtype == narrow[name].dtype
        np.testing.assert_allclose(wide[name], narrow[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "shapes",
    [
        ((1, 0, 2, 16), (1, 5, 1, 16)),
        ((1, 5, 2, 16), (1, 0, 1, 16)),
        ((0, 5, 2, 16), (0, 5, 1, 16)),
    ],
    ids=["no-queries", "no-keys", "no-batch"],
)
def test_empty_axes(shapes, implementation):
    query, key = (jnp.ones(shape) for shape in shapes)

    def attend(query, key):
        out, lse = s2_jax.s2_attention(
            query, key, key, S2_16, return_lse=True, implementation=implementation
        )
        return out.sum(), (out, lse)

    (_, (out, lse)), grads = jax.value_and_grad(attend, (0, 1), has_aux=True)(query, key)
    assert out.shape == query.shape
    assert lse.shape == (query.shape[0], 2, query.shape[1])
    assert not np.any(out)
    assert np.isneginf(np.asarray(lse)).all()
    assert [g.shape for g in grads] == list(shapes)


def test_the_batch_axis_may_be_left_out(implementation):
    inputs = AttentionCall(S2_16).inputs()
    arrays = [inputs[name] for name in ("query", "key", "value")]
    kwargs = {"return_lse": True, "implementation": implementation}
    out, lse = s2_jax.s2_attention(*arrays, S2_16, **kwargs)
    one, one_lse = s2_jax.s2_attention(*(a[0] for a in arrays), S2_16, **kwargs)
    assert np.array_equal(one, out[0])
    assert np.array_equal(one_lse, lse[0])


def test_vmap_is_a_batch(implementation):
    inputs = AttentionCall(S2_16, batch=3).inputs()
    arrays = [jnp.asarray(inputs[name]) for name in ("query", "key", "value")]

    def loss(query, key, value):
        return (
            s2_jax.s2_attention(query, key, value, S2_16, implementation=implementation) ** 2
        ).sum()

    whole = jax.grad(loss, (0, 1, 2))(*arrays)
    mapped = jax.vmap(jax.grad(loss, (0, 1, 2)))(*arrays)
    for a, b in zip(whole, mapped, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_chunks_equal_the_whole(implementation):
    """Prefill in chunks of odd sizes, at traced offsets, gives what one call gives."""
    call = AttentionCall(S2_16, q_len=113, kv_len=113)
    query, key, value = (jnp.asarray(call.inputs()[n]) for n in ("query", "key", "value"))
    attend = jax.jit(
        lambda query, offset: s2_jax.s2_attention(
            query, key, value, S2_16, query_offset=offset, implementation=implementation
        )
    )
    whole = attend(query, jnp.int32(0))
    for start, stop in ((0, 37), (37, 38), (38, 75), (75, 76), (76, 113)):
        chunk = attend(query[:, start:stop], jnp.int32(start))
        np.testing.assert_allclose(chunk, whole[:, start:stop], rtol=2e-5, atol=2e-6)


def test_an_offset_beyond_the_call_is_not_silent(implementation):
    """Positions that the block lists cannot cover give NaN instead of a wrong answer."""
    pattern = s2_jax.block_mask(np.ones((1, 4, 4), bool), block_size=16)
    query = jnp.ones((1, 20, 1, 16))
    key = jnp.ones((1, 64, 1, 16))
    attend = jax.jit(
        lambda offset: s2_jax.s2_attention(
            query, key, key, pattern, query_offset=offset, implementation=implementation
        )
    )
    assert np.isfinite(attend(jnp.int32(44))).all()
    late = np.asarray(attend(jnp.int32(50)))[0, :, 0, 0]
    assert np.isfinite(late[:14]).all()
    assert np.isnan(late[14:]).all()
    assert np.isnan(np.asarray(attend(jnp.int32(-3)))[0, :3]).all()


def test_equal_patterns_trace_once():
    traces = []

    @jax.jit(static_argnames="pattern")
    def attend(query, pattern):
        traces.append(pattern)
        return s2_jax.s2_attention(query, query, query, pattern)

    query = jnp.ones((1, 33, 2, 16))
    for _ in range(2):
        attend(query, s2_jax.local(1, block_size=16) | s2_jax.vertical_stride(3, block_size=16))
        attend(query, s2_jax.block_mask(RANDOM_MASK[:2], block_size=16))
    assert len(traces) == 2


def test_a_new_traced_offset_traces_nothing():
    traces = []

    @jax.jit
    def attend(query, key, offset):
        traces.append(1)
        return s2_jax.s2_attention(query, key, key, S2_16, query_offset=offset)

    query, key = jnp.ones((2, 5, 2, 16)), jnp.ones((2, 64, 2, 16))
    for offset in ((0, 3), (17, 59)):
        attend(query, key, jnp.asarray(offset, jnp.int32))
    assert len(traces) == 1


@pytest.mark.parametrize("heads", ["kv", "query"])
def test_a_shard_of_heads_computes_what_they_compute_in_the_whole(heads, kernels):
    """Four simulated devices hold heads [a, b) of eight query and four key/value heads."""
    if kernels != "interpret" and jax.device_count() < 4:
        mapped = jax.vmap
        split = lambda a: jnp.moveaxis(a.reshape(*a.shape[:2], 4, -1, a.shape[3]), 2, 0)  # noqa: E731
        join = lambda a: jnp.moveaxis(a, 0, 2).reshape(*a.shape[1:3], -1, a.shape[-1])  # noqa: E731
        run = lambda f, *arrays: join(mapped(f, axis_name="model")(*map(split, arrays)))  # noqa: E731
    else:
        mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
        spec = jax.sharding.PartitionSpec(None, None, "model")
        run = lambda f, *arrays: jax.jit(  # noqa: E731
            jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
        )(*arrays)
    pattern = s2_jax.local_stride(1, 8, block_size=16, heads=heads, dense_heads=1)
    call = AttentionCall(pattern, heads=8, kv_heads=4)
    query, key, value = (jnp.asarray(call.inputs()[n]) for n in ("query", "key", "value"))

    def attend(query, key, value, head_axis="model"):
        return s2_jax.s2_attention(
            query, key, value, pattern, head_axis=head_axis, implementation=kernels,
            tiles=call.tiles,
        )  # fmt: skip

    whole = attend(query, key, value, head_axis=None)
    np.testing.assert_allclose(run(attend, query, key, value), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize("split", ["batch", "heads"])
def test_none_runs_under_shard_map(split, check_vma):
    """Gradients too; where varying axes are checked, kernels and reference both name theirs."""
    pattern = s2_jax.local_stride(1, 8, block_size=16)
    call = AttentionCall(pattern, heads=8, kv_heads=4, batch=4)
    arrays = [jnp.asarray(call.inputs()[n]) for n in ("query", "key", "value")]
    devices = jax.devices("cpu")[:4]
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)
    spec = jax.sharding.PartitionSpec(*{"batch": ("x",), "heads": (None, None, "x")}[split])
    head_axis = "x" if split == "heads" else None

    def gradients(*arrays, head_axis=head_axis, implementation=None):
        def square(*arrays):
            out = s2_jax.s2_attention(
                *arrays, pattern, head_axis=head_axis, implementation=implementation
            )
            return (out**2).sum()

        return jax.grad(square, (0, 1, 2))(*arrays)

    sharded = jax.jit(
        jax.shard_map(gradients, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma)
    )
    whole = gradients(*arrays, head_axis=None, implementation="reference")
    for ours, truth in zip(sharded(*arrays), whole, strict=True):
        np.testing.assert_allclose(ours, truth, rtol=1e-4, atol=1e-5)


def test_tiles_of_each_kernel_may_differ(kernels):
    tiles = TileConfig(forward=Tile(64, 16), dq=Tile(16, 64), dkv=Tile(32, 16))
    check(AttentionCall(S2_16, q_len=203, kv_len=203, tiles=tiles), kernels)


def test_none_takes_the_reference_on_a_cpu():
    call = AttentionCall(S2_16)
    with jax.default_device(jax.devices("cpu")[0]):
        ours, reference = call.run(None), call.run("reference")
    for name in ours:
        np.testing.assert_allclose(ours[name], reference[name], rtol=1e-5, atol=1e-6)
