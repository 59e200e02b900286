"""What the mask of a call depends on besides the pattern."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["head_index", "offset", "q_ids", "kv_ids", "q_length", "kv_length"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Tokens:
    """What the mask of a call depends on and is known only at run time.

    head_index: int32 `[batch, heads]`, the numbers of the query heads in the whole call.
    offset: int32 `[batch]`, position of query 0; read where `Settings.query_offset` is None.
    q_ids, kv_ids: int32 `[batch, q_len]` and `[batch, kv_len]`; tokens see equal ids. Or None.
    q_length, kv_length: int32 `[batch]`, leading rows that count. Or None.
    """

    head_index: Any
    offset: Any
    q_ids: Any = None
    kv_ids: Any = None
    q_length: Any = None
    kv_length: Any = None
