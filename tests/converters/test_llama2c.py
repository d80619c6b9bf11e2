"""llama2.c's files as they should be, and as they should not."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

import llama2c_oracle as oracle
import numpy as np
import pytest
from helpers import listing, run_alone
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

import aq_jax as aq
from aq_jax.converters import huggingface, llama2c
from aq_jax.converters.llama2c_tokenizer import build_tokenizer, read_pieces

PIECES = [
    " t", "he", " the", "an", " an", "aa", "aaaa", "aaa", "  ", "    ", "ab", "aba", "<s", "<s>", "\n\n", "é€", "ππ",
    " ", "t", "h", "e", "a", "n", "b", "<", "s", ">", "\n", "é", "€", "π",
]  # fmt: skip
VOCAB = len(oracle.FIRST) + len(PIECES)
SHAPE = {"dim": 16, "hidden": 24, "layers": 2, "heads": 4, "kv_heads": 2, "vocab": VOCAB, "seq": 12}
TOKENS = [1, 270, 259, 276, 3, 280, 0, VOCAB - 1, 270, 2]
# What run.c calls a tensor, where transformers has it.
NAMES = {
    "rms_att_weight": "input_layernorm",
    "wq": "self_attn.q_proj", "wk": "self_attn.k_proj", "wv": "self_attn.v_proj", "wo": "self_attn.o_proj",
    "rms_ffn_weight": "post_attention_layernorm",
    "w1": "mlp.gate_proj", "w2": "mlp.down_proj", "w3": "mlp.up_proj",
}  # fmt: skip
SIDE_FILES = ["config.json", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(params=[True, False], ids=["shared", "unshared"])
def shared(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture
def model(tmp_path: Path) -> Path:
    oracle.write_model(tmp_path / "model.bin", **SHAPE)
    return tmp_path / "model.bin"


@pytest.fixture
def tok(tmp_path: Path) -> Path:
    assert oracle.write_tokenizer(tmp_path / "tok.bin", PIECES) == VOCAB
    return tmp_path / "tok.bin"


def unpaired(w: np.ndarray, heads: int) -> np.ndarray:
    """Row by row: the even rows of a head, then its odd rows."""
    size = len(w) // heads
    order = [h * size + i for h in range(heads) for i in (*range(0, size, 2), *range(1, size, 2))]
    return w[order]


# ------------------------------------------------------------------------------------------------ the model


def test_every_tensor_has_its_name_its_shape_and_its_values(tmp_path: Path, tok: Path, shared: bool) -> None:
    path = tmp_path / "model.bin"
    oracle.write_model(path, **SHAPE, shared=shared)
    done = llama2c.to_table(path, tok, tmp_path / "out" / "m.parquet")
    assert listing(tmp_path / "out") == sorted(["m.parquet", *SIDE_FILES])

    h, arrays = oracle.read_model(path)
    wanted = {"model.embed_tokens.weight": arrays["token_embedding_table"], "lm_head.weight": arrays["wcls"]}
    wanted["model.norm.weight"] = arrays["rms_final_weight"]
    for name, part in NAMES.items():
        for layer in range(h["layers"]):
            array = arrays[name][layer]
            if name in ("wq", "wk"):
                array = unpaired(array, h["heads" if name == "wq" else "kv_heads"])
            wanted[f"model.layers.{layer}.{part}.weight"] = array
    with aq.WeightLoader(tmp_path / "out" / "m.parquet") as loader:
        assert loader.aliases == ({"lm_head.weight": "model.embed_tokens.weight"} if shared else {})
        found = loader.load_weights("numpy")
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        assert (found[name].dtype, found[name].shape) == (np.float32, array.shape), name
        assert np.array_equal(found[name], array), name
    assert done.source_bytes == sum(array.nbytes for name, array in wanted.items() if not (shared and "head" in name))
    assert list(found)[:2] == ["model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"]


def test_config_says_what_the_header_says(tmp_path: Path, tok: Path, shared: bool) -> None:
    oracle.write_model(tmp_path / "model.bin", **SHAPE, shared=shared)
    llama2c.to_table(tmp_path / "model.bin", tok, tmp_path / "m.arrow")
    config = json.loads((tmp_path / "config.json").read_text())
    wanted = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 12, "head_dim": 4,
        "tie_word_embeddings": shared, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": [1, 2],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip
    assert config | wanted == config


def test_halves_turn_as_pairs_do(rng: np.random.Generator) -> None:
    heads, size, angles = 3, 8, rng.normal(size=4)
    q, k = rng.normal(size=(2, heads * size, 5)).astype(np.float32)

    def pairs(x: np.ndarray) -> np.ndarray:
        z = x.reshape(heads, size // 2, 2, 5)
        turned = (z[:, :, 0] + 1j * z[:, :, 1]) * np.exp(1j * angles)[:, None]
        return np.concatenate([turned.real, turned.imag], axis=1)

    def halved(x: np.ndarray) -> np.ndarray:
        z = x.reshape(heads, size, 5)
        turned = (z[:, : size // 2] + 1j * z[:, size // 2 :]) * np.exp(1j * angles)[:, None]
        return np.concatenate([turned.real, turned.imag], axis=1)

    for w in (q, k):
        np.testing.assert_array_equal(halved(llama2c.permute_rotary(w, heads)), pairs(w))


def test_tensors_are_views_of_the_file(model: Path) -> None:
    source = llama2c.Llama2cFile(model)
    for name in source.shapes:
        array = source.read(name)
        assert array.base is not None
        assert array.flags.writeable == ("q_proj" in name or "k_proj" in name), name


def test_a_model_is_quantized_on_the_way(model: Path, tok: Path, tmp_path: Path) -> None:
    seen: list[str] = []
    config = aq.QuantizationConfig("int8", mixed_precision_layers=["embed"])
    done = llama2c.to_table(
        model, tok, tmp_path / "m.parquet", config, compression="zstd", progress=lambda name, *_: seen.append(name)
    )
    assert set(done.quantized) == {name for name in seen if "proj" in name}
    assert len(done.quantized) == 14
    assert min(done.quantized.values()) > 0.999


# In a process of its own: transformers sets up warnings of its own when it is imported.
TRANSFORMERS = """
import json, sys, warnings
warnings.simplefilter("error")
# torch.jit.script is deprecated, and transformers still uses it while it is imported.
warnings.filterwarnings("ignore", message=r"`torch\\.jit\\.", category=DeprecationWarning)
import numpy as np, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokens, texts = json.loads(sys.argv[1])
for folder in sys.argv[2:]:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == model.config.tie_word_embeddings
    with torch.no_grad():
        np.save(folder + "/logits.npy", model.eval()(torch.tensor([tokens])).logits[0].numpy())
    for end in (1, 2):
        def end_third(ids, scores):
            scores[:, [1, 2]] = -torch.inf
            if ids.shape[1] == 4:
                scores[:, end] = 1e9
            return scores
        ids = model.generate(torch.tensor([[1, 270]]), max_new_tokens=8, do_sample=False, logits_processor=[end_third])
        assert ids.shape == (1, 5) and ids[0, -1] == end, ids
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.model_max_length) == (1, 2, 12)
    ids = [tokenizer(text)["input_ids"] for text in texts]
    back = [tokenizer.decode(i, skip_special_tokens=True) for i in ids]
    with open(folder + "/ids.json", "w") as file:
        json.dump([ids, back], file)
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
def test_transformers_computes_what_llama2c_does(tmp_path: Path, tok: Path) -> None:
    texts = ["then an aaaaaa", "", "  the 😀 <s> </s>\n<s>\n\n</s>\n <unk> <0x41> ▁"]
    kinds = {"shared": True, "own": False}
    for kind, is_shared in kinds.items():
        oracle.write_model(tmp_path / f"{kind}.bin", **SHAPE, shared=is_shared, seed=3)
        llama2c.to_table(tmp_path / f"{kind}.bin", tok, tmp_path / kind / "m.parquet")
        huggingface.from_table(tmp_path / kind / "m.parquet", tmp_path / kind)
    run_alone(tmp_path, TRANSFORMERS, json.dumps([TOKENS, texts]), *(tmp_path / kind for kind in kinds))
    for kind in kinds:
        wanted = oracle.logits(tmp_path / f"{kind}.bin", TOKENS)
        assert wanted.std() > 0.3
        np.testing.assert_allclose(np.load(tmp_path / kind / "logits.npy"), wanted, atol=2e-5, rtol=0)
        ids, back = json.loads((tmp_path / kind / "ids.json").read_text())
        assert ids == [oracle.encode(tok, VOCAB, text) for text in texts]
        assert back == texts


# ------------------------------------------------------------------------------------------------ the tokenizer


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tokenizer]:
    """A tokenizer of llama2.c, and what became of it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    oracle.write_model(folder / "model.bin", **SHAPE)
    oracle.write_tokenizer(folder / "tok.bin", PIECES)
    llama2c.to_table(folder / "model.bin", folder / "tok.bin", folder / "m.parquet")
    return folder / "tok.bin", Tokenizer.from_file(str(folder / "tokenizer.json"))


TEXT = st.one_of(
    st.text(max_size=40),
    st.text("the an\nab", max_size=60),
    st.lists(st.sampled_from([*PIECES, "<unk>", "</s>", "<0x41>", "▁", "😀", "\u0301"]), max_size=20).map("".join),
)


@settings(max_examples=150)
@given(text=TEXT)
def test_texts_are_encoded_as_llama2c_does_and_come_back(both: tuple[Path, Tokenizer], text: str) -> None:
    path, tokenizer = both
    wanted = oracle.encode(path, VOCAB, text)
    # The one text that differs is the name of a special token, and only while it is asked to be seen as one.
    tokenizer.encode_special_tokens = "\n<s>\n" in text or "\n</s>\n" in text
    assert tokenizer.encode(text).ids == wanted
    assert tokenizer.encode(text, add_special_tokens=False).ids == wanted[1:]
    assert tokenizer.decode(wanted) == text
    assert oracle.decode(path, VOCAB, wanted).decode() == text


def test_names_of_special_tokens_are_those_of_the_file(both: tuple[Path, Tokenizer]) -> None:
    path, tokenizer = both
    tokenizer.encode_special_tokens = False
    assert [tokenizer.id_to_token(i) for i in (0, 1, 2, 3, 258)] == ["<unk>", "\n<s>\n", "\n</s>\n", "<0x00>", "<0xFF>"]
    assert tokenizer.get_vocab_size() == VOCAB
    assert tokenizer.encode("<s><unk></s>").ids == oracle.encode(path, VOCAB, "<s><unk></s>")
    assert 1 in tokenizer.encode("a\n<s>\n").ids[1:]
    assert tokenizer.encode("a", "b").ids == [*oracle.encode(path, VOCAB, "a"), *oracle.encode(path, VOCAB, "b")]
    assert tokenizer.decode([1, 0, 2], skip_special_tokens=False) == "\n<s>\n<unk>\n</s>\n"


@st.composite
def vocabularies(draw: st.DrawFn) -> list[str]:
    """Pieces that are made of each other in every way, in any order of merit, now and then with one missing."""
    letters = draw(st.sampled_from(["a", "ab", "aé"]))
    pieces = [" ", *letters]
    for _ in range(draw(st.integers(2, 15))):
        made = draw(st.sampled_from(pieces)) + draw(st.sampled_from(pieces))
        if made not in pieces and len(made) < 9:
            pieces.append(made)
    if draw(st.booleans()):
        pieces.remove(draw(st.sampled_from(pieces[1:])))
    return draw(st.permutations(pieces))


@settings(max_examples=80)
@given(pieces=vocabularies(), data=st.data())
def test_any_vocabulary_merges_as_llama2c_does(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[str], data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.bin"
    size = oracle.write_tokenizer(path, pieces)
    tokenizer = build_tokenizer(read_pieces(path, size))
    for text in data.draw(st.lists(st.text("ab é", max_size=24), min_size=3, max_size=3)):
        assert tokenizer.encode(text).ids == oracle.encode(path, size, text), text


def test_what_llama2c_never_merges_is_no_merge(tmp_path: Path) -> None:
    pieces, scores = ["ab", "ba", " ", "a", "b"], [-2e10, -1.0, -2.0, -3.0, -4.0]
    size = oracle.write_tokenizer(tmp_path / "t.bin", pieces, scores)
    tokenizer = build_tokenizer(read_pieces(tmp_path / "t.bin", size))
    for text in ("ab", "abab"):
        assert tokenizer.encode(text).ids == oracle.encode(tmp_path / "t.bin", size, text)


def test_a_tie_between_pieces_is_refused(model: Path, tmp_path: Path) -> None:
    scores = [-float(i) for i in range(len(PIECES))]
    scores[3] = scores[1]
    oracle.write_tokenizer(tmp_path / "tok.bin", PIECES, scores)
    with pytest.raises(aq.FormatError, match=r"tok.bin: 'he' and 'an' both have score -1.0; wanted different ones"):
        llama2c.to_table(model, tmp_path / "tok.bin", tmp_path / "out" / "m.parquet")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ what is wrong


def refused(model: Path, tok: Path, culprit: Path, message: str) -> None:
    out = culprit.parent / "out"
    with pytest.raises(aq.FormatError, match=message) as caught:
        llama2c.to_table(model, tok, out / "m.parquet")
    assert str(culprit) in str(caught.value)
    assert not out.exists()


def test_a_model_cut_anywhere_is_refused(tmp_path: Path, tok: Path, shared: bool) -> None:
    path = tmp_path / "model.bin"
    oracle.write_model(path, **SHAPE, shared=shared)
    whole, ends = path.stat().st_size, [28]
    for name, array in oracle.read_model(path)[1].items():
        if name != "wcls" or not shared:
            for part in array if len(array) == SHAPE["layers"] else [array]:
                ends.append(ends[-1] + part.nbytes)
    assert ends[-1] == whole
    for cut in sorted({end + d for end in ends for d in (-4, -1, 0, 1)} | set(range(29)), reverse=True):
        if cut < whole:
            os.truncate(path, cut)
            wanted = f"cut, {whole - cut} bytes short: holds {cut}, wanted {whole} for Header" if cut >= 28 else "holds"
            refused(path, tok, path, wanted)


def test_a_tokenizer_cut_anywhere_is_refused(model: Path, tok: Path) -> None:
    last = re.compile(r"token \d+ of \d+, at byte \d+, ends after \d+ of \d+ bytes|max_token_length is 0")
    for cut in reversed(range(0, tok.stat().st_size, 5)):  # an entry is 14 bytes, so every place in one comes up
        os.truncate(tok, cut)
        with pytest.raises(aq.FormatError, match=last) as caught:
            read_pieces(tok, VOCAB)
        assert str(tok) in str(caught.value)
    refused(model, tok, tok, "max_token_length is 0; wanted 1 to 4096")


def test_a_file_too_long_is_refused(model: Path, tok: Path) -> None:
    for path, message in (
        (model, r"is 3 bytes too long: holds \d+, wanted"),
        (tok, "has 3 bytes after its 290 tokens"),
    ):
        whole = path.read_bytes()
        path.write_bytes(whole + b"abc")
        refused(model, tok, path, message)
        path.write_bytes(whole)


I32 = 2**31 - 1
GOOD = (16, 24, 2, 4, 2, VOCAB, 12)
WRONG_HEADERS: dict[str, tuple[tuple[int, ...], str]] = {
    **{
        f"{sign} {name}": ((*GOOD[:i], value, *GOOD[i + 1 :]), f"{name} is {value}; wanted 1 or more")
        for i, name in enumerate(("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "seq_len"))
        for sign, value in (("zero", 0), ("negative", -2))
        if (name, sign) != ("vocab_size", "negative")
    },
    "heads that do not divide": ((16, 24, 2, 3, 1, VOCAB, 12), "dim 16, n_heads 3, n_kv_heads 1; wanted an even dim"),
    "odd heads": ((12, 24, 2, 4, 2, VOCAB, 12), "dim 12, n_heads 4, n_kv_heads 2; wanted an even dim"),
    "heads that are not shared evenly": ((16, 24, 2, 4, 3, VOCAB, 12), "n_kv_heads 3; wanted an even dim"),
    "more key-value heads than heads": ((16, 24, 2, 4, 8, VOCAB, 12), "n_kv_heads 8; wanted an even dim"),
    "another size": ((16, 25, 2, 4, 2, VOCAB, 12), "bytes short"),
    "a head of its own that is not there": ((16, 24, 2, 4, 2, -VOCAB, 12), f"cut, {VOCAB * 64} bytes short"),
    "an endless size": ((I32 - 1, I32, I32, 1, 1, I32, I32), r"cut, \d{30} bytes short"),
    "an endless number of layers": ((2, 1, I32, 1, 1, 1, 1), "bytes short"),
    "the least of all integers": ((16, 24, 2, 4, 2, -(2**31), 12), "bytes short"),
    "a later version": ((0x616B3432, 1, 16, 24, 2, 4, 2), "is of version 1; wanted version 0"),
}


@pytest.mark.parametrize("what", WRONG_HEADERS)
def test_a_header_that_lies_is_refused(model: Path, tok: Path, what: str) -> None:
    fields, message = WRONG_HEADERS[what]
    model.write_bytes(struct.pack("<7i", *fields) + model.read_bytes()[28:])
    refused(model, tok, model, message)


def entry(data: bytes, token: int) -> int:
    """Where a token begins."""
    at = 4
    for _ in range(token):
        at += 8 + struct.unpack_from("<i", data, at + 4)[0]
    return at


def put(token: int, piece: bytes, score: float = -1.0, length: int | None = None) -> Callable[[bytes], bytes]:
    """Another piece in the place of a token."""

    def change(data: bytes) -> bytes:
        head = struct.pack("<fi", score, len(piece) if length is None else length)
        return data[: entry(data, token)] + head + piece + data[entry(data, token + 1) :]

    return change


WRONG_TOKENIZERS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "negative length": (put(260, b"he", length=-1), "token 260 of 290, at byte 3638, has length -1; wanted 1 to"),
    "endless length": (put(260, b"he", length=I32), f"has length {I32}; wanted 1 to max_token_length, 6"),
    "longer than the longest": (put(260, b"he he he"), "has length 8; wanted 1 to max_token_length, 6"),
    "empty piece": (put(260, b""), "has length 0; wanted 1 to"),
    "no UTF-8": (put(260, b"\xff\xfe"), r"is b'\\xff\\xfe'; wanted UTF-8: invalid start byte"),
    "half a character": (put(260, "é".encode()[:1]), "wanted UTF-8: unexpected end of data"),
    "a surrogate": (put(260, b"\xed\xa0\x80"), "wanted UTF-8: invalid continuation byte"),
    "twice the same": (put(261, b"he"), "token 261 of 290, .*, is 'he', as is token 260; wanted each piece once"),
    "not a number": (put(260, b"he", float("nan")), "'he', has score nan; wanted a finite one"),
    "an endless score": (put(260, b"he", float("inf")), "'he', has score inf; wanted a finite one"),
    "other bytes": (put(68, b"<0x40>"), "token 68 .*'<0x40>', as is token 67"),
    "no bytes": (put(68, b"A"), "token 68 .* is 'A'; wanted '<0x41>': run.c encodes"),
    "no space": (put(259 + PIECES.index(" "), b"_"), "has no token ' '"),
    "no longest": (lambda data: b"\0\0\0\0" + data[4:], "max_token_length is 0; wanted 1 to 4096"),
    "negative longest": (lambda data: b"\xff" * 4 + data[4:], "max_token_length is -1; wanted 1 to 4096"),
    "endless longest": (lambda data: struct.pack("<i", I32) + data[4:], f"max_token_length is {I32}; wanted 1"),
    "one token less": (lambda data: data[: entry(data, VOCAB - 1)], "token 289 .* ends after 0 of 8 bytes; is it"),
    "nothing": (lambda _: b"", "max_token_length is 0"),
}


@pytest.mark.parametrize("what", WRONG_TOKENIZERS)
def test_a_tokenizer_that_lies_is_refused(model: Path, tok: Path, what: str) -> None:
    change, message = WRONG_TOKENIZERS[what]
    tok.write_bytes(change(tok.read_bytes()))
    refused(model, tok, tok, message)


def test_a_vocabulary_without_all_bytes_is_refused(tmp_path: Path) -> None:
    model, tok = tmp_path / "model.bin", tmp_path / "tok.bin"
    oracle.write_model(model, **{**SHAPE, "vocab": 258})
    oracle.write_tokenizer(tok, PIECES)
    tok.write_bytes(tok.read_bytes()[: entry(tok.read_bytes(), 258)])
    refused(model, tok, tok, "has 258 tokens; wanted at least 259")


def test_files_that_are_not_there_are_named(model: Path, tok: Path, tmp_path: Path) -> None:
    for pair in ((tmp_path / "no.bin", tok), (model, tmp_path / "no.bin"), (tmp_path, tok), (model, tmp_path)):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            llama2c.to_table(*pair, tmp_path / "out" / "m.parquet")
    assert not (tmp_path / "out").exists()


def test_nothing_is_left_when_the_table_is_not_written(model: Path, tok: Path, tmp_path: Path) -> None:
    data = model.read_bytes()
    model.write_bytes(data[:28] + b"\xff" * 4 + data[32:])  # NaN, which cannot be quantized
    out = tmp_path / "out"
    with pytest.raises(aq.AqError, match=f"embed_tokens.weight: 1 of {VOCAB * 16} values are not finite"):
        llama2c.to_table(model, tok, out / "m.parquet", aq.QuantizationConfig("int8"))
    with pytest.raises(aq.FormatError, match=r"ends in \.parquet or \.arrow"):
        llama2c.to_table(model, tok, out / "m.bin")
    assert not out.exists() or listing(out) == []
    llama2c.to_table(model, tok, out / "m.parquet")  # as it is, it can be kept
    assert np.isnan(aq.load(out / "m.parquet", "numpy")["model.embed_tokens.weight"][0, 0])


@pytest.mark.parametrize("name", SIDE_FILES)
def test_another_models_files_are_not_replaced(model: Path, tok: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    llama2c.to_table(model, tok, out / "m.parquet")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    llama2c.to_table(model, tok, out / "n.parquet")  # equal ones are its own
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before | {"n.parquet": before["m.parquet"]}
    (out / name).write_text("{}")
    with pytest.raises(aq.FormatError, match=rf"out/{name}: already exists and differs"):
        llama2c.to_table(model, tok, out / "other.parquet")
    (out / name).unlink()
    (out / name).mkdir()
    with pytest.raises(aq.FormatError, match=rf"out/{name}: already exists and differs"):
        llama2c.to_table(model, tok, out / "other.parquet")
    assert "other.parquet" not in listing(out)
