"""Calls that `s2_attention` refuses: named, with the value, before anything is compiled."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import s2_jax

BLOCK = 16
PATTERN = s2_jax.local_stride(1, 3, block_size=BLOCK)
COMPILED = []
# How jnp.asarray and array[None] put an argument in place, before its values are known.
PLUMBING = ("jit(stage)", "jit(broadcast_in_dim)", "jit(convert_element_type)")


def remember(event, duration, *, fun_name="", **details):
    if event.endswith("backend_compile_duration") and fun_name not in PLUMBING:
        COMPILED.append(fun_name)


jax.monitoring.register_event_duration_secs_listener(remember)


@pytest.fixture(autouse=True)
def on_the_cpu():
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def normal(*shape, dtype="float32"):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(dtype)


def call(pattern=PATTERN, *, query=(2, 40, 4, 8), key=(2, 40, 2, 8), value=None, **options):
    """A call that is right but for what is given; arrays may be given by their shape."""
    value = key if value is None else value
    arrays = (normal(*a) if isinstance(a, tuple) else a for a in (query, key, value))
    return s2_jax.s2_attention(*arrays, pattern, **options)


def cast(dtype, **options):
    query, key, value = normal(2, 40, 4, 8), normal(2, 40, 2, 8), normal(2, 40, 2, 8)
    return call(
        query=query.astype(dtype), key=key.astype(dtype), value=value.astype(dtype), **options
    )


def mask(*shape):
    return s2_jax.block_mask(np.ones(shape, bool), block_size=BLOCK)


def int32(*numbers):
    return np.array(numbers, np.int32)


def tensor(*shape, dtype="int32"):
    return np.zeros(shape, dtype)


def traced(name):
    return jax.jit(lambda number: call(**{name: number}))(2.0)


ARRAYS = {
    "query heads not a multiple": (
        lambda: call(query=(2, 40, 5, 8)),
        ValueError,
        r"query heads must be a multiple of the key/value heads, got 5 and 2",
    ),
    "fewer query than key heads": (
        lambda: call(query=(2, 40, 1, 8)), ValueError, r"multiple of .* got 1 and 2",
    ),
    "no heads": (
        lambda: call(query=(2, 40, 0, 8)), ValueError, r"heads .* not be 0, got .*\(2, 40, 0, 8\)",
    ),
    "no head_dim": (
        lambda: call(query=(2, 40, 4, 0), key=(2, 40, 2, 0)),
        ValueError,
        r"head_dim must not be 0, got .*\(2, 40, 4, 0\)",
    ),
    "head dims differ": (
        lambda: call(key=(2, 40, 2, 16)),
        ValueError,
        r"query and key must have the same head_dim, got 8 and 16",
    ),
    "key and value lengths differ": (
        lambda: call(value=(2, 39, 2, 8)),
        ValueError,
        r"key and value must agree .*\(2, 40, 2, 8\) and \(2, 39, 2, 8\)",
    ),
    "key and value heads differ": (
        lambda: call(value=(2, 40, 4, 8)),
        ValueError,
        r"key and value must agree .*\(2, 40, 2, 8\) and \(2, 40, 4, 8\)",
    ),
    "batches differ": (
        lambda: call(query=(3, 40, 4, 8)),
        ValueError,
        r"query and key must agree in batch, got 3 and 2",
    ),
    "a batch of one is not repeated": (
        lambda: call(query=(1, 40, 4, 8)), ValueError, r"must agree in batch, got 1 and 2",
    ),
    "mixed dtypes": (
        lambda: call(key=normal(2, 40, 2, 8, dtype="float16")),
        TypeError,
        r"query, key and value must share one dtype, got float32, float16 and float16",
    ),
    "integers": (
        lambda: cast("int32"), TypeError, r"query must have a floating dtype, got int32",
    ),
    "an integer value": (
        lambda: call(value=tensor(2, 40, 2, 8)),
        TypeError,
        r"value must have a floating dtype, got int32",
    ),
    "bool": (lambda: cast("bool"), TypeError, r"query must have a floating dtype, got bool"),
    "complex": (
        lambda: cast("complex64"), TypeError, r"query must have a floating dtype, got complex64",
    ),
    "objects": (lambda: cast("object"), TypeError, r"query must have a floating .* got object"),
    "float64 without x64": (
        lambda: cast("float64"), TypeError, r"query is float64, .*enable jax_enable_x64",
    ),
    "rank 2": (
        lambda: call(query=(40, 8)), ValueError, r"query must be \[batch, .* got shape \(40, 8\)",
    ),
    "rank 5": (
        lambda: call(key=(1, 2, 40, 2, 8)),
        ValueError,
        r"key must be \[batch, .* got shape \(1, 2, 40, 2, 8\)",
    ),
    "rank 0": (
        lambda: call(value=np.array(1, np.float32)), ValueError, r"value must .* got shape \(\)",
    ),
    "mixed ranks": (
        lambda: call(query=(40, 4, 8)),
        ValueError,
        r"must have the same rank, got shapes \(40, 4, 8\), \(2, 40, 2, 8\) and \(2, 40, 2, 8\)",
    ),
    "a list": (
        lambda: call(query=normal(2, 40, 4, 8).tolist()),
        TypeError,
        r"query must be a NumPy or JAX array, got list",
    ),
    "a shape": (
        lambda: call(key=jax.ShapeDtypeStruct((2, 40, 2, 8), jnp.float32)),
        TypeError,
        r"key must be a NumPy or JAX array, got ShapeDtypeStruct",
    ),
    "no value": (
        lambda: s2_jax.s2_attention(normal(40, 4, 8), normal(40, 2, 8), None, PATTERN),
        TypeError,
        r"value must be a NumPy or JAX array, got NoneType",
    ),
}  # fmt: skip

PATTERNS = {
    "None": (lambda: call(None), TypeError, r"pattern must be a pattern .* got NoneType"),
    "a mask": (
        lambda: call(np.ones((4, 3, 3), bool)), TypeError, r"pattern must be .* got ndarray",
    ),
    "the function": (
        lambda: call(s2_jax.local), TypeError, r"pattern must be a pattern .* got function",
    ),
    "block_size 8": (
        lambda: call(s2_jax.local_stride(1, 3, block_size=8)),
        ValueError,
        r"block_size=8 must be one of \(16, 32, 64, 128\)",
    ),
    "block_size 256": (
        lambda: call(s2_jax.dense(block_size=256)),
        ValueError,
        r"block_size=256 must be one of \(16, 32, 64, 128\)",
    ),
    "block_size 64.0": (
        lambda: call(s2_jax.dense(block_size=64.0)), TypeError, r"block_size=64.0 must be .*int",
    ),
    "negative stride": (
        lambda: call(s2_jax.local_stride(1, -3)), ValueError, r"vert_stride=-3 must be at least 1",
    ),
    "no local block": (
        lambda: call(s2_jax.local_stride(0, 3)), ValueError, r"local_blocks=0 must be at least 1",
    ),
    "block_mask of other heads": (
        lambda: call(mask(3, 3, 3)),
        ValueError,
        r"block_mask has 3 heads; it needs .* 2 key/value heads .* 4 query heads",
    ),
    "block_mask with one head for several": (
        lambda: call(mask(1, 3, 3)), ValueError, r"block_mask has 1 heads; it needs .* 2 key/value",
    ),
    "block_mask with too few rows": (
        lambda: call(mask(4, 2, 3)),
        ValueError,
        r"covers 2 query blocks and 3 key blocks, but the call needs 3 and 3 blocks of 16 tokens",
    ),
    "block_mask with too few columns": (
        lambda: call(mask(4, 3, 2)),
        ValueError,
        r"covers 3 query blocks and 2 key blocks, but the call needs 3 and 3 blocks of 16 tokens",
    ),
    "block_mask too short at an offset": (
        lambda: call(mask(4, 3, 3), query_offset=9),
        ValueError,
        r"covers 3 query blocks .* but the call needs 4 and 3",
    ),
    "block_mask too short in a part": (
        lambda: call(PATTERN & mask(2, 2, 3).at_distance(1, None)),
        ValueError,
        r"covers 2 query blocks .* but the call needs 3 and 3",
    ),
    "per_head of three": (
        lambda: call(s2_jax.per_head([PATTERN] * 3)),
        ValueError,
        r"per_head got 3 patterns; it needs .* 2 key/value heads .* 4 query heads",
    ),
    "more dense heads than heads": (
        lambda: call(s2_jax.local_stride(1, 3, dense_heads=3)),
        ValueError,
        r"dense_heads=3 is more than the 2 kv heads",
    ),
}  # fmt: skip

OPTIONS = {
    "implementation unknown": (
        lambda: call(implementation="cudnn"),
        ValueError,
        r"implementation='cudnn' must be one of .*'triton', 'jax_triton', 'interpret', 'reference'",
    ),
    "implementation in capitals": (
        lambda: call(implementation="Triton"), ValueError, r"implementation='Triton' must be one",
    ),
    "implementation not a string": (
        lambda: call(implementation=True), ValueError, r"implementation=True must be one of",
    ),
    "triton without a GPU": (
        lambda: call(implementation="triton"),
        ValueError,
        r'implementation="triton" needs an NVIDIA GPU .* traced for \'cpu\'',
    ),
    "jax_triton without a GPU": (
        lambda: call(implementation="jax_triton"),
        ValueError,
        r'implementation="jax_triton" needs an NVIDIA GPU .* traced for \'cpu\'',
    ),
    "tiles of the wrong type": (
        lambda: call(tiles=(32, 32)), TypeError, r"tiles must be a TileConfig, got tuple",
    ),
    "a single tile": (
        lambda: call(tiles=s2_jax.Tile(32, 32)), TypeError, r"tiles must be a TileConfig, got Tile",
    ),
    "head_axis unknown": (
        lambda: call(head_axis="model"),
        ValueError,
        r"head_axis='model' names no mesh axis in scope; .*shard_map",
    ),
    "head_axis of two": (
        lambda: call(head_axis=("data", "model")),
        TypeError,
        r"head_axis must name one mesh axis, got \('data', 'model'\)",
    ),
    "scale traced": (
        lambda: traced("scale"), TypeError, r"scale must be a Python number, got a traced array",
    ),
    "scale NaN": (
        lambda: call(scale=float("nan")), ValueError, r"scale=nan must be finite",
    ),
    "scale inf": (
        lambda: call(scale=np.float32("inf")), ValueError, r"scale=inf must be finite",
    ),
    "scale a string": (
        lambda: call(scale="0.5"), TypeError, r"scale must be a number, got str",
    ),
    "scale a bool": (lambda: call(scale=True), TypeError, r"scale must be a number, got bool"),
    "scale a vector": (
        lambda: call(scale=np.ones(4)), TypeError, r"scale must be a number, got ndarray",
    ),
    "soft cap 0": (
        lambda: call(logits_soft_cap=0), ValueError, r"logits_soft_cap=0.0 must be positive",
    ),
    "soft cap negative": (
        lambda: call(logits_soft_cap=-30.0),
        ValueError,
        r"logits_soft_cap=-30.0 must be positive",
    ),
    "soft cap NaN": (
        lambda: call(logits_soft_cap=np.nan), ValueError, r"logits_soft_cap=nan must be finite",
    ),
    "soft cap inf": (
        lambda: call(logits_soft_cap=np.inf), ValueError, r"logits_soft_cap=inf must be finite",
    ),
    "soft cap traced": (
        lambda: traced("logits_soft_cap"),
        TypeError,
        r"logits_soft_cap must be a Python number, got a traced array",
    ),
    "soft cap a string": (
        lambda: call(logits_soft_cap="30"), TypeError, r"logits_soft_cap must be a number, got str",
    ),
}  # fmt: skip

OFFSETS = {
    "negative": (
        lambda: call(query_offset=-1), ValueError, r"query_offset=-1 must not be negative",
    ),
    "negative NumPy int": (
        lambda: call(query_offset=np.int64(-5)),
        ValueError,
        r"query_offset=-5 must not be negative",
    ),
    "a negative one among them": (
        lambda: call(query_offset=int32(3, -7)),
        ValueError,
        r"query_offset must not be negative, got \[ 3 -7\]",
    ),
    "negative JAX array": (
        lambda: call(query_offset=jnp.int32(-2)),
        ValueError,
        r"query_offset must not be negative, got -2",
    ),
    "negative closed over by jit": (
        lambda: jax.jit(lambda: call(query_offset=int32(0, -2)))(),
        ValueError,
        r"query_offset must not be negative, got \[ 0 -2\]",
    ),
    "2**30": (
        lambda: call(query_offset=2**30), ValueError, r"query_offset=1073741824 .* 2\*\*30",
    ),
    "float": (
        lambda: call(query_offset=3.0),
        TypeError,
        r"query_offset must be an int or an int32 array, got float",
    ),
    "float array": (
        lambda: call(query_offset=tensor(2, dtype="float32")),
        TypeError,
        r"query_offset must be an int or an int32 array, got float32",
    ),
    "int64 array": (
        lambda: call(query_offset=tensor(2, dtype="int64")),
        TypeError,
        r"query_offset must be an int or an int32 array, got int64",
    ),
    "bool": (
        lambda: call(query_offset=True), TypeError, r"query_offset must be an int .* got bool",
    ),
    "NumPy bool": (
        lambda: call(query_offset=np.True_), TypeError, r"query_offset must be an int .* got bool",
    ),
    "list": (
        lambda: call(query_offset=[3, 4]), TypeError, r"query_offset must be an int .* got list",
    ),
    "None": (
        lambda: call(query_offset=None), TypeError, r"query_offset must .* got NoneType",
    ),
    "three for a batch of two": (
        lambda: call(query_offset=int32(1, 2, 3)),
        ValueError,
        r"query_offset must have a shape of \[\(\), \(2,\)\], got \(3,\)",
    ),
    "one for each token": (
        lambda: call(query_offset=tensor(2, 40)), ValueError, r"query_offset .* got \(2, 40\)",
    ),
    "a batch axis without a batch": (
        lambda: call(query=(40, 4, 8), key=(40, 2, 8), query_offset=int32(3)),
        ValueError,
        r"query_offset must have a shape of \[\(\)\], got \(1,\)",
    ),
}  # fmt: skip

ROWS = {
    "segment_ids short": (
        lambda: call(segment_ids=tensor(2, 39)),
        ValueError,
        r"segment_ids must have shape \(2, 40\), got \(2, 39\)",
    ),
    "segment_ids without batch": (
        lambda: call(segment_ids=tensor(40)),
        ValueError,
        r"segment_ids must have shape \(2, 40\), got \(40,\)",
    ),
    "segment_ids float": (
        lambda: call(segment_ids=tensor(2, 40, dtype="float32")),
        TypeError,
        r"segment_ids must be an integer array, got float32",
    ),
    "segment_ids bool": (
        lambda: call(segment_ids=tensor(2, 40, dtype="bool")),
        TypeError,
        r"segment_ids must be an integer array, got bool",
    ),
    "segment_ids list": (
        lambda: call(segment_ids=tensor(2, 40).tolist()),
        TypeError,
        r"segment_ids must be an integer array, got list",
    ),
    "kv_segment_ids missing": (
        lambda: call(query=(2, 30, 4, 8), segment_ids=tensor(2, 30)),
        ValueError,
        r"kv_segment_ids is required where the lengths differ, got q_len=30, kv_len=40",
    ),
    "kv_segment_ids alone": (
        lambda: call(kv_segment_ids=tensor(2, 40)),
        ValueError,
        r"kv_segment_ids needs segment_ids",
    ),
    "kv_segment_ids of the queries": (
        lambda: call(
            query=(2, 30, 4, 8), segment_ids=tensor(2, 30), kv_segment_ids=tensor(2, 30)
        ),
        ValueError,
        r"kv_segment_ids must have shape \(2, 40\), got \(2, 30\)",
    ),
    "query lengths too large": (
        lambda: call(query_seq_lengths=int32(40, 41)),
        ValueError,
        r"query_seq_lengths must lie in \[0, 40\], got \[40 41\]",
    ),
    "query lengths negative": (
        lambda: call(query_seq_lengths=int32(-1, 4)),
        ValueError,
        r"query_seq_lengths must lie in \[0, 40\], got \[-1  4\]",
    ),
    "key lengths too large": (
        lambda: call(query=(2, 90, 4, 8), key_value_seq_lengths=int32(7, 90)),
        ValueError,
        r"key_value_seq_lengths must lie in \[0, 40\], got \[ 7 90\]",
    ),
    "lengths int64": (
        lambda: call(key_value_seq_lengths=tensor(2, dtype="int64")),
        TypeError,
        r"key_value_seq_lengths must be an int32 array, got int64",
    ),
    "lengths float": (
        lambda: call(query_seq_lengths=tensor(2, dtype="float32")),
        TypeError,
        r"query_seq_lengths must be an int32 array, got float32",
    ),
    "lengths int": (
        lambda: call(key_value_seq_lengths=17),
        TypeError,
        r"key_value_seq_lengths must be an int32 array, got int",
    ),
    "lengths list": (
        lambda: call(query_seq_lengths=[17, 40]),
        TypeError,
        r"query_seq_lengths must be an int32 array, got list",
    ),
    "three lengths for a batch of two": (
        lambda: call(query_seq_lengths=int32(1, 2, 3)),
        ValueError,
        r"query_seq_lengths must have shape \(2,\), got \(3,\)",
    ),
    "one length for a batch of two": (
        lambda: call(key_value_seq_lengths=np.array(5, np.int32)),
        ValueError,
        r"key_value_seq_lengths must have shape \(2,\), got \(\)",
    ),
}  # fmt: skip

GROUPS = {
    "arrays": ARRAYS, "pattern": PATTERNS, "options": OPTIONS, "offset": OFFSETS, "rows": ROWS
}  # fmt: skip
BAD = [
    pytest.param(*case, id=f"{group}: {name}")
    for group, cases in GROUPS.items()
    for name, case in cases.items()
]


def test_a_good_call_is_taken():
    """The table's calls differ from this one by what they name and by nothing else."""
    COMPILED.clear()
    out, lse = call(return_lse=True)
    assert out.shape == (2, 40, 4, 8)
    assert np.isfinite(out).all()
    assert np.isfinite(lse).all()
    assert COMPILED


@pytest.mark.parametrize(("make", "error", "message"), BAD)
def test_bad_input_is_named_before_anything_is_compiled(make, error, message):
    COMPILED.clear()
    with pytest.raises(error) as caught:
        make()
    assert type(caught.value) is error
    assert re.search(message, str(caught.value)), caught.value
    assert not COMPILED


WIDE = {"query": (2, 40, 4, 288), "key": (2, 40, 2, 288)}


def test_kernels_refuse_what_they_cannot_do():
    COMPILED.clear()
    message = "the kernels do not support head dims above 256, got 288"
    with pytest.raises(NotImplementedError, match=message):
        call(**WIDE, implementation="interpret")
    assert not COMPILED


def test_the_reference_serves_it_where_nothing_is_asked_for():
    chosen, reference = (call(**WIDE, implementation=i) for i in (None, "reference"))
    np.testing.assert_array_equal(chosen, reference)


def test_float64_is_for_the_reference():
    with jax.enable_x64(True):
        with pytest.raises(NotImplementedError, match=r"dtype float64 .*they take bfloat16"):
            cast("float64", implementation="interpret")
        out = cast("float64")
        assert out.dtype == np.float64
        np.testing.assert_array_equal(out, cast("float64", implementation="reference"))
    np.testing.assert_allclose(out, cast("float32"), rtol=1e-5, atol=1e-6)
