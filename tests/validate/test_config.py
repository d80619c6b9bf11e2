"""Configs of validations, good and bad: errors name the file, the case and the key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import small_validation

from aq_jax.errors import ConfigError
from aq_jax.nn.models import FAMILIES
from aq_jax.validate.config import Case, ValidationConfig, load_validation, read_conversions
from aq_jax.validate.criteria import check_thresholds

CASE = '[[case]]\nname = "int8"\nconfig = "int8.toml"\n'
ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(small_validation.bert(tmp_path / "bert"))
    return tmp_path / "bert"


def test_a_config_is_read(folder: Path) -> None:
    (folder / "v.toml").write_text(
        'text = "text.txt"\n' + CASE + 'set = ["compression=zstd"]\nat_least.size = { ratio_float32 = 2 }'
    )
    config = load_validation("v.toml", ("sentences=60", "folder=out"))
    assert (config.text, config.sentences, config.folder) == ("text.txt", 60, "out")
    assert config.cases == (Case("int8", "int8.toml", ("compression=zstd",), at_least={"size.ratio_float32": 2}),)
    (conversion,) = read_conversions(config)
    assert (conversion.compression, Path(conversion.output)) == ("zstd", Path("out/int8.parquet"))


def test_the_suite_for_minilm_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_validation("configs/validate_minilm.toml")
    assert {case.name for case in config.cases} >= {"int8", "int8_gptq", "int5_gptq", "tcq_400", "tcq_215", "tcq_free"}
    assert all({"layer_cosines.mean", "outputs.cosine.min"} <= case.at_least.keys() for case in config.cases)
    assert all({"rel_mse", "peak_memory_bytes"} <= case.at_most.keys() for case in config.cases)
    assert {case.activations for case in config.cases if case.config.endswith("int8.toml")} == {None, "float32"}
    check_thresholds(config, FAMILIES["bert"])
    recorded = {(line["case"], line["figures"].get("bits"), line["value"]) for file in RESULTS.glob("*.json")
                for line in json.loads(file.read_text())["results"] if line.get("figures")}  # fmt: skip
    assert {(f"{p.name}: embedding cosine", p.bits_per_weight, p.accuracy) for p in config.peers} <= recorded


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("nonsense = 1\n" + CASE, "v.toml: unknown key 'nonsense'; known are folder, text, .*, case"),
        ("sentence = 100\n" + CASE, "did you mean 'sentences'?"),
        ("sentences = '100'\n" + CASE, "sentences = '100': wanted an integer"),
        ("sentences = 10\n" + CASE, "sentences = 10: wanted 50 to"),
        ("seed = -1\n" + CASE, "seed = -1: wanted 0 to"),
        ("folder = ''\n" + CASE, "folder = '': wanted the name of a folder"),
        ("label_columns = ['a', 'a', 'b']\n" + CASE, "label_columns = .*: wanted two sentences' and the score's"),
        ("label_columns = ['a', 'b', 'c']\n" + CASE, "label_columns = .*: without effect, as there is no labels"),
        ("max_tokens = 64\n" + CASE, "max_tokens = 64: without effect, as there is no joined"),
        ("", "found no \\[\\[case\\]\\]"),
        ("case = 3", "case must be \\[\\[case\\]\\] tables"),
        ("case = [3]", "case 1: wanted a table of keys, found 3"),
        (CASE + CASE, "case 'int8': found more than one of that name"),
        (CASE + CASE.replace("int8", "INT8", 1), "found more than one"),
        (CASE.replace('"int8"', '"../int8"'), "case 1: name = '../int8': wanted letters"),
        (CASE.replace('"int8"', '"float"'), "case 1: name = 'float'"),
        (CASE.replace('"int8.toml"', "3"), "case 1: config = 3: wanted a string"),
        ('[[case]]\nname = "a"', "case 1: missing config"),
        (CASE + "at_lest = 3", "case 1: unknown key 'at_lest'; known are .*; did you mean 'at_least'"),
        (CASE + "at_least = 3", "case 1: at_least = 3: wanted a table of figures"),
        (CASE + "at_least.rel_mse = true", "case 1: at_least.rel_mse = True: wanted a finite number"),
        (CASE + "at_most.outputs.kl.mean = nan", "case 1: at_most.outputs.kl.mean = nan: wanted a finite number"),
        (CASE + "at_most.rel_mse = 1" + "0" * 400, "case 1: at_most.rel_mse = 10*: wanted a finite number"),
        (CASE + "[case.at_most]\na.b = 1\n'a.b' = 2", "case 1: at_most.a.b: found it more than once"),
        ("peer = 3\n" + CASE, "peer must be \\[\\[peer\\]\\] tables"),
        (CASE + "[[peer]]\nname = 'x'\naccuracy = 1", "peer 1: missing bits_per_weight"),
        (CASE + "[[peer]]\nname = 'x'\naccuracy = 1\nbits_per_weight = 0", "peer 1: bits_per_weight = 0: wanted"),
        (CASE + "[[peer]]\nname = 'x'\naccuracy = nan\nbits_per_weight = 2", "peer 1: accuracy = nan: wanted"),
        (CASE + 'activations = "int4"', "case 1: activations = 'int4': wanted one of"),
        (CASE + "set = 'a=b'", "case 1: set = 'a=b': wanted a list of strings"),
        ("[[case", "v.toml: not a TOML file"),
        ("a = " + "[" * 5000, "v.toml: not a TOML file"),
        ("sentences = " + "9" * 5000, "v.toml: "),
    ],
)
def test_bad_configs_are_refused_by_name(tmp_path: Path, text: str, wanted: str) -> None:
    (tmp_path / "v.toml").write_text(text)
    with pytest.raises(ConfigError, match=wanted):
        load_validation(tmp_path / "v.toml")


@pytest.mark.parametrize(
    ("case", "wanted"),
    [
        (Case("a", "none.toml"), "case 'a': config = 'none.toml': No such file"),
        (Case("a", "model"), "case 'a': config = 'model': Is a directory"),
        (Case("a", "x\0.toml"), "case 'a': config = .*null"),
        (Case("a", "text.txt"), "case 'a': config = 'text.txt': .*not a TOML file"),
        (Case("a", "int8.toml", ("quantization.bits=3",)), "case 'a': .*unknown key 'bits'"),
        (Case("a", "plain.toml"), "case 'a': .*has no \\[quantization\\]"),
        (
            Case("a", "int8.toml", ("source=other",)),
            "case 'a': .*its source is 'other', that of case 'first' is 'model'",
        ),
    ],
)
def test_bad_conversions_are_refused_by_case(folder: Path, case: Case, wanted: str) -> None:
    (folder / "plain.toml").write_text('source = "model"\noutput = "m.parquet"')
    with pytest.raises(ConfigError, match=wanted):
        read_conversions(ValidationConfig((Case("first", "int8.toml"), case)))
