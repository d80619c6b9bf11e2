"""What a decoder does, once more: one text at a time, without a cache, in plain NumPy, float64.

Nothing here imports aq_jax. Source: the papers of the families, and what transformers makes of the fields of their
config.json; a case gives all fields that count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def weights(kind: str, config: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights under Hugging Face's names, of sizes at which logits depend on every one of them."""
    rng = np.random.default_rng(seed)
    width, inner, vocabulary = (config[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
    size = config.get("head_dim", width // config["num_attention_heads"])
    queries, keys = size * config["num_attention_heads"], size * config["num_key_value_heads"]
    gain = 0.0 if kind.startswith("gemma") else 1.0
    out: dict[str, np.ndarray] = {"model.embed_tokens.weight": rng.normal(size=(vocabulary, width))}
    if not config["tie_word_embeddings"]:
        out["lm_head.weight"] = rng.normal(size=(vocabulary, width)) / math.sqrt(width)

    def linear(name: str, outputs: int, inputs: int, bias: bool) -> None:
        out[f"{name}.weight"] = rng.normal(size=(outputs, inputs)) * 1.5 / math.sqrt(inputs)
        if bias:
            out[f"{name}.bias"] = rng.normal(size=outputs) * 0.3

    def norm(name: str, length: int = width) -> None:
        out[f"{name}.weight"] = rng.normal(gain, 0.2, size=length)

    norm("model.norm")
    for i in range(config["num_hidden_layers"]):
        at, bias = f"model.layers.{i}", config.get("attention_bias", False)
        if kind == "phi3":
            linear(f"{at}.self_attn.qkv_proj", queries + 2 * keys, width, False)
            linear(f"{at}.mlp.gate_up_proj", 2 * inner, width, False)
        else:
            for name, outputs in (("q", queries), ("k", keys), ("v", keys)):
                linear(f"{at}.self_attn.{name}_proj", outputs, width, bias or kind == "qwen2")
            for name in ("gate", "up"):
                linear(f"{at}.mlp.{name}_proj", inner, width, config.get("mlp_bias", False))
        linear(f"{at}.self_attn.o_proj", width, queries, bias)
        linear(f"{at}.mlp.down_proj", width, inner, config.get("mlp_bias", False))
        if kind in ("qwen3", "gemma3_text") or kind.startswith("olmo"):
            whole = kind.startswith("olmo")
            norm(f"{at}.self_attn.q_norm", queries if whole else size)
            norm(f"{at}.self_attn.k_norm", keys if whole else size)
        for name in norms(kind).values():
            norm(f"{at}.{name}")
    return {name: array.astype(np.float32) for name, array in out.items()}


def norms(kind: str) -> dict[str, str]:
    """The names of a layer's norms, by what they come before or after."""
    if kind.startswith("olmo"):
        return {"after attention": "post_attention_layernorm", "after mlp": "post_feedforward_layernorm"}
    if kind in ("gemma2", "gemma3_text"):
        both = {"attention": "input_layernorm", "after attention": "post_attention_layernorm"}
        return both | {"mlp": "pre_feedforward_layernorm", "after mlp": "post_feedforward_layernorm"}
    return {"attention": "input_layernorm", "mlp": "post_attention_layernorm"}


def logits(kind: str, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], ids: Sequence[int]) -> np.ndarray:
    """[tokens, vocabulary] of one text."""
    t = {name: np.asarray(array, np.float64) for name, array in tensors.items()}
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    gemma, width = kind.startswith("gemma"), config["hidden_size"]
    size = config.get("head_dim", width // heads)
    count, at = len(ids), np.arange(len(ids))

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ t[f"{name}.weight"].T + t.get(f"{name}.bias", 0.0)

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        gain = t[f"{name}.weight"] + (1 if gemma else 0)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"]) * gain

    def turn(x: np.ndarray, theta: float) -> np.ndarray:
        turned = int(size * config.get("partial_rotary_factor", 1.0))
        pairs = (x[..., : turned // 2] + 1j * x[..., turned // 2 : turned]).astype(complex)
        angles = at[:, None] * theta ** (-2 * np.arange(turned // 2) / turned)
        pairs = pairs * np.exp(1j * angles)[:, None]
        return np.concatenate([pairs.real, pairs.imag, x[..., turned:]], axis=-1)

    def act(x: np.ndarray) -> np.ndarray:
        inside = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        return x * (1 + np.tanh(inside)) / 2 if gemma else x / (1 + np.exp(-x))

    def bounded(x: np.ndarray, cap: float | None) -> np.ndarray:
        return cap * np.tanh(x / cap) if cap else x

    def after(part: str, layer: str, x: np.ndarray) -> np.ndarray:
        name = norms(kind).get(f"after {part}")
        return norm(f"{layer}.{name}", x) if name else x

    def before(part: str, layer: str, x: np.ndarray) -> np.ndarray:
        name = norms(kind).get(part)
        return norm(f"{layer}.{name}", x) if name else x

    scale = config.get("attention_multiplier", config.get("query_pre_attn_scalar", size) ** -0.5)
    x = t["model.embed_tokens.weight"][list(ids)] * (
        math.sqrt(width) if gemma else config.get("embedding_multiplier", 1)
    )
    for i in range(config["num_hidden_layers"]):
        layer, window, theta = f"model.layers.{i}", config["windows"][i], config["thetas"][i]
        y = before("attention", layer, x)
        if kind == "phi3":
            q, k, v = np.split(linear(f"{layer}.self_attn.qkv_proj", y), [heads * size, (heads + groups) * size], -1)
        else:
            q, k, v = (linear(f"{layer}.self_attn.{name}_proj", y) for name in "qkv")
        if kind.startswith("olmo"):
            q, k = norm(f"{layer}.self_attn.q_norm", q), norm(f"{layer}.self_attn.k_norm", k)
        q, k, v = (part.reshape(count, -1, size) for part in (q, k, v))
        if kind in ("qwen3", "gemma3_text"):
            q, k = norm(f"{layer}.self_attn.q_norm", q), norm(f"{layer}.self_attn.k_norm", k)
        if theta:
            q, k = turn(q, theta), turn(k, theta)
        mixed = np.zeros((count, heads, size))
        seen = (at[:, None] >= at) & (at[:, None] - at < (window or count))
        for head in range(heads):
            of = head // (heads // groups)
            scores = bounded(scale * q[:, head] @ k[:, of].T, config.get("attn_logit_softcapping"))
            shares = np.exp(scores) * seen
            mixed[:, head] = shares / shares.sum(1, keepdims=True) @ v[:, of]
        y = linear(f"{layer}.self_attn.o_proj", mixed.reshape(count, -1))
        x = x + config.get("residual_multiplier", 1) * after("attention", layer, y)
        y = before("mlp", layer, x)
        if kind == "phi3":
            gate, up = np.split(linear(f"{layer}.mlp.gate_up_proj", y), 2, axis=-1)
        else:
            gate, up = linear(f"{layer}.mlp.gate_proj", y), linear(f"{layer}.mlp.up_proj", y)
        y = linear(f"{layer}.mlp.down_proj", act(gate) * up)
        x = x + config.get("residual_multiplier", 1) * after("mlp", layer, y)
    head = t["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    found = norm("model.norm", x) @ head.T / config.get("logits_scaling", 1)
    return bounded(found, config.get("final_logit_softcapping"))
