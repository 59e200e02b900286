"""Where each array of a run lies on a mesh of the axes data, fsdp and tensor.

The batch is split over data and fsdp; parameters, and with them the optimiser's moments, over fsdp
and tensor by the rules below. Attention is split by heads; between the products of a layer
`models.transformer` splits what it computes by tokens over tensor.
"""

from __future__ import annotations

import re
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from models import ModelConfig
from train.config import MeshConfig

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))
_RULES = (
    (r"\['attention'\]\['(query|key|value)'\]\['kernel'\]", P("fsdp", "tensor")),  # width, heads
    (r"\['attention'\]\['out'\]\['kernel'\]", P("tensor", None, "fsdp")),  # heads, dim, width
    (r"\['mlp'\]\['(gate|up)'\]\['kernel'\]", P("fsdp", "tensor")),
    (r"\['mlp'\]\['down'\]\['kernel'\]", P("tensor", "fsdp")),
    (r"\['embed'\]", P("tensor", "fsdp")),
    (r"\['head'\]\['kernel'\]", P("fsdp", "tensor")),
)


def make_mesh(config: MeshConfig) -> Mesh:
    """Of the first `config.size` devices of all processes."""
    shape = (config.data, config.fsdp, config.tensor)
    kinds = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(shape, AXES, axis_types=kinds, devices=jax.devices()[: config.size])


def check_mesh(config: MeshConfig, model: ModelConfig, batch_size: int, accumulate: int) -> None:
    """Raises ValueError where devices, batch or model cannot be shared out."""
    if config.size > jax.device_count():
        raise ValueError(
            f"mesh: data * fsdp * tensor = {config.size} devices are more than the "
            f"{jax.device_count()} that there are"
        )
    if jax.process_count() > 1 and config.size != jax.device_count():
        raise ValueError(
            f"mesh: data * fsdp * tensor = {config.size} must be all {jax.device_count()} devices "
            f"of the {jax.process_count()} processes"
        )
    rows = config.data * config.fsdp * accumulate
    if batch_size % rows:
        raise ValueError(
            f"{batch_size=} must be a multiple of {rows}: mesh.data={config.data} times "
            f"mesh.fsdp={config.fsdp} times {accumulate=}"
        )
    for axis, names in {
        "tensor": ("num_kv_heads", "num_heads", "mlp_width", "vocab_size"),
        "fsdp": ("width",),
    }.items():
        parts = getattr(config, axis)
        for name in names:
            if (value := getattr(model, name)) % parts:
                raise ValueError(f"{name}={value!r} must be a multiple of mesh.{axis}={parts}")


def shardings(mesh: Mesh, state: Any) -> Any:
    """A `NamedSharding` for every array of a state, by its path."""

    def of(path: Any, x: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path)
        spec = next((spec for rule, spec in _RULES if x.ndim and re.search(rule, name)), P())
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(of, state)
