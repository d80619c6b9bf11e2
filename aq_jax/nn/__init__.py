"""Flax NNX layers with quantized weights, and models built from them."""

from aq_jax.nn.encoder import Encoder
from aq_jax.nn.generator import Generator
from aq_jax.nn.layers import QEmbed, QLinear
from aq_jax.nn.load import load_model
from aq_jax.nn.prompt_cache import PromptCache
from aq_jax.nn.reranker import Reranker
from aq_jax.nn.swap import quantize_module

__all__ = ["Encoder", "Generator", "PromptCache", "QEmbed", "QLinear", "Reranker", "load_model", "quantize_module"]
