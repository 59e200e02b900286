"""Writes the tiny checkpoints of tests/data/pretrained, and their logits by transformers.

    pip install torch transformers
    python -m tests.make_pretrained            # or a folder to write to

Random weights, large enough that every setting shows in the logits.
"""

from __future__ import annotations

import pathlib
import shutil
import sys
from typing import Any

import numpy as np
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

FOLDER = pathlib.Path(__file__).parent / "data" / "pretrained"
LENGTH = 23

# Prime or at least different sizes, so that no axis passes for another.
SHAPE: dict[str, Any] = {
    "vocab_size": 41,
    "hidden_size": 24,
    "intermediate_size": 19,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "rms_norm_eps": 0.01,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def rope(theta: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


def models() -> dict[str, tuple[Any, torch.dtype, str]]:
    """By name: the model, the dtype of its file, and the size of a shard."""
    llama = LlamaConfig(**SHAPE, **rope(100.0), tie_word_embeddings=False)
    tied = LlamaConfig(**SHAPE, **rope(10_000.0), head_dim=10, tie_word_embeddings=True)
    mistral = MistralConfig(**SHAPE, **rope(1000.0), sliding_window=5)
    return {
        "llama": (LlamaForCausalLM(llama), torch.float32, "20KB"),
        "llama-tied": (LlamaForCausalLM(tied), torch.bfloat16, "1GB"),
        "mistral": (MistralForCausalLM(mistral), torch.float16, "1GB"),
    }


def write(folder: pathlib.Path) -> None:
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    for name, (model, dtype, shard) in models().items():
        for key, weight in model.named_parameters():
            if "norm" in key:
                torch.nn.init.uniform_(weight, 0.5, 1.5)
        shutil.rmtree(folder / name, ignore_errors=True)
        model.to(dtype).save_pretrained(folder / name, max_shard_size=shard)
        (folder / name / "generation_config.json").unlink(missing_ok=True)
        tokens = torch.randint(SHAPE["vocab_size"], (2, LENGTH))
        # Loaded again, since .to(dtype) rounds the rotary frequencies as well as the weights.
        model = type(model).from_pretrained(
            folder / name, dtype=torch.float32, attn_implementation="eager"
        )
        with torch.no_grad():
            logits = model.eval()(tokens).logits
        np.savez_compressed(
            folder / name / "logits.npz",
            tokens=tokens.numpy().astype(np.int32),
            logits=logits.numpy(),
        )


if __name__ == "__main__":
    write(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
