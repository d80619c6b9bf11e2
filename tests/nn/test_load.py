"""Tables of every kind, with the files beside them, as models that run."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import bert_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import run_alone

import aq_jax as aq
from aq_jax.config import QuantizationConfig
from aq_jax.nn.encoder import Encoder
from aq_jax.nn.layers import QEmbed, QLinear
from aq_jax.nn.load import choose_activations, load_model
from aq_jax.nn.models.bert import Bert
from aq_jax.nn.pooling import Normalize, Pooling
from aq_jax.nn.sentences import SentenceSettings, read_sentences
from aq_jax.nn.tokenizer import read_tokenizer

CONFIG = {**oracle.CONFIG, "num_hidden_layers": 1}
TENSORS = oracle.weights(CONFIG)
BIAS = "encoder.layer.0.output.dense.bias"
INT2 = QuantizationConfig("int2", per_channel=False, group_size=16, solver="absmax")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files that stand beside a table."""
    oracle.write_side_files(tmp_path / "model", CONFIG)
    return tmp_path / "model"


def load(path: Path, tensors: dict[str, Any], activations: Any = None) -> Encoder:
    aq.save(path, tensors)
    encoder = load_model(path, activations)
    assert isinstance(encoder, Encoder)
    return encoder


def leaves(encoder: Encoder) -> dict[str, bytes]:
    paths, _ = jax.tree_util.tree_flatten_with_path(nnx.state(encoder.model))
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in paths}


def test_the_package_offers_it() -> None:
    assert aq.load_model is load_model


@pytest.mark.parametrize("quant_type", [None, "int8", "int2"])
def test_every_kind_of_table_is_the_same_model(folder: Path, quant_type: str | None) -> None:
    """V1 and V2, Parquet and Arrow, one file and a folder of shards: bit for bit."""
    config = INT2 if quant_type == "int2" else quant_type
    tensors = dict(TENSORS) if config is None else aq.quantize_tree(TENSORS, config)
    found = []
    for name in ("m.parquet", "m.arrow"):
        found.append(leaves(load(folder / name, tensors)))
        (folder / name).unlink()
    names = list(tensors)
    aq.save(folder / "model-1.parquet", {name: tensors[name] for name in names[:9]})
    aq.save(folder / "model-2.arrow", {name: tensors[name] for name in names[9:]})
    found.append(leaves(load_model(str(folder))))
    assert found[0] == found[1] == found[2]


def test_a_loaded_model_is_any_nnx_module_and_its_weights_stay_packed(folder: Path) -> None:
    encoder = load(folder / "m.parquet", aq.quantize_tree(TENSORS, INT2))
    graph, state = nnx.split(encoder.model)
    q = encoder.model.layers[0].up.qtensor
    assert (q.codes.dtype, q.codes.shape, q.shape) == (jnp.uint8, (64, 8), (64, 32))
    kinds = [type(module) for _, module in nnx.iter_modules(encoder.model)]
    assert (kinds.count(QLinear), kinds.count(QEmbed)) == (6, 3)
    assert nnx.Linear not in kinds
    assert nnx.Embed not in kinds
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    ids = np.array([[2, 20, 30, 3]], np.int32)
    model = nnx.merge(graph, jax.tree.map(lambda leaf: leaf, state))
    assert isinstance(model, Bert)
    hidden = nnx.jit(lambda m, i: m(i, i > 0))(model, ids)
    tensors = {name: np.asarray(array) for name, array in aq.load(folder / "m.parquet").items()}
    np.testing.assert_allclose(hidden[0], oracle.hidden_states(tensors, ids[0].tolist(), CONFIG), atol=1e-5)


def test_numbers_of_bits_may_differ_from_layer_to_layer(folder: Path) -> None:
    kept = ("position", "query", "token_type")  # in float16
    config = QuantizationConfig(
        "int4",
        group_size=16,
        solver="absmax",
        mixed_precision_layers=kept,
        overrides=(aq.Override("word", quant_type="int8"),),
    )
    encoder = load(folder / "m.parquet", aq.quantize_tree(TENSORS, config))
    tensors = aq.load(folder / "m.parquet", "numpy")
    texts = ["the cat sat on the mat", "she runs", ""]
    ids = [encoding.ids for encoding in oracle.tokenizer().encode_batch(texts)]
    np.testing.assert_allclose(encoder.encode(texts), oracle.embed(tensors, ids, CONFIG), atol=2e-6)


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (None, "float32"),
        ("int8", "int8"),
        (QuantizationConfig("int8", per_channel=False), "int8"),
        (QuantizationConfig("int8", group_size=16, symmetric=False), "int8"),
        (QuantizationConfig("int8", mixed_precision_layers=("query",)), "int8"),
        (QuantizationConfig("int8", group_size=24), "float32"),  # groups that cross rows
        (QuantizationConfig("int8", overrides=(aq.Override("query", quant_type="int4"),)), "float32"),
        (QuantizationConfig("int4", solver="absmax"), "float32"),
        (INT2, "float32"),
    ],
)
def test_activations_are_rounded_where_weights_have_eight_bits(config: Any, wanted: str) -> None:
    names = ("embeddings.word_embeddings.weight", "encoder.layer.0.attention.self.query.weight", BIAS)
    tensors = {name: TENSORS[name] for name in names}
    tensors = tensors if config is None else aq.quantize_tree(tensors, config)
    assert choose_activations(tensors, None, "m.parquet") == wanted


def test_activations_are_those_of_every_layer(folder: Path) -> None:
    tensors = aq.quantize_tree(TENSORS, "int8")
    for given, wanted in ((None, "int8"), ("float32", "float32"), ("bfloat16", "bfloat16"), ("int8", "int8")):
        model = load(folder / "m.parquet", tensors, given).model
        parts = [module for _, module in nnx.iter_modules(model) if hasattr(module, "activations")]
        assert len(parts) == 1 + 6 + 3  # the layer, whose attention multiplies too, its linears, and the embeddings
        assert {part.activations for part in parts} == {wanted}


@pytest.mark.parametrize("given", ["int4", "", "INT8", 8, False])
def test_other_activations_are_refused(folder: Path, given: Any) -> None:
    aq.save(folder / "m.parquet", TENSORS)
    with pytest.raises(aq.ConfigError, match=f"activations = {given!r}: wanted one of float32, bfloat16, int8"):
        load_model(folder / "m.parquet", given)


@pytest.mark.parametrize("given", ["int8", "bfloat16"])
def test_activations_of_float_weights_are_refused(folder: Path, given: Any) -> None:
    message = (
        rf"m\.parquet: holds float weights only; activations = '{given}' needs quantized ones.*convert with a quan"
    )
    with pytest.raises(aq.ConfigError, match=message):
        load(folder / "m.parquet", dict(TENSORS), given)
    load(folder / "m.parquet", dict(TENSORS), "float32")


def test_integer_products_with_groups_that_cross_rows_are_refused(folder: Path) -> None:
    tensors = aq.quantize_tree(TENSORS, QuantizationConfig("int8", group_size=24))
    with pytest.raises(
        aq.ConfigError, match=r"m\.parquet: activations = 'int8' cannot be multiplied by 9 we"
    ) as caught:
        load(folder / "m.parquet", tensors, "int8")
    for name in (name for name in TENSORS if TENSORS[name].ndim == 2):
        assert re.search(rf"{name}: found QTensor\(.*\), wanted grids that each lie in one row of W", str(caught.value))
    load(folder / "m.parquet", tensors)


def test_what_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_model(folder / "m.parquet")
    aq.save(folder / "m.parquet", TENSORS)
    (folder / "config.json").rename(folder / "config")
    with pytest.raises(aq.FormatError, match=r"model/config\.json: no such file; wanted the model's config"):
        load_model(folder / "m.parquet")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a JSON file"),
        ("[" * 100_000, "not a JSON file"),
        ("[]", "holds list; wanted a JSON object"),
        ("{}", "model_type is None; wanted 'bert' or 'roberta'"),
        ('{"model_type": "t5"}', "model_type is 't5'; wanted 'bert' or 'roberta'"),
        ('{"model_type": ["bert"]}', r"model_type is \['bert'\]; wanted"),
        ('{"model_type": "bert"}', "no vocab_size; wanted a positive integer"),
        (json.dumps({**CONFIG, "hidden_size": -1}), "hidden_size is -1; wanted a positive integer"),
        (json.dumps({**CONFIG, "hidden_act": "tanh"}), "hidden_act is 'tanh'; wanted 'silu' or"),
        (json.dumps({**CONFIG, "is_decoder": True}), "is_decoder is True; wanted False"),
        (
            json.dumps({**CONFIG, "position_embedding_type": "relative_key"}),
            "position_embedding_type is 'relative_key'",
        ),
    ],
)
def test_configs_that_cannot_be_are_named(folder: Path, text: str, message: str) -> None:
    aq.save(folder / "m.parquet", TENSORS)
    (folder / "config.json").write_text(text)
    with pytest.raises(aq.FormatError, match=rf"model/config\.json: {message}"):
        load_model(folder / "m.parquet")


def test_an_unknown_model_is_named_before_any_weight_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aq.save(folder / "m.parquet", TENSORS)
    oracle.write_json(folder / "config.json", {**CONFIG, "model_type": "t5"})
    monkeypatch.setattr(aq.WeightLoader, "load_weights", None)
    with pytest.raises(aq.FormatError, match="model_type is 't5'; wanted 'bert' or 'roberta'"):
        load_model(folder / "m.parquet")


def test_tensors_of_another_model_are_all_named(folder: Path) -> None:
    oracle.write_json(folder / "config.json", {**CONFIG, "num_hidden_layers": 2, "vocab_size": 101})
    with pytest.raises(aq.FormatError, match=r"m\.parquet: 17 tensors do not fit the model") as caught:
        load(folder / "m.parquet", TENSORS)
    assert "layers.1.query.kernel: no tensor fills it" in str(caught.value)
    assert "embeddings.word_embeddings.weight: shape [100, 32] does not fit word.embedding" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"model": {"type": "Unheard"}}'])
def test_a_damaged_tokenizer_is_named(folder: Path, text: str) -> None:
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(aq.FormatError, match=r"model/tokenizer\.json: holds no tokenizer that can be built: "):
        read_tokenizer(folder)


# In a process of its own: transformers sets up warnings, and imports torch, which is not needed, for seconds.
FALLBACK = """
import sys
sys.modules["torch"] = None
from pathlib import Path
from aq_jax import FormatError
from aq_jax.nn.tokenizer import read_tokenizer
folder = Path(sys.argv[1])
for text in sys.argv[2:]:
    print(*read_tokenizer(folder).encode(text).ids)
for file in folder.iterdir():
    file.unlink()
try:
    read_tokenizer(folder)
except FormatError as error:
    print(error)
"""


def test_older_tokenizer_files_are_read_by_transformers(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(oracle.VOCAB))
    oracle.write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    oracle.write_json(tmp_path / "config.json", CONFIG)
    texts = ["The Cat sat, zebra 7", "\u00e9"]
    said = run_alone(tmp_path, FALLBACK, tmp_path, *texts, PYTHONPATH=":".join(sys.path))
    first, second, refusal = said.split("\n", 2)
    assert [first, second] == [" ".join(map(str, oracle.tokenizer().encode(text).ids)) for text in texts]
    assert refusal.startswith(f"{tmp_path / 'tokenizer.json'}: holds no tokenizer that can be built: ")


POOLINGS = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


def pooling(*chosen: str) -> dict[str, object]:
    """1_Pooling/config.json as sentence-transformers writes it."""
    return {"word_embedding_dimension": 32, **{f"pooling_mode_{mode}": mode in chosen for mode in POOLINGS}}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        (pooling("mean_tokens"), "mean"),
        (pooling("cls_token"), "cls"),
        ({"embedding_dimension": 32, "pooling_mode": "mean", "include_prompt": True}, "mean"),
        ({"embedding_dimension": 32, "pooling_mode": "cls", "include_prompt": True}, "cls"),
        ({"pooling_mode": ["mean"]}, "mean"),
        (pooling(), "mean"),  # as sentence-transformers reads it
        ({}, "mean"),
    ],
)
def test_pooling_is_what_the_files_say(folder: Path, fields: dict[str, object], wanted: str, normalize: bool) -> None:
    oracle.write_side_files(folder, CONFIG, normalize=normalize)
    oracle.write_json(folder / "1_Pooling" / "config.json", fields)
    stages = (Pooling((wanted,)), *([Normalize()] if normalize else []))
    assert read_sentences(folder, 256) == SentenceSettings(stages, 256)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pooling_mode": "median"}, r"pools by \['median'\]; wanted one or more of cls, max"),
        ({"pooling_mode": []}, r"pools by \[\]; wanted"),
        ({"pooling_mode": [["mean"]]}, "pools by"),
        (pooling("mean_tokens") | {"pooling_mode_other": True}, "has pooling_mode_other; known are"),
    ],
)
def test_other_poolings_are_refused(folder: Path, fields: dict[str, object], message: str) -> None:
    oracle.write_json(folder / "1_Pooling" / "config.json", fields)
    with pytest.raises(aq.FormatError, match=rf"1_Pooling/config\.json: .*{message}"):
        read_sentences(folder, 256)


@pytest.mark.parametrize(
    "kinds",
    [
        ["Transformer", "Pooling", "CNN"],
        ["Transformer", "WeightedLayerPooling", "Pooling"],
        ["Transformer", "Pooling", "Pooling"],
        ["Transformer"],
        ["Pooling", "Transformer"],
        ["WordEmbeddings", "Pooling"],
        [],
    ],
)
def test_other_modules_are_refused(folder: Path, kinds: list[str]) -> None:
    modules = [
        {"idx": i, "path": str(i), "type": f"sentence_transformers.models.{kind}"} for i, kind in enumerate(kinds)
    ]
    oracle.write_json(folder / "modules.json", modules)
    with pytest.raises(aq.FormatError, match=r"modules\.json: .*wanted Transformer, Pooling and then any of Dense, "):
        read_sentences(folder, 256)


def test_modules_are_known_wherever_sentence_transformers_keeps_them(folder: Path) -> None:
    kinds = ["base.modules.transformer.Transformer", "sentence_transformer.modules.pooling.Pooling"]
    modules = [
        {"path": path, "type": f"sentence_transformers.{kind}"} for path, kind in zip(("", "p"), kinds, strict=True)
    ]
    oracle.write_json(folder / "modules.json", modules)
    oracle.write_json(folder / "p" / "config.json", {"pooling_mode": "cls"})
    assert read_sentences(folder, 256) == SentenceSettings((Pooling(("cls",)),), 256)


def test_without_those_files_sentences_are_means(tmp_path: Path) -> None:
    oracle.write_side_files(tmp_path, CONFIG, pooling=None)
    assert read_sentences(tmp_path, 256) == SentenceSettings(max_tokens=256)


@pytest.mark.parametrize(
    ("sentence_bert", "tokenizer", "wanted"),
    [
        ({"max_seq_length": 64}, {"model_max_length": 32}, 64),
        ({"max_seq_length": None}, {"model_max_length": 32}, 32),
        ({"max_seq_length": 5000}, None, 256),
        (None, {"model_max_length": 1e30}, 256),
        (None, {"model_max_length": 128}, 128),
        ({}, {}, 256),
    ],
)
def test_the_longest_text_is_what_the_files_say(
    folder: Path, sentence_bert: dict | None, tokenizer: dict | None, wanted: int
) -> None:
    for name, fields in (("sentence_bert_config.json", sentence_bert), ("tokenizer_config.json", tokenizer)):
        if fields is not None:
            oracle.write_json(folder / name, fields)
    assert read_sentences(folder, 256).max_tokens == wanted


@pytest.mark.parametrize("limit", [1, 2, 0.5, 0, -1, True, "64", float("nan")])
@pytest.mark.parametrize("file", ["sentence_bert_config.json", "tokenizer_config.json"])
def test_texts_without_room_for_a_token_are_refused(folder: Path, file: str, limit: object) -> None:
    name = {"sentence_bert_config.json": "max_seq_length", "tokenizer_config.json": "model_max_length"}[file]
    oracle.write_json(folder / file, {name: limit})
    message = rf"model/{file}: {name} is {re.escape(repr(limit))}, of 256 positions; wanted 3 tokens or more"
    with pytest.raises(aq.FormatError, match=message):
        read_sentences(folder, 256, least=3)


def test_a_text_has_a_token_beside_the_special_ones(folder: Path) -> None:
    aq.save(folder / "m.parquet", TENSORS)
    oracle.write_json(folder / "sentence_bert_config.json", {"max_seq_length": 3})
    assert load_model(folder / "m.parquet").sentences.max_tokens == 3
    oracle.write_json(folder / "sentence_bert_config.json", {"max_seq_length": 2})
    with pytest.raises(aq.FormatError, match="max_seq_length is 2, of 256 positions; wanted 3 tokens or"):
        load_model(folder / "m.parquet")


def test_a_folder_without_a_vocabulary_is_refused(folder: Path) -> None:
    """transformers would make a tokenizer to which every word is unknown."""
    (folder / "tokenizer.json").unlink()
    with pytest.raises(aq.FormatError, match=r"tokenizer\.json: holds no tokenizer .*wanted it, or one of vocab\.txt"):
        read_tokenizer(folder)
