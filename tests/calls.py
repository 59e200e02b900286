"""A call to test, the oracle for it, and the tolerance rule."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import s2_jax
from s2_jax import Pattern, Tile, TileConfig

RESULTS = ("out", "lse", "dq", "dk", "dv")


def small_tiles(block_q: int = 32, block_kv: int = 32) -> TileConfig:
    """Tiles that make a short row span several of them."""
    tile = Tile(block_q, block_kv, num_warps=4, num_stages=1)
    return TileConfig(forward=tile, dq=tile, dkv=tile)


SMALL_TILES = small_tiles()


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    pattern: Pattern
    q_len: int = 97
    kv_len: int = 97
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 16
    batch: int = 1
    query_offset: int | tuple[int, ...] = 0
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
        shapes = {"query": q_shape, "key": kv_shape, "value": kv_shape, "d_out": q_shape}
        shapes["d_lse"] = (self.batch, self.heads, self.q_len)
        dtypes = dict.fromkeys(shapes, jnp.dtype(self.dtype)) | {"d_lse": np.dtype("float32")}
        return {name: rng.normal(size=shapes[name]).astype(dtypes[name]) for name in shapes}

    def run(self, implementation: str | None) -> dict[str, np.ndarray]:
        """Output, LSE and the gradients of query, key and value."""
        inputs = {name: jnp.asarray(array) for name, array in self.inputs().items()}
        offset: Any = self.query_offset
        if isinstance(offset, tuple):
            offset = jnp.asarray(offset, jnp.int32)
        kernels = implementation in ("triton", "jax_triton", "interpret")

        def attend(query, key, value, offset):
            return s2_jax.s2_attention(
                query, key, value, self.pattern, scale=self.scale, return_lse=True,
                query_offset=self.query_offset if isinstance(self.query_offset, int) else offset,
                implementation=implementation, tiles=self.tiles if kernels else None,
            )  # fmt: skip

        return _with_gradients(attend, inputs, offset)

    def oracle(self) -> dict[str, np.ndarray]:
        """The same in float64, dense, from an explicit token mask."""
        with jax.enable_x64(True):
            inputs = {name: jnp.asarray(a, jnp.float64) for name, a in self.inputs().items()}
            scale = self.head_dim**-0.5 if self.scale is None else self.scale
            return _with_gradients(_dense, inputs, jnp.asarray(self.token_mask()), scale)

    def token_mask(self) -> np.ndarray:
        """bool `[batch, heads, q_len, kv_len]`, from the block mask and nothing else."""
        offsets = self.query_offset
        offsets = offsets if isinstance(offsets, tuple) else (offsets,) * self.batch
        size = self.pattern.block_size
        rows = max(offsets) + self.q_len
        blocks = self.pattern.block_mask_at(
            num_heads=self.heads, num_kv_heads=self.kv_heads,
            q_blocks=-(-rows // size), kv_blocks=-(-self.kv_len // size),
        )  # fmt: skip
        tokens = np.kron(blocks, np.ones((1, size, size), bool))[:, :rows, : self.kv_len]
        if self.pattern.causal:
            tokens = tokens & np.tri(rows, self.kv_len, dtype=bool)
        return np.stack([tokens[:, offset : offset + self.q_len] for offset in offsets])


def _with_gradients(attend, inputs: dict[str, Any], *more: Any) -> dict[str, np.ndarray]:
    @jax.jit
    def run(query, key, value, d_out, d_lse, *more):
        (out, lse), pull_back = jax.vjp(lambda *qkv: attend(*qkv, *more), query, key, value)
        return out, lse, *pull_back((d_out.astype(out.dtype), d_lse.astype(lse.dtype)))

    results = run(*inputs.values(), *more)
    return dict(zip(RESULTS, map(np.asarray, results), strict=True))


def _dense(query, key, value, mask, scale):
    group = query.shape[2] // key.shape[2]
    key, value = jnp.repeat(key, group, axis=2), jnp.repeat(value, group, axis=2)
    scores = jnp.einsum("bqnh,bknh->bnqk", query, key) * scale
    some = mask.any(axis=-1)
    safe = jnp.where(mask | ~some[..., None], scores, -jnp.inf)
    weights = jnp.where(some[..., None], jax.nn.softmax(safe, axis=-1), 0.0)
    lse = jnp.where(some, jax.nn.logsumexp(safe, axis=-1), -jnp.inf)
    return jnp.einsum("bnqk,bknh->bqnh", weights, value), lse


def assert_as_good_as(
    got: dict[str, np.ndarray],
    reference: dict[str, np.ndarray],
    oracle: dict[str, np.ndarray],
    dtype: str,
) -> None:
    """The rule: twice the error of the reference in the same dtype, and a few roundings."""
    for name in RESULTS:
        truth = np.asarray(oracle[name], np.float64)
        masked = np.isneginf(truth)
        assert np.array_equal(np.isneginf(np.asarray(got[name], np.float64)), masked), name
        truth = np.where(masked, 0.0, truth)
        error, allowed = (
            np.abs(np.where(masked, 0.0, np.asarray(x[name], np.float64)) - truth).max(initial=0.0)
            for x in (got, reference)
        )
        rounding = 4 * float(jnp.finfo(dtype).eps) * np.abs(truth).max(initial=0.0)
        assert error <= 2 * allowed + rounding, f"{name}: {error} > 2 * {allowed} + {rounding}"


def check(call: AttentionCall, implementation: str) -> None:
    """`implementation` is as good as the rule asks, in its output and all gradients.

    The oracle runs on the CPU, also where the kernels and the reference run on a GPU.
    """
    with jax.default_device(jax.devices("cpu")[0]):
        oracle = call.oracle()
    reference = call.run("reference")
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
