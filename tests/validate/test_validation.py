"""Validations of small models from the command line: the report is right, its verdict too, and bad input is said."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bert_oracle
import numpy as np
import pytest
import small_validation
from cli_run import Run, listing

import aq_jax as aq
from aq_jax import cli
from aq_jax.cli.compilecache import FOLDER_VARIABLE
from aq_jax.nn.models import FAMILIES
from aq_jax.store.inspection import inspect_table
from aq_jax.validate import independent_reader
from aq_jax.validate.config import load_validation
from aq_jax.validate.criteria import MEASURES
from aq_jax.validate.report import case_table, markdown, verdict
from aq_jax.validate.validation import agree

DOCS = Path(__file__).parents[2] / "docs" / "validation.md"
SUITE = """
text = "text.txt"
labels = "labels.tsv"
sentences = 100
[[case]]
name = "int8"
config = "int8.toml"
activations = "float32"
min_ratio_float32 = 2
max_bits_per_weight = 14
max_metadata_share = 0.5
min_weight_cosine = 0.999
min_weight_cosine_worst = 0.999
max_weight_error = 0.001
max_weight_error_worst = 0.001
max_weight_error_attention = 0.001
min_output_cosine = 0.999
min_output_cosine_p1 = 0.999
min_output_cosine_worst = 0.999
max_output_cosine_std = 0.001
max_spearman_loss = 5
max_convert_seconds = 600
max_load_seconds = 60
max_peak_memory_mb = 64000
[[case]]
name = "int2"
config = "int2.toml"
min_output_cosine = 0.999
"""
LLAMA = """
text = "text.txt"
[[case]]
name = "int2"
config = "int2.toml"
set = ["output=a.arrow"]
max_perplexity_ratio = 100
max_kl = 0.001
min_same_top = 0
"""


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_validation.bert(tmp_path_factory.mktemp("validate") / "bert")


@pytest.fixture(scope="module")
def report(bert: Path) -> dict[str, Any]:
    """Of the suite above, as it was written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(bert)
        patch.setenv(FOLDER_VARIABLE, "off")
        Path("v.toml").write_text(SUITE)
        assert cli.main(["validate", "v.toml"]) == 1
    return json.loads((bert / "build" / "validation" / "report.json").read_text())


def test_the_verdict_names_what_does_not_hold(report: dict[str, Any]) -> None:
    int8, int2 = report["cases"]
    assert (report["ok"], int8["ok"], int2["ok"]) == (False, True, False)
    assert len(int8["criteria"]) == 16 + 5
    (failed,) = [c for c in int2["criteria"] if not c["ok"]]
    assert (failed["name"], failed["wanted"]) == ("output_cosine", ">= 0.999")
    assert failed["found"] == int2["outputs"]["cosine"]["mean"]


def test_figures_are_those_of_the_models(report: dict[str, Any], bert: Path) -> None:
    weights = bert_oracle.weights(small_validation.BERT)
    assert report["model"]["float32_bytes"] == sum(a.nbytes for a in weights.values())
    assert report["model"]["params"] == sum(a.size for a in weights.values())
    lines = (bert / "text.txt").read_text().splitlines()
    assert (report["text"]["sentences"], report["text"]["excluded"]) == (100, 0)
    drawn = np.random.default_rng(0).permutation(len(lines))[:100]
    ids = [bert_oracle.tokenizer().encode(lines[i]).ids for i in drawn]
    wanted = bert_oracle.embed(weights, ids, small_validation.BERT)
    for case in report["cases"]:
        table = bert / "build" / "validation" / f"{case['name']}.parquet"
        assert case["activations"] == {"int8": "float32", "int2": "float32"}[case["name"]]
        model = aq.load_model(table, case["activations"])
        found = np.asarray(model.encode([lines[i] for i in drawn]))  # pyright: ignore[reportAttributeAccessIssue]
        assert case["outputs"]["cosine"]["mean"] == pytest.approx(np.sum(found * wanted, 1).mean(), abs=1e-5)
        size = table.stat().st_size
        assert case["size"]["file_bytes"] == size
        assert case["size"]["ratio_float32"] == pytest.approx(report["model"]["float32_bytes"] / size)
        inspected = inspect_table(table)
        assert [layer["name"] for layer in case["layers"]] == [layer.name for layer in inspected.layers]
        assert sum(kind["params"] for kind in case["kinds"].values()) == inspected.params
        quantized = [layer for layer in inspected.layers if layer.rel_mse is not None]
        errors, params = ([getattr(layer, of) for layer in quantized] for of in ("rel_mse", "params"))
        assert case["rel_mse"] == pytest.approx(np.average(errors, weights=params))
        assert (case["layer_errors"]["count"], case["layer_errors"]["max"]) == (len(errors), max(errors))
        attention = [i for i, layer in enumerate(quantized) if FAMILIES["bert"].kind(layer.name) == "attention"]
        wanted_error = np.average(np.take(errors, attention), weights=np.take(params, attention))
        assert case["kinds"]["attention"]["rel_mse"] == pytest.approx(wanted_error)
        assert sum(case["quant_types"].values()) == report["model"]["tensors"]
        assert 0 < case["size"]["metadata_share"] < 0.5
        assert case["outputs"]["spearman"]["float"] == report["cases"][0]["outputs"]["spearman"]["float"]
        assert case["schemas"] == dict.fromkeys(("v1_read", "v2_written", "independent_reader", "v1_columns"), True)
        assert case["digests"] == {"rows": 21, "unchecked": 0, "ok": True, "table": case["digests"]["table"]}
        assert case["peak_memory_bytes"] > 50e6
        assert set(case["seconds"]["load"]) == {"open", "read", "dequantize"}
    assert report["labels"] == {"name": "labels.tsv", "pairs": 60, "excluded": 0}


def test_the_report_is_for_people_too(report: dict[str, Any], bert: Path) -> None:
    folder = bert / "build" / "validation"
    text = (folder / "report.md").read_text()
    assert text == markdown(report)
    assert text.startswith("# Validation of model: FAILED\n\n1 of 27 criteria does not hold, in 1 of 2 cases.")
    assert "| int2 | output_cosine | >= 0.999 | 0." in text
    assert "<html" in (folder / "report.html").read_text()
    hostile = json.loads(json.dumps(report).replace("embeddings.word", "a|b<img src=x>`\\u001b[31m"))
    cells = [line for line in markdown(hostile).splitlines() if "img" in line]
    assert cells
    for line in cells:
        assert "a\\|b\\<img src=x>\\`\\\\x1b\\[31m" in line
        assert line.isprintable()


def test_the_documentation_names_every_key(report: dict[str, Any], tmp_path: Path) -> None:
    text = DOCS.read_text()

    def keys(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield key
                if key not in ("config", "versions", "quant_types", "kinds"):  # what stands in those is named elsewhere
                    yield from keys(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from keys(inner)

    assert not [
        key for key in {*keys(report), *keys(report["cases"][0]["kinds"]["attention"])} if f"`{key}`" not in text
    ]
    assert not [key for key in MEASURES if f"`{key}`" not in text]
    (example,) = re.findall(r"^```toml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "v.toml").write_text(example)
    assert load_validation(tmp_path / "v.toml").cases[0].min_output_cosine == 0.9993


def test_a_suite_that_holds_is_done(
    run: Run, bert: Path, report: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bert)
    Path("one.toml").write_text(SUITE.partition('[[case]]\nname = "int2"')[0])
    status, out, err = run("validate", "one.toml", "--json", "--set", "labels=", "--set", "folder=out")
    assert status == 2
    assert "case 'int8': max_spearman_loss: wanted labels" in err
    assert not Path("out").exists()
    status, out, err = run("validate", "one.toml", "--json", "--set", "folder=out")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["ok"] is True
    assert found == json.loads(Path("out/report.json").read_text())
    # Sizes and accuracy do not depend on the run.
    for part in ("size", "layers", "kinds", "rel_mse", "layer_errors", "outputs", "digests"):
        assert found["cases"][0][part] == report["cases"][0][part]


def test_what_is_not_measured_has_no_column(report: dict[str, Any]) -> None:
    header, rows = case_table(report)
    assert [row[header.index("activations")] for row in rows] == ["float32", "float32"]
    assert "float's Spearman" in header
    report = json.loads(json.dumps(report))
    for case in report["cases"]:
        case["outputs"]["spearman"] = None
    without, fewer = case_table(report)
    assert without == tuple(name for name in header if "Spearman" not in name)
    assert {len(row) for row in fewer} == {len(without)}


def test_verdicts_count_as_people_do() -> None:
    good, bad = {"ok": True, "criteria": [{"ok": True}] * 5}, {"ok": False, "criteria": [{"ok": False}] * 2}
    assert verdict({"cases": [good]}) == "all 5 criteria hold, in 1 case"
    assert verdict({"cases": [good, good]}) == "all 10 criteria hold, in 2 cases"
    assert verdict({"cases": [bad]}) == "2 of 2 criteria do not hold, in 1 case"
    assert verdict({"cases": [good, bad]}) == "2 of 7 criteria do not hold, in 1 of 2 cases"


def test_activations_are_those_that_were_used(run: Run, bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody asked for eight bits: a model of int8 weights has them unless it is told otherwise."""
    monkeypatch.chdir(bert)
    Path("used.toml").write_text('text = "text.txt"\n[[case]]\nname = "int8"\nconfig = "int8.toml"')
    status, out, _ = run("validate", "used.toml", "--set", "folder=used")
    assert status == 0
    assert re.search(r"^case +verdict +activations .*\n-+\nint8 +holds +int8 ", out)
    assert "all 5 criteria hold, in 1 case" in out
    assert "| int8 | holds | int8 |" in Path("used/report.md").read_text()
    assert json.loads(Path("used/report.json").read_text())["cases"][0]["activations"] == "int8"


def test_rotated_tensors_agree_within_the_order_of_their_sums(rng: np.random.Generator) -> None:
    """However large the rest of a tensor is: an error in one element is seen."""
    value = rng.normal(size=(64, 128)).astype(np.float32)
    value[32:] *= 1e4
    assert agree(np.nextafter(value, np.float32(np.inf)), value, 128)
    for i in (0, 63):
        other = value.copy()
        other[i, 5] += 1e-3 * np.sqrt(np.mean(value[i] ** 2))
        assert not agree(other, value, 128)
    assert not agree(np.full_like(value, np.nan), value, 128)
    assert not agree(value[:1], value, 128)


def test_language_models_are_judged_by_what_they_predict(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small_validation.llama(tmp_path / "llama"))
    Path("v.toml").write_text(LLAMA)
    status, out, err = run("validate", "v.toml")
    assert (status, err) == (1, "")
    assert "perplexity" in out
    assert "\nint2  kl         <= 0.001  0." in out
    assert "1 of 8 criteria does not hold, in 1 case; see build/validation/report.html" in out
    (case,) = json.loads(Path("build/validation/report.json").read_text())["cases"]
    float_model, model = (aq.load_model(f"build/validation/{name}") for name in ("float.parquet", "int2.arrow"))
    lines = Path("text.txt").read_text().splitlines()
    for which, scored in (("float", float_model), ("quantized", model)):
        scores = [np.asarray(scored.score(line)) for line in lines]  # pyright: ignore[reportAttributeAccessIssue]
        wanted = np.exp(-np.mean(np.concatenate(scores)))
        assert case["outputs"]["perplexity"][which] == pytest.approx(wanted, rel=1e-5)
    assert case["kinds"]["attention"]["tensors"] == 8


def test_bad_input_is_said_and_nothing_is_written(run: Run, bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bert)
    before = listing(bert)
    for sets, wanted in (
        (("labels=text.txt",), "labels = 'text.txt': its first row is"),
        (("text=none.txt",), "text = 'none.txt': no such file"),
        (("seed=x",), "seed = 'x': wanted an integer"),
    ):
        (bert / "bad.toml").write_text(SUITE)
        status, out, err = run("validate", "bad.toml", *(part for text in sets for part in ("--set", text)))
        assert (status, out) == (2, "")
        assert wanted in err
    (bert / "bad.toml").unlink()
    assert run("validate", "none.toml")[0] == 2
    assert listing(bert) == before


def test_the_independent_reader_shares_no_code() -> None:
    text = Path(independent_reader.__file__).read_text()
    assert "import aq_jax" not in text
    assert "from aq_jax" not in text


def test_a_table_that_another_reader_refuses_is_told(tmp_path: Path) -> None:
    aq.save(tmp_path / "v1.arrow", {"a": np.ones((2, 3), np.float32)})
    aq.save(tmp_path / "v2.parquet", {"a": aq.quantize(np.ones((2, 8), np.float32), "int8")})
    assert independent_reader.begins_with(tmp_path / "v2.parquet", independent_reader.V2)
    assert not independent_reader.begins_with(tmp_path / "v1.arrow", independent_reader.V2)
    assert independent_reader.reads_as_v1(tmp_path / "v1.arrow")
    assert independent_reader.reads_as_v1(tmp_path / "v2.parquet")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("embeddings.word_embeddings.weight", "embeddings"),
        ("bert.embeddings.LayerNorm.weight", "norms"),
        ("encoder.layer.0.attention.self.query.bias", "attention"),
        ("encoder.layer.0.attention.output.dense.weight", "attention"),
        ("encoder.layer.0.attention.output.LayerNorm.bias", "norms"),
        ("encoder.layer.0.intermediate.dense.weight", "feed-forward"),
        ("encoder.layer.0.output.dense.weight", "feed-forward"),
        ("pooler.dense.weight", "other"),
        ("model.embed_tokens.weight", "embeddings"),
        ("lm_head.weight", "embeddings"),
        ("model.norm.weight", "norms"),
        ("model.layers.3.input_layernorm.weight", "norms"),
        ("model.layers.3.post_attention_layernorm.weight", "norms"),
        ("model.layers.3.self_attn.q_proj.weight", "attention"),
        ("model.layers.3.mlp.gate_proj.weight", "feed-forward"),
    ],
)
def test_kinds_are_told_by_names(name: str, kind: str) -> None:
    assert {family.kind(name) for family in FAMILIES.values()} == {kind}
