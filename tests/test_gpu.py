"""What only a GPU can show: long rows, repeatable bits, and training by the kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import s2_jax
from benchmarks.training import Options, compare

pytestmark = pytest.mark.gpu


def normal(seed, *shape, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


@pytest.mark.parametrize("length", [16384, 32771])
def test_long_rows_agree_with_the_reference(length):
    """In bfloat16, gradients included, against the reference in float32 at highest precision."""
    pattern = s2_jax.local_stride(8, 16)
    shapes = ((1, length, 4, 128), (1, length, 2, 128), (1, length, 2, 128))
    arrays = [normal(seed, *shape) for seed, shape in enumerate(shapes)]
    d_out = normal(9, *shapes[0])

    def run(implementation, *arrays):
        def attend(*arrays):
            return s2_jax.s2_attention(
                *arrays, pattern, return_lse=True, implementation=implementation
            )

        (out, lse), pull_back = jax.vjp(attend, *arrays)
        return out, lse, *pull_back((d_out.astype(out.dtype), jnp.zeros_like(lse)))

    exact = jax.jit(lambda *a: run("reference", *a))(*(a.astype(jnp.float32) for a in arrays))
    rounded = jax.jit(lambda *a: run("reference", *a))(*arrays)
    ours = jax.jit(lambda *a: run("triton", *a))(*arrays)
    for name, truth, theirs, got in zip(
        ("out", "lse", "dq", "dk", "dv"), exact, rounded, ours, strict=True
    ):
        truth, theirs, got = (np.asarray(x, np.float32) for x in (truth, theirs, got))
        allowed = 2 * np.abs(theirs - truth).max() + 4 * 2.0**-8 * np.abs(truth).max()
        assert np.abs(got - truth).max() <= allowed, name


def test_gradients_are_the_same_bit_for_bit():
    pattern = s2_jax.local_stride(4, 8)
    arrays = [normal(seed, 2, 4099, 4, 64) for seed in range(3)]
    ids = jnp.arange(2 * 4099, dtype=jnp.int32).reshape(2, 4099) // 700

    @jax.jit
    def gradients(*arrays):
        def loss(*arrays):
            out = s2_jax.s2_attention(*arrays, pattern, segment_ids=ids, implementation="triton")
            return out.astype(jnp.float32).sum()

        return jax.grad(loss, argnums=(0, 1, 2))(*arrays)

    first = jax.device_get(gradients(*arrays))
    for _ in range(3):
        again = jax.device_get(gradients(*arrays))
        assert all(a.tobytes() == b.tobytes() for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_memory_is_that_of_inputs_and_results(packed):
    """At 131 072 tokens nothing quadratic, and no copy per head, is held."""
    query = jax.ShapeDtypeStruct((1, 131072, 8, 128), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((1, 131072), jnp.int32)
    attend = jax.jit(
        lambda q, k, v, ids: s2_jax.s2_attention(
            q, k, v, s2_jax.local_stride(8, 16), implementation="triton",
            segment_ids=ids if packed else None,
        )
    )  # fmt: skip
    memory = attend.lower(query, query, query, ids).compile().memory_analysis()
    results = memory.argument_size_in_bytes + memory.output_size_in_bytes
    assert memory.temp_size_in_bytes < 0.05 * results


def test_more_than_two_to_the_31_elements():
    """The last rows of arrays that 32 bits cannot index, gradients included."""
    length, heads, dim, tail = 4097 * 64, 64, 128, 512
    assert length * heads * dim > 2**31
    pattern = s2_jax.local(2)

    def run(query, key, value, d_out):
        def attend(*arrays):
            return s2_jax.s2_attention(*arrays, pattern, implementation="triton")

        out, pull_back = jax.vjp(attend, query, key, value)
        return out, *pull_back(d_out)

    arrays = [normal(seed, 1, length, heads, dim) for seed in range(4)]
    whole = [a[:, -tail:] for a in jax.jit(run)(*arrays)]
    apart = jax.jit(run)(*(a[:, -tail:] for a in arrays))
    # The slice lacks what its first block would see, and what reaches it from there.
    for name, ours, theirs in zip(("out", "dq", "dk", "dv"), whole, apart, strict=True):
        a, b = (np.asarray(x[:, 128:], np.float32) for x in (ours, theirs))
        np.testing.assert_array_equal(a, b, err_msg=name)
        assert np.abs(a).max() > 0


def test_cudnn_agrees_where_it_can():
    """An independent implementation: dense causal attention, forward and gradients."""
    query, key, value, d_out = (normal(seed, 2, 1024, 4, 64) for seed in range(4))

    def run(attend):
        out, pull_back = jax.vjp(attend, query, key, value)
        return out, *pull_back(d_out)

    ours = run(lambda *a: s2_jax.s2_attention(*a, s2_jax.dense(), implementation="triton"))
    theirs = run(
        lambda *a: jax.nn.dot_product_attention(*a, is_causal=True, implementation="cudnn")
    )
    for a, b in zip(ours, theirs, strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        assert np.abs(a - b).max() <= 2.0**-6 * np.abs(b).max()


def test_kernels_train_like_the_reference():
    """50 steps of a small hybrid from one seed: the same losses to bfloat16 rounding."""
    with jax.numpy_dtype_promotion("standard"):  # Optax relies on it
        result = compare(Options())
    assert result["last"] < 0.8 * result["first"]
    assert result["largest_relative_difference"] < 2.0**-7
