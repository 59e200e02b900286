"""Llama and Mistral checkpoints in Hugging Face's format, as a `Transformer`."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.config import HybridConfig, ModelConfig
from models.tensor_files import StoredTensor, listed, read_json, read_tensors, stored_tensors
from models.transformer import Transformer

# What transformers takes where config.json is silent.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": None, "sliding_window": None},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
}
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load_pretrained(
    folder: str | os.PathLike[str],
    *,
    attention: HybridConfig | None = None,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    param_dtype: Literal["float32", "bfloat16"] = "float32",
) -> tuple[ModelConfig, Transformer]:
    """The model in a folder with `config.json` and safetensors files.

    Args:
      folder: as `save_pretrained` of transformers (4 or 5) or a download leaves it.
      attention: what the layers see instead of what they were trained with: causal attention,
        and Mistral's sliding window.
      dtype: what is computed in.
      param_dtype: what the matrices are stored in, whatever the files hold (bfloat16, float16 or
        float32): float32 to train, bfloat16 to generate.

    Raises:
      TypeError: `attention` is no `HybridConfig`.
      ValueError: what is missing or broken in the folder; a setting that this model does not
        have (rope_scaling, biases, another activation, quantisation, another model type); tensors
        that are missing, unknown, or of another shape or dtype. All are named.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"{folder} must be a folder with config.json and safetensors files")
    config = _model_config(folder / "config.json", attention, dtype, param_dtype)
    weights, stored = dict(_weights(config)), stored_tensors(folder)
    stored = {name: x for name, x in stored.items() if not name.endswith(".rotary_emb.inv_freq")}
    tied_head = stored.pop(_HEAD, None) if config.tie_embeddings else None
    _check_tensors(folder, weights, stored)
    arrays: dict[Any, jax.Array] = {
        weights[name].path: weights[name].ours(values, param_dtype)
        for name, values in read_tensors(stored)
    }
    if tied_head is not None:
        _check_tied(tied_head, arrays[weights[_EMBEDDING].path])
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    flat = [(path, variable.replace(arrays[path])) for path, variable in nnx.to_flat_state(state)]
    return config, nnx.merge(graphdef, nnx.from_flat_state(flat))


def _model_config(
    path: Path, attention: HybridConfig | None, dtype: Any, param_dtype: Any
) -> ModelConfig:
    settings = read_json(path)
    _check_supported(path, settings)
    settings = _DEFAULTS[settings["model_type"]] | settings

    def size(name: str, default: int | None = None) -> int:
        value = settings.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{path} must have a positive integer {name}, got {value!r}")
        return value

    def number(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{path} must have a number for {name}, got {value!r}")
        return float(value)

    width, num_heads = size("hidden_size"), size("num_attention_heads")
    own = HybridConfig(kind="dense")
    if settings["sliding_window"] is not None:
        own = HybridConfig(kind="window", dense_first=0, window=size("sliding_window"))
    rope = settings.get("rope_scaling") or settings.get("rope_parameters") or {}  # as transformers
    return ModelConfig(
        vocab_size=size("vocab_size"),
        num_layers=size("num_hidden_layers"),
        width=width,
        num_heads=num_heads,
        num_kv_heads=size("num_key_value_heads", num_heads),
        head_dim=size("head_dim", width // num_heads),
        mlp_width=size("intermediate_size"),
        norm_epsilon=number("rms_norm_eps", settings.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(settings.get("tie_word_embeddings", False)),
        rope_base=number(
            "rope_theta", rope.get("rope_theta", settings.get("rope_theta", 10_000.0))
        ),
        dtype=dtype,
        param_dtype=param_dtype,
        attention=own if attention is None else attention,
    )


def _check_supported(path: Path, settings: dict[str, Any]) -> None:
    """Refuses, by name, every setting that would change what the model computes."""
    kind = settings.get("model_type")
    if not isinstance(kind, str) or kind not in _DEFAULTS:
        raise ValueError(f"{path}: model_type={kind!r} is not supported, only llama and mistral")
    only = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "quantization_config": None,
        "layer_types": None,
    }
    for name, value in only.items():
        if settings.get(name, value) != value:
            raise ValueError(f"{path}: {name}={settings[name]!r} is not supported, only {value!r}")
    for name in ("rope_scaling", "rope_parameters"):  # transformers 4 and 5
        rope = settings.get(name) or {}
        plain = isinstance(rope, dict) and rope.keys() <= {"rope_type", "type", "rope_theta"}
        if not plain or any(
            rope.get(key) not in (None, "default") for key in ("rope_type", "type")
        ):
            raise ValueError(f"{path}: {name}={rope!r} is not supported, only rope_type default")


@dataclasses.dataclass(frozen=True)
class _Weight:
    """Where a tensor goes. One with `outputs` is a matrix `[outputs, inputs]` in the file, and
    `[*inputs, *outputs]` here; both conventions of rotary embedding pair the halves of a head.
    """

    path: tuple[str | int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...] = ()

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return (math.prod(self.outputs), math.prod(self.inputs)) if self.outputs else self.inputs

    def ours(self, array: np.ndarray, dtype: str) -> jax.Array:
        """Matrices in `dtype`, norms in float32."""
        if self.outputs:
            array = array.T.reshape(*self.inputs, *self.outputs)
        return jnp.asarray(array, dtype if array.ndim > 1 else jnp.float32)


def _weights(config: ModelConfig) -> Iterator[tuple[str, _Weight]]:
    """Hugging Face's name of every tensor, and where it goes."""
    width, mlp_width = (config.width,), (config.mlp_width,)
    heads = (config.num_heads, config.head_features)
    kv_heads = (config.num_kv_heads, config.head_features)
    yield _EMBEDDING, _Weight(("embed",), (config.vocab_size, config.width))
    for layer in range(config.num_layers):
        theirs, ours = f"model.layers.{layer}", ("blocks", layer)
        for name, norm in (
            ("input_layernorm", "attention_norm"),
            ("post_attention_layernorm", "mlp_norm"),
        ):
            yield f"{theirs}.{name}.weight", _Weight((*ours, norm, "scale"), width)
        for name, inputs, outputs in (
            ("query", width, heads),
            ("key", width, kv_heads),
            ("value", width, kv_heads),
            ("out", heads, width),
        ):
            weight = _Weight((*ours, "attention", name, "kernel"), inputs, outputs)
            yield f"{theirs}.self_attn.{name[0]}_proj.weight", weight
        for name, inputs, outputs in (
            ("gate", width, mlp_width),
            ("up", width, mlp_width),
            ("down", mlp_width, width),
        ):
            weight = _Weight((*ours, "mlp", name, "kernel"), inputs, outputs)
            yield f"{theirs}.mlp.{name}_proj.weight", weight
    yield "model.norm.weight", _Weight(("norm", "scale"), width)
    if not config.tie_embeddings:
        yield _HEAD, _Weight(("head", "kernel"), width, (config.vocab_size,))


def _check_tensors(
    folder: Path, weights: dict[str, _Weight], stored: dict[str, StoredTensor]
) -> None:
    problems = []
    if missing := [name for name in weights if name not in stored]:
        problems.append(f"missing tensors: {listed(missing)}")
    if unknown := [name for name in stored if name not in weights]:
        problems.append(f"unknown tensors: {listed(unknown)}")
    both = [(name, stored[name], weights[name]) for name in weights if name in stored]
    if shapes := [
        f"{name} {tensor.shape} instead of {weight.stored_shape}"
        for name, tensor, weight in both
        if tensor.shape != weight.stored_shape
    ]:
        problems.append(f"wrong shapes: {listed(shapes)}")
    if dtypes := [
        f"{name} {tensor.dtype}"
        for name, tensor, _ in both
        if tensor.dtype not in ("BF16", "F16", "F32")
    ]:
        problems.append(f"dtypes other than BF16, F16 and F32: {listed(dtypes)}")
    if problems:
        raise ValueError(f"{folder} does not fit its config.json: {'; '.join(problems)}")


def _check_tied(stored: StoredTensor, embedding: jax.Array) -> None:
    """Some files hold a tied head all the same; it must be the embedding."""
    ((_, head),) = read_tensors({_HEAD: stored})
    if not np.array_equal(np.asarray(jnp.asarray(head, embedding.dtype)), np.asarray(embedding)):
        raise ValueError(f"{stored.file}: {_HEAD} differs from {_EMBEDDING}, but they are tied")
