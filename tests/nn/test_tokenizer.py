"""Tokenizers and special tokens of folders are those of transformers, which is asked where the files do not tell."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bert_oracle as oracle
import pytest
from helpers import run_alone
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

import aq_jax as aq
from aq_jax.nn import tokenizer
from aq_jax.nn.chat import read_chat_template
from aq_jax.nn.tokenizer import WITH_TYPES, read_tokenizer

CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast"}
MAP = {"special_tokens_map.json": {"cls_token": "<extra>"}}
ADDED = {"added_tokens.json": {"<extra>": 100}}


def write(folder: Path, kind: str, said: dict[str, Any] | None, files: dict[str, Any] | None = None) -> None:
    """Write a folder's files beside its tokenizer.json; `said` is tokenizer_config.json."""
    more = {"config.json": {"model_type": kind}, **(files or {})}
    for name, fields in (more if said is None else more | {"tokenizer_config.json": said}).items():
        oracle.write_json(folder / name, fields)


@pytest.mark.parametrize(
    ("kind", "said", "files", "asked"),
    [
        *((kind, None, {}, True) for kind in ("roberta", "xlm-roberta", "camembert", "mpnet", "gemma2", "qwen2")),
        *((kind, None, {}, False) for kind in ("bert", "distilbert", "nomic_bert", "modernbert", "llama", "phi3")),
        *((kind, PLAIN, {}, False) for kind in ("roberta", "gemma3_text", "qwen3", "llama", "bert")),
        ("llama", None, MAP, True),
        ("llama", None, ADDED, True),
        ("llama", None, {"config.json": {"model_type": "llama", "tokenizer_class": "LlamaTokenizer"}}, True),
        ("llama", PLAIN, MAP, False),
    ],
)
def test_transformers_is_asked_where_it_does_not_take_the_file_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, said: dict | None, files: dict, asked: bool
) -> None:
    calls: list[Path] = []

    def ask(folder: Path, extra: object) -> Tokenizer:
        calls.append(folder)
        return oracle.tokenizer()

    monkeypatch.setattr(tokenizer, "_by_transformers", ask)
    oracle.tokenizer().save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, kind, said, files)
    read_tokenizer(tmp_path)
    assert calls == [tmp_path] * asked


def test_templates_get_the_tokens_that_files_name_and_those_of_the_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rendered(said: dict[str, Any], source: str = TEMPLATE, files: dict[str, Any] | None = None) -> str:
        write(tmp_path, "llama", said | {"chat_template": source}, files)
        found = read_chat_template(tmp_path)
        assert found is not None
        return found.render(CHAT)

    named = {"bos_token": "<s>", "eos_token": {"content": "</s>", "__type": "AddedToken"}, "img_token": "<i>"}
    extra = {"extra_special_tokens": {"image_token": "<img>"}}
    monkeypatch.setattr(tokenizer, "_transformers", None)  # it is not asked
    for kind in ("PreTrainedTokenizerFast", "Qwen2Tokenizer"):
        said = {"tokenizer_class": kind} | named | extra
        assert rendered(said) == "<s>hello</s>world</s>"
        assert rendered(said, "{{ image_token }}{{ img_token }}") == "<img><i>"
    assert rendered(PLAIN) == "helloworld"
    assert (
        rendered({"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "</s>"}) == "hello</s>world</s>"
    )
    older = {"special_tokens_map.json": {"eos_token": "<e>"}}
    assert rendered(PLAIN | named, files=older) == "<s>hello<e>world<e>"
    assert rendered(PLAIN | named | {"added_tokens_decoder": {}}, files=older) == "<s>hello</s>world</s>"

    (tmp_path / "special_tokens_map.json").unlink()
    monkeypatch.setattr(tokenizer, "_transformers", lambda _: SimpleNamespace(special_tokens_map={"eos_token": "<o>"}))
    assert rendered({"tokenizer_class": "Qwen2Tokenizer"}) == "hello<o>world<o>"
    monkeypatch.setattr(tokenizer, "_transformers", None)
    wanted = r"tokenizer_config\.json: names no bos_token, eos_token, which the chat template may need, and no Odd can"
    with pytest.raises(aq.FormatError, match=wanted):
        rendered({"tokenizer_class": "Odd"})


# ------------------------------------------------------------------------------------------------ transformers


def bytes_of_pairs() -> Tokenizer:
    special = ["<s>", "</s>", "<unk>", "<pad>", "<mask>"]
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *special]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(special)
    return made


def pieces() -> Tokenizer:
    words = ["<unk>", "<s>", "</s>", "\u2581", *"helowrdatc", "\u2581hello", "<mask>"]
    made = Tokenizer(models.Unigram([(word, -float(i)) for i, word in enumerate(words)], 0, False))
    made.pre_tokenizer, made.decoder, made.normalizer = (
        pre_tokenizers.Metaspace(), decoders.Metaspace(), normalizers.NFKC(),
    )  # fmt: skip
    made.add_special_tokens(["<s>", "</s>", "<unk>", "<mask>"])
    special = [("<s>", 1), ("</s>", 2)]
    made.post_processor = processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> $B </s>", special)
    return made


def words() -> Tokenizer:
    made = oracle.tokenizer()
    made.normalizer = normalizers.BertNormalizer(lowercase=False)
    return made


CASES: dict[str, tuple[Any, str, dict[str, Any] | None, dict[str, Any]]] = {
    "roberta": (bytes_of_pairs, "roberta", None, {}),
    "xlm-roberta": (pieces, "xlm-roberta", None, {}),
    "camembert": (pieces, "camembert", None, {}),
    "distilbert": (words, "distilbert", None, {}),
    "nomic_bert": (words, "nomic_bert", None, {}),
    "mpnet": (words, "mpnet", None, {}),
    "qwen3": (bytes_of_pairs, "qwen3", None, {}),
    "llama": (bytes_of_pairs, "llama", None, {}),
    "llama and a map": (bytes_of_pairs, "llama", None, MAP),
    "llama and added tokens": (bytes_of_pairs, "llama", None, {"added_tokens.json": {"<extra>": 261}}),
    "nothing named, GPT-2": (bytes_of_pairs, "llama", {"tokenizer_class": "GPT2Tokenizer"}, {}),
    "nothing named, Qwen": (bytes_of_pairs, "qwen2", {"tokenizer_class": "Qwen2Tokenizer"}, {}),
    "nothing named, Gemma": (bytes_of_pairs, "gemma", {"tokenizer_class": "GemmaTokenizer"}, {}),
    "nothing named, Llama": (bytes_of_pairs, "llama", {"tokenizer_class": "LlamaTokenizer"}, {}),
    "an image": (bytes_of_pairs, "llama", PLAIN | {"extra_special_tokens": {"image_token": "<i>"}}, {}),
}  # fmt: skip
THEIRS = """
import json, sys
sys.modules["torch"] = None
from pathlib import Path
import transformers
from transformers import AutoTokenizer
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name
from aq_jax.nn.chat import read_chat_template
from aq_jax.nn.tokenizer import read_tokenizer
folder, names, texts, chat = json.loads(sys.argv[1])
out = {}
for name in names:
    here = Path(folder, name)
    theirs = AutoTokenizer.from_pretrained(here)
    rendered = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ours = read_tokenizer(here)
    ids = [theirs(text)["input_ids"] for text in texts]
    out[name] = [[ids, rendered], [[ours.encode(text).ids for text in texts], read_chat_template(here).render(chat)]]
typed = []
others = (name for name in dir(transformers) if "Tokenizer" in name)
for name in {*filter(None, TOKENIZER_MAPPING_NAMES.values()), *others}:
    try:
        names = getattr(tokenizer_class_from_name(name), "model_input_names", ())
    except ImportError:  # of a package that is not installed
        continue
    typed += [name] if "token_type_ids" in names else []
print(json.dumps([out, typed]))
"""


@pytest.mark.slow  # importing transformers takes longer than all other tests here
def test_ids_special_tokens_and_types_are_those_of_transformers(tmp_path: Path) -> None:
    for name, (make, kind, said, files) in CASES.items():
        (tmp_path / name).mkdir()
        make().save(str(tmp_path / name / "tokenizer.json"))
        write(tmp_path / name, kind, said, files)
        (tmp_path / name / "chat_template.jinja").write_text(TEMPLATE + "{{ image_token }}")
    texts = ["hello world", "  Hello  w\u00f6rld", "a<s>b </s> c", "", "<pad>z <extra> q ", "don't I'll"]
    said = run_alone(
        tmp_path, THEIRS, json.dumps([str(tmp_path), list(CASES), texts, CHAT]), PYTHONPATH=":".join(sys.path)
    )
    found, typed = json.loads(said.splitlines()[-1])
    for name, (theirs, ours) in found.items():
        assert ours == theirs, name
    assert set(typed) == WITH_TYPES
