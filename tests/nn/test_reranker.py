"""Rerankers rank as sentence-transformers' CrossEncoder does, and refuse what they do not compute."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import bert_oracle as oracle
import numpy as np
import pytest
import safetensors.numpy
from helpers import run_alone

import aq_jax as aq
from aq_jax.converters import huggingface
from aq_jax.nn.precision import quantize_embeddings
from aq_jax.nn.reranker import Reranker

QUERY = "quick red cats"
TEXTS = ["the small sun", "a lazy dog jumps", "cats", "an tall tree in that house on the sea", ""]
RNG = np.random.default_rng(0)
HEAD = {
    "bert.pooler.dense.weight": RNG.normal(size=(32, 32)) * 0.3, "bert.pooler.dense.bias": RNG.normal(size=32) * 0.3,
    "classifier.weight": RNG.normal(size=(1, 32)) * 0.3, "classifier.bias": RNG.normal(size=1) * 0.3,
}  # fmt: skip
CONFIG = {
    **oracle.CONFIG, "architectures": ["BertForSequenceClassification"], "num_hidden_layers": 1,
    "id2label": {"0": "LABEL_0"},
}  # fmt: skip


def make(folder: Path, config: dict[str, Any] = CONFIG, **head: np.ndarray) -> Path:
    """A folder of a sequence classifier, and the table that becomes of it."""
    folder.mkdir(exist_ok=True)
    tensors = {f"bert.{name}": array for name, array in oracle.weights(CONFIG).items()} | HEAD
    tensors |= {name.replace("__", "."): array for name, array in head.items()}
    safetensors.numpy.save_file({k: v.astype(np.float32) for k, v in tensors.items()}, folder / "model.safetensors")
    oracle.write_side_files(folder, config, pooling=None)
    huggingface.to_table(folder, folder / "out" / "m.parquet")
    return folder / "out" / "m.parquet"


def load(path: Path) -> Reranker:
    found = aq.load_model(path)
    assert isinstance(found, Reranker)
    return found


def scores(tensors: dict[str, np.ndarray], pairs: list[tuple[str, str]]) -> np.ndarray:
    """The logits of pairs, by the oracle: the second text's tokens are of the second type."""
    t = {name: np.asarray(array, np.float64) for name, array in tensors.items()}
    types = t["bert.embeddings.token_type_embeddings.weight"]
    out = []
    for pair in pairs:
        found = oracle.tokenizer().encode(*pair)
        own = {name.removeprefix("bert."): array for name, array in t.items()}
        # A row a token, so that each has the type that it has: the oracle adds the first.
        rows = own["embeddings.word_embeddings.weight"][found.ids] + types[found.type_ids] - types[0]
        own["embeddings.word_embeddings.weight"] = rows
        hidden = oracle.hidden_states(own, range(len(found.ids)), CONFIG)[0]
        pooled = np.tanh(hidden @ t["bert.pooler.dense.weight"].T + t["bert.pooler.dense.bias"])
        out.append(pooled @ t["classifier.weight"].T + t["classifier.bias"])
    return np.stack(out)


def test_texts_are_ranked_by_the_oracles_scores(tmp_path: Path) -> None:
    path = make(tmp_path / "m")
    model = load(path)
    wanted = 1 / (1 + np.exp(-scores(aq.load(path, "numpy"), [(QUERY, text) for text in TEXTS])[:, 0]))
    assert wanted.std() > 0.01
    found = model.rank(QUERY, TEXTS)
    assert [each.number for each in found] == np.argsort(-wanted).tolist()
    np.testing.assert_allclose([each.score for each in found], np.sort(wanted)[::-1], atol=1e-5)
    assert [each.text for each in found] == [TEXTS[each.number] for each in found]
    assert model.rank(QUERY, iter(TEXTS), 2) == found[:2]
    assert model.rank(QUERY, []) == []
    for wrong in ((3, TEXTS), (QUERY, "one"), (QUERY, [3])):
        with pytest.raises(aq.AqError, match="wanted"):
            model.rank(*wrong)  # type: ignore[arg-type]
    with pytest.raises(aq.AqError, match="top_k = 0; wanted a positive integer"):
        model.rank(QUERY, TEXTS, 0)


def test_several_scores_of_a_pair_are_predicted_and_not_ranked(tmp_path: Path) -> None:
    head = {"classifier__weight": RNG.normal(size=(3, 32)), "classifier__bias": RNG.normal(size=3)}
    path = make(tmp_path / "m", **head)
    model, pairs = load(path), [(QUERY, text) for text in TEXTS[:2]]
    np.testing.assert_allclose(model.predict(pairs), scores(aq.load(path, "numpy"), pairs), atol=1e-4)
    with pytest.raises(aq.AqError, match="rank: the model gives a pair 3 scores; wanted one"):
        model.rank(QUERY, TEXTS)


@pytest.mark.parametrize(
    ("said", "activation"),
    [
        ({"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, "Identity"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Tanh"}}, "Tanh"),
        ({}, "Sigmoid"),
        ({"sentence_transformers": {"activation_fn": "mine.Own"}}, "activation_fn is 'mine.Own'; wanted torch.nn's"),
    ],
)
def test_the_activation_is_the_folders(tmp_path: Path, said: dict[str, Any], activation: str) -> None:
    path = make(tmp_path / "m", CONFIG | said)
    if "wanted" in activation:
        with pytest.raises(aq.FormatError, match=activation):
            aq.load_model(path)
    else:
        assert load(path).stages[-1].activation == activation  # type: ignore[union-attr]


def test_the_command_prints_the_order(tmp_path: Path, run: Any) -> None:
    path = make(tmp_path / "m")
    (tmp_path / "texts").write_text("\n".join(TEXTS[:3]) + "\n")
    wanted = load(path).rank(QUERY, TEXTS[:3], 2)
    status, out, _ = run("rank", path, QUERY, "--input", tmp_path / "texts", "--top-k", 2, "--json")
    assert status == 0
    assert [tuple(each.values()) for each in json.loads(out)] == [pytest.approx(tuple(each)) for each in wanted]
    status, out, _ = run("rank", path, QUERY, "--input", tmp_path / "texts")
    assert (status, len(out.splitlines())) == (0, 3)
    assert out.splitlines()[0].split("  ") == [f"{wanted[0].score:.6f}", wanted[0].text]


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
def test_embeddings_are_rounded_as_sentence_transformers_rounds_them(precision: Any) -> None:
    floats = np.random.default_rng(1).normal(size=(7, 19)).astype(np.float32)
    floats[:, 3] = 0.5  # of no range
    bits = [[int(x > 0) for x in row] + [0] * 5 for row in floats]
    packed = [[int("".join(map(str, row[i : i + 8])), 2) for i in range(0, 24, 8)] for row in bits]
    low, high = floats.min(0), floats.max(0)
    step = np.where(high == low, 1, (high - low) / np.float32(255))
    levels = np.clip(np.floor((floats - low) / step), 0, 255)
    wanted = {"ubinary": packed, "binary": np.array(packed) - 128, "uint8": levels, "int8": levels - 128}[precision]
    found = quantize_embeddings(floats, precision)
    assert found.dtype == (np.uint8 if precision.startswith("u") else np.int8)
    np.testing.assert_array_equal(found, wanted)
    assert quantize_embeddings(floats[:0], precision).shape[0] == 0
    if "int8" in precision:
        with pytest.raises(aq.AqError, match="found one embedding, which has no ranges; wanted two or more"):
            quantize_embeddings(floats[:1], precision)
    else:
        np.testing.assert_array_equal(quantize_embeddings(floats[:1], precision), found[:1])


# In a process of its own: importing it takes longer than all other tests here.
CROSS_ENCODER = """
import json, sys
import numpy as np
from sentence_transformers import CrossEncoder
from sentence_transformers.util import quantize_embeddings
folder, query, texts = json.loads(sys.argv[1])
model = CrossEncoder(folder + "/m")
print(json.dumps([[each["corpus_id"], each["score"]] for each in model.rank(query, texts)]))
model.save_pretrained(folder + "/saved")
floats = np.random.default_rng(1).normal(size=(120, 19)).astype(np.float32)
names = ("int8", "uint8", "binary", "ubinary")
np.savez(folder + "/rounded.npz", **{name: quantize_embeddings(floats, name) for name in names})
"""


@pytest.mark.slow
def test_texts_are_ranked_and_embeddings_rounded_as_by_sentence_transformers(tmp_path: Path) -> None:
    for package in ("torch", "sentence_transformers"):
        if importlib.util.find_spec(package) is None or sys.modules.get(package, ...) is None:
            pytest.skip(f"needs {package}")
    path = make(tmp_path / "m")
    fields = {"tokenizer_class": "BertTokenizer", "model_max_length": 256}
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(fields))
    said = run_alone(tmp_path, CROSS_ENCODER, json.dumps([str(tmp_path), QUERY, TEXTS]))
    wanted = json.loads(said.splitlines()[-1])
    huggingface.to_table(tmp_path / "saved", tmp_path / "own" / "m.parquet")
    for model in (load(path), load(tmp_path / "own" / "m.parquet")):
        found = model.rank(QUERY, TEXTS)
        assert [each.number for each in found] == [index for index, _ in wanted]
        np.testing.assert_allclose([each.score for each in found], [score for _, score in wanted], atol=1e-5)
    floats = np.random.default_rng(1).normal(size=(120, 19)).astype(np.float32)
    for name, array in np.load(tmp_path / "rounded.npz").items():
        np.testing.assert_array_equal(quantize_embeddings(floats, name), array)
