"""Static embeddings are those of model2vec and sentence-transformers, and what is not theirs is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import aq_jax as aq
from aq_jax.converters import huggingface
from aq_jax.nn.encoder import Encoder

VOCAB, WIDTH, UNKNOWN = 40, 16, 0
TEXTS = ["w3 w4 w39 w3", "w7", "", "who w5 knows w6", " ".join(f"w{i}" for i in range(1, 40))]
MODEL2VEC = {"model_type": "model2vec", "architectures": ["StaticModel"], "apply_zipf": True, "seq_length": 10**6}
OWN = "sentence_transformers."


def ids_of(text: str, letters: int | None = None) -> list[int]:
    return [int(word[1:]) if word[1:].isdigit() else UNKNOWN for word in text[:letters].split()]


def save(folder: Path, tensors: dict[str, np.ndarray], config: dict | None, modules: list[str] | None) -> Path:
    """Write a folder; tokens that a Transformer's tokenizer would add are in the file, and must not count."""
    inner = folder / ("0_StaticEmbedding" if modules and modules[0] else "")
    inner.mkdir(parents=True)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="w1 $A w2", special_tokens=[("w1", 1), ("w2", 2)])
    tokenizer.save(str(inner / "tokenizer.json"))
    safetensors.numpy.save_file(tensors, inner / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if modules is not None:
        kinds = ["models.StaticEmbedding", *(f"base.modules.normalize.{kind}" for kind in modules[1:])]
        paths = [modules[0], *(f"{i}_Normalize" for i in range(1, len(modules)))]
        listed = [{"idx": i, "name": str(i), "path": path, "type": OWN + kind} for i, (path, kind) in
                  enumerate(zip(paths, kinds, strict=True))]  # fmt: skip
        (folder / "modules.json").write_text(json.dumps(listed))
    return folder


def table(seed: int = 0, rows: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, WIDTH)).astype(np.float32)


def expected(rows: np.ndarray, ids: list[list[int]], normalize: bool) -> np.ndarray:
    means = np.array([rows[text].mean(0) if text else np.zeros(WIDTH) for text in ids])
    lengths = np.linalg.norm(means, axis=1, keepdims=True)
    return means / np.where(normalize & (lengths > 0), lengths, 1)


def load(source: Path, out: Path, config: Any = None) -> Encoder:
    huggingface.to_table(source, out / "m.parquet", config)
    found = aq.load_model(out / "m.parquet")
    assert isinstance(found, Encoder)
    return found


@pytest.mark.parametrize("modules", [[""], ["0_StaticEmbedding", "Normalize"]])
def test_folders_of_sentence_transformers_count_all_tokens(tmp_path: Path, modules: list[str]) -> None:
    rows = table()
    found = load(save(tmp_path / "st", {"embedding.weight": rows}, None, modules), tmp_path / "out")
    wanted = expected(rows, [ids_of(text) for text in TEXTS], len(modules) > 1)
    np.testing.assert_allclose(found.encode(TEXTS), wanted, atol=1e-6)
    np.testing.assert_allclose(found.encode(TEXTS[3:4]), wanted[3:4], atol=1e-6)
    back = huggingface.from_table(tmp_path / "out" / "m.parquet", tmp_path / "back")
    assert back.relative_to(tmp_path / "back").parent == Path(modules[0])


def test_folders_of_model2vec_leave_unknown_tokens_out_and_map_others(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    mapping, weights = rng.integers(0, 9, VOCAB), rng.uniform(0.5, 2, VOCAB)
    tensors = {"embeddings": table(1, 9).astype(np.float16), "mapping": mapping, "weights": weights}
    source = save(tmp_path / "m2v", tensors, MODEL2VEC | {"normalize": True, "max_length": 20}, ["", "Normalize"])
    rows = tensors["embeddings"].astype(np.float64)[mapping] * weights[:, None]
    # Cut to 20 times the median length of a token, then to 20 tokens.
    ids = [[i for i in ids_of(text, 20 * 3)[:20] if i != UNKNOWN] for text in TEXTS]
    assert 15 < len(ids[-1]) < 20
    found = load(source, tmp_path / "out")
    with pytest.warns(UserWarning, match="1 of 5 texts are longer than 20 tokens, and were cut"):
        np.testing.assert_allclose(found.encode(TEXTS), expected(rows, ids, True), atol=1e-6)


def test_a_quantized_table_stays_packed(tmp_path: Path) -> None:
    source = save(tmp_path / "m2v", {"embeddings": table()}, MODEL2VEC | {"max_length": None}, None)
    found = load(source, tmp_path / "out", aq.QuantizationConfig("int8"))
    rows = aq.load(tmp_path / "out" / "m.parquet", "numpy")["embeddings"]
    assert 0 < np.abs(rows - table()).max() < 0.02
    ids = [[i for i in ids_of(text) if i != UNKNOWN] for text in TEXTS]
    np.testing.assert_allclose(found.encode(TEXTS), expected(rows, ids, False), atol=1e-6)
    assert found.nbytes < 3 * rows.size


WRONG: dict[str, tuple[dict[str, np.ndarray], dict | None, list[str] | None, str]] = {
    "a field": ({"embeddings": table()}, MODEL2VEC | {"novelty": 3}, None, "has novelty = 3, which is not known"),
    "a length": ({"embeddings": table()}, MODEL2VEC | {"max_length": 0}, None, "max_length is 0; wanted a positive"),
    "norms": ({"embeddings": table()}, MODEL2VEC | {"normalize": True}, [""], r"normalize is True; .* has \[\] after"),
    "no table": ({"table": table()}, MODEL2VEC, None, "has tensors .*; wanted a table"),
    "weights": ({"embedding.weight": table(), "weights": np.ones(3)}, None, [""], "has tensors .*; wanted a table"),
    "another head": ({"embeddings": table(), "head": np.ones(3)}, MODEL2VEC, None, "head: matches no pattern"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_not_computed_is_refused(tmp_path: Path, what: str) -> None:
    tensors, config, modules, message = WRONG[what]
    with pytest.raises(aq.FormatError, match=message):
        load(save(tmp_path / "in", tensors, config, modules), tmp_path / "out")


@pytest.mark.slow
def test_embeddings_are_those_of_both_libraries(tmp_path: Path) -> None:
    st = pytest.importorskip("sentence_transformers")
    source = save(tmp_path / "st", {"embedding.weight": table()}, None, ["0_StaticEmbedding", "Normalize"])
    (source / "1_Normalize").mkdir()
    found = load(source, tmp_path / "out")
    np.testing.assert_allclose(found.encode(TEXTS), st.SentenceTransformer(str(source)).encode(TEXTS), atol=1e-6)
    model2vec = pytest.importorskip("model2vec")
    for normalize, limit in ((True, 20), (False, None)):
        config = MODEL2VEC | {"normalize": normalize, "max_length": limit}
        source = save(tmp_path / f"m2v{limit}", {"embeddings": table(2)}, config, ["", *["Normalize"] * normalize])
        texts = TEXTS if limit is None else [*TEXTS[:-1], "w1 w2"]  # of long ones, ours warns
        theirs = model2vec.StaticModel.from_pretrained(str(source)).encode(texts)
        np.testing.assert_allclose(load(source, tmp_path / f"out{limit}").encode(texts), theirs, atol=1e-6)
