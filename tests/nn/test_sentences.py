"""Folders of sentence-transformers: what they say of prompts, poolings, modules and tokenizers is what encode does.

The oracle is sentence-transformers itself, on the same folder; of tokenizers, transformers.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bert_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import aq_jax as aq
from aq_jax.converters import huggingface
from aq_jax.nn.encoder import Encoder
from aq_jax.nn.pooling import MODES, Dense, LayerNorm, Normalize, Pooling, embed
from aq_jax.nn.sentences import read_sentence_tokenizer, read_sentences
from aq_jax.nn.tokenizer import read_tokenizer

torch = pytest.importorskip("torch", reason="the oracle needs torch")
if importlib.util.find_spec("sentence_transformers") is None:  # whose import takes 4 seconds of each worker
    pytest.skip("the oracle is sentence-transformers", allow_module_level=True)

WIDTH, POSITIONS = 32, 64
TEXTS = ["The quick cats jump", "she runs [SEP] on", "Ünder the sea", "中国 sun", ""]
LONG = "the red sun runs over a small house " * 20
PROMPTS = {"query": "the cat: ", "passage": "dogs "}
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:(torch|transformers|sentence_transformers|huggingface_hub).*",
    "ignore::FutureWarning:(torch|transformers|sentence_transformers|huggingface_hub).*",
)


@pytest.fixture(scope="module")
def st() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sentence_transformers
        import sentence_transformers.sentence_transformer.modules
        import transformers

    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    return sentence_transformers


@pytest.fixture(scope="module")
def base(st: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of one layer, whose weights are large enough for embeddings to depend on all of them, and a tokenizer."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("base")
    fields = dict(oracle.CONFIG) | {"num_hidden_layers": 1, "max_position_embeddings": POSITIONS}
    model = BertModel(BertConfig(**{k: v for k, v in fields.items() if k != "model_type"}))
    tensors = {name: torch.tensor(array) for name, array in oracle.weights(fields).items()}
    model.load_state_dict(tensors, strict=False)
    model.save_pretrained(folder)
    BertTokenizer(vocab={token: i for i, token in enumerate(oracle.VOCAB)}).save_pretrained(folder)
    return folder


@pytest.fixture
def make(st: Any, base: Path, tmp_path: Path) -> Callable[..., Path]:
    """A folder as sentence-transformers saves it."""

    def make(*modules: Any, modes: Any = "mean", include_prompt: bool = True, **settings: Any) -> Path:
        parts = st.sentence_transformer.modules
        torch.manual_seed(0)
        pooling = parts.Pooling(WIDTH, modes, include_prompt=include_prompt)
        model = st.SentenceTransformer(modules=[parts.Transformer(str(base)), pooling, *modules], **settings)
        folder = tmp_path / "model"
        model.save(str(folder), create_model_card=False)
        return folder

    return make


def load(folder: Path) -> Encoder:
    if not (folder / "m.parquet").exists():
        huggingface.to_table(folder, folder / "m.parquet")
    model = aq.load_model(folder / "m.parquet")
    assert isinstance(model, Encoder)
    return model


def same(st: Any, folder: Path, texts: Sequence[str] = TEXTS, **how: Any) -> np.ndarray:
    """Both libraries' embeddings of the same folder, compared; ours."""
    wanted = st.SentenceTransformer(str(folder)).encode(list(texts), **how)
    found = np.asarray(load(folder).encode(texts, **how))
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=2e-6)
    return found


def edit(file: Path, **fields: Any) -> None:
    found = json.loads(file.read_text()) if file.exists() else {}
    oracle.write_json(file, {name: value for name, value in (found | fields).items() if value is not ...})


def test_prompts(st: Any, make: Callable[..., Path]) -> None:
    """By name, in full, by default; a prompt goes before a name, and an empty one is one."""
    folder = make(prompts=PROMPTS, default_prompt_name="query")
    default = same(st, folder)
    by_name = same(st, folder, prompt_name="query")
    np.testing.assert_array_equal(default, by_name)
    others = [same(st, folder, **how) for how in ({"prompt_name": "passage"}, {"prompt": "she "}, {"prompt": ""})]
    assert all(np.abs(a - b).max() > 0.1 for a, b in itertools.combinations([default, *others], 2))
    np.testing.assert_array_equal(same(st, folder, prompt_name="document"), others[-1])
    model = load(folder)
    with pytest.warns(UserWarning, match="prompt_name is ignored"):
        both = model.encode(TEXTS, prompt="she ", prompt_name="unheard")
    np.testing.assert_array_equal(both, others[1])
    known = "prompt_name is 'unheard'; the model has 'query', 'document', 'passage'"
    with pytest.raises(aq.AqError, match=known):
        model.encode(TEXTS, prompt_name="unheard")
    with pytest.raises(aq.AqError, match="prompt is int; wanted a string"):
        model.encode(TEXTS, prompt=3)  # type: ignore[arg-type]


def test_poolings_with_and_without_the_prompt(st: Any, make: Callable[..., Path]) -> None:
    """All of them side by side, in an order of their own."""
    modes = ("weightedmean", "max", "lasttoken", "cls", "mean_sqrt_len_tokens", "mean")
    folder = make(modes=modes, include_prompt=False, prompts=PROMPTS)
    np.testing.assert_array_equal(same(st, folder), same(st, folder, prompt_name="document"))
    left_out = same(st, folder, prompt_name="query")
    edit(folder / "1_Pooling" / "config.json", include_prompt=True)
    counted = same(st, folder, prompt_name="query")
    changed = np.abs(left_out - counted).reshape(-1, len(modes), WIDTH).max((0, 2)) > 0.1
    assert dict(zip(modes, changed.tolist(), strict=True)) == {mode: mode != "lasttoken" for mode in modes}


def test_poolings_in_the_old_spelling(st: Any, make: Callable[..., Path]) -> None:
    folder = make()
    flags = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    fields = {f"pooling_mode_{flag}": flag in ("mean_tokens", "max_tokens", "cls_token") for flag in flags}
    oracle.write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": WIDTH, **fields})
    assert same(st, folder).shape == (len(TEXTS), 3 * WIDTH)


@pytest.mark.parametrize("name", ["Tanh", "Identity", "ReLU", "GELU", "Sigmoid", "SiLU", "ELU", "LeakyReLU"])
def test_activations_are_torchs(name: str) -> None:
    x = np.linspace(-4, 4, 41, dtype=np.float32)[None]
    stage = Dense(np.eye(41, dtype=np.float32), activation=name)
    found = embed(jnp.asarray(x)[:, None], jnp.ones((1, 1), bool), (Pooling(), stage))
    np.testing.assert_allclose(found, getattr(torch.nn, name)()(torch.tensor(x)), rtol=1e-5, atol=1e-6)


def test_modules_one_after_another(st: Any, make: Callable[..., Path]) -> None:
    """Dense layers with and without a bias and what is added to them, norms, and lengths, which need not be last."""
    parts = st.sentence_transformer.modules
    norm = parts.LayerNorm(48)
    with torch.no_grad():
        norm.norm.weight.uniform_(0.5, 2)
        norm.norm.bias.uniform_(-1, 1)
    folder = make(
        parts.Dense(2 * WIDTH, 48), norm, parts.Normalize(), parts.Dropout(0.5),
        parts.Dense(48, 48, bias=False, activation_function=torch.nn.GELU(), use_residual=True),
        parts.Dense(48, 20, activation_function=torch.nn.Identity(), use_residual=True),
        modes=("mean", "max"), truncate_dim=16,
    )  # fmt: skip
    assert same(st, folder).shape == (len(TEXTS), 16)
    assert load(folder).encode([]).shape == (0, 16)
    names = json.loads((folder / "modules.json").read_text())
    for entry, path in zip(names, ["", "a pool", "x/2", "norm", "length", "", "d", "e"], strict=True):
        if entry["path"] and entry["path"] != path:
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / entry["path"]).rename(folder / path) if path else shutil.rmtree(folder / entry["path"])
            entry["path"] = path
    oracle.write_json(folder / "modules.json", [entry for entry in names if "Dropout" not in entry["type"]])
    same(st, folder)


@pytest.mark.parametrize("dim", [16, 32, 100])
def test_truncated_embeddings(st: Any, make: Callable[..., Path], dim: int) -> None:
    """After they were given length 1."""
    folder = make(st.sentence_transformer.modules.Normalize(), truncate_dim=dim)
    assert same(st, folder).shape == (len(TEXTS), min(dim, 32))


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet"])
def test_every_name_of_the_length_limit(st: Any, make: Callable[..., Path], name: str) -> None:
    folder = make()
    (folder / "sentence_bert_config.json").unlink()
    oracle.write_json(folder / f"sentence_{name}_config.json", {"max_seq_length": 7, "do_lower_case": False})
    wanted = st.SentenceTransformer(str(folder)).max_seq_length
    assert read_sentences(folder, POSITIONS).max_tokens == wanted == 7


def test_without_modules_settings_say_nothing(st: Any, make: Callable[..., Path]) -> None:
    folder = make(modes="max", prompts=PROMPTS, default_prompt_name="query", truncate_dim=16)
    (folder / "modules.json").unlink()
    message = r"without modules\.json, .*ignores config_sentence_transformers\.json, sentence_bert_config\.json$"
    with pytest.warns(UserWarning, match=message):
        assert same(st, folder).shape == (len(TEXTS), WIDTH)


def old_layout(folder: Path) -> None:
    """Into the layout of sentence-transformers before version 2: the model has a folder of its own."""
    inner = folder / "0_Transformer"
    inner.mkdir()
    for file in [*folder.glob("*token*"), folder / "config.json", folder / "model.safetensors"]:
        file.rename(inner / file.name)
    (folder / "sentence_bert_config.json").unlink()
    oracle.write_json(inner / "sentence_roberta_config.json", {"max_seq_length": 9, "do_lower_case": False})
    modules = json.loads((folder / "modules.json").read_text())
    for entry in modules:
        entry["type"] = "sentence_transformers.models." + entry["type"].rpartition(".")[2]
    modules[0]["path"] = "0_Transformer"
    oracle.write_json(folder / "modules.json", modules)


def test_the_old_layout(st: Any, make: Callable[..., Path]) -> None:
    folder = make()
    old_layout(folder)
    with pytest.warns(UserWarning, match="1 of 2 texts are longer than 9 tokens"):
        same(st, folder, [LONG, "the sea"])
    written = huggingface.from_table(folder / "m.parquet", folder.parent / "out")
    assert written == folder.parent / "out" / "0_Transformer" / "model.safetensors"
    before, after = (load_file(folder / "0_Transformer" / "model.safetensors"), load_file(written))
    assert {name: array.tobytes() for name, array in after.items()} == {
        name: array.tobytes() for name, array in before.items()
    }


def test_lower_case_by_sentence_transformers(st: Any, make: Callable[..., Path]) -> None:
    """Which leaves special tokens in a text alone."""
    folder = make()
    edit(folder / "tokenizer_config.json", do_lower_case=False)
    cased = same(st, folder)
    edit(folder / "sentence_bert_config.json", do_lower_case=True)
    assert np.abs(same(st, folder) - cased).max() > 0.1


def test_settings_of_the_processor_go_first(st: Any, make: Callable[..., Path]) -> None:
    folder = make()
    given = {"do_lower_case": False, "truncation_side": "left", "model_max_length": 8}
    edit(folder / "sentence_bert_config.json", processor_kwargs=given, max_seq_length=20)
    with pytest.warns(UserWarning, match="longer than 8 tokens"):
        same(st, folder, [LONG, *TEXTS])


# ------------------------------------------------------------------------------------------------ tokenizers

ODD = [
    *TEXTS,
    LONG,
    "ÀÉÎ õü ñ",
    "日本語 text 中",
    "[CLS] [MASK]x [PAD]",
    "<new> word <New>",
    "e\u0301\u0007 a\u00a0b\t",
]
TOKEN = {"content": "<new>", "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}


@pytest.mark.parametrize(
    ("config", "own"),
    [
        ({}, True),
        (None, True),
        ({"do_lower_case": False}, True),
        ({"do_lower_case": ...}, True),
        ({"strip_accents": True, "do_lower_case": False}, True),
        ({"strip_accents": False}, True),
        ({"tokenize_chinese_chars": False}, True),
        ({"truncation_side": "left"}, True),
        ({"model_max_length": 6, "split_special_tokens": True}, True),
        ({"tokenizer_class": ...}, True),
        ({"tokenizer_class": "BertTokenizerFast", "tokenize_chinese_chars": False}, True),
        ({"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": False}, True),
        ({"tokenizer_class": "TokenizersBackend", "truncation_side": "left"}, True),
        ({"cls_token": "the", "sep_token": "of"}, True),
        ({"pad_token": {**TOKEN, "__type": "AddedToken", "content": "[PAD]"}}, True),
        ({"extra_special_tokens": ["[MASK]"]}, True),
        ({"extra_special_tokens": ["<new>"]}, False),
        ({"additional_special_tokens": ["<new>"]}, False),
        ({"added_tokens_decoder": {"100": {**TOKEN, "special": False}}}, False),
        ({"unk_token": "[MASK]"}, False),
        ({"new_token": "<new>"}, False),
        ({"tokenizer_class": "DistilBertTokenizer", "do_lower_case": False}, False),
        ({"unheard_of": 1}, False),
    ],
)
def test_tokenizers_are_those_of_transformers(
    st: Any, base: Path, tmp_path: Path, config: dict | None, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And those of which it can be told are made without it, which takes seconds to import."""
    from transformers import AutoTokenizer

    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, tmp_path / name)
    if config is None:
        (tmp_path / "tokenizer_config.json").unlink()
    else:
        edit(tmp_path / "tokenizer_config.json", **config)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    if own:
        monkeypatch.setattr(AutoTokenizer, "from_pretrained", None)
    ours = read_tokenizer(tmp_path)
    limit = min(theirs.model_max_length, POSITIONS)
    ours.enable_truncation(limit, direction=ours.truncation["direction"])
    wanted = theirs(ODD, truncation="longest_first", max_length=limit)["input_ids"]
    assert [encoding.ids for encoding in ours.encode_batch(ODD)] == wanted


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_are_cut_on_the_side_that_the_folder_says(st: Any, make: Callable[..., Path], side: str) -> None:
    folder = make()
    edit(folder / "tokenizer_config.json", truncation_side=side, model_max_length=8)
    with pytest.warns(UserWarning, match="longer than 8 tokens"):
        same(st, folder, [LONG, *TEXTS])


def test_a_token_without_a_row_is_refused_where_it_occurs(st: Any, make: Callable[..., Path]) -> None:
    folder = make()
    edit(folder / "tokenizer_config.json", extra_special_tokens=["<new>"])
    same(st, folder)
    message = r"encode: text 1 has the token '<new>', which the tokenizer numbers 100; vocab_size in config.json is 100"
    with pytest.raises(aq.AqError, match=message):
        load(folder).encode(["the sea", "a <new> sea"])


def test_a_classifier_is_not_used_to_embed(st: Any, make: Callable[..., Path]) -> None:
    folder = make()
    tensors = load_file(folder / "model.safetensors")
    heads = {"classifier.weight": np.ones((2, WIDTH), np.float32), "qa_outputs.bias": np.ones(2, np.float32)}
    save_file(tensors | heads, folder / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match=r"classifier\.weight, qa_outputs\.bias are a classifier's, and not used"):
        same(st, folder)


# ------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("config_sentence_transformers.json", {"default_prompt_name": "x"}, "default_prompt_name is 'x'; prompts has"),
        ("config_sentence_transformers.json", {"default_prompt_name": ["x"]}, r"default_prompt_name is \['x'\]"),
        ("config_sentence_transformers.json", {"prompts": ["a"]}, "wanted an object of names and strings"),
        ("config_sentence_transformers.json", {"truncate_dim": 0}, "truncate_dim is 0; wanted a positive integer"),
        ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}, "model_type is 'SparseEncoder'"),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "transformer_task is 'fill-mask'"),
        ("sentence_bert_config.json", {"module_output_name": "sentence_embedding"}, "module_output_name is"),
        ("sentence_bert_config.json", {"processing_kwargs": {"text": {"max_length": 4}}}, "processing_kwargs is"),
        (
            "sentence_bert_config.json",
            {"config_kwargs": {"num_hidden_layers": 0}},
            "has num_hidden_layers, which",
        ),
        ("sentence_bert_config.json", {"model_args": [1]}, r"model_args is '\[1\]'; wanted an object"),
        ("sentence_bert_config.json", {"unheard": 1}, "has unheard, which is not known here"),
        ("1_Pooling/config.json", {"pooling_mode": "median"}, r"pools by \['median'\]; wanted one or more of cls, max"),
        ("1_Pooling/config.json", {"include_prompt": "no"}, "include_prompt is 'no'"),
        ("2_Dense/config.json", {"activation_function": "my.code.Swish"}, "activation_function is 'my.code.Swish'"),
        ("2_Dense/config.json", {"activation_function": "torch.nn.Softmax"}, "activation_function is 'torch.nn.Softm"),
        ("2_Dense/config.json", {"module_input_name": "token_embeddings"}, "module_input_name is 'token_embeddings'"),
        ("2_Dense/config.json", {"in_features": 31}, r"linear\.weight is float32 of shape \[20, 32\]; wanted"),
        ("2_Dense/config.json", {"bias": False}, r"holds \['linear.bias', 'linear.weight'\]; wanted linear.weight"),
        ("3_LayerNorm/config.json", {"dimension": 2**40}, "dimension is 1099511627776"),
        ("3_LayerNorm/config.json", {"eps": 1.0}, "has eps; known is dimension"),
    ],
)
def test_what_is_not_computed_is_refused(
    st: Any, make: Callable[..., Path], file: str, fields: dict[str, Any], message: str
) -> None:
    parts = st.sentence_transformer.modules
    folder = make(parts.Dense(WIDTH, 20), parts.LayerNorm(20))
    edit(folder / file, **fields)
    with pytest.raises(aq.FormatError, match=message) as caught:
        read_sentences(folder, POSITIONS, WIDTH)
    assert str(folder / Path(file).parent) in str(caught.value)


@pytest.mark.parametrize("path", ["../other", "/etc", "a/../../b", "C:\\x", 3])
def test_a_folder_outside_is_refused(make: Callable[..., Path], path: object) -> None:
    folder = make()
    modules = json.loads((folder / "modules.json").read_text())
    for i in (0, 1):
        oracle.write_json(
            folder / "modules.json", [entry | {"path": path} if j == i else entry for j, entry in enumerate(modules)]
        )
        with pytest.raises(aq.FormatError, match="wanted one inside this folder"):
            read_sentences(folder, POSITIONS, WIDTH)


def test_weights_that_are_missing_or_damaged_are_named(st: Any, make: Callable[..., Path]) -> None:
    folder = make(st.sentence_transformer.modules.Dense(WIDTH, 20))
    file = folder / "2_Dense" / "model.safetensors"
    data = file.read_bytes()
    for bad, message in (
        (data[:-1], "not a safetensors file"),
        (b"\xff" * 16, "not a safetensors"),
        (b"", "not a saf"),
    ):
        file.write_bytes(bad)
        with pytest.raises(aq.FormatError, match=message):
            read_sentences(folder, POSITIONS, WIDTH)
    file.write_bytes(data[:-4] + b"\x00\x00\xc0\x7f")
    with pytest.raises(aq.FormatError, match="numbers that are not finite"):
        read_sentences(folder, POSITIONS, WIDTH)
    file.rename(folder / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(aq.FormatError, match=r"2_Dense/pytorch_model\.bin: is a pickle, which can run code"):
        read_sentences(folder, POSITIONS, WIDTH)
    (folder / "2_Dense" / "pytorch_model.bin").unlink()
    with pytest.raises(aq.FormatError, match=r"2_Dense/model\.safetensors: no such file; wanted linear\.weight"):
        read_sentences(folder, POSITIONS, WIDTH)


def test_modules_must_fit_each_other(st: Any, make: Callable[..., Path]) -> None:
    folder = make(st.sentence_transformer.modules.Dense(WIDTH, 20))
    with pytest.raises(aq.FormatError, match="2_Dense: takes 32 numbers; the stage before it gives 33"):
        read_sentences(folder, POSITIONS, 33)


def test_code_of_a_folder_is_not_imported(st: Any, make: Callable[..., Path]) -> None:
    folder = make()
    (folder / "mine.py").write_text("raise SystemExit")
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.T", "mine.T"]}, tokenizer_class="Mine")
    assert read_sentence_tokenizer(folder).encode("the sea").ids == oracle.tokenizer().encode("the sea").ids
    modules = json.loads((folder / "modules.json").read_text())
    oracle.write_json(folder / "modules.json", [*modules, {"type": "mine.Dense", "path": ""}])
    with pytest.raises(aq.FormatError, match=r"modules\.json: has \['Transformer', 'Pooling', 'mine\.Dense'\]; wanted"):
        read_sentences(folder, POSITIONS)


# ------------------------------------------------------------------------------------------------ numerics

STAGES = (
    Pooling(("mean", "weightedmean", "max"), include_prompt=False),
    Dense(
        np.random.default_rng(0).normal(size=(48, 24)).astype(np.float32) / 7, np.linspace(-1, 1, 24, dtype=np.float32)
    ),
    LayerNorm(np.linspace(0.5, 2, 24, dtype=np.float32), np.ones(24, np.float32)),
    Normalize(),
)


def test_what_follows_a_pooling_does_not_depend_on_the_batch() -> None:
    """Bit for bit, in any number of rows; where tokens are padded, sums over them are rounded otherwise."""
    hidden = np.random.default_rng(1).normal(size=(7, 8, 16)).astype(np.float32)
    run = jax.jit(lambda hidden, mask: embed(hidden, mask, STAGES, 1))
    mask = np.arange(8)[None] < np.array([8, 3, 5, 2, 4, 6, 7])[:, None]
    whole = np.asarray(run(hidden, mask))
    padded = np.asarray(run(np.pad(hidden, ((0, 9), (0, 0), (0, 0))), np.pad(mask, ((0, 9), (0, 0)))))
    assert np.isfinite(padded).all()
    assert padded[:7].tobytes() == whole.tobytes()
    longer = np.asarray(run(np.pad(hidden, ((0, 0), (0, 24), (0, 0))), np.pad(mask, ((0, 0), (0, 24)))))
    np.testing.assert_allclose(longer, whole, rtol=1e-5, atol=1e-6)
    for i in range(7):
        assert np.asarray(run(hidden[i : i + 1], mask[i : i + 1])).tobytes() == whole[i].tobytes()


def test_gradients_are_those_of_differences() -> None:
    """Of every stage, and finite for a sentence of no tokens: training moves weights by them."""
    rng = np.random.default_rng(2)
    hidden, way = (jnp.asarray(rng.normal(size=(2, 4, 16)), jnp.float32) for _ in range(2))
    mask = jnp.array([[True] * 4, [False] * 4])
    loss = jax.jit(lambda x: embed(x, mask, STAGES)[0] @ jnp.arange(24, dtype=jnp.float32))
    slope = jnp.vdot(jax.jit(jax.grad(loss))(hidden), way)
    steep = (loss(hidden + 1e-2 * way) - loss(hidden - 1e-2 * way)) / 2e-2
    np.testing.assert_allclose(slope, steep, rtol=2e-2)


@pytest.mark.slow  # whole models under every switch: tests/cli/test_switches.py
@pytest.mark.parametrize(
    ("switch", "value"),
    [
        ("jax_enable_x64", True), ("jax_numpy_rank_promotion", "raise"), ("jax_numpy_dtype_promotion", "strict"),
        ("jax_disable_jit", True), ("jax_debug_nans", True),
    ],
)  # fmt: skip
def test_jaxs_switches_change_nothing(switch: str, value: object) -> None:
    hidden = np.random.default_rng(1).normal(size=(3, 8, 16)).astype(np.float32)
    mask = np.arange(8)[None] < np.array([8, 3, 0])[:, None]

    def run() -> np.ndarray:
        alone = [np.asarray(embed(jnp.asarray(hidden), jnp.asarray(mask), (Pooling((mode,)),), 1)) for mode in MODES]
        return np.concatenate([*alone, np.asarray(embed(jnp.asarray(hidden), jnp.asarray(mask), STAGES, 1))], axis=1)

    before = run()
    old = getattr(jax.config, switch)
    jax.config.update(switch, value)
    try:
        after = run()
    finally:
        jax.config.update(switch, old)
    assert after.dtype == np.float32
    np.testing.assert_allclose(after, before, rtol=1e-6, atol=1e-6)
