"""Decoding with either cache equals one full forward, and reads nothing that it has let go."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

import s2_jax
from tests.calls import AttentionCall
from tests.decoding import (
    CACHES,
    assert_one_forward,
    feed,
    full_forward,
    make_cache,
    program,
)
from tests.draws import decodings

S2_16 = s2_jax.local_stride(2, 3, block_size=16)
DENSE = s2_jax.dense(block_size=16)
GROUPED = {"heads": 6, "kv_heads": 2}
SHORT = {"q_len": 75, "kv_len": 75}


@pytest.fixture(params=CACHES)
def kind(request):
    return request.param


def efficient_mask(heads, blocks):
    """At random, but what a query drops no later one wants back."""
    last = np.random.default_rng(5).integers(-1, blocks, size=(heads, 1, blocks))
    return np.arange(blocks)[:, None] <= np.maximum(last, np.arange(blocks) - 1)


# What differs in the lists of blocks that the caches make.
PATTERNS = {
    "pattern-heads-are-query-heads": AttentionCall(
        s2_jax.local_stride(1, 3, heads="query", head_step=1, block_size=16), **GROUPED, **SHORT
    ),
    "one-pattern-a-kv-head": AttentionCall(
        s2_jax.per_head([S2_16, DENSE]), soft_cap=1.5, scale=-1.0, **GROUPED, **SHORT
    ),
    "one-pattern-a-query-head": AttentionCall(
        s2_jax.per_head([s2_jax.local(n, block_size=16) for n in (1, 2, 3, 1)]),
        heads=4, kv_heads=2, **SHORT,
    ),
    "block-mask": AttentionCall(
        s2_jax.block_mask(efficient_mask(3, 5), block_size=16), heads=3, kv_heads=3, scale=-0.7,
        **SHORT,
    ),
    "rings": AttentionCall(
        s2_jax.local(1, block_size=16)
        | DENSE.at_distance(1, 3).at_distance(0, 2)
        | s2_jax.vertical_stride(2, block_size=16).at_distance(1, 4),
        **SHORT,
    ),
    "window": AttentionCall(DENSE, window=37, window_joins="&", soft_cap=1.5, **SHORT),
    "window-or-sink": AttentionCall(s2_jax.sink(1, block_size=16), window=21, **SHORT),
    "window-and-stride": AttentionCall(
        S2_16, window=30, window_joins="&", heads=3, kv_heads=3, **SHORT
    ),
    "more-heads-a-group-than-rows-of-a-program": AttentionCall(
        S2_16, heads=37, kv_heads=1, q_len=53, kv_len=53
    ),
}  # fmt: skip

# What differs in the kernel.
FEATURES = {
    "zero-scale": AttentionCall(S2_16, scale=0.0, head_dim=19, value_dim=40, **SHORT),
    "window-1": AttentionCall(DENSE, window=1, window_joins="&", dtype="float16", **SHORT),
    "value-dim-smaller": AttentionCall(S2_16, head_dim=128, value_dim=64, **SHORT),
    "value-dim-smaller-bfloat16": AttentionCall(
        s2_jax.local_stride(1, 2, block_size=64), head_dim=192, value_dim=128, dtype="bfloat16",
        q_len=150, kv_len=150,
    ),
    "large-scores-of-head-dim-80": AttentionCall(
        s2_jax.local_stride(1, 2, block_size=32), head_dim=80, scale=5.0, dtype="bfloat16",
        **SHORT,
    ),
    "head-dim-256": AttentionCall(
        s2_jax.local_stride(1, 2, block_size=64), head_dim=256, q_len=150, kv_len=150
    ),
    "blocks-of-128": AttentionCall(
        s2_jax.local_stride(1, 2, block_size=128), dtype="bfloat16", q_len=277, kv_len=277
    ),
}  # fmt: skip


def pieces_up_to(length):
    """Up to 16 tokens at a time, many of them across the end of a block."""
    pieces, sizes = [], (13, 5, 16, 1, 15)
    while sum(pieces) < length:
        pieces.append(min(sizes[len(pieces) % len(sizes)], length - sum(pieces)))
    return pieces


@pytest.mark.parametrize("call", PATTERNS.values(), ids=PATTERNS)
def test_patterns(call, implementation):
    out, _ = feed(call, make_cache("evicting", call), pieces_up_to(call.q_len), implementation)
    assert_one_forward(out, call)


@pytest.mark.parametrize("call", PATTERNS.values(), ids=PATTERNS)
def test_patterns_in_the_contiguous_cache(call):
    out, _ = feed(call, make_cache("contiguous", call), pieces_up_to(call.q_len), None)
    assert_one_forward(out, call)


@pytest.mark.parametrize(
    ("call", "kind"), list(zip(FEATURES.values(), [*CACHES] * len(FEATURES))), ids=FEATURES
)
def test_features(call, kind, implementation):
    out, _ = feed(call, make_cache(kind, call), pieces_up_to(call.q_len), implementation)
    assert_one_forward(out, call)


# The tests from here to the pool of pages share their programs: those of three sequences, in
# pieces of up to 16 tokens or up to 48. There is room for 133 tokens, nine blocks less a bit.
CALL = AttentionCall(S2_16, **GROUPED, batch=3, q_len=250, kv_len=250)
ROOM = 133


def cache_of(kind, **changes):
    return make_cache(kind, CALL, **({"max_length": ROOM} | changes))


@pytest.mark.parametrize("value_dim", [16, 24])  # one kernel takes in those of one size
def test_token_by_token(kind, implementation, value_dim):
    call = dataclasses.replace(CALL, dtype="bfloat16", value_dim=value_dim)
    cache = cache_of(kind, dtype="bfloat16", value_dim=value_dim)
    out, cache = feed(call, cache, [1] * 53, implementation)
    assert_one_forward(out, call, cache.length)


def test_prefill_in_chunks_of_odd_sizes(kind, implementation):
    pieces = [37, 41, (7, 1, 16), (17, 48, 38), (16, 3, 1)]
    out, cache = feed(CALL, cache_of(kind), pieces, implementation)
    assert_one_forward(out, CALL, cache.length)


def test_sequences_of_different_lengths(kind, implementation):
    """Some get nothing at times, one never does, and one is full before the others."""
    pieces = [(48, 0, 17), (16, 0, 1), (0, 0, 0), (1, 0, 16), (45, 0, 33), (16, 0, 8), (7, 0, 0)]
    out, cache = feed(CALL, cache_of(kind), pieces, implementation, first=True)
    np.testing.assert_array_equal(cache.length, [ROOM, 0, 75])
    assert_one_forward(out, CALL, cache.length)


def test_nothing_that_was_let_go_is_read(kind, implementation):
    """NaN in freed pages, pages of nobody, rows not written and padding changes no bit."""
    pieces = [(37, 48, 1), (16, 3, 16), (48, 17, 20), (16, 16, 16), (16, 9, 0)]
    poisoned, _ = feed(CALL, cache_of(kind), pieces, implementation)
    clean, _ = feed(CALL, cache_of(kind), pieces, implementation, poison=False)
    assert np.isfinite(clean).all()
    assert clean.tobytes() == poisoned.tobytes()


def test_neighbours_change_no_bit(kind, implementation):
    pieces = [(37, 20, 48), (16, 16, 9), (1, 7, 1), (16, 0, 11)]
    ours, _ = feed(CALL, cache_of(kind), pieces, implementation)
    inputs = {name: CALL.inputs()[name].copy() for name in ("query", "key", "value")}
    for array in inputs.values():
        array[[0, 2]] = 3.0
    others = [(0, mine, 1) for _, mine, _ in pieces]
    alone, _ = feed(CALL, cache_of(kind), others, implementation, **inputs)
    # The first chunk was taken by other kernels, with which its rows are compared elsewhere.
    assert ours[1, 20:].tobytes() == alone[1, 20:].tobytes()
    np.testing.assert_allclose(ours[1], alone[1], rtol=1e-5, atol=1e-6)


def test_first_drops_what_was_held(kind, implementation):
    once, cache = feed(CALL, cache_of(kind), [(35, 48, 1), 16], implementation, first=True)
    assert_one_forward(once, CALL, cache.length)
    _, used = feed(CALL, cache_of(kind), [(48, 17, 48), 48, (16, 0, 16)], implementation)
    again, _ = feed(CALL, used, [(35, 48, 1), 16], implementation, first=True)
    assert once.tobytes() == again.tobytes()


def test_a_cache_is_a_value(kind, implementation):
    """Two continuations of one prefix: the second knows nothing of the first."""
    _, prefix = feed(CALL, cache_of(kind), [(33, 48, 5)], implementation)
    other = {name: CALL.inputs()[name] + 1 for name in ("query", "key", "value")}
    pieces = [(16, 3, 9), (1, 1, 16), (16, 16, 16)]
    once, _ = feed(CALL, prefix, pieces, implementation)
    feed(CALL, prefix, [(7, 16, 16), (48, 16, 16)], implementation, **other)
    again, _ = feed(CALL, prefix, pieces, implementation)
    assert once.tobytes() == again.tobytes()
    np.testing.assert_array_equal(prefix.length, [33, 48, 5])


def test_rows_come_and_go(kind, implementation):
    """A prompt is taken on its own and joins a batch, in place of a sequence that ended."""
    out, cache = feed(CALL, cache_of(kind), [(29, 48, 5)], implementation)
    prompt = {name: CALL.inputs()[name][:1] * 0.5 for name in ("query", "key", "value")}
    single = dataclasses.replace(CALL, batch=1)
    joined = {name: CALL.inputs()[name].copy() for name in ("query", "key", "value")}
    for name, array in joined.items():
        array[1] = prompt[name][0]

    one = jax.jit(lambda cache, index: cache.row(index))(cache, 1)
    np.testing.assert_array_equal(one.length, [48])
    # Its pages are those of all sequences, which `feed` would take for nobody's.
    head, one = feed(single, one, [16], implementation, first=True, poison=False, **prompt)
    cache = jax.jit(lambda cache, index, one: cache.with_row(index, one))(cache, 1, one)
    np.testing.assert_array_equal(cache.length, [29, 16, 5])
    tail, cache = feed(CALL, cache, [16, 1], implementation, **joined)
    np.testing.assert_array_equal(cache.length, [46, 33, 22])
    assert_one_forward(np.stack([out[0] + tail[0], out[1], out[2] + tail[2]]), CALL, [46, 0, 22])

    alone, _ = feed(CALL, cache_of(kind), [(0, 16, 0), (0, 16, 0), (0, 1, 0)], implementation,
                    **joined)  # fmt: skip
    np.testing.assert_allclose(head[0] + tail[1], alone[1], rtol=1e-5, atol=1e-6)


def test_past_max_length(kind, implementation):
    """NaN from there on and all else as it was, also in the block in whose middle that is."""
    pieces = [48, (48, 48, 1), (33, 20, 16), (16, 16, 1), (1, 48, 9), (48, 1, 0)]
    out, cache = feed(CALL, cache_of(kind), pieces, implementation)
    np.testing.assert_array_equal(cache.length, [194, 181, 75])
    for row, length in enumerate(np.asarray(cache.length)):
        assert np.isnan(out[row, ROOM:length]).all()
    assert_one_forward(out, CALL, np.minimum(cache.length, ROOM))


def page_numbers(cache, *numbers):
    return jnp.asarray([*numbers, *[-1] * (cache.table.page.shape[1] - len(numbers))], jnp.int32)


def test_a_pool_of_pages(implementation):
    """Sequences with pages here and there, one that outgrows its own, and one that comes later.

    `feed` holds NaN in the pages of nobody.
    """
    cache = cache_of("evicting", num_pages=15)
    assert np.asarray(cache.table.page == -1).all()
    needed = [cache.pages_needed(tokens) for tokens in (0, 1, 16, 17, 48, 64, ROOM, 9999)]
    assert needed == [0, 1, 1, 2, 3, 4, 5, 5]
    give = jax.jit(lambda cache, index, pages: cache.with_pages(index, pages))
    cache = give(cache, 0, page_numbers(cache, 7, 0, 14, 3, 9))
    cache = give(cache, 1, page_numbers(cache, 5, 2))
    out, cache = feed(CALL, cache, [(48, 29, 0), (16, 3, 0)], implementation)
    assert_one_forward(out, CALL, [64, 32, 0])

    # Two pages are full of 32 tokens. The second sequence goes on all the same, and harms nobody.
    more, cache = feed(CALL, cache, [(1, 1, 0), (16, 16, 0), (20, 30, 0)], implementation)
    rest, _ = feed(CALL, cache, [(9, 0, 0)], implementation)
    assert_one_forward(np.stack([out[0] + more[0] + rest[0], out[1], out[2]]), CALL, [110, 32, 0])

    # Its pages go to the third, and others to a new one in its place.
    cache = give(cache, 1, page_numbers(cache, 6, 13, 10))
    cache = give(cache, 2, page_numbers(cache, 2, 1, 5))
    np.testing.assert_array_equal(cache.length, [101, 0, 0])
    new, cache = feed(CALL, cache, [(9, 16, 16), (0, 20, 32)], implementation)
    assert_one_forward(np.stack([out[0], new[1], new[2]]), CALL, [64, 36, 48])
    assert new[0].tobytes() == rest[0].tobytes()


def test_layers_share_a_table(kind):
    """One table, or length, for all layers: that of the first serves the second."""
    other = {name: CALL.inputs()[name] + 1 for name in ("query", "key", "value")}
    _, first = feed(CALL, cache_of(kind), [16, (5, 16, 1)], "reference")
    _, second = feed(CALL, cache_of(kind), [16, (5, 16, 1)], "reference", **other)
    out, _ = feed(CALL, second.with_table(first.table), [16, 3], "reference", **other)
    expected, _ = feed(CALL, second, [16, 3], "reference", **other)
    assert out.tobytes() == expected.tobytes()


def test_new_lengths_trace_nothing(kind):
    run = program(CALL.scale, CALL.soft_cap, None, False)
    _, cache = feed(CALL, cache_of(kind), [(16, 3, 1)], None)
    traced = run._cache_size()
    feed(CALL, cache, [(2, 16, 0), (16, 0, 0), 9], None)
    assert run._cache_size() == traced


def test_a_loop_in_one_program(kind):
    """`lax.scan` gets back a cache of the type that it gave. Without `lengths` all tokens count."""
    call = AttentionCall(S2_16, heads=4, kv_heads=2, batch=2, q_len=40, kv_len=40)
    inputs = [jnp.asarray(call.inputs()[name]) for name in ("query", "key", "value")]

    @jax.jit
    def generate(cache, tokens):
        def step(cache, token):
            out, cache = s2_jax.cached_attention(*token, cache)
            return cache, out

        return jax.lax.scan(step, cache, tokens)

    tokens = [jnp.swapaxes(array, 0, 1)[:, :, None] for array in inputs]
    cache, out = generate(make_cache(kind, call), tokens)
    np.testing.assert_array_equal(cache.length, [40, 40])
    assert_one_forward(np.moveaxis(np.asarray(out)[:, :, 0], 0, 1), call)


def test_a_donated_cache_is_updated_in_place(kind):
    call = AttentionCall(S2_16, q_len=40, kv_len=40)
    inputs = [call.inputs()[name] for name in ("query", "key", "value")]
    run = jax.jit(s2_jax.cached_attention, donate_argnames="cache")
    cache, outs = make_cache(kind, call), []
    for start in range(0, 40, 5):
        given, memory = cache, cache.key.unsafe_buffer_pointer()
        out, cache = run(*(array[:, start : start + 5] for array in inputs), cache=given)
        assert given.key.is_deleted()
        assert cache.key.unsafe_buffer_pointer() == memory
        outs.append(out)
    assert_one_forward(np.concatenate(outs, axis=1), call)


def test_no_new_tokens(kind, implementation):
    cache = make_cache(kind, CALL)
    nothing = [CALL.inputs()[name][:, :0] for name in ("query", "key", "value")]
    out, same = s2_jax.cached_attention(*nothing, cache, implementation=implementation)
    assert out.shape == (3, 0, 6, 16)
    jax.tree.map(np.testing.assert_array_equal, same, cache)


def test_heads_that_see_nothing_yet(implementation):
    """Zeros, also where no head sees anything before the cache is full."""
    late = s2_jax.vertical_stride(5, head_offset=1, heads="query", block_size=16)
    call = AttentionCall(late, q_len=40, kv_len=40)
    out, _ = feed(call, make_cache("evicting", call), [16, 7], implementation)
    assert not out.any()


def test_a_pattern_that_wants_back_what_it_dropped():
    """The reason names the head and the blocks; the contiguous cache takes it."""
    call = AttentionCall(s2_jax.dilated_stride(2, block_size=16), **SHORT)
    with pytest.raises(ValueError, match=r"not KV-efficient.* head 0 .* block 0 from .* block 1"):
        make_cache("evicting", call)
    out, _ = feed(call, make_cache("contiguous", call), pieces_up_to(75), "reference")
    assert_one_forward(out, call)
    make_cache("evicting", call, max_length=32)  # two blocks: nothing comes back


def test_every_number_may_be_numpys(kind):
    """A cache of NumPy's integers is the same pytree, so that nothing is compiled again."""
    names = ("batch", "max_length", "num_heads", "num_kv_heads", "head_dim")
    numbers = dict(zip(names, map(np.int64, (3, ROOM, 6, 2, 16))))
    ours, theirs = cache_of(kind), cache_of(kind, **numbers)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    assert type(theirs.max_length) is type(theirs.num_heads) is type(theirs.num_kv_heads) is int


def test_float64(kind):
    """The reference decodes in float64 too, to its precision; kernels refuse, as ever."""
    with jax.enable_x64(True):
        call = AttentionCall(S2_16, **GROUPED, dtype="float64", q_len=70, kv_len=70, batch=2)
        cache = make_cache(kind, call)
        out, after = feed(call, cache, [(16, 11), (16, 16), (16, 1)], None)
        for row, length in enumerate(np.asarray(after.length)):
            oracle = full_forward(call)[1][row, :length]
            np.testing.assert_allclose(out[row, :length], oracle, rtol=0, atol=1e-14)
        with pytest.raises(NotImplementedError, match="dtype float64"):
            feed(call, cache, [1], "interpret")


def test_with_x64_enabled(implementation):
    """What is int32 stays so."""
    call = AttentionCall(S2_16, q_len=20, kv_len=20)
    with jax.enable_x64(True):
        out, cache = feed(call, make_cache("evicting", call), [16, 4], implementation)
    assert cache.length.dtype == np.int32
    assert_one_forward(out, call)


def test_drawn_sequences(implementation):
    """Patterns, lengths and pieces at random, in the evicting cache where it takes the pattern."""

    @given(decodings())
    def drawn(decoding):
        call, pieces = decoding
        kind = "evicting" if is_kv_efficient(call) else "contiguous"
        out, cache = feed(call, make_cache(kind, call), pieces, implementation)
        assert_one_forward(out, call, cache.length)

    drawn()


def is_kv_efficient(call):
    lengths = {"q_len": call.q_len, "kv_len": call.q_len}
    return call.whole_pattern.is_kv_efficient(call.heads, **lengths, num_kv_heads=call.kv_heads)
