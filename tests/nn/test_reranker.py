"""Rerankers rank as sentence-transformers' CrossEncoder does, and refuse what they do not compute."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import bert_oracle as oracle
import decoder_oracle
import numpy as np
import pytest
import safetensors.numpy
from helpers import run_alone
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import aq_jax as aq
from aq_jax.converters import huggingface
from aq_jax.nn.models import FAMILIES
from aq_jax.nn.precision import quantize_embeddings
from aq_jax.nn.reranker import Reranker
from aq_jax.nn.tokenizer import gives_types

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


def scores(tensors: dict[str, np.ndarray], pairs: list[tuple[str, str]], typed: bool = True) -> np.ndarray:
    """The logits of pairs, by the oracle: the second text's tokens are of the second type, if any are."""
    t = {name: np.asarray(array, np.float64) for name, array in tensors.items()}
    types = t["bert.embeddings.token_type_embeddings.weight"]
    out = []
    for pair in pairs:
        found = oracle.tokenizer().encode(*pair)
        own = {name.removeprefix("bert."): array for name, array in t.items()}
        # A row a token, so that each has the type that it has: the oracle adds the first.
        rows = own["embeddings.word_embeddings.weight"][found.ids] + types[np.array(found.type_ids) * typed] - types[0]
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


PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast"}
NAMES = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
TYPED = [
    ("bert", {}, True), ("bert", PLAIN, False), ("bert", PLAIN | NAMES, True),
    ("bert", {"model_input_names": ["input_ids", "attention_mask"]}, False),
    ("bert", {"tokenizer_class": "BertTokenizerFast"}, True),
    ("bert", {"tokenizer_class": "DistilBertTokenizer"}, False),
    ("nomic_bert", {}, True), ("nomic_bert", PLAIN, False), ("distilbert", {"model_max_length": 9}, True),
    ("roberta", {}, False), ("roberta", NAMES, True), ("roberta", {"tokenizer_class": "BertTokenizer"}, True),
    ("roberta", {"tokenizer_class": "BertTokenizerFast"}, False),
    ("xlm-roberta", {"tokenizer_class": "XLMRobertaTokenizerFast"}, False), ("modernbert", PLAIN | NAMES, True),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "said", "typed"), TYPED)
def test_tokenizers_give_types_by_their_names_or_by_their_class(
    tmp_path: Path, kind: str, said: dict[str, Any], typed: bool
) -> None:
    oracle.write_json(tmp_path / "config.json", {"model_type": kind})
    oracle.write_json(tmp_path / "tokenizer_config.json", said)
    assert gives_types(tmp_path) is typed
    assert gives_types(tmp_path, NAMES)
    with pytest.raises(aq.FormatError, match=r"tokenizer_config\.json: model_input_names is 'token_type_ids'; wanted"):
        gives_types(tmp_path, {"model_input_names": "token_type_ids"})


def test_pairs_have_types_only_where_the_tokenizer_gives_them(tmp_path: Path) -> None:
    path = make(tmp_path / "m")
    tensors, pairs = aq.load(path, "numpy"), [(QUERY, TEXTS[1])]
    plain, typed = scores(tensors, pairs, False), scores(tensors, pairs)
    assert np.abs(plain - typed).max() > 0.1
    for said, wanted in ((PLAIN, plain), (PLAIN | NAMES, typed)):
        oracle.write_json(path.parent / "tokenizer_config.json", said)
        np.testing.assert_allclose(load(path).predict(pairs), 1 / (1 + np.exp(-wanted)), atol=1e-5)


def test_a_type_that_the_model_has_no_row_for_is_refused(tmp_path: Path) -> None:
    few = {"bert.embeddings.token_type_embeddings.weight": np.ones((1, 32))}
    path = make(tmp_path / "m", CONFIG | {"type_vocab_size": 1}, **few)
    with pytest.raises(aq.AqError, match=r"predict: the tokenizer gives tokens of type 1; type_vocab_size in"):
        load(path).predict([(QUERY, TEXTS[1])])
    oracle.write_json(path.parent / "tokenizer_config.json", PLAIN)
    assert load(path).predict([(QUERY, TEXTS[1])]).shape == (1, 1)


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


SIZES = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
WORDS = [("w7 w8", "w9"), ("w10", "w11 w12 w13 w14")]


def write_words(folder: Path, pair: str, said: dict[str, Any] | None = None) -> None:
    """Write a tokenizer of the words w0 to w39, whose pairs have this template."""
    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(SIZES["vocab_size"])}, "w5"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [(f"w{i}", i) for i in (3, 4)]
    made.post_processor = processors.TemplateProcessing("$A", pair=pair, special_tokens=special)
    made.save(str(folder / "tokenizer.json"))
    oracle.write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | (said or {}))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The table of a language model that scores pairs."""
    folder = tmp_path_factory.mktemp("llama")
    tensors = decoder_oracle.weights("llama", SIZES) | {"score.weight": RNG.normal(size=(2, 32))}
    tensors = {name: np.asarray(each, np.float32) for name, each in tensors.items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    fields = {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]} | SIZES
    write_words(folder, "$A $B")
    oracle.write_json(folder / "config.json", fields)
    huggingface.to_table(folder, folder / "out" / "m.parquet")
    return folder / "out" / "m.parquet"


@pytest.mark.parametrize(
    ("pad", "pair", "pairs", "shorter", "same"),
    [
        (4, "$A w4 $B w4 w4", WORDS, "$A w4 $B", WORDS),
        (0, "w3 $A $B", [("w0", "w0")], "w3 $A $B", [("", "")]),
        (0, "$A $B", [("w0", "w0")], "$A $B", [("w0", "")]),  # all is padding: the first
    ],
)
def test_language_models_score_the_last_token_that_is_no_padding(
    llama: Path, pad: int, pair: str, pairs: list, shorter: str, same: list
) -> None:
    """A token's state does not depend on those after it: without these, and where none is padding, scores are equal."""

    def predict(template: str, pad: int | None, pairs: list[tuple[str, str]]) -> np.ndarray:
        write_words(llama.parent, template)
        fields = json.loads((llama.parent / "config.json").read_text())
        oracle.write_json(llama.parent / "config.json", fields | {"pad_token_id": pad})
        return load(llama).predict(pairs)

    np.testing.assert_allclose(predict(pair, pad, pairs), predict(shorter, None, same), atol=1e-5)


def test_each_family_has_transformers_padding_and_another_kind_is_refused() -> None:
    read = {kind: family.scorer for kind, family in FAMILIES.items() if family.task == "generate" and family.scorer}
    pads = {kind: scorer({}).pad for kind, scorer in read.items()}
    firsts = dict.fromkeys(("gemma", "gemma2", "gemma3_text"), 0) | dict.fromkeys(("olmo2", "olmo3"), 1)
    wanted = firsts | {"phi3": 32000, "smollm3": 128004}  # and none of the others
    assert {kind: pad for kind, pad in pads.items() if pad is not None} == wanted
    assert read["gemma"]({"pad_token_id": None}).pad is None
    with pytest.raises(aq.FormatError, match="pad_token_id is '0'; wanted an integer or null"):
        read["llama"]({"pad_token_id": "0"})


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


# By name: the model_type, what differs from SIZES, the template of pairs, and what tokenizer_config.json says.
FIRST, LAST = "w3 $A w4 $B:1 w4:1", "$A w4 $B w4"
SCORED: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "bert": ("bert", {}, FIRST, {}),
    "bert of types": ("bert", {}, FIRST, NAMES),
    "roberta": ("roberta", {"type_vocab_size": 2}, FIRST, {}),
    "roberta of types": ("roberta", {"type_vocab_size": 2}, FIRST, NAMES),
    "nomic": ("nomic_bert", {"pad_token_id": 0}, FIRST, {}),
    "llama": ("llama", {"pad_token_id": 4}, LAST, {"pad_token": "w4", "eos_token": "w4"}),
    "llama of other padding": ("llama", {"pad_token_id": 0}, LAST, {}),
    "llama of none": ("llama", {"pad_token_id": None}, LAST, {}),
    "gemma": ("gemma", {"head_dim": 8, "num_key_value_heads": 2, "pad_token_id": 4}, LAST, {}),
}
PREDICTIONS = """
import json, sys
from pathlib import Path
import torch
from sentence_transformers import CrossEncoder
from transformers import AutoConfig, AutoModelForSequenceClassification
cases, pairs, folder = json.loads(sys.argv[1])
out = {}
for name, (kind, fields) in cases.items():
    torch.manual_seed(0)
    here = Path(folder, name)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **fields))
    with torch.no_grad():
        for each in model.parameters():
            each.normal_(0, 0.3)
    model.save_pretrained(here)
    out[name] = CrossEncoder(str(here), device="cpu").predict(pairs, batch_size=1).tolist()
print(json.dumps(out))
"""


@pytest.mark.slow
def test_scores_of_each_kind_are_those_of_sentence_transformers(tmp_path: Path) -> None:
    for package in ("torch", "sentence_transformers"):
        if importlib.util.find_spec(package) is None or sys.modules.get(package, ...) is None:
            pytest.skip(f"needs {package}")
    few = {name: size for name, size in SIZES.items() if name not in ("num_key_value_heads", "tie_word_embeddings")}
    for name, (_, _, template, settings) in SCORED.items():
        (tmp_path / name).mkdir()
        write_words(tmp_path / name, template, {"pad_token": "w0"} | settings)
    cases = {name: (kind, few | {"num_labels": 2} | fields) for name, (kind, fields, _, _) in SCORED.items()}
    said = run_alone(tmp_path, PREDICTIONS, json.dumps([cases, WORDS, str(tmp_path)]))
    for name, wanted in json.loads(said.splitlines()[-1]).items():
        huggingface.to_table(tmp_path / name, tmp_path / "tables" / name / "m.parquet")
        found = load(tmp_path / "tables" / name / "m.parquet").predict(WORDS)
        assert np.std(wanted) > 0.1
        np.testing.assert_allclose(found, wanted, atol=1e-4, err_msg=name)
