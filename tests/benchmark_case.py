"""The smallest case of the attention benchmark, and a GPU to say that it ran on."""

from __future__ import annotations

from benchmarks.cases import Case

GPU = {"name": "A GPU", "driver": "1.2", "memory_mb": 80000}
TINY = Case(96, heads=2, kv_heads=2, head_dim=16, local_blocks=2, stride=3, block_size=16)
