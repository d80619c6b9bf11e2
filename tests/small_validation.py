"""Make a small BERT and a small Llama with text, labels and configs to validate them by."""

from __future__ import annotations

from pathlib import Path

import bert_oracle
import numpy as np
import small_llama

import aq_jax as aq

BERT = {**bert_oracle.CONFIG, "num_hidden_layers": 1, "intermediate_size": 32, "max_position_embeddings": 16}
WORDS = [word for word in bert_oracle.WORDS if len(word) > 1]
# What a case's config says, by its name: those of gptq are solved on the text.
CONFIGS = {
    "int8": 'quant_type = "int8"',
    "int2": 'quant_type = "int2"\ngroup_size = 16\nsymmetric = false\nrotate = true',
    "gptq": 'quant_type = "int4"\ngroup_size = 16\nsolver = "gptq"\n[calibration]\ntext = "text.txt"\nsentences = 40',
    "trained": 'quant_type = "int4"\nsolver = "gptq"\n[calibration]\ntext = "text.txt"\n[train]\nsteps = 2',
}


def bert(folder: Path) -> Path:
    """model/, text.txt, labels.tsv, and a TOML file for each of CONFIGS."""
    bert_oracle.write_source(folder / "model", BERT)
    return _write(folder)


def llama(folder: Path) -> Path:
    """The same of a Llama."""
    folder.mkdir()
    aq.dequantize_file(small_llama.make(folder / "made"), folder / "model")
    return _write(folder)


def _write(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    lines = list(dict.fromkeys(" ".join(rng.choice(WORDS, 4)) for _ in range(200)))
    (folder / "text.txt").write_text("\n".join(lines))
    pairs = [(lines[i], lines[i + 1], rng.uniform(0, 5)) for i in range(0, 120, 2)]
    rows = [f"genre\tfile\t2012\t{i}\t{score:.3f}\t{a}\t{b}" for i, (a, b, score) in enumerate(pairs)]
    (folder / "labels.tsv").write_text("\n".join(rows) + "\n")
    for name, text in CONFIGS.items():
        (folder / f"{name}.toml").write_text(f'source = "model"\noutput = "other.parquet"\n[quantization]\n{text}\n')
    return folder
