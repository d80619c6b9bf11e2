"""Each architecture's tensors, config and tokenizer come out as they went in: names and shapes are Hugging Face's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bert_oracle
import gguf_file
import numpy as np
import pytest
from gguf_file import F32

import aq_jax as aq
from aq_jax.config import ConversionConfig

# A tensor a line: llama.cpp's name, Hugging Face's name, the shape.
DECODER = """
token_embd.weight               model.embed_tokens.weight                              10 8
blk.0.attn_norm.weight          model.layers.0.input_layernorm.weight                  8
blk.0.ffn_norm.weight           model.layers.0.post_attention_layernorm.weight         8
blk.0.ffn_gate.weight           model.layers.0.mlp.gate_proj.weight                    6 8
blk.0.ffn_up.weight             model.layers.0.mlp.up_proj.weight                      6 8
blk.0.ffn_down.weight           model.layers.0.mlp.down_proj.weight                    8 6
output_norm.weight              model.norm.weight                                      8
"""
QWEN2 = f"""{DECODER}
blk.0.attn_q.weight             model.layers.0.self_attn.q_proj.weight                 8 8
blk.0.attn_q.bias               model.layers.0.self_attn.q_proj.bias                   8
blk.0.attn_k.weight             model.layers.0.self_attn.k_proj.weight                 4 8
blk.0.attn_k.bias               model.layers.0.self_attn.k_proj.bias                   4
blk.0.attn_v.weight             model.layers.0.self_attn.v_proj.weight                 4 8
blk.0.attn_v.bias               model.layers.0.self_attn.v_proj.bias                   4
blk.0.attn_output.weight        model.layers.0.self_attn.o_proj.weight                 8 8
"""
QWEN3 = f"""{DECODER}
blk.0.attn_q.weight             model.layers.0.self_attn.q_proj.weight                 12 8
blk.0.attn_k.weight             model.layers.0.self_attn.k_proj.weight                 6 8
blk.0.attn_v.weight             model.layers.0.self_attn.v_proj.weight                 6 8
blk.0.attn_output.weight        model.layers.0.self_attn.o_proj.weight                 8 12
blk.0.attn_q_norm.weight        model.layers.0.self_attn.q_norm.weight                 6
blk.0.attn_k_norm.weight        model.layers.0.self_attn.k_norm.weight                 6
output.weight                   lm_head.weight                                         10 8
"""
BERT = """
token_embd.weight               embeddings.word_embeddings.weight                      100 8
token_types.weight              embeddings.token_type_embeddings.weight                2 8
position_embd.weight            embeddings.position_embeddings.weight                  16 8
token_embd_norm.weight          embeddings.LayerNorm.weight                            8
token_embd_norm.bias            embeddings.LayerNorm.bias                              8
blk.0.attn_q.weight             encoder.layer.0.attention.self.query.weight            8 8
blk.0.attn_q.bias               encoder.layer.0.attention.self.query.bias              8
blk.0.attn_k.weight             encoder.layer.0.attention.self.key.weight              8 8
blk.0.attn_k.bias               encoder.layer.0.attention.self.key.bias                8
blk.0.attn_v.weight             encoder.layer.0.attention.self.value.weight            8 8
blk.0.attn_v.bias               encoder.layer.0.attention.self.value.bias              8
blk.0.attn_output.weight        encoder.layer.0.attention.output.dense.weight          8 8
blk.0.attn_output.bias          encoder.layer.0.attention.output.dense.bias            8
blk.0.attn_output_norm.weight   encoder.layer.0.attention.output.LayerNorm.weight      8
blk.0.attn_output_norm.bias     encoder.layer.0.attention.output.LayerNorm.bias        8
blk.0.ffn_up.weight             encoder.layer.0.intermediate.dense.weight              6 8
blk.0.ffn_up.bias               encoder.layer.0.intermediate.dense.bias                6
blk.0.ffn_down.weight           encoder.layer.0.output.dense.weight                    8 6
blk.0.ffn_down.bias             encoder.layer.0.output.dense.bias                      8
blk.0.layer_output_norm.weight  encoder.layer.0.output.LayerNorm.weight                8
blk.0.layer_output_norm.bias    encoder.layer.0.output.LayerNorm.bias                  8
"""
NOMIC = """
token_embd.weight               embeddings.word_embeddings.weight                      100 8
token_types.weight              embeddings.token_type_embeddings.weight                2 8
token_embd_norm.weight          emb_ln.weight                                          8
token_embd_norm.bias            emb_ln.bias                                            8
blk.0.attn_qkv.weight           encoder.layers.0.attn.Wqkv.weight                      24 8
blk.0.attn_output.weight        encoder.layers.0.attn.out_proj.weight                  8 8
blk.0.attn_output_norm.weight   encoder.layers.0.norm1.weight                          8
blk.0.attn_output_norm.bias     encoder.layers.0.norm1.bias                            8
blk.0.ffn_up.weight             encoder.layers.0.mlp.fc11.weight                       6 8
blk.0.ffn_gate.weight           encoder.layers.0.mlp.fc12.weight                       6 8
blk.0.ffn_down.weight           encoder.layers.0.mlp.fc2.weight                        8 6
blk.0.layer_output_norm.weight  encoder.layers.0.norm2.weight                          8
blk.0.layer_output_norm.bias    encoder.layers.0.norm2.bias                            8
"""
TENSORS = {"qwen2": QWEN2, "qwen3": QWEN3, "bert": BERT, "nomic-bert": NOMIC}
FIELDS: dict[str, dict[str, Any]] = {
    "qwen2": {"attention.head_count_kv": 1, "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 1e6},
    "qwen3": {
        "attention.head_count_kv": 1, "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 1e6,
        "attention.key_length": 6, "attention.value_length": 6,
    },
    "bert": {"attention.layer_norm_epsilon": 1e-12, "attention.causal": False},
    "nomic-bert": {"attention.layer_norm_epsilon": 1e-12, "attention.causal": False, "rope.freq_base": 1000.0},
}  # fmt: skip
COMMON = {
    "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 16,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e6}
QWEN = COMMON | {"vocab_size": 10, "num_key_value_heads": 1, "rms_norm_eps": 1e-6, "rope_parameters": ROPE}
ENCODER = COMMON | {"vocab_size": 100, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "pad_token_id": 0}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": QWEN | {"model_type": "qwen2", "head_dim": 4, "tie_word_embeddings": True, "eos_token_id": 9},
    "qwen3": QWEN | {"model_type": "qwen3", "head_dim": 6, "tie_word_embeddings": False, "attention_bias": False},
    "bert": ENCODER | {"model_type": "bert", "hidden_act": "gelu"},
    "nomic-bert": ENCODER
    | {"model_type": "nomic_bert", "hidden_act": "silu", "rope_parameters": ROPE | {"rope_theta": 1000.0}},
}
TOKENS = ["a", "b", "1", "2", "12", "Ġ", "ab", "Ġab", "<|endoftext|>", "<|im_end|>"]
BYTE_PAIRS = {
    "model": "gpt2", "pre": "qwen2", "tokens": TOKENS, "token_type": [1] * 8 + [3] * 2, "eos_token_id": 9,
    "merges": ["a b", "1 2", "Ġ ab"],
}  # fmt: skip
CASED = [*bert_oracle.VOCAB[:-1], "Cat"]


def word_pieces(tokens: list[str]) -> dict[str, Any]:
    """A WordPiece as llama.cpp's converter writes it: what begins a word has a mark, and what goes on has none."""
    special = len(bert_oracle.SPECIAL)
    marked = [token[2:] if token.startswith("##") else f"▁{token}" for token in tokens[special:]]
    return {
        "model": "bert", "tokens": tokens[:special] + marked, "token_type": [3] * special + [1] * len(marked),
        "padding_token_id": 0, "unknown_token_id": 1, "cls_token_id": 2, "seperator_token_id": 3, "mask_token_id": 4,
    }  # fmt: skip


WORDS = {
    "qwen2": BYTE_PAIRS,
    "qwen3": BYTE_PAIRS,
    "bert": word_pieces(bert_oracle.VOCAB),
    "nomic-bert": word_pieces(CASED),
}


def names(architecture: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The name in Hugging Face, and the shape, by llama.cpp's name."""
    lines = [line.split() for line in TENSORS[architecture].split("\n") if line]
    return {theirs: (ours, tuple(map(int, shape))) for theirs, ours, *shape in lines}


def write(path: Path, architecture: str, values: Mapping[str, np.ndarray], **more: Any) -> None:
    """Write a model whose values have Hugging Face's names, and fields that others lack."""
    said = {"context_length": 16, "embedding_length": 8, "feed_forward_length": 6, "block_count": 1}
    said |= {"attention.head_count": 2} | FIELDS[architecture] | more
    fields = {"general.architecture": architecture} | {f"{architecture}.{key}": value for key, value in said.items()}
    fields |= {f"tokenizer.ggml.{key}": value for key, value in WORDS[architecture].items()}
    tensors = {
        theirs: (values[ours].shape, F32, values[ours].astype("<f4").tobytes())
        for theirs, (ours, _) in names(architecture).items()
    }
    path.write_bytes(gguf_file.whole(fields, tensors))


@pytest.mark.parametrize("architecture", TENSORS)
def test_a_model_comes_out_as_it_went_in(architecture: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    random = np.random.default_rng(0)
    values = {ours: random.normal(size=shape).astype(np.float32) for ours, shape in names(architecture).values()}
    write(tmp_path / "m.gguf", architecture, values)
    done = aq.convert(ConversionConfig(str(tmp_path / "m.gguf"), str(tmp_path / "out" / "m.arrow")))
    assert not done.notes
    found = aq.load(done.path, "numpy")
    if architecture == "qwen2":
        values["lm_head.weight"] = values["model.embed_tokens.weight"]
    assert set(found) == set(values)
    for name, value in values.items():
        assert np.array_equal(np.asarray(found[name]), value), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.items() >= CONFIGS[architecture].items()
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    if architecture.startswith("qwen"):
        assert tokenizer.encode("ab ab12<|im_end|>").ids == [6, 7, 2, 3, 9]
        return
    wanted = bert_oracle.tokenizer()
    wanted.add_special_tokens(bert_oracle.SPECIAL)
    for text in ("the lazy dogs, 12!", "unseen[MASK]", ""):
        assert tokenizer.encode(text).tokens == [
            "[CLS]",
            *wanted.encode(text, add_special_tokens=False).tokens,
            "[SEP]",
        ]
    pair = tokenizer.encode("a cat", "the dog")
    assert (pair.ids, pair.type_ids) == (wanted.encode("a cat", "the dog").ids, [0] * 4 + [1] * 3)
    cat = bert_oracle.VOCAB.index("cat")
    assert tokenizer.encode("Cat cat").ids == [2, cat if architecture == "bert" else 99, cat, 3]
    said = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (said["cls_token"], said["sep_token"], said["pad_token"]) == ("[CLS]", "[SEP]", "[PAD]")


def config_of(folder: Path, architecture: str, values: Mapping[str, np.ndarray], **more: Any) -> dict[str, Any]:
    write(folder / "m.gguf", architecture, values, **more)
    done = aq.convert(ConversionConfig(str(folder / "m.gguf"), str(folder / "out" / "m.arrow")))
    assert not done.notes
    return json.loads((folder / "out" / "config.json").read_text())


@pytest.mark.parametrize(
    ("more", "scaling"),
    [
        ({"rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),  # llama.cpp's default
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),  # of older files
        ({"rope.scaling.type": "linear", "rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}, {}),
        ({"rope.scale_linear": 0.0}, {}),
        ({"rope.scaling.type": "none"}, {}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 8},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
        ),
    ],
)
def test_rotations_are_scaled_as_llama_cpp_does(more: dict[str, Any], scaling: dict[str, Any], tmp_path: Path) -> None:
    values = {ours: np.zeros(shape, np.float32) for ours, shape in names("qwen2").values()}
    assert config_of(tmp_path, "qwen2", values, **more)["rope_parameters"] == ROPE | scaling


def test_the_config_has_the_rows_that_embeddings_have(tmp_path: Path) -> None:
    values = {ours: np.zeros(shape, np.float32) for ours, shape in names("bert").values()}
    values["embeddings.token_type_embeddings.weight"] = np.zeros((1, 8), np.float32)
    assert config_of(tmp_path, "bert", values)["type_vocab_size"] == 1
    values["embeddings.position_embeddings.weight"] = np.zeros((12, 8), np.float32)
    with pytest.raises(aq.FormatError, match=r"context_length is 16, and position_embd\.weight has 12 rows"):
        config_of(tmp_path, "bert", values)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", TENSORS)
def test_transformers_loads_the_same_model(architecture: str, tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    load_file = pytest.importorskip("safetensors.numpy").load_file
    wanted = {key: value for key, value in CONFIGS[architecture].items() if key != "model_type"}
    name = {"qwen2": "Qwen2", "qwen3": "Qwen3", "bert": "Bert", "nomic-bert": "NomicBert"}[architecture]
    decoder = architecture.startswith("qwen")
    kind = getattr(transformers, f"{name}{'ForCausalLM' if decoder else 'Model'}")
    options = {} if decoder else {"add_pooling_layer": False}
    torch.manual_seed(0)
    model = kind(getattr(transformers, f"{name}Config")(**wanted), **options).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight)
    model.save_pretrained(tmp_path / "theirs")
    values = load_file(tmp_path / "theirs" / "model.safetensors")
    assert {key: value.shape for key, value in values.items()} == dict(names(architecture).values())
    write(tmp_path / "m.gguf", architecture, values)
    aq.dequantize_file(tmp_path / "m.gguf", tmp_path / "floats")
    again, info = kind.from_pretrained(tmp_path / "floats", output_loading_info=True, **options)
    assert not any(info.values()), info
    ids = torch.tensor([[2, 27, 28, 29, 3] if not decoder else [6, 7, 2, 3]])
    with torch.no_grad():
        found = model(ids)[0][0]
        assert torch.equal(again.eval()(ids)[0][0], found)
    aq.convert(ConversionConfig(str(tmp_path / "m.gguf"), str(tmp_path / "out" / "m.parquet")))
    ours = aq.load_model(tmp_path / "out" / "m.parquet")
    if decoder:
        said = torch.log_softmax(found[:-1], -1)[range(3), ids[0, 1:]].numpy()
        assert np.allclose(ours.score("ab ab12"), said, atol=1e-4)
    else:
        (embedding,) = ours.encode([" ".join(bert_oracle.VOCAB[27:30])])
        assert np.allclose(embedding, found.mean(0), atol=1e-5)
