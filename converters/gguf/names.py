"""Hugging Face's names of a model's tensors, by architecture, and what llama.cpp's converter did to their values.

Source: github.com/ggml-org/llama.cpp, convert_hf_to_gguf.py and gguf-py/gguf/tensor_mapping.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from aq_jax.errors import FormatError

Change = Literal["", "query", "key", "plus_one"]
"""What was done to the values: rows of queries or of keys were permuted, as rotary embeddings of pairs want them; one
was added, which the model adds to its norms' gains."""


@dataclass(frozen=True)
class Architecture:
    """The names of a model's tensors.

    Args:
        model_type: Hugging Face's name of the architecture.
        outside: Names outside the layers -> their names in Hugging Face's checkpoints.
        layer: The names of a layer's parts, after `blk.N.`, and in Hugging Face's checkpoints, after `prefix`.
        prefix: What stands before the number of a layer there.
        permuted: Whether the rows of queries and keys were permuted.
        plus_one: Whether one was added to the gains of norms.
        tied: The names that share the embedding's values, where the file has no tensor `output.weight`.
    """

    model_type: str
    outside: Mapping[str, str]
    layer: Mapping[str, str]
    prefix: str
    permuted: bool = False
    plus_one: bool = False
    tied: Mapping[str, str] = field(default_factory=dict)

    def find(self, name: str, where: object) -> tuple[str, Change]:
        """Find a tensor's name in Hugging Face's checkpoints, and what was done to its values.

        Raises:
            FormatError: for a tensor that the architecture does not have, naming it.

        >>> ARCHITECTURES["llama"].find("blk.3.attn_q.weight", "m.gguf")
        ('model.layers.3.self_attn.q_proj.weight', 'query')
        """
        stem, _, leaf = name.rpartition(".")
        layer = re.fullmatch(r"blk\.(\d{1,5})\.(\w+)", stem)
        part = layer[2] if layer else stem
        found = self.layer.get(part) if layer else self.outside.get(stem)
        if found is None or leaf not in ("weight", "bias"):
            raise FormatError(f"{where}: holds {name}, which Hugging Face's {self.model_type} does not have")
        change: Change = ""
        if self.permuted and part in ("attn_q", "attn_k"):
            change = "query" if part == "attn_q" else "key"
        elif self.plus_one and part.endswith("norm"):
            change = "plus_one"
        return f"{f'{self.prefix}.{layer[1]}.' if layer else ''}{found}.{leaf}", change


_DECODER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_DECODER_LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
_TIED = {"lm_head.weight": "model.embed_tokens.weight"}
_BERT_LAYER = {
    "attn_q": "attention.self.query", "attn_k": "attention.self.key", "attn_v": "attention.self.value",
    "attn_output": "attention.output.dense", "attn_output_norm": "attention.output.LayerNorm",
    "ffn_up": "intermediate.dense", "ffn_down": "output.dense", "layer_output_norm": "output.LayerNorm",
}  # fmt: skip
_NOMIC_LAYER = {
    "attn_qkv": "attn.Wqkv", "attn_output": "attn.out_proj", "attn_output_norm": "norm1", "ffn_up": "mlp.fc11",
    "ffn_gate": "mlp.fc12", "ffn_down": "mlp.fc2", "layer_output_norm": "norm2",
}  # fmt: skip
_EMBEDDINGS = {
    "token_embd": "embeddings.word_embeddings", "token_types": "embeddings.token_type_embeddings",
    "position_embd": "embeddings.position_embeddings",
}  # fmt: skip

_GEMMA_LAYER = _DECODER_LAYER | _HEAD_NORMS | _GEMMA_NORMS
_BERT, _NOMIC = _EMBEDDINGS | {"token_embd_norm": "embeddings.LayerNorm"}, _EMBEDDINGS | {"token_embd_norm": "emb_ln"}

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType({
    "llama": Architecture("llama", _DECODER, _DECODER_LAYER, "model.layers", permuted=True, tied=_TIED),
    "qwen2": Architecture("qwen2", _DECODER, _DECODER_LAYER, "model.layers", tied=_TIED),
    "qwen3": Architecture("qwen3", _DECODER, _DECODER_LAYER | _HEAD_NORMS, "model.layers", tied=_TIED),
    "gemma3": Architecture("gemma3_text", _DECODER, _GEMMA_LAYER, "model.layers", plus_one=True, tied=_TIED),
    "bert": Architecture("bert", _BERT, _BERT_LAYER, "encoder.layer"),
    "nomic-bert": Architecture("nomic_bert", _NOMIC, _NOMIC_LAYER, "encoder.layers"),
})  # fmt: skip
"""The architectures by the name that a file has in `general.architecture`."""
