"""What a BERT sentence encoder does, once more: one sentence at a time, without padding, in plain NumPy, float64.

Nothing here imports aq_jax. Source: the equations of arXiv:1706.03762 and arXiv:1810.04805, and the names that Hugging
Face gives the weights.
"""

from __future__ import annotations

import json
import math
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

CONFIG: Mapping[str, Any] = {
    "model_type": "bert",
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TEXT = """The quick red cats jumps over a lazy dog and an tall tree. She runs in that house of the small sun, not on the
sea. They are sleeps: it is moon sky mat dogs cat sat."""
WORDS = sorted(set(TEXT.lower().translate(str.maketrans("", "", string.punctuation)).split()))
LETTERS = string.ascii_lowercase
VOCAB = [*SPECIAL, *(word for word in WORDS if len(word) > 1), *LETTERS, *(f"##{c}" for c in LETTERS), *"0123456789"][
    :100
]

_erf = np.vectorize(math.erf, otypes=[float])
ACTS = {
    "gelu": lambda x: x * 0.5 * (1 + _erf(x / math.sqrt(2))),
    "gelu_new": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
}


def weights(config: Mapping[str, Any] = CONFIG, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights under Hugging Face's names, of sizes at which embeddings depend on every one of them."""
    rng = np.random.default_rng(seed)
    width, inner = config["hidden_size"], config["intermediate_size"]
    out: dict[str, np.ndarray] = {}

    def table(name: str, rows: int, size: float) -> None:
        out[f"embeddings.{name}_embeddings.weight"] = rng.normal(size=(rows, width)) * size

    def linear(name: str, outputs: int, inputs: int) -> None:
        out[f"{name}.weight"] = rng.normal(size=(outputs, inputs)) * 1.5 / math.sqrt(inputs)
        out[f"{name}.bias"] = rng.normal(size=outputs) * 0.3

    def norm(name: str) -> None:
        out[f"{name}.weight"] = rng.normal(1, 0.2, size=width)
        out[f"{name}.bias"] = rng.normal(size=width) * 0.2

    table("word", config["vocab_size"], 1)
    table("position", config["max_position_embeddings"], 0.3)  # shared by all sentences, which are to be told apart
    table("token_type", config["type_vocab_size"], 0.3)
    norm("embeddings.LayerNorm")
    for layer in range(config["num_hidden_layers"]):
        at = f"encoder.layer.{layer}"
        for name in ("query", "key", "value"):
            linear(f"{at}.attention.self.{name}", width, width)
        linear(f"{at}.attention.output.dense", width, width)
        norm(f"{at}.attention.output.LayerNorm")
        linear(f"{at}.intermediate.dense", inner, width)
        linear(f"{at}.output.dense", width, inner)
        norm(f"{at}.output.LayerNorm")
    return {name: array.astype(np.float32) for name, array in out.items()}


def hidden_states(tensors: Mapping[str, np.ndarray], ids: Sequence[int], config: Mapping[str, Any]) -> np.ndarray:
    """[tokens, width] of one sentence."""
    t = {name: np.asarray(array, np.float64) for name, array in tensors.items()}

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        variance = (centred**2).mean(-1, keepdims=True)
        return centred / np.sqrt(variance + config["layer_norm_eps"]) * t[f"{name}.weight"] + t[f"{name}.bias"]

    x = t["embeddings.word_embeddings.weight"][list(ids)]
    x = x + t["embeddings.position_embeddings.weight"][: len(ids)] + t["embeddings.token_type_embeddings.weight"][0]
    x = norm("embeddings.LayerNorm", x)
    heads = config["num_attention_heads"]
    size = config["hidden_size"] // heads
    for layer in range(config["num_hidden_layers"]):
        at = f"encoder.layer.{layer}"
        q, k, v = (linear(f"{at}.attention.self.{name}", x) for name in ("query", "key", "value"))
        mixed = np.zeros_like(x)
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            scores = q[:, part] @ k[:, part].T / math.sqrt(size)
            shares = np.exp(scores - scores.max(1, keepdims=True))
            mixed[:, part] = shares / shares.sum(1, keepdims=True) @ v[:, part]
        x = norm(f"{at}.attention.output.LayerNorm", x + linear(f"{at}.attention.output.dense", mixed))
        inner = ACTS[config["hidden_act"]](linear(f"{at}.intermediate.dense", x))
        x = norm(f"{at}.output.LayerNorm", x + linear(f"{at}.output.dense", inner))
    return x


def embed(
    tensors: Mapping[str, np.ndarray],
    sentences: Sequence[Sequence[int]],
    config: Mapping[str, Any] = CONFIG,
    pooling: str = "mean",
    normalize: bool = True,
) -> np.ndarray:
    """[sentences, width] of sentences as ids."""
    out = []
    for ids in sentences:
        hidden = hidden_states(tensors, ids, config)
        pooled = hidden[0] if pooling == "cls" else hidden.mean(0)
        out.append(pooled / np.linalg.norm(pooled) if normalize else pooled)
    return np.stack(out)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def tokenizer() -> Tokenizer:
    """WordPiece over VOCAB: a word that is no entry is spelled in its letters."""
    out = Tokenizer(models.WordPiece({token: i for i, token in enumerate(VOCAB)}, unk_token="[UNK]"))
    out.normalizer = normalizers.BertNormalizer(lowercase=True)
    out.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    out.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return out


def write_json(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def write_side_files(
    folder: Path, config: Mapping[str, Any] = CONFIG, *, pooling: str | None = "mean", normalize: bool = True
) -> None:
    """config.json, tokenizer.json and, unless pooling is None, the files of sentence-transformers."""
    write_json(folder / "config.json", dict(config))
    tokenizer().save(str(folder / "tokenizer.json"))
    if pooling is None:
        return
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": paths[i], "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    write_json(folder / "modules.json", modules)
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
    chosen = {f"pooling_mode_{mode}": mode.partition("_")[0] == pooling and "sqrt" not in mode for mode in modes}
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": config["hidden_size"], **chosen})


def write_source(folder: Path, config: Mapping[str, Any] = CONFIG) -> None:
    """The random weights, and the files beside them."""
    write_side_files(folder, config)
    safetensors.numpy.save_file(weights(config), folder / "model.safetensors")
