"""The kernels whose resources are measured: call variants x every tile that can be picked, and
steps of decoding.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

import s2_jax
from pallas_kernels import add_norm, append, combine
from pallas_kernels.call import padded_dim
from pallas_kernels.decode import pick_tile
from pallas_kernels.tiles import Tile, TileConfig, pick_tiles
from pallas_kernels.triton_ir import KernelIR, kernels_of

HEAD_DIMS = (64, 80, 128, 192, 256)
BLOCK_SIZES = (16, 32, 64, 128)
_SHORT, _LONG = 1024, 1 << 20
_KV_HEADS = 2
_BATCH = 64  # so many that dk/dv keeps the heads of a group in one program, in a loop
# A GPU for each generation; what is picked for a 100 is picked for a 120.
_DEVICES = {80: "A100", 86: "A10G", 89: "L4", 90: "H100", 100: "B200", 120: "B200"}


def _lower(function: Any, *arrays: Any, capability: int = 90) -> jax.stages.Lowered:
    """For one GPU generation; needs no GPU."""
    kind = _DEVICES[capability]
    device = AbstractDevice(device_kind=f"NVIDIA {kind}", num_cores=132, platform="cuda")
    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        return jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",))


def _few_runs(block_size: int, causal: bool) -> s2_jax.Pattern:
    return s2_jax.local_stride(2, 3, block_size=block_size, causal=causal)


def _many_runs(block_size: int, causal: bool) -> s2_jax.Pattern:
    """Each row in more runs than a kernel reads at once."""
    mask = np.random.default_rng(0).random((_KV_HEADS, 128, 128)) < 0.5
    return s2_jax.block_mask(mask, block_size=block_size, causal=causal)


def _window(block_size: int, causal: bool) -> s2_jax.Pattern:
    sink = s2_jax.sink(1, block_size=block_size, causal=causal)
    return sink | s2_jax.token_window(300, block_size=block_size, causal=causal)


def _packed(q_len: int, kv_len: int) -> dict[str, Any]:
    return {"segment_ids": jnp.zeros((_BATCH, q_len), jnp.int32)}


def _padded(q_len: int, kv_len: int) -> dict[str, Any]:
    lengths = jnp.ones((_BATCH,), jnp.int32)
    return {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kind of call, at any tile.

    ragged: lengths that no tile divides. traced_offset: the position of query 0 is an array.
    gathers: as for `pick_tiles`.
    arguments: further keyword arguments of `s2_attention`, from the two lengths.
    """

    pattern: Callable[[int, bool], s2_jax.Pattern] = _few_runs
    causal: bool = True
    ragged: bool = True
    group: int = 2
    traced_offset: bool = False
    gathers: bool = True
    arguments: Callable[[int, int], dict[str, Any]] = lambda q_len, kv_len: {}


VARIANTS = {
    "ragged": Variant(),
    "aligned": Variant(ragged=False, group=1),
    "bidirectional": Variant(causal=False),
    "many runs": Variant(pattern=_many_runs, gathers=False),
    "traced offset": Variant(traced_offset=True),
    "packed": Variant(arguments=_packed),
    "padded": Variant(arguments=_padded),
    "soft cap": Variant(arguments=lambda q_len, kv_len: {"logits_soft_cap": 30.0}),
    "window": Variant(pattern=_window),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A call variant in one dtype at one tile configuration; three kernels."""

    variant: str
    dtype: str
    head_dim: int
    block_size: int
    tiles: TileConfig

    names = ("forward", "dq", "dkv")

    def tile(self, kernel: str) -> Tile:
        return getattr(self.tiles, kernel)

    def wants_wgmma(self, kernel: str) -> bool:
        """Hopper's products take 2-byte elements and 64 rows of a program's own tile."""
        tile = self.tile(kernel)
        rows = tile.block_kv if kernel == "dkv" else tile.block_q
        return self.dtype != "float32" and rows >= 64

    @functools.cached_property
    def kernels(self) -> dict[str, KernelIR]:
        variant = VARIANTS[self.variant]
        length = 1000 if variant.ragged else 1024
        queries = (_BATCH, length, _KV_HEADS * variant.group, self.head_dim)
        keys = (_BATCH, length, _KV_HEADS, self.head_dim)
        pattern = variant.pattern(self.block_size, variant.causal)

        def loss(query: Any, key: Any, value: Any, offset: Any) -> Any:
            out = s2_jax.s2_attention(
                query, key, value, pattern, tiles=self.tiles, implementation="triton",
                query_offset=offset if variant.traced_offset else 0,
                **variant.arguments(length, length),
            )  # fmt: skip
            return out.astype(jnp.float32).sum()

        arrays = [jax.ShapeDtypeStruct(shape, self.dtype) for shape in (queries, keys, keys)]
        offset = jax.ShapeDtypeStruct((_BATCH,), jnp.int32)
        lowered = _lower(jax.grad(loss, argnums=(0, 1, 2)), *arrays, offset)
        return dict(zip(self.names, kernels_of(lowered), strict=True))


@dataclasses.dataclass(frozen=True)
class Step:
    """Kinds of decoding: new tokens a sequence, from which cache, by which pattern."""

    new: int = 1
    batch: int = 2
    kind: type[s2_jax.ContiguousCache] | type[s2_jax.EvictingCache] = s2_jax.EvictingCache
    pattern: Callable[[int, bool], s2_jax.Pattern] = _few_runs
    soft_cap: float | None = None


STEPS = {
    "decode pages": Step(),
    "decode many": Step(batch=64),
    "decode rows": Step(kind=s2_jax.ContiguousCache),
    "decode 8 tokens": Step(new=8),  # 32 rows a program, not 16
    "decode window": Step(pattern=_window, soft_cap=30.0),
}


@dataclasses.dataclass(frozen=True)
class DecodeCase:
    """A kind of decoding, for one GPU generation.

    The kernel, the one that joins its parts and, where there is one new token, the one that takes
    it in.
    """

    variant: str
    dtype: str
    head_dim: int
    block_size: int
    capability: int

    _group = 4

    @property
    def names(self) -> tuple[str, ...]:
        return (*["append"] * (STEPS[self.variant].new == 1), "decode", "combine")

    def tile(self, kernel: str) -> Tile:
        if kernel != "decode":
            return {"append": append.TILE, "combine": combine.TILE}[kernel]
        rows = 16 if STEPS[self.variant].new * self._group <= 16 else 32
        itemsize, dims = jnp.dtype(self.dtype).itemsize, 2 * padded_dim(self.head_dim)
        lists = STEPS[self.variant].batch * _KV_HEADS
        cut = pick_tile(itemsize, dims, lists, self.capability)
        return Tile(rows, cut.keys, cut.num_warps, cut.num_stages)

    def wants_wgmma(self, kernel: str) -> bool:
        return False

    @functools.cached_property
    def kernels(self) -> dict[str, KernelIR]:
        step, heads = STEPS[self.variant], _KV_HEADS * self._group
        cache = jax.eval_shape(
            lambda: step.kind.create(
                step.pattern(self.block_size, True), batch=step.batch, max_length=4000,
                num_heads=heads, num_kv_heads=_KV_HEADS, head_dim=self.head_dim, dtype=self.dtype,
            )
        )  # fmt: skip
        arrays = [
            jax.ShapeDtypeStruct((step.batch, step.new, count, self.head_dim), self.dtype)
            for count in (heads, _KV_HEADS, _KV_HEADS)
        ]
        decode = functools.partial(
            s2_jax.cached_attention,
            implementation="triton",
            logits_soft_cap=step.soft_cap,
            rope_base=1e4,
        )
        lowered = _lower(decode, *arrays, cache, capability=self.capability)
        return dict(zip(self.names, kernels_of(lowered), strict=True))


@dataclasses.dataclass(frozen=True)
class NormCase:
    """What stands between two layers of a step, for one GPU generation."""

    dtype: str
    width: int
    parts: int
    capability: int

    names = ("add_norm",)
    variant = "add and norm"

    @property
    def head_dim(self) -> int:
        return self.width

    @property
    def block_size(self) -> int:
        return self.parts

    def tile(self, kernel: str) -> Tile:
        return add_norm.TILE

    def wants_wgmma(self, kernel: str) -> bool:
        return False

    @functools.cached_property
    def kernels(self) -> dict[str, KernelIR]:
        added = (self.parts, 4, self.width), self.dtype if self.parts == 1 else "float32"
        arrays = [
            jax.ShapeDtypeStruct(*array)
            for array in (((4, self.width), self.dtype), added, ((self.width,), "float32"))
        ]
        call = functools.partial(add_norm.add_norm, epsilon=1e-6, launcher="pallas")
        lowered = _lower(call, *arrays, capability=self.capability)
        return dict(zip(self.names, kernels_of(lowered), strict=True))


AnyCase = Case | DecodeCase | NormCase

# Of every block size, head dim and dtype one, and each kind of step.
_DECODED = (
    *(("decode pages", "bfloat16", 128, block_size) for block_size in BLOCK_SIZES),
    *(("decode pages", "bfloat16", head_dim, 64) for head_dim in (64, 80, 256)),
    *(("decode many", "bfloat16", head_dim, 64) for head_dim in (64, 128, 256)),
    ("decode pages", "float16", 128, 64),
    ("decode pages", "float32", 128, 64),
    ("decode 8 tokens", "float32", 256, 16),
    ("decode rows", "bfloat16", 128, 16),
    ("decode rows", "bfloat16", 128, 64),
    ("decode 8 tokens", "bfloat16", 256, 64),
    ("decode window", "bfloat16", 128, 64),
)


_NORMED = (("bfloat16", 4096, 1), ("bfloat16", 8192, 2), ("float32", 5120, 1), ("float16", 768, 1))


def cases(compute_capability: int) -> Iterator[AnyCase]:
    """Every tile that the heuristic picks, each variant at its commonest ones, and decoding."""
    for what in _DECODED:
        yield DecodeCase(*what, capability=compute_capability)
    for norm in _NORMED:
        yield NormCase(*norm, capability=compute_capability)
    seen = set()
    everything = itertools.product(
        ("bfloat16", "float32", "float16"), HEAD_DIMS, BLOCK_SIZES, (_SHORT, _LONG), VARIANTS
    )
    for dtype, head_dim, block_size, q_len, variant in everything:
        usual = head_dim == 128 and block_size in (16, 64)
        if variant != "ragged" and not (usual and dtype == "bfloat16"):
            continue
        if dtype == "float16" and not usual:  # the same code as bfloat16's
            continue
        tiles = pick_tiles(
            head_dim=head_dim,
            itemsize=jnp.dtype(dtype).itemsize,
            q_len=q_len,
            block_size=block_size,
            group=VARIANTS[variant].group,
            gathers=VARIANTS[variant].gathers,
            compute_capability=compute_capability,
        )
        case = Case(variant, dtype, head_dim, block_size, tiles)
        if case not in seen:
            seen.add(case)
            yield case
