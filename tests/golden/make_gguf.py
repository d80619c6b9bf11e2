"""Writes tests/golden/gguf: a small Llama whose bytes gguf-py packed, and digests of the values that it makes of them.

It was run once, with gguf 0.19.0, and its files are committed: `PYTHONPATH=FOLDER python tests/golden/make_gguf.py`,
FOLDER being where `pip install --no-deps --target FOLDER gguf` put it. gguf-py quantizes the types without `_K`; the
blocks of the others are random, and only dequantized by it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import quants

FOLDER = Path(__file__).parent / "gguf"
WIDTH, HEADS, KV_HEADS, SIZE, INNER = 256, 4, 2, 4, 32
# The offsets of halves in a block whose bytes are random otherwise.
HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
LAYERS = (
    {"attn_q": "Q4_K", "attn_k": "Q5_K", "attn_v": "Q6_K", "ffn_gate": "Q2_K", "ffn_up": "Q3_K", "ffn_down": "Q4_0"},
    {"attn_q": "Q8_0", "attn_k": "Q4_1", "attn_v": "Q5_0", "ffn_gate": "Q5_1", "ffn_up": "F16", "ffn_down": "Q4_1"},
)
SHAPES = {
    "attn_norm": (WIDTH,), "attn_q": (HEADS * SIZE, WIDTH), "attn_k": (KV_HEADS * SIZE, WIDTH),
    "attn_v": (KV_HEADS * SIZE, WIDTH), "attn_output": (WIDTH, HEADS * SIZE), "ffn_norm": (WIDTH,),
    "ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH), "ffn_down": (WIDTH, INNER),
}  # fmt: skip
TOKENS = ["<unk>", "<s>", "</s>", "a", "b", "c", "d", "Ġ", "ab", "Ġab", "cd", "abcd"]
MERGES = ["a b", "Ġ ab", "c d", "ab cd"]


def packed(generator: np.random.Generator, shape: tuple[int, ...], kind: Type) -> np.ndarray:
    """Values that gguf-py packed, or random blocks of a type that it does not pack."""
    values = (generator.normal(size=shape) * 0.1).astype(np.float32)
    if kind.name not in HALVES:
        return values if kind == Type.F32 else quants.quantize(values, kind)
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = generator.integers(0, 256, (values.size // elements, size), np.uint8)
    for at in HALVES[kind.name]:
        blocks[:, at : at + 2] = (generator.normal(size=(len(blocks), 1)) * 0.01).astype(np.float16).view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def main() -> None:
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(FOLDER / "llama.gguf", "llama")
    writer.add_name("a small Llama")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(len(LAYERS))
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(SIZE)
    writer.add_value_length(SIZE)
    writer.add_rope_dimension_count(SIZE)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([2, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{{ messages }}")
    values: dict[str, np.ndarray] = {}

    def add(name: str, shape: tuple[int, ...], kind: Type) -> None:
        data = packed(generator, shape, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
        values[name] = quants.dequantize(data, kind).reshape(shape)

    add("token_embd.weight", (len(TOKENS), WIDTH), Type.Q8_0)
    for number, types in enumerate(LAYERS):
        for part, shape in SHAPES.items():
            default = Type.BF16 if part == "attn_output" else Type.F32
            add(f"blk.{number}.{part}.weight", shape, Type[types[part]] if part in types else default)
    add("output_norm.weight", (WIDTH,), Type.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    digests = {name: hashlib.sha256(value.tobytes()).hexdigest() for name, value in values.items()}
    (FOLDER / "expected.json").write_text(json.dumps(digests, indent=1) + "\n")


if __name__ == "__main__":
    main()
