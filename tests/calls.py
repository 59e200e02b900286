"""A call to test, the oracle for it, and the tolerance rule."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import s2_jax
from s2_jax import Pattern, Tile, TileConfig

RESULTS = ("out", "lse", "dq", "dk", "dv")
KERNELS = ("triton", "mosaic", "jax_triton", "interpret")


def small_tiles(block_q: int = 32, block_kv: int = 32) -> TileConfig:
    """Tiles that make a short row span several of them."""
    tile = Tile(block_q, block_kv, num_warps=4, num_stages=1)
    return TileConfig(forward=tile, dq=tile, dkv=tile)


def unrolled_tiles(unroll: int) -> TileConfig:
    """Tiles of which forward and dq take several in a turn of their loop."""
    tile = Tile(32, 16, num_warps=4, num_stages=2)
    several = dataclasses.replace(tile, unroll=unroll)
    return TileConfig(forward=several, dq=several, dkv=tile)


SMALL_TILES = small_tiles()


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """window: tokens of a token window that joins the pattern, with `|` or with `&`.

    segments: how the ids lie: "packed" documents in a row, "padded" (the last one has id 0),
    "shuffled" (documents in any order of ids, some ids twice) or "random" for each token.
    """

    pattern: Pattern
    q_len: int = 97
    kv_len: int = 97
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 16
    batch: int = 1
    value_dim: int | None = None
    query_offset: int | tuple[int, ...] = 0
    window: int | None = None
    window_joins: str = "|"
    segments: str | None = None
    query_lengths: tuple[int, ...] | None = None
    kv_lengths: tuple[int, ...] | None = None
    soft_cap: float | None = None
    scale: float | None = None
    dtype: str = "float32"
    tiles: TileConfig | None = SMALL_TILES
    seed: int = 0

    @property
    def spans_several_tiles(self) -> bool:
        tile = self.tiles.forward if self.tiles else Tile(128, 64)
        return self.q_len > 2 * tile.block_q and self.kv_len > 2 * tile.block_kv

    def inputs(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(self.seed)
        q_shape = (self.batch, self.q_len, self.heads, self.head_dim)
        kv_shape = (self.batch, self.kv_len, self.kv_heads, self.head_dim)
        value_dim = (self.value_dim or self.head_dim,)
        shapes = {"query": q_shape, "key": kv_shape, "value": kv_shape[:3] + value_dim}
        shapes["d_out"] = q_shape[:3] + value_dim
        shapes["d_lse"] = (self.batch, self.heads, self.q_len)
        dtypes = dict.fromkeys(shapes, jnp.dtype(self.dtype)) | {"d_lse": np.dtype("float32")}
        return {name: rng.normal(size=shapes[name]).astype(dtypes[name]) for name in shapes}

    @property
    def offsets(self) -> tuple[int, ...]:
        offset = self.query_offset
        return offset if isinstance(offset, tuple) else (offset,) * self.batch

    @property
    def whole_pattern(self) -> Pattern:
        if self.window is None:
            return self.pattern
        window = s2_jax.token_window(
            self.window, block_size=self.pattern.block_size, causal=self.pattern.causal
        )
        return self.pattern | window if self.window_joins == "|" else self.pattern & window

    def ids(self) -> tuple[np.ndarray, np.ndarray]:
        """Segment ids of queries and keys, int32 `[batch, q_len]` and `[batch, kv_len]`."""
        rng = np.random.default_rng(self.seed + 1)
        length = max(max(self.offsets) + self.q_len, self.kv_len)
        rows = []
        for _ in range(self.batch):
            cuts = np.sort(rng.choice(length, size=min(length, 5), replace=False))
            ids = np.searchsorted(cuts, np.arange(length), side="right") + 1
            if self.segments == "padded":
                ids[ids == ids.max()] = 0
            elif self.segments == "shuffled":
                ids = rng.integers(-3, 3, size=7)[ids]
            elif self.segments == "random":
                ids = rng.integers(0, 3, size=length)
            rows.append(ids)
        table = np.stack(rows).astype(np.int32)
        queries = [row[start : start + self.q_len] for row, start in zip(table, self.offsets)]
        return np.stack(queries), table[:, : self.kv_len]

    def masks(self) -> dict[str, np.ndarray]:
        """The arguments of `s2_attention` that are arrays and hide tokens."""
        found = {}
        if self.segments is not None:
            q_ids, kv_ids = self.ids()
            found["segment_ids"] = q_ids
            if not np.array_equal(q_ids, kv_ids):
                found["kv_segment_ids"] = kv_ids
        if self.query_lengths is not None:
            found["query_seq_lengths"] = np.asarray(self.query_lengths, np.int32)
        if self.kv_lengths is not None:
            found["key_value_seq_lengths"] = np.asarray(self.kv_lengths, np.int32)
        return found

    @property
    def static(self) -> AttentionCall:
        """The same for all calls that share a compiled program."""
        return dataclasses.replace(
            self,
            seed=0,
            segments=self.segments and "packed",
            query_offset=0 if self.traced else self.query_offset,
            query_lengths=self.query_lengths and (0,) * self.batch,
            kv_lengths=self.kv_lengths and (0,) * self.batch,
        )

    @property
    def traced(self) -> bool:
        return isinstance(self.query_offset, tuple)

    def run(
        self, implementation: str | None, place: Any = jnp.asarray, **changes: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Output, LSE and the gradients of query, key and value.

        place: makes JAX arrays of NumPy's. changes: replace inputs.
        """
        inputs = self.inputs() | changes
        offset = np.asarray(self.offsets, np.int32)
        program = _program(self.static, self.traced, implementation)
        results = program(*jax.tree.map(place, (inputs, offset, self.masks())))
        return dict(zip(RESULTS, map(np.asarray, results), strict=True))

    def lowered(self, implementation: str | None) -> str:
        """The same program as StableHLO for CUDA, which takes no GPU."""
        return self.staged(implementation).lower(lowering_platforms=("cuda",)).as_text()

    def staged(self, implementation: str | None) -> Any:
        """The same program, traced."""
        arrays = self.inputs(), np.asarray(self.offsets, np.int32), self.masks()
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
        return _program(self.static, self.traced, implementation).trace(*shapes)

    def attend(self, implementation: str | None, query, key, value, offset, masks) -> Any:
        return s2_jax.s2_attention(
            query, key, value, self.whole_pattern, scale=self.scale, return_lse=True,
            query_offset=offset, logits_soft_cap=self.soft_cap, implementation=implementation,
            tiles=self.tiles if implementation in KERNELS else None, **masks,
        )  # fmt: skip

    def oracle(self) -> dict[str, np.ndarray]:
        """The same in float64: NumPy, dense, from an explicit token mask."""
        inputs = {name: array.astype(np.float64) for name, array in self.inputs().items()}
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        return _dense(**inputs, mask=self.token_mask(), scale=scale, cap=self.soft_cap)

    def token_mask(self) -> np.ndarray:
        """bool `[batch, heads, q_len, kv_len]`, from the block mask and definitions alone."""
        size = self.pattern.block_size
        rows = max(self.offsets) + self.q_len
        blocks = self.pattern.block_mask_at(
            num_heads=self.heads, num_kv_heads=self.kv_heads,
            q_blocks=-(-rows // size), kv_blocks=-(-self.kv_len // size),
        )  # fmt: skip
        tokens = np.kron(blocks, np.ones((1, size, size), bool))[:, :rows, : self.kv_len]
        distance = np.arange(rows)[:, None] - np.arange(self.kv_len)[None]
        if self.window is not None:
            near = np.abs(distance) < self.window
            tokens = tokens | near if self.window_joins == "|" else tokens & near
        if self.pattern.causal:
            tokens = tokens & (distance >= 0)
        mask = np.stack([tokens[:, start : start + self.q_len] for start in self.offsets])
        if self.segments is not None:
            q_ids, kv_ids = self.ids()
            mask &= (q_ids[:, :, None] == kv_ids[:, None, :])[:, None]
        for name, axis in (("query_lengths", 2), ("kv_lengths", 3)):
            if (lengths := getattr(self, name)) is not None:
                inside = np.arange(mask.shape[axis]) < np.asarray(lengths)[:, None]
                mask &= np.expand_dims(inside, (1, 5 - axis))
        return mask


@functools.lru_cache(maxsize=64)
def _program(call: AttentionCall, traced: bool, implementation: str | None) -> Any:
    @jax.jit
    def run(inputs, offset, masks):
        def attend(query, key, value):
            start = offset if traced else call.query_offset
            return call.attend(implementation, query, key, value, start, masks)

        (out, lse), pull_back = jax.vjp(attend, *(inputs[x] for x in ("query", "key", "value")))
        grads = (inputs["d_out"].astype(out.dtype), inputs["d_lse"].astype(lse.dtype))
        return out, lse, *pull_back(grads)

    return run


def _dense(query, key, value, d_out, d_lse, mask, scale, cap):
    """softmax(mask(cap(q k))) v and its gradients, by the book."""
    kv_heads, group = key.shape[2], query.shape[2] // key.shape[2]
    key, value = np.repeat(key, group, axis=2), np.repeat(value, group, axis=2)
    query, key, value, d_out = (x.swapaxes(1, 2) for x in (query, key, value, d_out))  # bnqh
    scores = query @ key.mT * scale
    slope = 1.0
    if cap is not None:
        tanh = np.tanh(scores / cap)
        scores, slope = cap * tanh, 1 - tanh**2
    peak = np.max(scores, axis=-1, initial=-1e300, where=mask, keepdims=True)
    weights = np.where(mask, np.exp(np.where(mask, scores - peak, 0)), 0)
    total = weights.sum(axis=-1, keepdims=True)
    some = total > 0
    weights = weights / np.where(some, total, 1)
    lse = np.where(some, peak + np.log(np.where(some, total, 1)), -np.inf)[..., 0]
    d_weights = d_out @ value.mT
    delta = (weights * d_weights).sum(axis=-1, keepdims=True)
    d_scores = weights * (d_weights - delta + d_lse[..., None]) * slope * scale
    # The terms of which dq and dk are sums, without their signs.
    terms = np.abs(d_out) @ np.abs(value).mT
    terms = terms + (weights * terms).sum(axis=-1, keepdims=True) + np.abs(d_lse)[..., None]
    terms = weights * terms * np.abs(slope * scale)

    def ungroup(array):
        return array.reshape(*array.shape[:2], kv_heads, group, -1).sum(axis=3)

    products = {
        "out": weights @ value,
        "dq": d_scores @ key,
        "dk": d_scores.mT @ query,
        "dv": weights.mT @ d_out,
        "dq terms": terms @ np.abs(key),
        "dk terms": terms.mT @ np.abs(query),
    }
    products = {name: array.swapaxes(1, 2) for name, array in products.items()}
    sums = {name: ungroup(products[name]) for name in ("dk", "dv", "dk terms")}
    return products | sums | {"lse": lse}


def assert_as_good_as(
    got: dict[str, np.ndarray],
    reference: dict[str, np.ndarray],
    oracle: dict[str, np.ndarray],
    dtype: str,
) -> None:
    """The rule: twice the error of the reference in the same dtype, and a few roundings.

    The scores' gradient is a difference, `dO.v - delta`. Autodiff of the reference cancels it with
    one and the same rounding; a backward pass that recomputes cannot, so that dq and dk may also
    be off by one float32 rounding of the terms that cancel.
    """
    for name in got:
        truth = np.asarray(oracle[name], np.float64)
        masked = np.isneginf(truth)
        assert np.array_equal(np.isneginf(np.asarray(got[name], np.float64)), masked), name
        truth = np.where(masked, 0.0, truth)
        error, allowed = (
            np.abs(np.where(masked, 0.0, np.asarray(x[name], np.float64)) - truth).max(initial=0.0)
            for x in (got, reference)
        )
        rounding = 4 * float(jnp.finfo(dtype).eps) * np.abs(truth).max(initial=0.0)
        terms = oracle.get(f"{name} terms", np.zeros(1))
        rounding += float(jnp.finfo(jnp.float32).eps) * terms.max(initial=0.0)
        assert error <= 2 * allowed + rounding, f"{name}: {error} > 2 * {allowed} + {rounding}"


@functools.lru_cache(maxsize=128)
def _expected(call: AttentionCall) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """By the oracle and by the reference; programs leave their cache before all have asked."""
    return call.oracle(), call.run("reference")


def check(call: AttentionCall, implementation: str) -> None:
    """`implementation` is as good as the rule asks, in its output and all gradients."""
    oracle, reference = _expected(call)
    if implementation != "reference":
        assert_as_good_as(call.run(implementation), reference, oracle, call.dtype)
        return
    # The reference itself: float32 sums of a row, or a few roundings to a low precision.
    roundings = 64 if call.dtype == "float32" else 6
    eps = roundings * float(jnp.finfo(call.dtype).eps)
    for name in RESULTS:
        tolerance = eps * np.abs(np.nan_to_num(oracle[name], neginf=0.0)).max(initial=1e-6)
        got = np.asarray(reference[name], np.float64)
        np.testing.assert_allclose(got, oracle[name], rtol=0, atol=tolerance, err_msg=name)


def with_nan_in_the_padding(call: AttentionCall) -> dict[str, np.ndarray]:
    """The inputs of a call with lengths."""
    assert call.query_lengths is not None
    assert call.kv_lengths is not None
    inputs = {name: array.copy() for name, array in call.inputs().items()}
    for row, (queries, keys) in enumerate(zip(call.query_lengths, call.kv_lengths)):
        for name, stop in (("query", queries), ("d_out", queries), ("key", keys), ("value", keys)):
            inputs[name][row, stop:] = np.nan
    return inputs


def assert_padding_reaches_nothing(call: AttentionCall, implementation: str) -> None:
    clean = call.run(implementation)
    poisoned = call.run(implementation, **with_nan_in_the_padding(call))
    for name in clean:
        np.testing.assert_allclose(poisoned[name], clean[name], rtol=1e-6, err_msg=name)
