"""BERT, the model of all-MiniLM-L6-v2 and most sentence encoders: Devlin et al., arXiv:1810.04805.

Residual sums are float32; linear layers and attention round their inputs to `activations`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from aq_jax.config.fields import Fields
from aq_jax.core.dispatch import Activations, product_dtype
from aq_jax.errors import FormatError
from aq_jax.nn.blocks import add_and_normalize, follow
from aq_jax.nn.models.family import Family, Model
from aq_jax.nn.models.fields import ACTS, IDLE
from aq_jax.nn.weights import NameRule, keep, transpose
from aq_jax.ops import Epilogue, attention

SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings",
)  # fmt: skip
# Of a pooler, which no sentence embedding uses, and of how the model was trained.
IDLE_POOLER = (
    "directionality", "pooler_type", "pooler_fc_size", "pooler_num_fc_layers", "pooler_num_attention_heads",
    "pooler_size_per_head", "output_past", "tie_word_embeddings",
)  # fmt: skip


@dataclass(frozen=True)
class BertConfig:
    """The fields of a Hugging Face config.json that the computation depends on."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"

    @classmethod
    def from_json(cls, fields: Mapping[str, Any], where: str) -> BertConfig:
        """Read a parsed config.json.

        Raises:
            FormatError: for missing fields, fields of another type, and variants that this model does not compute.
        """
        given = Fields(fields, where)
        given.leave(*IDLE, *IDLE_POOLER)
        given.require(position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
        config = cls(
            *(given.take(name, int) for name in SIZES),
            type_vocab_size=given.take("type_vocab_size", int, 2),
            layer_norm_eps=given.take("layer_norm_eps", float, 1e-12),
            hidden_act=ACTS[given.choose("hidden_act", ACTS, "gelu")],
        )
        given.finish()
        if config.hidden_size % config.num_attention_heads:
            raise FormatError(f"{where}: {config.num_attention_heads} heads do not divide {config.hidden_size}")
        return config


class Bert(Model):
    """The encoder: ids and mask to hidden states.

    Args:
        config: The model's sizes.
        activations: The type that linear layers (once quantized) and attention round their inputs to.
        rngs: The random streams of the initial weights.

    >>> import jax
    >>> from flax import nnx
    >>> config = BertConfig(100, 16, 1, 2, 32, 64)
    >>> def hidden():
    ...     return Bert(config, rngs=nnx.Rngs(0))(jnp.ones((2, 8), int), jnp.ones((2, 8), bool))
    >>> jax.eval_shape(hidden).shape
    (2, 8, 16)
    """

    table = "word.embedding"

    def __init__(self, config: BertConfig, *, activations: Activations = "float32", rngs: nnx.Rngs) -> None:
        width = config.hidden_size
        self.config = config
        self.word = nnx.Embed(config.vocab_size, width, rngs=rngs)
        self.position = nnx.Embed(config.max_position_embeddings, width, rngs=rngs)
        self.token_type = nnx.Embed(config.type_vocab_size, width, rngs=rngs)
        self.norm = _norm(config, rngs)
        self.layers = nnx.List([Layer(config, activations, rngs) for _ in range(config.num_hidden_layers)])

    def begin(self, ids: Int[Array, "batch tokens"]) -> Float[Array, "batch tokens width"]:
        """Compute the first layer's inputs."""
        position = self.position(jnp.arange(ids.shape[1], dtype=jnp.int32))
        return self.norm(self.word(ids) + position[None] + self.token_type(jnp.zeros((1, 1), jnp.int32)))


class Layer(nnx.Module):
    """Attention and a feed-forward part, each added to its input and normalized."""

    def __init__(self, config: BertConfig, activations: Activations, rngs: nnx.Rngs) -> None:
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.act = config.hidden_act
        self.activations: Activations = activations
        self.query, self.key, self.value, self.out = (nnx.Linear(width, width, rngs=rngs) for _ in range(4))
        self.up = nnx.Linear(width, config.intermediate_size, rngs=rngs)
        self.down = nnx.Linear(config.intermediate_size, width, rngs=rngs)
        self.attention_norm, self.output_norm = _norm(config, rngs), _norm(config, rngs)

    def __call__(
        self, x: Float[Array, "batch tokens width"], mask: Bool[Array, "batch tokens"]
    ) -> Float[Array, "batch tokens width"]:
        """Run one layer."""
        mixed = attention(self.query(x), self.key(x), self.value(x), mask, self.heads, product_dtype(self.activations))
        x = add_and_normalize(self.out, mixed, x, self.attention_norm)
        return add_and_normalize(self.down, follow(self.up, x, Epilogue(act=self.act)), x, self.output_norm)


def _norm(config: BertConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, use_fast_variance=False, rngs=rngs)


# Hugging Face names -> paths in Bert. Heads and poolers, which sentence embeddings do not use, are ignored.
HEADS = r"(?:classifier|qa_outputs)\.(?:weight|bias)"  # BertForSequenceClassification and its like
_LAYER = r"(?:bert\.)?encoder\.layer\.(\d+)\."
_EMBED = r"(?:bert\.)?embeddings\."
NAMES: tuple[NameRule, ...] = (
    (_EMBED + r"word_embeddings\.weight", "word.embedding", keep),
    (_EMBED + r"position_embeddings\.weight", "position.embedding", keep),
    (_EMBED + r"token_type_embeddings\.weight", "token_type.embedding", keep),
    (_EMBED + r"LayerNorm\.(?:weight|gamma)", "norm.scale", keep),
    (_EMBED + r"LayerNorm\.(?:bias|beta)", "norm.bias", keep),
    (_EMBED + r"position_ids", None, keep),
    (_LAYER + r"attention\.self\.(query|key|value)\.weight", r"layers.\1.\2.kernel", transpose),
    (_LAYER + r"attention\.self\.(query|key|value)\.bias", r"layers.\1.\2.bias", keep),
    (_LAYER + r"attention\.output\.dense\.weight", r"layers.\1.out.kernel", transpose),
    (_LAYER + r"attention\.output\.dense\.bias", r"layers.\1.out.bias", keep),
    (_LAYER + r"attention\.output\.LayerNorm\.(?:weight|gamma)", r"layers.\1.attention_norm.scale", keep),
    (_LAYER + r"attention\.output\.LayerNorm\.(?:bias|beta)", r"layers.\1.attention_norm.bias", keep),
    (_LAYER + r"intermediate\.dense\.weight", r"layers.\1.up.kernel", transpose),
    (_LAYER + r"intermediate\.dense\.bias", r"layers.\1.up.bias", keep),
    (_LAYER + r"output\.dense\.weight", r"layers.\1.down.kernel", transpose),
    (_LAYER + r"output\.dense\.bias", r"layers.\1.down.bias", keep),
    (_LAYER + r"output\.LayerNorm\.(?:weight|gamma)", r"layers.\1.output_norm.scale", keep),
    (_LAYER + r"output\.LayerNorm\.(?:bias|beta)", r"layers.\1.output_norm.bias", keep),
    (r"(?:bert\.)?pooler\..*|cls\..*", None, keep),
    (HEADS, None, keep),
)

BERT = Family(("bert",), "embed", BertConfig.from_json, Bert, lambda _: NAMES, heads=HEADS, tokenizer="BertTokenizer")
