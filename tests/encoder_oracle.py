"""What encoders beside BERT do, once more: one text at a time, without padding, in plain NumPy, float64.

Nothing here imports aq_jax. Source: the papers of the families, and the names that Hugging Face gives the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_erf = np.vectorize(math.erf, otypes=[float])
# By model_type: a layer's names of queries, keys and values (or all in one), output, norm, up (or gate and up), down,
# norm.
LAYERS: Mapping[str, tuple[Any, ...]] = {
    "roberta": (
        "encoder.layer.{}.", [f"attention.self.{name}" for name in ("query", "key", "value")], "attention.output.dense",
        "attention.output.LayerNorm", ["intermediate.dense"], "output.dense", "output.LayerNorm",
    ),
    "distilbert": (
        "transformer.layer.{}.", [f"attention.{name}_lin" for name in "qkv"], "attention.out_lin", "sa_layer_norm",
        ["ffn.lin1"], "ffn.lin2", "output_layer_norm",
    ),
    "mpnet": (
        "encoder.layer.{}.", [f"attention.attn.{name}" for name in "qkv"], "attention.attn.o", "attention.LayerNorm",
        ["intermediate.dense"], "output.dense", "output.LayerNorm",
    ),
    "modernbert": ("layers.{}.", ["attn.Wqkv"], "attn.Wo", "attn_norm", ["mlp.Wi"], "mlp.Wo", "mlp_norm"),
    "nomic_bert": (
        "encoder.layers.{}.", ["attn.Wqkv"], "attn.out_proj", "norm1", ["mlp.fc12", "mlp.fc11"], "mlp.fc2", "norm2",
    ),
}  # fmt: skip
EMBEDDINGS = {
    "roberta": ("embeddings.word_embeddings", "embeddings.LayerNorm"),
    "modernbert": ("embeddings.tok_embeddings", "embeddings.norm"),
    "nomic_bert": ("embeddings.word_embeddings", "emb_ln"),
}
WIDTH, INNER, HEADS, DEPTH, POSITIONS, EPSILON = 32, 48, 4, 3, 96, 1e-3


def weights(kind: str, vocabulary: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights under Hugging Face's names, of sizes at which hidden states depend on every one of them."""
    rng = np.random.default_rng(seed)
    table, first = EMBEDDINGS.get(kind, EMBEDDINGS["roberta"])
    rotary = kind in ("modernbert", "nomic_bert")
    out: dict[str, np.ndarray] = {f"{table}.weight": rng.normal(size=(vocabulary, WIDTH))}
    if not rotary:
        out["embeddings.position_embeddings.weight"] = rng.normal(size=(POSITIONS, WIDTH)) * 0.3
    if kind in ("roberta", "nomic_bert"):
        out["embeddings.token_type_embeddings.weight"] = rng.normal(size=(2, WIDTH)) * 0.3
    if kind == "mpnet":
        out["encoder.relative_attention_bias.weight"] = rng.normal(size=(32, HEADS))

    def linear(name: str, outputs: int, inputs: int) -> None:
        out[f"{name}.weight"] = rng.normal(size=(outputs, inputs)) * 1.5 / math.sqrt(inputs)
        if not rotary:
            out[f"{name}.bias"] = rng.normal(size=outputs) * 0.3

    def norm(name: str) -> None:
        out[f"{name}.weight"] = rng.normal(1, 0.2, size=WIDTH)
        if kind != "modernbert":
            out[f"{name}.bias"] = rng.normal(size=WIDTH) * 0.2

    norm(first)
    start, qkv, mixed, one, up, down, two = LAYERS[kind]
    for i in range(DEPTH):
        at = start.format(i)
        for name in qkv:
            linear(at + name, 3 * WIDTH // len(qkv), WIDTH)
        linear(at + mixed, WIDTH, WIDTH)
        for name in up:
            linear(at + name, 2 * INNER if kind == "modernbert" else INNER, WIDTH)
        linear(at + down, WIDTH, INNER)
        for name in (one, two):
            if kind != "modernbert" or i or name == two:
                norm(at + name)
    if kind == "modernbert":
        norm("final_norm")
    return {name: array.astype(np.float32) for name, array in out.items()}


def hidden_states(
    kind: str, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], ids: Sequence[int]
) -> np.ndarray:
    """[tokens, width] of one text."""
    t = {name: np.asarray(array, np.float64) for name, array in tensors.items()}
    epsilon = 1e-12 if kind == "distilbert" else EPSILON
    count, size, at = len(ids), WIDTH // HEADS, np.arange(len(ids))

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ t[f"{name}.weight"].T + t.get(f"{name}.bias", 0.0)

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
        return scaled * t[f"{name}.weight"] + t.get(f"{name}.bias", 0.0)

    def turn(x: np.ndarray, theta: float) -> np.ndarray:
        pairs = (x[..., : size // 2] + 1j * x[..., size // 2 :]) * np.exp(
            1j * at[:, None] * theta ** (-2 * np.arange(size // 2) / size)
        )[:, None]
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    def act(x: np.ndarray) -> np.ndarray:
        return x / (1 + np.exp(-x)) if kind == "nomic_bert" else x * 0.5 * (1 + _erf(x / math.sqrt(2)))

    def bias_of(distance: int) -> np.ndarray:
        near = abs(distance)
        if near >= 8:
            near = min(15, 8 + int(math.log(near / 8) / math.log(16) * 8 + 1e-6))
        return t["encoder.relative_attention_bias.weight"][near + 16 * (distance > 0)]

    table, first = EMBEDDINGS.get(kind, EMBEDDINGS["roberta"])
    x = t[f"{table}.weight"][list(ids)]
    if "embeddings.position_embeddings.weight" in t:
        x = x + t["embeddings.position_embeddings.weight"][at + (0 if kind == "distilbert" else 2)]
    if "embeddings.token_type_embeddings.weight" in t:
        x = x + t["embeddings.token_type_embeddings.weight"][0]
    x = norm(first, x)
    start, qkv, mixed, one, up, down, two = LAYERS[kind]
    for i in range(DEPTH):
        layer = start.format(i)
        y = norm(layer + one, x) if kind == "modernbert" and i else x
        parts = np.split(linear(layer + qkv[0], y), 3, -1) if len(qkv) == 1 else [linear(layer + n, y) for n in qkv]
        q, k, v = (part.reshape(count, HEADS, size) for part in parts)
        if "thetas" in config:
            q, k = turn(q, config["thetas"][i]), turn(k, config["thetas"][i])
        scores = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(size)
        if kind == "mpnet":
            scores += np.array([[bias_of(j - i) for j in at] for i in at]).transpose(2, 0, 1)
        near = np.abs(at[:, None] - at) <= config.get("reaches", [count] * DEPTH)[i]
        shares = np.exp(scores) * near
        y = np.einsum("hqk,khd->qhd", shares / shares.sum(-1, keepdims=True), v).reshape(count, WIDTH)
        x = x + linear(layer + mixed, y)
        x = x if kind == "modernbert" else norm(layer + one, x)
        y = norm(layer + two, x) if kind == "modernbert" else x
        inner = (
            np.split(linear(layer + up[0], y), 2, -1) if kind == "modernbert" else [linear(layer + n, y) for n in up]
        )
        x = x + linear(layer + down, act(inner[0]) * (inner[1] if len(inner) == 2 else 1))
        x = x if kind == "modernbert" else norm(layer + two, x)
    return norm("final_norm", x) if kind == "modernbert" else x
