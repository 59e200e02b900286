"""A decoder-only transformer in Flax NNX whose layers are dense or S2, by configuration."""

from models.cache import ModelCache
from models.config import HybridConfig, ModelConfig
from models.decoding import for_decoding
from models.generator import Generation, Generator, GeneratorConfig
from models.huggingface import load_pretrained
from models.sampling import Sampling
from models.transformer import Transformer

__all__ = [
    "Generation",
    "Generator",
    "GeneratorConfig",
    "HybridConfig",
    "ModelCache",
    "ModelConfig",
    "Sampling",
    "Transformer",
    "for_decoding",
    "load_pretrained",
]
