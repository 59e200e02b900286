"""A decoder-only transformer in Flax NNX whose layers are dense or S2, by configuration."""

from models.config import HybridConfig, ModelConfig
from models.generate import generate
from models.huggingface import load_pretrained
from models.transformer import Transformer

__all__ = ["HybridConfig", "ModelConfig", "Transformer", "generate", "load_pretrained"]
