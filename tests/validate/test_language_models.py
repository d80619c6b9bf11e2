"""A language model is judged by windows as transformers' logits judge it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from aq_jax.converters import huggingface
from aq_jax.validate.config import Case, ValidationConfig
from aq_jax.validate.run import validate

VOCAB, WINDOW = 120, 24
CONFIG = """
source = "model"
output = "m.parquet"
[quantization]
quant_type = "int3"
group_size = 16
symmetric = false
[[override]]
pattern = "embed_tokens"
quant_type = "int8"
"""


@pytest.mark.slow  # importing torch and transformers takes longer than all other tests here
def test_windows_are_judged_as_by_transformers_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
        initializer_range=0.3,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained("model")
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save("model/tokenizer.json")
    words = np.random.default_rng(0).integers(3, VOCAB, (900, 5))
    Path("book.txt").write_text("\n".join(" ".join(f"w{i}" for i in line) for line in words))
    Path("int3.toml").write_text(CONFIG)
    asked = ValidationConfig(
        (Case("int3", "int3.toml", activations="float32"),),
        text="book.txt",
        joined=True,
        max_tokens=WINDOW,
        sentences=50,
    )
    report = validate(asked)
    found = report["cases"][0]["outputs"]
    assert found["tokens"] == 50 * (WINDOW - 1)
    assert "Judged on 50 windows of 24 tokens of book.txt" in Path("build/validation/report.md").read_text()

    lines = [" ".join(f"w{i}" for i in line) for line in words]
    pieces, piece = [], []
    for line in lines:
        piece.append(line)
        if sum(map(len, piece)) >= 5 * WINDOW:
            pieces.append("\n".join(piece))
            piece = []
    drawn = [pieces[i] for i in np.random.default_rng(0).permutation(len(pieces))[:50]]
    ids = torch.tensor([[int(word[1:]) for word in text.split()][:WINDOW] for text in drawn])
    huggingface.from_table("build/validation/int3.parquet", "back")
    logits = []
    for folder in ("model", "back"):
        model = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            logits.append(model(ids).logits[:, :-1].double().log_softmax(-1).numpy())
    p, q = logits
    kl = (np.exp(p) * (p - q)).sum(-1).mean(1)
    loss = [-np.take_along_axis(each, ids[:, 1:, None].numpy(), 2)[..., 0].mean(1) for each in (p, q)]
    same = (p.argmax(-1) == q.argmax(-1)).mean(1)
    assert kl.mean() > 0.01

    def error(values: np.ndarray) -> float:
        return float(values.std(ddof=1) / len(values) ** 0.5)

    perplexity = [float(np.exp(each.mean())) for each in loss]
    for name, wanted in (
        ("kl.mean", kl.mean()), ("kl.standard_error", error(kl)), ("same_top.rate", same.mean()),
        ("same_top.standard_error", error(same)), ("perplexity.float", perplexity[0]),
        ("perplexity.quantized", perplexity[1]), ("perplexity.standard_error", perplexity[1] * error(loss[1])),
        ("perplexity.ratio", perplexity[1] / perplexity[0]),
        ("perplexity.ratio_standard_error", perplexity[1] / perplexity[0] * error(loss[1] - loss[0])),
    ):  # fmt: skip
        outer, inner = name.split(".")
        assert found[outer][inner] == pytest.approx(wanted, rel=2e-3), name
    assert json.loads(Path("build/validation/report.json").read_text()) == report
