"""How a kernel reaches the GPU: the one module that knows of Pallas' Triton backend.

JAX 0.11 deprecated that backend; only that one warning is ignored here. Without a GPU a kernel
can still be lowered: inside `jax.sharding.use_abstract_mesh` with an abstract CUDA device.
"""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
from jax import lax
from jax._src import config as _config  # `_check_vma` has no public name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.tiles import Tile

warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated")

# How a kernel is run: by XLA's Triton, in Pallas' interpreter, or by the official Triton.
Launcher = Literal["pallas", "interpret", "jax_triton"]
OLDEST_COMPUTE_CAPABILITY = 80
FIRST_MOSAIC_JAX, FIRST_JAX_THAT_INTERPRETS = (0, 11), (0, 12)
_H100_MULTIPROCESSORS = 132
_CUDA_THAT_ERRS = range(12080, 12091)  # from 12.8 to below 12.9.1

_ABSTRACT_KINDS = (
    ("B200", 100),
    ("H100", 90),
    ("H200", 90),
    ("H800", 90),
    ("H20", 90),
    ("L4", 89),
    ("A10G", 86),
    ("A100", 80),
)


def target_platform() -> str:
    """The platform that a call traced now will most likely be lowered for, such as "gpu"."""
    abstract = _abstract_device()
    if abstract is not None:
        return "gpu" if abstract.platform in ("cuda", "gpu") else str(abstract.platform)
    default = jax.config.jax_default_device  # type: ignore[attr-defined]
    if default is not None:
        return default if isinstance(default, str) else str(default.platform)
    return jax.default_backend()


def compute_capability() -> int | None:
    """90 for an H100, and so on; None where it is not an NVIDIA GPU or not known."""
    device, abstract = _device(), _abstract_device()
    if device is None:
        kind = abstract.device_kind if abstract is not None else ""
        return next((number for name, number in _ABSTRACT_KINDS if name in kind), None)
    number = getattr(device, "compute_capability", None)
    try:
        return round(float(number) * 10) if number is not None else None
    except ValueError:  # AMD GPUs name theirs "gfx..."
        return None


def has_mosaic() -> bool:
    """Whether kernels that Mosaic GPU lowers can run where a call traced now most likely does."""
    return (
        compute_capability() == 90
        and jax.__version_info__ >= FIRST_MOSAIC_JAX
        and not compiler_errs()
    )


def compiler_errs() -> bool:
    """Whether this is a CUDA whose compiler has been found to take masks of Mosaic's kernels wrong.

    JAX's own (`jax.experimental.pallas.ops.gpu.attention_mgpu`) are refused there too.
    """
    device = _device()
    version = device.client.platform_version if device is not None else ""
    found = re.search(r"cuda (\d+)", version)
    return found is not None and int(found[1]) in _CUDA_THAT_ERRS


def multiprocessors() -> int:
    """Of the GPU that a call traced now will most likely run on; an H100's where not known."""
    cores = (getattr(_device(), "core_count", None), getattr(_abstract_device(), "num_cores", None))
    return next((int(number) for number in cores if number), _H100_MULTIPROCESSORS)


def missing_packages() -> list[str]:
    """What has to be installed before the "jax_triton" launcher can be used."""
    names = {"jax_triton": "jax-triton", "triton": "triton"}
    return [package for module, package in names.items() if not importlib.util.find_spec(module)]


def _device() -> Any:
    """The GPU of this process that a call traced now will most likely run on, if there is one."""
    if target_platform() not in ("gpu", "cuda"):
        return None
    abstract = _abstract_device()
    if abstract is None:
        return jax.local_devices(backend="gpu")[0]
    alike = (d for d in jax.local_devices() if d.device_kind == abstract.device_kind)
    return next(alike, None)


def _abstract_device() -> Any:
    return getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)


def varying(arrays: Sequence[Any]) -> frozenset[str]:
    """The mesh axes over which any of the arrays varies, inside `jax.shard_map`."""
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))


def vary_alike(arrays: Sequence[Any]) -> tuple[jax.Array, ...]:
    """The same arrays, marked as varying over all mesh axes over which any of them does.

    Inside `jax.shard_map(..., check_vma=True)` a kernel's operands and results must agree.
    """
    known = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    axes = frozenset().union(*known)
    return tuple(
        jax.lax.pcast(array, tuple(sorted(axes - own)), to="varying") if axes - own else array
        for array, own in zip(arrays, known, strict=True)
    )


def can_hide_varying() -> bool:
    return hasattr(_config, "_check_vma")


def hide_varying(function: Callable[..., Sequence[jax.Array]]) -> Callable[..., list[jax.Array]]:
    """The same function of arrays, which sees none of them vary over a mesh axis.

    Mosaic's kernels are traced like that by JAX itself, but read numbers of operands that vary:
    loops over those are refused, since what is made of them does not.
    """

    def call(*arrays: jax.Array) -> list[jax.Array]:
        axes = tuple(sorted(varying(arrays)))
        if not axes:
            return list(function(*arrays))
        with _config._check_vma(False):
            # An axis is added and taken away: what an operation returns is not said to vary.
            hidden = [lax.squeeze(lax.expand_dims(array, [0]), [0]) for array in arrays]
            results = function(*hidden)
        return [lax.pcast(result, axes, to="varying") for result in results]

    return call


def call_kernel(
    kernel: Callable[..., None],
    operands: Sequence[jax.Array],
    *,
    name: str,
    grid: tuple[int, ...],
    in_specs: Sequence[pl.BlockSpec],
    out_specs: Sequence[pl.BlockSpec],
    out_shape: Sequence[jax.ShapeDtypeStruct],
    tile: Tile,
    launcher: Launcher,
    aliases: Mapping[int, int] | None = None,
) -> Sequence[jax.Array]:
    """Runs a kernel over a grid, by the launcher asked for.

    aliases: operand -> result, which begins as that operand and may take its memory.
    """
    operands = vary_alike(operands)
    varying = jax.typeof(operands[0]).manual_axis_type
    out_shape = [
        jax.ShapeDtypeStruct(out.shape, out.dtype, manual_axis_type=varying) for out in out_shape
    ]
    parameters = plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages)
    call = pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=list(in_specs),
        out_specs=list(out_specs),
        out_shape=out_shape,
        compiler_params=parameters,
        input_output_aliases=dict(aliases or {}),
        interpret=launcher == "interpret",
        name=name,
    )
    if launcher != "jax_triton":
        return call(*operands)
    capability = compute_capability()
    assert capability is not None, "the caller has made sure of a GPU"
    from pallas_kernels import launch  # reaches into JAX deeper than anything else here

    return launch.launch(call, operands, capability)
