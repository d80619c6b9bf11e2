"""GGUF files become tables whose values gguf-py's dequantization has, bit for bit, with config and tokenizer beside."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import gguf_file
import numpy as np
import pytest
from gguf_file import F16, F32, LLAMA, floats, whole

import aq_jax as aq
from aq_jax.config import ConversionConfig, ShardsConfig
from aq_jax.converters import open_source
from aq_jax.converters.gguf.names import ARCHITECTURES
from aq_jax.converters.gguf.types import TYPES
from aq_jax.converters.inspection import inspect
from aq_jax.store import open_table

GOLDEN = Path(__file__).parents[2] / "golden" / "gguf"
HEADS = {"query": 4, "key": 2}


def permuted(value: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the rows of queries and keys: in each head, i -> 2i, and d/2 + i -> 2i + 1."""
    size = len(value) // heads
    return np.concatenate([value[h * size + np.arange(size).reshape(2, -1).T.ravel()] for h in range(heads)])


def expected() -> dict[str, tuple[str, str]]:
    """The digest that gguf-py's values have, and what the converter did to them, by the name in Hugging Face."""
    digests: dict[str, str] = json.loads((GOLDEN / "expected.json").read_text())
    llama = ARCHITECTURES["llama"]
    return {ours: (digests[name], change) for name in digests for ours, change in [llama.find(name, "")]}


def digest_of(value: np.ndarray, change: str) -> str:
    value = permuted(value, HEADS[change]) if change in HEADS else value
    return hashlib.sha256(value.astype(np.float32).tobytes()).hexdigest()


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("gguf") / "m.parquet"
    aq.convert(ConversionConfig(str(GOLDEN / "llama.gguf"), str(output)))
    return output


def test_values_are_gguf_pys_bit_for_bit(table: Path) -> None:
    found, wanted = aq.load(table, "numpy"), expected()
    assert set(found) == {*wanted, "lm_head.weight"}
    with open_source(GOLDEN / "llama.gguf") as source:
        for name, (digest, change) in wanted.items():
            assert digest_of(found[name], change) == digest, name
            assert digest_of(np.asarray(source.read(name)), change) == digest, name


def test_weights_stay_packed_and_small(table: Path) -> None:
    with open_table(table) as opened:
        rows = {name: opened.pieces(name)[0] for name in opened.names}
        kinds = {row.quant_type for row in rows.values()}
        assert opened.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert kinds == {each.quant_type for each in TYPES.values() if each.quant_type} | {"none"}
    query = rows["model.layers.0.self_attn.q_proj.weight"]
    assert (query.quant_type, query.solver, query.dtype) == ("q4_k", "GGUF Q4_K", "float32")
    assert rows["model.layers.1.mlp.up_proj.weight"].dtype == "float16"
    with open_source(GOLDEN / "llama.gguf", packed=True) as source:
        assert sum(row.disk_bytes for row in rows.values()) < 1.05 * sum(map(source.nbytes, source.shapes))


def test_the_config_and_the_tokenizer_are_rebuilt(table: Path) -> None:
    from tokenizers import Tokenizer

    config = json.loads((table.parent / "config.json").read_text())
    wanted = {
        "model_type": "llama", "hidden_size": 256, "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 4,
        "vocab_size": 12, "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "attention_bias": False,
    }  # fmt: skip
    assert config.items() >= wanted.items()
    tokenizer = Tokenizer.from_file(str(table.parent / "tokenizer.json"))
    assert tokenizer.encode("ab abcd").ids == [1, 8, 9, 10]
    assert tokenizer.encode("</s>").ids == [1, 2]
    said = json.loads((table.parent / "tokenizer_config.json").read_text())
    assert (said["bos_token"], said["unk_token"], said["chat_template"]) == ("<s>", "<unk>", "{{ messages }}")
    model = aq.load_model(table)
    assert model.score("ab abcd").shape == (3,)


def test_a_headers_tensors_are_listed_without_jax(table: Path) -> None:
    found = inspect(GOLDEN / "llama.gguf")
    layers = {layer.name: layer for layer in found.layers}
    assert (found.format, found.version, len(layers)) == ("gguf", 0, len(expected()))
    query = layers["model.layers.0.self_attn.q_proj.weight"]
    assert (query.shape, query.quant_type, query.bits) == ((16, 256), "q4_k", 4.5)


def test_shards_and_requantizing(table: Path, tmp_path: Path) -> None:
    source = str(GOLDEN / "llama.gguf")
    shards = ConversionConfig(source, str(tmp_path / "shards"), shards=ShardsConfig(size=30_000, workers=1))
    done = aq.convert(shards)
    assert len(list((tmp_path / "shards").glob("*.parquet"))) > 1
    found, wanted = aq.load(done.path, "numpy"), aq.load(table, "numpy")
    assert all(found[name].tobytes() == wanted[name].tobytes() for name in wanted)
    int8 = aq.QuantizationConfig("int8")
    with pytest.raises(aq.FormatError, match=r"embed_tokens\.weight: is int8_f16 already, and would be rounded twice"):
        aq.convert(ConversionConfig(source, str(tmp_path / "m.parquet"), int8))
    done = aq.convert(ConversionConfig(source, str(tmp_path / "m.parquet"), int8, requantize=True))
    assert "model.layers.1.mlp.down_proj.weight" in done.quantized
    assert any("are quantized again: their errors add up" in note for note in done.notes)


# ------------------------------------------------------------------------------------------------ small files

EMBED = {"token_embd.weight": floats((3, 8))}


def opened(path: Path, content: bytes, packed: bool = True) -> Any:
    path.write_bytes(content)
    with open_source(path, packed=packed) as source:
        return source


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [1, 8, 64])
def test_versions_and_alignments(version: int, alignment: int, tmp_path: Path) -> None:
    tensors = EMBED | {"output_norm.weight": floats((3,), 1), "output.weight": floats((3, 8), 2)}
    fields = LLAMA | {"general.alignment": alignment}
    source = opened(tmp_path / "m.gguf", whole(fields, tensors, version, alignment))
    for name, ours in zip(tensors, ("model.embed_tokens", "model.norm", "lm_head"), strict=True):
        assert source.read(f"{ours}.weight").tobytes() == tensors[name][2]
    assert not source.aliases


def test_gains_lose_what_was_added(tmp_path: Path) -> None:
    fields = {"general.architecture": "gemma3"}
    gain = np.array([1.5, 1.0, 0.25], "<f4")
    source = opened(tmp_path / "m.gguf", whole(fields, {"blk.0.post_ffw_norm.weight": ((3,), F32, gain.tobytes())}))
    assert source.read("model.layers.0.post_feedforward_layernorm.weight").tolist() == [0.5, 0.0, -0.75]


def test_split_files_are_one(tmp_path: Path) -> None:
    said = {"split.count": 2, "split.tensors.count": 2}
    parts = [tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    parts[0].write_bytes(whole(LLAMA | said | {"split.no": 0}, EMBED))
    with (
        pytest.raises(aq.FormatError, match=r"its part m-00002-of-00002\.gguf is not beside it"),
        open_source(parts[0]),
    ):
        pass
    norm = {"output_norm.weight": floats((8,))}
    parts[1].write_bytes(whole(said | {"split.no": 1}, norm))
    with open_source(parts[1]) as source:
        assert set(source.shapes) == {"model.embed_tokens.weight", "model.norm.weight"}
        assert source.read("model.norm.weight").tobytes() == norm["output_norm.weight"][2]
    for content, wrong in (
        (whole(said | {"split.no": 0}, norm), "says that it is another part"),
        (whole(said | {"split.no": 1}, EMBED), "which another part holds too"),
        (whole(said | {"split.no": 1}, norm | {"output.weight": floats((3, 8))}), "hold 3 tensors; wanted 2"),
    ):
        parts[1].write_bytes(content)
        with pytest.raises(aq.FormatError, match=wrong), open_source(parts[0]):
            pass


def test_what_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    iq = ((2, 32), 20, bytes(36))
    cases = {
        r"holds blk\.0\.ffn_up\.weight \(IQ4_NL\), of types that no table holds": (LLAMA, {"blk.0.ffn_up.weight": iq}),
        "its architecture is 'phi9'; known are llama": ({"general.architecture": "phi9"}, EMBED),
        "its architecture is 'None'": ({}, EMBED),
        r"holds blk\.0\.ffn_gate_exps\.weight, which": (LLAMA, {"blk.0.ffn_gate_exps.weight": floats((2, 2))}),
        r"attn_q\.weight has 6 rows, and attention\.head_count is 2": (LLAMA, {"blk.0.attn_q.weight": floats((6, 8))}),
        r"rope_freqs\.weight is F16 \[2\]": (LLAMA, {"rope_freqs.weight": ((2,), F16, bytes(4))}),
    }
    for wanted, (fields, tensors) in cases.items():
        with pytest.raises(aq.FormatError, match=wanted):
            opened(tmp_path / "m.gguf", whole(fields, tensors))
    halves = np.full((1, 1), np.nan, "<f2").tobytes() + bytes(16)
    source = opened(tmp_path / "m.gguf", whole(LLAMA, {"output.weight": ((1, 32), gguf_file.Q4_0, halves)}))
    with pytest.raises(aq.FormatError, match=r"output\.weight: scales are not all finite"):
        source.read("lm_head.weight")


def test_llama_3s_factors_are_its_rule(tmp_path: Path) -> None:
    from aq_jax.conversion.sidefiles import GeneratedFiles
    from aq_jax.store.folders import Folder

    size, base, factor = 64, 500000.0, 8.0
    lengths = [2 * np.pi * base ** (2 * i / size) for i in range(size // 2)]
    factors = []
    for length in lengths:
        smooth = (8192 / length - 1) / 3
        factors.append(1.0 if length < 2048 else factor if length > 8192 else 1 / ((1 - smooth) / factor + smooth))
    fields = LLAMA | {
        "llama.rope.freq_base": base,
        "llama.attention.key_length": size,
        "llama.attention.value_length": size,
    }
    for change in (1.0, 1.5):
        tensor = ((size // 2,), F32, (np.array(factors) * [change, *[1] * 31]).astype("<f4").tobytes())
        source = opened(tmp_path / "m.gguf", whole(fields, EMBED | {"rope_freqs.weight": tensor}))
        if change > 1:
            with pytest.raises(aq.FormatError, match="other factors than Llama 3's rule"):
                source.side_files(Folder(tmp_path))
            continue
        made = source.side_files(Folder(tmp_path)).origin
        assert isinstance(made, GeneratedFiles)
        assert json.loads(made.read("config.json"))["rope_parameters"] == {
            "rope_type": "llama3", "rope_theta": base, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }  # fmt: skip
