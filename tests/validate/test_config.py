"""Configs of validations, good and bad: errors name the file, the case and the key."""

from __future__ import annotations

from pathlib import Path

import pytest
import small_validation

from aq_jax.errors import ConfigError
from aq_jax.validate.config import Case, ValidationConfig, conversions, load_validation
from aq_jax.validate.criteria import MEASURES, OF_ENCODERS, OF_LANGUAGE_MODELS, check_thresholds, judged

CASE = '[[case]]\nname = "int8"\nconfig = "int8.toml"\n'
ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(small_validation.bert(tmp_path / "bert"))
    return tmp_path / "bert"


def test_a_config_is_read(folder: Path) -> None:
    (folder / "v.toml").write_text('text = "text.txt"\n' + CASE + 'set = ["compression=zstd"]\nmin_ratio_float32 = 2')
    config = load_validation("v.toml", ("sentences=60", "folder=out"))
    assert (config.text, config.sentences, config.folder) == ("text.txt", 60, "out")
    assert config.cases == (Case("int8", "int8.toml", ("compression=zstd",), min_ratio_float32=2),)
    (conversion,) = conversions(config)
    assert (conversion.compression, Path(conversion.output)) == ("zstd", Path("out/int8.parquet"))


def test_every_threshold_is_judged() -> None:
    fields = {name for name in Case.__dataclass_fields__ if name.startswith(("min_", "max_"))}
    assert fields == set(MEASURES)
    assert set(OF_ENCODERS + OF_LANGUAGE_MODELS) <= fields


def test_the_suite_for_minilm_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_validation("configs/validate_minilm.toml")
    assert {case.name for case in config.cases} >= {"int8", "int4_gptq", "int3_gptq", "int2_gptq", "int2"}
    judged = {"min_weight_cosine", "max_weight_error", "min_output_cosine_worst"}
    assert all(judged <= case.thresholds.keys() for case in config.cases)
    assert {case.activations for case in config.cases if case.config.endswith("int8.toml")} == {None, "float32"}
    check_thresholds(config, "embed")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("nonsense = 1\n" + CASE, "v.toml: unknown key 'nonsense'; known are folder, text, .*, case"),
        ("sentence = 100\n" + CASE, "did you mean 'sentences'?"),
        ("sentences = '100'\n" + CASE, "sentences = '100': wanted an integer"),
        ("sentences = 10\n" + CASE, "sentences = 10: wanted 50 to"),
        ("seed = -1\n" + CASE, "seed = -1: wanted 0 to"),
        ("folder = ''\n" + CASE, "folder = '': wanted"),
        ("label_columns = ['a', 'a', 'b']\n" + CASE, "label_columns = .*: wanted two sentences' and the score's"),
        ("", "found no \\[\\[case\\]\\]"),
        ("case = 3", "case must be \\[\\[case\\]\\] tables"),
        ("case = [3]", "case 1: wanted a table of keys, found 3"),
        (CASE + CASE, "case 'int8': found more than one of that name"),
        (CASE + CASE.replace("int8", "INT8", 1), "found more than one"),
        (CASE.replace('"int8"', '"../int8"'), "case 1: name = '../int8': wanted letters"),
        (CASE.replace('"int8"', '"float"'), "case 1: name = 'float'"),
        (CASE.replace('"int8.toml"', "3"), "case 1: config = 3: wanted a string"),
        ('[[case]]\nname = "a"', "case 1: missing config"),
        (CASE + "min_ratio = 3", "case 1: unknown key 'min_ratio'; known are .*; did you mean 'min_ratio_float"),
        (CASE + "min_ratio_float32 = true", "case 1: min_ratio_float32 = True: wanted a number"),
        (CASE + "max_kl = nan", "case 1: max_kl = nan: wanted a finite number"),
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
        conversions(ValidationConfig((Case("first", "int8.toml"), case)))


def test_thresholds_of_another_kind_of_model_are_refused() -> None:
    for key, task in (("max_kl", "embed"), ("min_output_cosine", "generate")):
        config = ValidationConfig((Case("a", "a.toml", **{key: 0.5}),))  # pyright: ignore[reportArgumentType]
        with pytest.raises(ConfigError, match=f"case 'a': {key}: the model is an? "):
            check_thresholds(config, task)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="max_spearman_loss: wanted labels = FILE"):
        check_thresholds(ValidationConfig((Case("a", "a.toml", max_spearman_loss=1),)), "embed")


def test_a_threshold_holds_at_its_number_and_not_beyond() -> None:
    report = {"digests": {"ok": True}, "schemas": {}, "size": {"ratio_float32": 4.0, "bits_per_weight": 8.0}}
    report["layer_cosines"] = None  # type: ignore[assignment]  # nothing was quantized
    report["kinds"] = {"attention": {"rel_mse": 0.1}}
    for given, ok in (
        ({"min_ratio_float32": 4.0}, True), ({"min_ratio_float32": 4.001}, False),
        ({"max_bits_per_weight": 8.0}, True), ({"max_bits_per_weight": 7.999}, False),
        ({"min_weight_cosine": 0.5}, False),
        ({"max_weight_error_attention": 0.1}, True), ({"max_weight_error_attention": 0.09}, False),
        ({"max_weight_error_feed_forward": 1}, False),  # there are none
    ):  # fmt: skip
        criterion = judged(Case("a", "a.toml", **given), report)[0]
        assert criterion["ok"] is ok, criterion
    assert judged(Case("a", "a.toml", min_weight_cosine=0), report)[0]["found"] is None
    assert not judged(Case("a", "a.toml"), report | {"digests": {"ok": False}})[0]["ok"]
