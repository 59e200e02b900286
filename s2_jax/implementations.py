"""What the names of implementations stand for, and how a small kernel or its reference is run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap

from pallas_kernels import lowering

KERNEL_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
LAUNCHERS: dict[str | None, lowering.Launcher] = {
    None: "pallas",
    "triton": "pallas",
    "mosaic": "pallas",
    "jax_triton": "jax_triton",
    "interpret": "interpret",
}


def on_old_gpu() -> bool:
    """Whether a call traced now will most likely run on a GPU that the kernels do not support."""
    on_gpu = lowering.target_platform() in ("gpu", "cuda")
    capability = lowering.compute_capability() or 0
    return on_gpu and capability < lowering.OLDEST_COMPUTE_CAPABILITY


def run(
    implementation: str | None,
    kernel: Callable[..., Any],
    reference: Callable[..., Any],
    *operands: Any,
) -> Any:
    """What `kernel(*operands, launcher=...)` gives, or `reference(*operands)`.

    implementation: as for `s2_attention`; what cannot run has been refused. "cudnn" is as None:
    cuDNN has nothing in the kernel's place. Mapped by `vmap`, a kernel runs for one entry after the
    other.
    """
    if implementation == "reference" or (implementation is None and on_old_gpu()):
        return reference(*operands)
    arrays, tree = jax.tree.flatten(operands)
    operands = jax.tree.unflatten(tree, lowering.vary_alike(arrays))
    launcher = LAUNCHERS.get(implementation, "pallas")
    launched: Any = sequential_vmap(functools.partial(kernel, launcher=launcher))
    if implementation in (None, "cudnn"):
        return lax.platform_dependent(*operands, cuda=launched, default=reference)
    return launched(*operands)
