"""Tile shapes, and the one function a GPU generation that picks them."""

from __future__ import annotations

import dataclasses
from typing import Literal

TILE_SIZES = (16, 32, 64, 128)
MOSAIC_ROWS = 128  # queries, or keys of dk/dv, of a program that Mosaic lowers
LEAST_MOSAIC_QUERIES = 32  # of a block, for dk/dv: copies of fewer numbers would not be aligned
# Queries from which on steps of 128 keys are faster in dq, and Mosaic's dk/dv as fast as Triton's
# (of groups faster), by head dim: on an H200.
LEAST_MOSAIC_ROWS = {
    ("wide dq", 64): 8192, ("wide dq", 128): 16384, ("dkv", 64): 65536, ("dkv", 128): 8192,
}  # fmt: skip
_HOPPER_SHARED_BYTES = 227 << 10  # of a program


@dataclasses.dataclass(frozen=True)
class Tile:
    """What one program works on: `block_q` x `block_kv` tokens, and how it is compiled.

    num_warps: warps of 32 threads a program. num_stages: depth of the software pipeline. unroll:
    tiles of the walked axis that one turn of the loop takes, so that the exponentials of one can
    hide behind the products of the next. lowering: by which of Pallas' backends; "mosaic" is for
    Hopper, with 128 queries (for dk/dv also 128 keys) and 8 warps that compute.
    """

    block_q: int
    block_kv: int
    num_warps: int = 4
    num_stages: int = 2
    unroll: int = 1
    lowering: Literal["triton", "mosaic"] = "triton"

    def __post_init__(self) -> None:
        for name in ("block_q", "block_kv", "num_warps", "num_stages", "unroll"):
            number = getattr(self, name)
            if not isinstance(number, int) or isinstance(number, bool):
                raise TypeError(f"{name}={number!r} must be an int")
        for name in ("block_q", "block_kv"):
            size = getattr(self, name)
            if size not in TILE_SIZES:
                raise ValueError(f"{name}={size!r} must be one of {TILE_SIZES}")
        if self.num_warps not in (1, 2, 4, 8, 16, 32):
            raise ValueError(f"num_warps={self.num_warps!r} must be 1, 2, 4, 8, 16 or 32")
        if not 1 <= self.num_stages <= 8:
            raise ValueError(f"num_stages={self.num_stages!r} must lie in 1..8")
        if not 1 <= self.unroll <= 4:
            raise ValueError(f"unroll={self.unroll!r} must lie in 1..4")
        if self.lowering not in ("triton", "mosaic"):
            raise ValueError(f"lowering={self.lowering!r} must be 'triton' or 'mosaic'")
        sizes = self.block_q, self.block_kv
        fits = max(sizes) == MOSAIC_ROWS and min(sizes) in (64, MOSAIC_ROWS)
        fits &= (self.num_warps, self.unroll) == (8, 1) and self.num_stages >= 2
        if self.lowering == "mosaic" and not fits:
            raise ValueError(
                f"a tile of lowering='mosaic' has block_q={MOSAIC_ROWS}, block_kv=64 or 128 (or "
                f"64 and 128, for all three gradients), "
                f"num_warps=8, unroll=1 and two stages or more, got {self}"
            )


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """One tile for each kernel: forward, the query gradient, the key/value gradients.

    dq: None where the kernel of `dkv` makes all three gradients: one of lowering="mosaic" with
    block_q=64 does, and no other.
    """

    forward: Tile
    dq: Tile | None
    dkv: Tile

    def __post_init__(self) -> None:
        for name in ("forward", "dq", "dkv"):
            tile = getattr(self, name)
            if not isinstance(tile, Tile) and not (name == "dq" and tile is None):
                raise TypeError(f"{name} must be a Tile, got {type(tile).__name__}")
            if tile is None or name == "dkv" or tile.lowering != "mosaic":
                continue
            if tile.block_q != MOSAIC_ROWS:
                raise ValueError(
                    f"{name} of lowering='mosaic' has block_q={MOSAIC_ROWS}, got {tile}"
                )
        if self.dkv.unroll != 1:
            raise ValueError(
                f"unroll={self.dkv.unroll!r} of dkv must be 1: its loop is not unrolled"
            )
        if self.dkv.lowering == "mosaic" and self.dkv.block_kv != MOSAIC_ROWS:
            raise ValueError(f"dkv of lowering='mosaic' has block_kv={MOSAIC_ROWS}, got {self.dkv}")
        makes_all = self.dkv.lowering == "mosaic" and self.dkv.block_q == 64
        if makes_all != (self.dq is None):
            raise ValueError(
                "dq is None where dkv has lowering='mosaic' and block_q=64, and a Tile otherwise: "
                f"got dq={self.dq} and dkv={self.dkv}"
            )

    def check_mosaic_memory(self, dim: int, segments: bool) -> None:
        """Raises ValueError where a kernel that Mosaic lowers would need more than there is."""

        def whole(size: int) -> int:
            return -(-size // 1024) * 1024

        # Arrays of the fixed axis that are in shared memory at a time, rows of the walked one a
        # stage, and what else: numbers of a token, notes, flags, what the compiler reserves. Wide
        # steps of dq leave room for half of a result.
        kernels = [
            ("forward", self.forward, 2, self.forward.block_kv, 6208),
            ("dkv", self.dkv, 2, self.dkv.block_q, 2304 + (16 << 10)),
        ]
        if self.dq is not None:
            half = self.dq.block_kv > 64
            others = 3120 + half * (16 << 10)
            kernels.append(("dq", self.dq, 2 if half else 3, self.dq.block_kv, others))

        for name, tile, arrays, walked, others in kernels:
            if tile.lowering != "mosaic":
                continue
            rows = 2 * tile.num_stages * walked + arrays * MOSAIC_ROWS
            needed = 2 * dim * rows + others
            needed += 40 * tile.num_stages + whole(512 * tile.num_stages)  # barriers, entries
            if name == "dkv":
                needed += 2 * whole(512 * tile.num_stages)  # a number a query
                if self.dq is None:  # one more, gradients of scores, and some of the queries'
                    needed += whole(256 * tile.num_stages) + (16 << 10) * (1 + tile.num_stages)
            if segments:
                needed += 1024 + whole(4 * tile.num_stages * walked)
            if needed > _HOPPER_SHARED_BYTES:
                raise ValueError(
                    f"num_stages={tile.num_stages} of tiles.{name} are too many: with "
                    f"block_kv={tile.block_kv} and head dim {dim}"
                    f"{' and segments' if segments else ''} about {needed} bytes of shared memory "
                    f"are needed, of {_HOPPER_SHARED_BYTES}"
                )

    @property
    def mosaic(self) -> bool:
        """Whether any kernel is lowered by Mosaic."""
        tiles = (tile for tile in (self.forward, self.dq, self.dkv) if tile is not None)
        return any(tile.lowering == "mosaic" for tile in tiles)


def pick_tiles(
    *,
    head_dim: int,
    itemsize: int,
    q_len: int,
    block_size: int = 64,
    group: int = 1,
    gathers: bool = True,
    cut_short: bool = False,
    padded: bool = False,
    compute_capability: int = 90,
    mosaic: bool = False,
) -> TileConfig:
    """The tiles for a call.

    Args:
      head_dim: the larger of the two head dims.
      itemsize: bytes an element: 2 or 4.
      q_len: query tokens in a row; short rows want small tiles to fill the GPU.
      cut_short: segments leave each query only few of the keys.
      padded: queries have lengths.
      block_size: of the pattern.
      group: query heads of a key/value head.
      gathers: whether a key tile of dk/dv can be put together from columns that the same queries
        see. Otherwise it is no larger than a block: it would walk, masked, the queries of all its
        columns for each of them.
      compute_capability: 80, 86, 89, 90, 100, ...
      mosaic: Mosaic lowers forward and dq, and dk/dv where that is faster; the call has to allow it
        (hopper.py).
    """
    pick = {90: _hopper, 100: _blackwell, 103: _blackwell}.get(compute_capability, _ampere)
    tiles = pick(head_dim, itemsize, min(q_len, 4096) if cut_short else q_len)
    grouped_on_hopper = compute_capability == 90 and itemsize == 2 and group > 1
    if grouped_on_hopper and 64 < head_dim <= 128 and block_size >= 64:
        # Where one loop walks for all heads of a group, 64x128 is 1.09 times as fast in rows of
        # 131072 tokens (h100-tune-gqa.json), but not where several programs share a group. Where
        # they see different blocks, a loop for each takes registers, which a tile of 64x64 lacks.
        large = Tile(64, 128, 8, 3) if q_len > 65536 else tiles.dkv
        dkv = large if gathers else Tile(32, 64, 4, 3)
        tiles = dataclasses.replace(tiles, dkv=dkv)
    if mosaic:
        rows = min(q_len, 4096) if cut_short else q_len
        dim = 64 if head_dim <= 64 else 128
        wide = rows >= LEAST_MOSAIC_ROWS["wide dq", dim]
        tiles = dataclasses.replace(
            tiles,
            forward=Tile(128, *((64, 8, 4) if cut_short else (128, 8, 2)), lowering="mosaic"),
            dq=Tile(128, *((128, 8, 2) if wide else (64, 8, 3)), lowering="mosaic"),
        )
        # In shorter rows a tile of its dk/dv has too few steps to make up for its start; of padded
        # ones it wants copies without what is in the padding.
        long = rows >= LEAST_MOSAIC_ROWS["dkv", dim] and not padded
        if gathers and block_size >= LEAST_MOSAIC_QUERIES and long:
            stages = 4 if head_dim == 64 else 2
            return dataclasses.replace(tiles, dkv=Tile(128, 128, 8, stages, lowering="mosaic"))
    if gathers:
        return tiles
    dkv = dataclasses.replace(tiles.dkv, block_kv=min(tiles.dkv.block_kv, block_size))
    if compute_capability == 90 and itemsize == 2 and dkv.block_kv == 32:
        dkv = dataclasses.replace(dkv, block_q=32)  # 64 spills
    return dataclasses.replace(tiles, dkv=dkv)


def _hopper(head_dim: int, itemsize: int, q_len: int) -> TileConfig:
    """227 KB of shared memory a multiprocessor (H100, H200).

    Up to head_dim 128 from `python -m benchmarks.tune`: with 4 warps two programs share a
    multiprocessor, and one's softmax hides behind the other's products.
    """
    if itemsize == 4:
        return _float32(head_dim)
    if head_dim > 128:
        return TileConfig(forward=Tile(64, 64, 8, 2), dq=Tile(64, 32, 8, 2), dkv=Tile(64, 32, 8, 1))
    # As fast at such lengths, and half as many lists.
    forward = Tile(128, 64, 8, 3, unroll=2) if q_len >= 1 << 19 else Tile(64, 64, 4, 3)
    dq = Tile(128, 64, 8, 3) if q_len >= 16384 else Tile(64, 64, 4, 2)
    dkv = Tile(64, 64, 4, 2) if head_dim > 64 else Tile(32, 64, 4, 3)
    return TileConfig(forward=forward, dq=dq, dkv=dkv)


def _blackwell(head_dim: int, itemsize: int, q_len: int) -> TileConfig:
    """227 KB as on Hopper (B200, B300), other products; not measured: tiles that do not spill."""
    tiles = _hopper(head_dim, itemsize, q_len)
    if itemsize == 4:
        return tiles
    if head_dim > 128:
        return dataclasses.replace(tiles, dq=Tile(64, 64, 8, 1))
    dkv = Tile(64, 64, 8, 2) if head_dim > 64 else tiles.dkv
    return dataclasses.replace(tiles, forward=Tile(128, 64, 8, 2), dkv=dkv)


def _ampere(head_dim: int, itemsize: int, q_len: int) -> TileConfig:
    """99 KB of shared memory a program at most (sm_86, sm_89, sm_120; sm_80 has 163)."""
    if itemsize == 4:
        return _float32(head_dim)
    if head_dim > 128:
        return TileConfig(forward=Tile(64, 32, 8, 2), dq=Tile(32, 32, 4, 1), dkv=Tile(32, 32, 8, 1))
    if head_dim > 64:
        return TileConfig(forward=Tile(64, 32, 4, 2), dq=Tile(64, 64, 8, 1), dkv=Tile(64, 64, 8, 1))
    return TileConfig(forward=Tile(64, 64, 4, 2), dq=Tile(64, 64, 4, 1), dkv=Tile(32, 64, 4, 1))


def _float32(head_dim: int) -> TileConfig:
    """IEEE products run on the ordinary cores: small tiles. With one stage, and head dims over 64,
    whole rows would stay in registers, and spill.
    """
    if head_dim > 64:
        small = Tile(16, 16, num_warps=8, num_stages=2)
        return TileConfig(forward=Tile(16, 32, num_warps=8, num_stages=2), dq=small, dkv=small)
    tile = Tile(16, 32, num_warps=4, num_stages=1)
    return TileConfig(forward=Tile(32, 32, num_warps=8, num_stages=1), dq=tile, dkv=tile)
