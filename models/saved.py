"""A model to generate from: of a training run, or a checkpoint in Hugging Face's format."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokenizers
from flax import nnx

from models.config import ModelConfig
from models.from_json import build
from models.huggingface import load_pretrained
from models.tensor_files import read_json
from models.tokenizer import NUM_BYTES, ByteTokenizer
from models.transformer import Transformer

TOKENIZER, TOKENIZER_SETTINGS = "tokenizer.json", "tokenizer_config.json"


class Text:
    """Text to tokens and back, as the model was trained; stop: tokens that end a text."""

    def __init__(self, tokenizer: tokenizers.Tokenizer | None, stop: tuple[int, ...]) -> None:
        """`tokenizer` None means bytes."""
        self._tokenizer = tokenizer
        self.stop = stop

    def encode(self, text: str) -> list[int]:
        """With what the tokenizer puts before a text."""
        if self._tokenizer is None:
            return ByteTokenizer().encode([text])[0].tolist()
        return self._tokenizer.encode(text).ids

    def decode_after(self, before: list[int], tokens: list[int]) -> str:
        """The text of tokens that follow others: by themselves they may lose a space."""
        return self.decode([*before, *tokens])[len(self.decode(before)) :]

    def decode(self, tokens: list[int]) -> str:
        """Without special tokens; bytes that are not UTF-8 become the replacement character."""
        if self._tokenizer is None:
            kept = [token for token in tokens if token not in self.stop]
            return ByteTokenizer().decode(np.asarray(kept, np.int32))
        return self._tokenizer.decode(tokens, skip_special_tokens=True)


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """config and model, and the text that it reads and writes."""

    config: ModelConfig
    model: Transformer
    text: Text


def load_model(folder: Path) -> SavedModel:
    """The last checkpoint of a run of `python -m train`, or a Hugging Face checkpoint.

    Raises:
        ValueError: the folder holds neither, or something in it is missing or broken.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds no config.json: it must be the folder of a run of `python -m train`, "
            "or of a Hugging Face checkpoint"
        )
    settings = read_json(folder / "config.json")
    is_run = isinstance(settings.get("model"), dict)
    if not is_run and "model_type" not in settings:
        raise ValueError(f"{folder / 'config.json'} is neither of a run nor of a model")
    values = settings["model"] if is_run else settings
    text = _load_text(folder, values.get("vocab_size"), settings, is_run)
    if is_run:
        config, model = _from_run(folder, values)
    else:
        config, model = load_pretrained(folder, param_dtype="bfloat16")
    return SavedModel(config, model, text)


def _from_run(folder: Path, values: dict[str, Any]) -> tuple[ModelConfig, Transformer]:
    import orbax.checkpoint as ocp

    try:
        config = build(ModelConfig, values)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'} does not describe a model: {error}") from error
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = {
        "params": jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), params
        )
    }
    args = ocp.args.Composite(
        state=ocp.args.PyTreeRestore(
            item=like,
            restore_args=ocp.checkpoint_utils.construct_restore_args(like),
            partial_restore=True,
        )
    )
    checkpoints = folder / "checkpoints"
    if not checkpoints.is_dir():
        raise ValueError(f"{folder} holds no checkpoints")
    problems: list[str] = []
    level = logging.root.manager.disable
    with ocp.CheckpointManager(checkpoints.resolve()) as manager:
        for step in sorted(manager.all_steps(), reverse=True):
            try:
                logging.disable(logging.ERROR)  # its own words on damage
                restored = manager.restore(step, args=args)
                if problems:
                    warnings.warn(
                        f"checkpoints that are damaged, {'; '.join(problems)}: that of step {step} "
                        "is used",
                        stacklevel=3,
                    )
                return config, nnx.merge(graphdef, restored.state["params"])
            except Exception as error:  # damage may show in any way
                why = f"{type(error).__name__}: {error}".splitlines()[0][:100]
                problems.append(f"{step} ({why})")
            finally:
                logging.disable(level)
    found = f", these cannot be read: {'; '.join(problems)}" if problems else ""
    raise ValueError(f"{checkpoints} holds no whole checkpoint of this model{found}")


def _load_text(folder: Path, vocab_size: Any, settings: dict[str, Any], is_run: bool) -> Text:
    path = folder / TOKENIZER
    if not path.is_file():
        if vocab_size != NUM_BYTES:
            raise ValueError(f"{folder} holds no {TOKENIZER}, and tokens are not bytes")
        return Text(None, (ByteTokenizer().end_token,))
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises nothing more specific
        raise ValueError(f"{path} is not a tokenizer.json ({error})") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    # As in training: a text that spells the end token out does not end there.
    tokenizer.encode_special_tokens = is_run
    return Text(tokenizer, _end_tokens(folder, tokenizer, settings))


def _end_tokens(
    folder: Path, tokenizer: tokenizers.Tokenizer, settings: dict[str, Any]
) -> tuple[int, ...]:
    """By number in config.json, or by name in the tokenizer's settings."""
    found: list[Any] = []
    numbers = settings.get("eos_token_id")
    found += numbers if isinstance(numbers, list) else [numbers]
    if (folder / TOKENIZER_SETTINGS).is_file():
        name = read_json(folder / TOKENIZER_SETTINGS).get("eos_token")
        name = name.get("content") if isinstance(name, dict) else name
        found.append(tokenizer.token_to_id(name) if isinstance(name, str) else None)
    return tuple(dict.fromkeys(token for token in found if isinstance(token, int)))
