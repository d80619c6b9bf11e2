"""A checkpoint that another program quantized, all the way: a table that runs, floats that transformers loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import decoder_oracle as oracle
import numpy as np
import pytest
from schemes import write
from tokenizers import Tokenizer, models, pre_tokenizers

import aq_jax as aq
from aq_jax.config import ConversionConfig
from aq_jax.converters.convert import dequantize_file
from aq_jax.core.qtensor import QTensor
from aq_jax.io.loader import WeightLoader

VOCAB, TEXT = 120, [3, 50, 17, 90, 4, 33]
FIELDS = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": VOCAB, "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-3, "tie_word_embeddings": False, "rope_theta": 300.0,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "torch_dtype": "float32",
}  # fmt: skip
LOADED = """
import sys, numpy as np, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation="eager", dtype=torch.float32).eval()
with torch.no_grad():
    np.save(sys.argv[2], model(torch.tensor([[int(i) for i in sys.argv[3].split()]])).logits[0].numpy())
"""


def packed(weight: np.ndarray, name: str) -> dict[str, np.ndarray]:
    """AWQ, by its definition: four bits, a scale and a zero point for 32 inputs, eight outputs a word."""
    outputs, inputs = weight.shape
    groups = weight.reshape(outputs, -1, 32)
    low, high = groups.min(-1), groups.max(-1)
    scales = ((high - low) / 15).astype(np.float16)
    zeros = np.clip(np.rint(-low / scales), 0, 15)
    codes = np.clip(np.rint(groups / scales[..., None]) + zeros[..., None], 0, 15).reshape(outputs, inputs)

    def words(numbers: np.ndarray) -> np.ndarray:
        eights = numbers.T.astype(np.uint32).reshape(-1, outputs // 8, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]]
        return np.bitwise_or.reduce(eights << np.arange(0, 32, 4, dtype=np.uint32), -1).view(np.int32)

    return {f"{name}.qweight": words(codes), f"{name}.qzeros": words(zeros), f"{name}.scales": scales.T}


@pytest.mark.slow
def test_it_runs_and_transformers_loads_what_it_dequantizes_to(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    tensors: dict[str, np.ndarray] = {}
    for name, weight in oracle.weights("qwen3", FIELDS).items():
        quantized = name.endswith("_proj.weight")
        tensors |= packed(weight, name.removesuffix(".weight")) if quantized else {name: weight.astype(np.float32)}
    entry = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
    folder = write(tmp_path / "awq", tensors, FIELDS | {"quantization_config": entry})
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')

    done = aq.convert(ConversionConfig(str(folder), str(tmp_path / "table" / "m.parquet")))
    with WeightLoader(done.path) as loader:
        kinds = [loader.get_quantized(name) for name in loader.get_layer_names() if name.endswith("_proj.weight")]
    assert len(kinds) == 14
    assert all(isinstance(q, QTensor) and q.spec.quant_type == "int4_f16i" for q in kinds)
    found = aq.load_model(done.path).log_probabilities(TEXT)  # type: ignore[union-attr]

    dequantize_file(done.path, tmp_path / "floats")
    assert "quantization_config" not in json.loads((tmp_path / "floats" / "config.json").read_text())
    files, text = (str(tmp_path / "floats"), str(tmp_path / "l.npy")), " ".join(map(str, TEXT))
    command = [sys.executable, "-c", LOADED, *files, text]
    subprocess.run(command, check=True, capture_output=True)
    logits = np.load(tmp_path / "l.npy").astype(np.float64)
    wanted = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(found, wanted[:-1], rtol=0, atol=5e-3)  # the floats are float16
