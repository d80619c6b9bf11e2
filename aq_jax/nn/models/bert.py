"""BERT, the model of all-MiniLM-L6-v2 and most sentence encoders: Devlin et al., arXiv:1810.04805.

RoBERTa, DistilBERT and MPNet are settings of it. Residual sums are float32; linear layers and attention round their
inputs to `activations`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from aq_jax.config.fields import Fields
from aq_jax.core.dispatch import Activations, product_dtype
from aq_jax.errors import FormatError
from aq_jax.nn.blocks import add_and_normalize, follow
from aq_jax.nn.models.family import Family, Model, Scorer
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
    """The settings of a BERT and of what came of it.

    Args:
        vocab_size: The number of tokens.
        hidden_size: The width of hidden states.
        num_hidden_layers: The number of layers.
        num_attention_heads: The number of heads.
        intermediate_size: The width inside a feed-forward part.
        max_position_embeddings: The number of positions that a text may have.
        type_vocab_size: The number of token types, of which the first is added; 0 for none.
        layer_norm_eps: What norms add to variances.
        hidden_act: The activation of feed-forward parts, one of `ops.ACTS`.
        padding_id: The token that has its own row of positions, of this number, which the others' follow; None for
            positions that begin with row 0.
        relative_buckets: The number of distances whose scores have a bias of their own; 0 for no biases.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    padding_id: int | None = None
    relative_buckets: int = 0

    @classmethod
    def from_json(cls, fields: Mapping[str, Any], where: str) -> BertConfig:
        """Read a parsed config.json of a BERT.

        Raises:
            FormatError: for missing fields, fields of another type, and what is not computed or not known.
        """
        given = Fields(fields, where)
        config = cls.from_fields(given, type_vocab_size=given.take("type_vocab_size", int, 2))
        given.finish()
        return config

    @classmethod
    def from_fields(cls, given: Fields, **settings: Any) -> BertConfig:
        """Read the fields that RoBERTa and MPNet have, too.

        Raises:
            FormatError: for missing fields, fields of another type, and what is not computed.
        """
        given.leave(*IDLE, *IDLE_POOLER)
        given.require(
            position_embedding_type="absolute", is_decoder=False, is_encoder_decoder=False, add_cross_attention=False,
            pruned_heads={},
        )  # fmt: skip
        sizes = {name: given.take(name, int) for name in SIZES}
        if (padding := settings.get("padding_id")) is not None:
            sizes["max_position_embeddings"] -= padding + 1
        epsilon = given.take("layer_norm_eps", float, 1e-12)
        act = ACTS[given.choose("hidden_act", ACTS, "gelu")]
        return check(cls(**sizes, layer_norm_eps=epsilon, hidden_act=act, **settings), given.where)


def check(config: BertConfig, where: str) -> BertConfig:
    """Return a config whose sizes fit each other.

    Raises:
        FormatError: for heads that do not divide the width, and too few positions.
    """
    if config.hidden_size % config.num_attention_heads:
        raise FormatError(f"{where}: {config.num_attention_heads} heads do not divide {config.hidden_size}")
    if config.max_position_embeddings < 1:
        raise FormatError(f"{where}: max_position_embeddings leaves no position beside that of padding; wanted more")
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
        before = 0 if config.padding_id is None else config.padding_id + 1
        self.word = nnx.Embed(config.vocab_size, width, rngs=rngs)
        self.position = nnx.Embed(before + config.max_position_embeddings, width, rngs=rngs)
        if config.type_vocab_size:
            self.token_type = nnx.Embed(config.type_vocab_size, width, rngs=rngs)
        self.norm = _norm(config, rngs)
        relative = RelativeBias(config.relative_buckets, config.num_attention_heads)
        shared = relative if config.relative_buckets else None
        self.layers = nnx.List([Layer(config, activations, rngs, shared) for _ in range(config.num_hidden_layers)])

    def begin(
        self, ids: Int[Array, "batch tokens"], types: Int[Array, "batch tokens"] | None = None
    ) -> Float[Array, "batch tokens width"]:
        """Compute the first layer's inputs."""
        types = jnp.zeros((1, 1), jnp.int32) if types is None else types
        if self.config.padding_id is None:
            position = self.position(jnp.arange(ids.shape[1], dtype=jnp.int32))[None]
        else:
            real = ids != self.config.padding_id
            count = jnp.cumsum(real, axis=1, dtype=jnp.int32)
            position = self.position(self.config.padding_id + jnp.where(real, count, 0))
        x = self.word(ids) + position
        return self.norm(x + self.token_type(types) if self.config.type_vocab_size else x)


class Layer(nnx.Module):
    """Attention and a feed-forward part, each added to its input and normalized."""

    def __init__(
        self, config: BertConfig, activations: Activations, rngs: nnx.Rngs, relative: RelativeBias | None = None
    ) -> None:
        width = config.hidden_size
        self.relative = relative
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
        bias = None if self.relative is None else self.relative(x.shape[1])
        mixed = attention(
            self.query(x), self.key(x), self.value(x), mask, self.heads, product_dtype(self.activations), bias=bias
        )
        x = add_and_normalize(self.out, mixed, x, self.attention_norm)
        return add_and_normalize(self.down, follow(self.up, x, Epilogue(act=self.act)), x, self.output_norm)


class RelativeBias(nnx.Module):
    """Biases of scores by the distance of the key: near ones each have a bias, far ones share it (T5's).

    Args:
        buckets: The number of biases, half of them for keys that follow.
        heads: The number of heads.

    >>> RelativeBias(8, 2)(3).shape
    (2, 3, 3)
    """

    def __init__(self, buckets: int, heads: int) -> None:
        # A few numbers, which are not quantized in memory.
        self.table = nnx.Param(jnp.zeros((buckets, heads), jnp.float32))

    def __call__(self, tokens: int) -> Float[Array, "heads tokens tokens"]:
        """Look up the biases of texts of so many tokens."""
        table, at = self.table.get_value(), np.arange(tokens)
        return table[buckets_of(at[None] - at[:, None], table.shape[0])].transpose(2, 0, 1)


def buckets_of(distance: Int[np.ndarray, "tokens tokens"], buckets: int, far: int = 128) -> np.ndarray:
    """Give distances of keys their numbers, from `far` on one (arXiv:1910.10683).

    >>> buckets_of(np.array([[-200, -3, 0, 1, 200]]), 8).tolist()
    [[3, 2, 0, 5, 7]]
    """
    half, exact, size = buckets // 2, buckets // 4, np.abs(distance)
    steps = np.log(np.maximum(size, 1).astype(np.float32) / exact) / np.float32(np.log(far / exact)) * (half - exact)
    beyond = np.minimum(exact + steps.astype(np.int32), half - 1)
    return np.where(distance > 0, half, 0) + np.where(size < exact, size, beyond)


def _norm(config: BertConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, use_fast_variance=False, rngs=rngs)


# Heads and poolers, which sentence embeddings do not use, are ignored.
HEADS = r"(?:classifier|qa_outputs)\.(?:weight|bias)"  # BertForSequenceClassification and its like
EMBEDDINGS = {"word": "word_embeddings", "position": "position_embeddings", "token_type": "token_type_embeddings"}


def make_names(
    prefix: str, layer: str, linear: Mapping[str, str], norms: Mapping[str, str], ignored: str
) -> tuple[NameRule, ...]:
    """Make the rules for names: Hugging Face names -> paths in Bert.

    Args:
        prefix: What stands before names of a model with a head, such as "bert".
        layer: What stands before the number of a layer, as a pattern.
        linear: Their names of a layer's linear layers, by ours.
        norms: Their names of its norms, by ours.
        ignored: The pattern of names that no embedding needs.
    """
    start = rf"(?:{prefix}\.)?"
    at = rf"{start}{layer}\.(\d+)\."
    embed = rf"{start}embeddings\."
    rules: list[NameRule] = []
    for ours, theirs in EMBEDDINGS.items():
        rules.append((rf"{embed}{theirs}\.weight", f"{ours}.embedding", keep))
    parts = [(embed + "LayerNorm", "norm"), *((at + theirs, rf"layers.\1.{ours}") for ours, theirs in norms.items())]
    for theirs, ours in parts:
        rules += [(theirs + r"\.(?:weight|gamma)", f"{ours}.scale", keep)]
        rules += [(theirs + r"\.(?:bias|beta)", f"{ours}.bias", keep)]
    for ours, theirs in linear.items():
        rules += [(rf"{at}{theirs}\.weight", rf"layers.\1.{ours}.kernel", transpose)]
        rules += [(rf"{at}{theirs}\.bias", rf"layers.\1.{ours}.bias", keep)]
    return (*rules, (embed + "position_ids", None, keep), (rf"{start}(?:{ignored})", None, keep))


LINEAR = {name: rf"attention\.self\.{name}" for name in ("query", "key", "value")}
LINEAR |= {"out": r"attention\.output\.dense", "up": r"intermediate\.dense", "down": r"output\.dense"}
NORMS = {"attention_norm": r"attention\.output\.LayerNorm", "output_norm": r"output\.LayerNorm"}
NAMES = make_names("bert", r"encoder\.layer", LINEAR, NORMS, rf"pooler\..*|cls\..*|{HEADS}")

SCORER = Scorer("cls", (("bert.pooler.dense", "Tanh"), ("classifier", "Identity")))
BERT = Family(
    ("bert",), "embed", BertConfig.from_json, Bert, lambda _: NAMES, heads=HEADS, tokenizer="BertTokenizer",
    scorer=lambda _: SCORER,
)  # fmt: skip
