"""Rebuild config.json from a file's fields.

Each function takes the fields of an architecture, without its name before them, and gives those of config.json. A field
that it does not take is noted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from aq_jax.converters.gguf.header import T, field_of
from aq_jax.converters.gguf.names import ARCHITECTURES
from aq_jax.errors import FormatError

Rows = Mapping[str, int]
EMBEDDING = "token_embd.weight"
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The numbers of Llama 3.1's rule for rotary frequencies; a file has the factors that follow from them."""
_GEMMA_LOCAL_BASE, _GEMMA_PATTERN, _GEMMA_27B = 10000.0, 6, 62
_DEFAULT_BASE = 10000.0


class Fields:
    """The fields of an architecture; knows which were taken.

    Args:
        where: The file, for errors.
        fields: All fields of the file.
        architecture: The name before those of the architecture.
    """

    def __init__(self, where: object, fields: Mapping[str, Any], architecture: str) -> None:
        self.where, self.all, self.architecture = where, fields, architecture
        self.taken: set[str] = set()

    def number(self, key: str, default: float | None = None, whole: bool = True) -> Any:
        """Take a number; whole ones are positive and below 2^31.

        Raises:
            FormatError: if it is missing and has no default, or is none.
        """
        name = f"{self.architecture}.{key}"
        self.taken.add(name)
        found = self.all.get(name, default)
        kind = (int,) if whole else (int, float)
        right = isinstance(found, kind) and not isinstance(found, bool) and math.isfinite(found)
        if not right or found < 0 or (whole and not 0 < found < 2**31):
            wanted = "a whole number of 1 or more" if whole else "a number of 0 or more"
            raise FormatError(f"{self.where}: {name} is {str(found)[:40]}; wanted {wanted}")
        return found if whole else float(f"{float(found):.7g}")  # float32 1e-05 is no more than that

    def take(self, key: str, kind: type[T]) -> T | None:
        """Take a text, a whole number, or true or false; None if it is missing.

        Raises:
            FormatError: if it is of another kind.
        """
        self.taken.add(f"{self.architecture}.{key}")
        return field_of(self.all, f"{self.architecture}.{key}", kind, self.where)

    def left(self) -> list[str]:
        """List the fields of the architecture that nobody took."""
        return [key for key in self.all if key.startswith(f"{self.architecture}.") and key not in self.taken]

    def others(self) -> list[str]:
        """List the fields that are neither the architecture's, nor the tokenizer's, nor describe the file."""
        known = ("general.", "quantize.", "split.", "tokenizer.", f"{self.architecture}.")
        return [key for key in self.all if not key.startswith(known)]


def model_config(fields: Fields, rows: Rows, tied: bool, factors: np.ndarray | None) -> dict[str, Any]:
    """Build the fields of config.json.

    Args:
        fields: The fields of the file.
        rows: The number of rows of each matrix, by its name in the file.
        tied: Whether the head is the embedding.
        factors: The factors of rotary frequencies that the file holds, if it does.

    Raises:
        FormatError: for fields that are missing or impossible, and for a model that transformers does not have.
    """
    return _BUILDERS[fields.architecture](fields, rows, tied, factors) | {
        "model_type": ARCHITECTURES[fields.architecture].model_type
    }


def _decoder(fields: Fields, rows: Rows, tied: bool, factors: np.ndarray | None, name: str) -> dict[str, Any]:
    width, heads = fields.number("embedding_length"), fields.number("attention.head_count")
    size = fields.number("attention.key_length", width // heads)
    if fields.number("attention.value_length", size) != size or fields.number("rope.dimension_count", size) != size:
        raise FormatError(f"{fields.where}: its heads have parts that are not rotated, or values of another length")
    vocabulary = rows[EMBEDDING]
    fields.number("vocab_size", vocabulary)
    found = {
        "architectures": [name],
        "hidden_size": width,
        "intermediate_size": fields.number("feed_forward_length"),
        "num_hidden_layers": fields.number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.number("attention.head_count_kv", heads),
        "head_dim": size,
        "vocab_size": vocabulary,
        "max_position_embeddings": fields.number("context_length"),
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon", whole=False),
        "tie_word_embeddings": tied,
        "dtype": "float32",
    }
    rope = {"rope_type": "default", "rope_theta": fields.number("rope.freq_base", _DEFAULT_BASE, whole=False)}
    return found | {"rope_parameters": rope | _scaling(fields, factors, size, rope["rope_theta"])}


def _scaling(fields: Fields, factors: np.ndarray | None, size: int, base: float) -> dict[str, Any]:
    kind = fields.take("rope.scaling.type", str) or "linear"
    if factors is not None:
        factor = float(factors.max(initial=1))
        said = {"rope_type": "llama3", "factor": factor} | _LLAMA3
        if factors.shape != (size // 2,) or not np.allclose(factors, _llama3_factors(size, base, factor), rtol=1e-5):
            raise FormatError(
                f"{fields.where}: rope_freqs.weight holds other factors than Llama 3's rule gives, and config.json has "
                "no place for them"
            )
        return said
    if kind == "none":
        return {}
    if kind == "linear":  # as llama.cpp reads them: older files have another name, and neither 0 nor 1 scales
        older = fields.number("rope.scale_linear", 1.0, whole=False)
        factor = fields.number("rope.scaling.factor", older, whole=False)
        return {} if factor in (0, 1) else {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return {
            "rope_type": "yarn",
            "factor": fields.number("rope.scaling.factor", whole=False),
            "original_max_position_embeddings": fields.number("rope.scaling.original_context_length"),
        }
    raise FormatError(f"{fields.where}: rope.scaling.type is {kind[:40]!r}; wanted none, linear or yarn")


def _llama3_factors(size: int, base: float, factor: float) -> np.ndarray:
    """Compute what the frequencies are divided by (github.com/meta-llama/llama-models, models/llama3/model.py)."""
    lengths = 2 * np.pi * base ** (np.arange(0, size, 2) / size)
    low, high, whole = _LLAMA3.values()
    smooth = np.clip((whole / lengths - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _llama(fields: Fields, rows: Rows, tied: bool, factors: np.ndarray | None) -> dict[str, Any]:
    biases = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    return _decoder(fields, rows, tied, factors, "LlamaForCausalLM") | biases


def _qwen2(fields: Fields, rows: Rows, tied: bool, factors: np.ndarray | None) -> dict[str, Any]:
    found = _decoder(fields, rows, tied, factors, "Qwen2ForCausalLM")
    return found | {"hidden_act": "silu", "use_sliding_window": False}


def _qwen3(fields: Fields, rows: Rows, tied: bool, factors: np.ndarray | None) -> dict[str, Any]:
    found = _decoder(fields, rows, tied, factors, "Qwen3ForCausalLM")
    return found | {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False}


def _gemma3(fields: Fields, rows: Rows, tied: bool, factors: np.ndarray | None) -> dict[str, Any]:
    found = _decoder(fields, rows, tied, factors, "Gemma3ForCausalLM")
    layers, rope = found["num_hidden_layers"], found["rope_parameters"]
    local = fields.number("rope.freq_base_swa", _GEMMA_LOCAL_BASE, whole=False)
    # The largest model alone divides by the square root of another number than the size of a head.
    scalar = found["hidden_size"] // found["num_attention_heads"] if layers == _GEMMA_27B else found["head_dim"]
    kinds = ["full_attention" if i % _GEMMA_PATTERN == 0 else "sliding_attention" for i in range(1, layers + 1)]
    return found | {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "query_pre_attn_scalar": scalar,
        "sliding_window": fields.number("attention.sliding_window"),
        "layer_types": kinds,
        "rope_parameters": {
            "full_attention": rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
    }


def _bert(fields: Fields, rows: Rows, tied: bool, factors: np.ndarray | None) -> dict[str, Any]:
    if fields.take("attention.causal", bool):
        raise FormatError(f"{fields.where}: attention.causal is true; a BERT sees the whole text")
    length = fields.number("context_length")
    if (held := rows.get("position_embd.weight", length)) != length:
        raise FormatError(f"{fields.where}: context_length is {length}, and position_embd.weight has {held} rows")
    return {
        "architectures": ["BertModel"],
        "hidden_size": fields.number("embedding_length"),
        "intermediate_size": fields.number("feed_forward_length"),
        "num_hidden_layers": fields.number("block_count"),
        "num_attention_heads": fields.number("attention.head_count"),
        "vocab_size": rows[EMBEDDING],
        "max_position_embeddings": length,
        "type_vocab_size": rows.get("token_types.weight", 2),
        "layer_norm_eps": fields.number("attention.layer_norm_epsilon", whole=False),
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
        "dtype": "float32",
    }


def _nomic_bert(fields: Fields, rows: Rows, tied: bool, factors: np.ndarray | None) -> dict[str, Any]:
    found = _bert(fields, rows, tied, factors)
    del found["position_embedding_type"]
    theta = fields.number("rope.freq_base", _DEFAULT_BASE, whole=False)
    return found | {
        "architectures": ["NomicBertModel"],
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    }


_BUILDERS: Mapping[str, Callable[[Fields, Rows, bool, np.ndarray | None], dict[str, Any]]] = MappingProxyType(
    {
        "llama": _llama, "qwen2": _qwen2, "qwen3": _qwen3, "gemma3": _gemma3, "bert": _bert, "nomic-bert": _nomic_bert,
    }
)  # fmt: skip
