"""The decode kernel over a mesh of Auto axes: sequences and key/value heads may be split."""

from __future__ import annotations

import functools
from typing import Any

import jax

from pallas_kernels.decode import DecodeLists, DecodeSettings, decode
from pallas_kernels.partition import may_be_split
from pallas_kernels.split import splittable

# A program is (key/value head, part of its rows): those of a head are side by side.
_LISTS = "batch programs entries"
_ROWS = "batch programs rows"
_WHOLE = ("rows", "dim", "value_dim", "entries", "pages", "block", "length")
_STORAGE = {True: "kv_heads pages block dim", False: "batch length kv_heads dim"}


def decode_over_mesh(
    settings: DecodeSettings,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    position: jax.Array,
    lists: DecodeLists,
) -> tuple[jax.Array, jax.Array]:
    """`decode`, which XLA may split as the query and the storage are split."""
    if not may_be_split():
        return decode(settings, query, key, value, position, lists)
    kv_heads = key.shape[0 if settings.paged else 2]
    split = _splittable(settings, kv_heads, query.shape[1] // kv_heads)
    return split(query, key, value, position, *lists)


@functools.lru_cache(maxsize=64)
def _splittable(settings: DecodeSettings, kv_heads: int, programs_of_head: int) -> Any:
    storage = _STORAGE[settings.paged]

    def run(query: Any, key: Any, value: Any, position: Any, *lists: Any) -> Any:
        return decode(settings, query, key, value, position, DecodeLists(*lists))

    return splittable(
        run,
        (
            f"{_ROWS} dim", storage, storage.replace("dim", "value_dim"), _ROWS, *[_LISTS] * 3,
            "batch programs",
        ),
        (f"{_ROWS} value_dim", _ROWS),
        whole=_WHOLE,
        members={"programs": ("kv_heads", kv_heads, programs_of_head)},
    )  # fmt: skip
