"""The settings of decoders, and how the fields that all their configs have are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from aq_jax.config.fields import Fields
from aq_jax.errors import FormatError
from aq_jax.nn.models.fields import ACTS, IDLE
from aq_jax.nn.rope import Rope, read_rope
from aq_jax.ops import Scores

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Attention:
    """Settings of the attention of one layer.

    Args:
        rope: How its queries and keys are turned; None if they are not.
        scores: How it scores keys, and which a token sees.
    """

    rope: Rope | None
    scores: Scores


@dataclass(frozen=True)
class LayerConfig:
    """Settings that all layers of a decoder share.

    Args:
        width: The width of hidden states.
        inner: The width inside a feed-forward part.
        heads: The number of heads.
        kv_heads: The number of heads of keys and values.
        size: The size of a head.
        epsilon: What norms add to the mean of squares.
        act: The activation of a gate, one of `ops.ACTS`.
        biased: The names of the linear layers that have a bias.
        fused: Whether queries, keys and values are one linear layer, and gate and up another.
        qk_norm: What queries and keys are normalized over: nothing, a "head", or all of the "width".
        norms: Where norms stand: "before" attention and feed-forward part, "after" them, or "both".
        unit_gain: Whether norms multiply by 1 + their gain.
        residual_scale: The factor of what is added to hidden states.
    """

    width: int
    inner: int
    heads: int
    kv_heads: int
    size: int
    epsilon: float
    act: str = "silu"
    biased: frozenset[str] = frozenset()
    fused: bool = False
    qk_norm: Literal["", "head", "width"] = ""
    norms: Literal["before", "after", "both"] = "before"
    unit_gain: bool = False
    residual_scale: float = 1.0


@dataclass(frozen=True)
class DecoderConfig:
    """The settings of a decoder.

    Args:
        vocab_size: The number of tokens.
        max_position_embeddings: The number of positions.
        layer: What all layers have in common.
        attentions: What each has of its own.
        tied: Whether the head is the embedding table; an encoder has no other head.
        embedding_scale: The factor of embeddings.
        logit_scale: The factor of logits.
        logit_cap: Their bound (see `Scores.bound`); 0 for none.
    """

    vocab_size: int
    max_position_embeddings: int
    layer: LayerConfig
    attentions: tuple[Attention, ...]
    tied: bool = False
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_cap: float = 0.0

    @property
    def hidden_size(self) -> int:
        """The width of hidden states."""
        return self.layer.width


@dataclass(frozen=True)
class Sizes:
    """The sizes that every decoder's config has."""

    vocab_size: int
    positions: int
    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    size: int

    def layer(self, fields: Fields, act: str = "", epsilon: float = 1e-6, **settings: Any) -> LayerConfig:
        """Make what all layers have in common.

        Args:
            fields: The fields of config.json.
            act: The activation of a gate; by default that of `hidden_act`, or else silu.
            epsilon: The default of `rms_norm_eps`.
            settings: Other settings of `LayerConfig`.
        """
        act = act or read_act(fields, default="silu")
        epsilon = fields.take("rms_norm_eps", float, epsilon)
        common = (self.width, self.inner, self.heads, self.kv_heads, self.size, epsilon, act)
        return LayerConfig(*common, **settings)

    def config(
        self, fields: Fields, layer: LayerConfig, attentions: Sequence[Attention], tied: bool = False, **scales: float
    ) -> DecoderConfig:
        """Make the settings; `tied` is the default of `tie_word_embeddings`, `scales` are others of `DecoderConfig`."""
        tied = fields.take("tie_word_embeddings", bool, tied)
        return DecoderConfig(self.vocab_size, self.positions, layer, tuple(attentions), tied, **scales)


def read_sizes(fields: Fields, head_dim: int | None = None) -> Sizes:
    """Read the sizes, and leave out what changes nothing; `head_dim` is its default, or else width / heads.

    Raises:
        FormatError: for fields that are missing or of another type, and heads that cannot be shared or turned.
    """
    fields.leave(*IDLE)
    fields.leave("is_decoder")  # they are decoders, whatever it says
    fields.require(is_encoder_decoder=False, add_cross_attention=False)
    width, heads = fields.take("hidden_size", int), fields.take("num_attention_heads", int)
    found = Sizes(
        vocab_size=fields.take("vocab_size", int), positions=fields.take("max_position_embeddings", int),
        layers=fields.take("num_hidden_layers", int), width=width, inner=fields.take("intermediate_size", int),
        heads=heads, kv_heads=fields.take("num_key_value_heads", int, heads),
        size=fields.take("head_dim", int, head_dim or width // heads),
    )  # fmt: skip
    if found.heads % found.kv_heads or found.size % 2 or not found.size:
        raise FormatError(
            f"{fields.where}: num_attention_heads {found.heads}, num_key_value_heads {found.kv_heads}, head_dim "
            f"{found.size}; wanted a number of heads that the key-value heads divide, and an even head_dim"
        )
    return found


def read_act(fields: Fields, name: str = "hidden_act", default: Any = ...) -> str:
    """Read the name of an activation."""
    return ACTS[fields.choose(name, ACTS, default)]


def read_one_rope(fields: Fields, sizes: Sizes, theta: float = 10000.0, part: float = 1.0) -> Rope:
    """Read the rotation that all layers have.

    Args:
        fields: The fields of config.json.
        sizes: The model's sizes.
        theta: The default base of the frequencies.
        part: The default part of a head that is turned; only with another default than 1, a config may have its own.

    Raises:
        FormatError: for rules that are not computed.
    """
    theta = fields.take("rope_theta", float, theta)
    old, new = _read_rotations(fields)
    where = f"{fields.where}: {'rope_scaling' if old else 'rope_parameters'}"
    said = old or new
    found = said.pop("partial_rotary_factor", None)
    if found not in (None, part):
        raise FormatError(f"{where}: partial_rotary_factor is {found!r}; wanted {part}")
    if int(sizes.size * part) % 2:
        raise FormatError(f"{where}: {part} of {sizes.size} numbers are turned; wanted an even number of them")
    return read_rope(said, where, theta, int(sizes.size * part), sizes.positions)


def read_two_ropes(fields: Fields, sizes: Sizes, thetas: Mapping[str, tuple[str, float]]) -> dict[str, Rope]:
    """Read the rotations of two kinds of layers; `rope_scaling`, of transformers 4, is that of full attention.

    Args:
        fields: The fields of config.json.
        sizes: The model's sizes.
        thetas: For each kind, the name of the field with the base of its frequencies, and its default.

    Raises:
        FormatError: for rules that are not computed.
    """
    scaling, new = _read_rotations(fields)
    kinds = Fields(new, f"{fields.where}: rope_parameters")
    found = {}
    for kind, (name, theta) in thetas.items():
        said = kinds.take(kind, dict, {}) | (scaling if kind == FULL else {})
        theta = fields.take(name, float, theta)
        found[kind] = read_rope(said, f"{kinds.where}.{kind}", theta, sizes.size, sizes.positions)
    kinds.finish()
    return found


def _read_rotations(fields: Fields) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read `rope_scaling`, of transformers 4, and `rope_parameters`, of 5, of which one is empty."""
    old, new = dict(fields.take("rope_scaling", dict, {})), dict(fields.take("rope_parameters", dict, {}))
    if old and new and old != new:
        raise FormatError(
            f"{fields.where}: has both rope_scaling and rope_parameters, of which transformers reads the first alone; "
            "move what holds into one of them, and remove the other"
        )
    return (old, {}) if old else ({}, new)


def read_kinds(fields: Fields, usual: Sequence[str]) -> tuple[str, ...]:
    """Read `layer_types`, which says of each layer whether its attention slides.

    Raises:
        FormatError: for other kinds, and for another number of layers.
    """
    found = fields.take("layer_types", list, list(usual))
    if len(found) < len(usual) or not set(found) <= {FULL, SLIDING}:
        raise FormatError(
            f"{fields.where}: layer_types is {str(found)[:80]}; wanted {len(usual)} times {FULL!r} or {SLIDING!r}"
        )
    return tuple(found[: len(usual)])


def read_used_window(fields: Fields, default: int | None) -> int | None:
    """Read `sliding_window`, which holds only if `use_sliding_window` says so."""
    used = fields.take("use_sliding_window", bool, False)
    window = fields.take("sliding_window", int, default, null=None)
    return window if used else None


def read_reaches(
    fields: Fields, kinds: Sequence[str], window: int | None, wanted: str = "a sliding_window"
) -> dict[str, int | None]:
    """Return the reach of each kind of layers.

    Args:
        fields: The fields of config.json.
        kinds: The kind of each layer.
        window: The window of layers that slide; None for none.
        wanted: What gives them one, for errors.

    Raises:
        FormatError: for a sliding layer without a window.
    """
    if window is None and SLIDING in kinds:
        raise FormatError(f"{fields.where}: layer_types has {SLIDING!r}; wanted {wanted}")
    return {FULL: None, SLIDING: reach_of(window)}


def reach_of(window: int | None) -> int | None:
    """Return the reach of a window, which counts the token itself."""
    return None if window is None else window - 1
