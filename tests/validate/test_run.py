"""Validations of small models from the command line: the report is right, its verdict too, and bad input is said."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bert_oracle
import numpy as np
import pytest
import small_validation
from helpers import Run, listing

import aq_jax as aq
from aq_jax import cli
from aq_jax.cli.compilecache import FOLDER_VARIABLE
from aq_jax.nn.models import FAMILIES
from aq_jax.store.inspection import inspect_table
from aq_jax.validate.config import load_validation
from aq_jax.validate.criteria import figure_paths
from aq_jax.validate.report import markdown
from aq_jax.validate.tables import case_table, verdict

DOCS = Path(__file__).parents[2] / "docs" / "validation.md"
SUITE = """
text = "text.txt"
labels = "labels.tsv"
sentences = 100
[[case]]
name = "int8"
config = "int8.toml"
activations = "float32"
[case.at_least]
size.ratio_float32 = 2
layer_cosines.mean = 0.999
outputs.cosine.p1 = 0.999
seconds.encode.sentences_a_second = 0.001
[case.at_most]
size.bits_per_weight = 14
layer_errors.max = 0.001
kinds.attention.rel_mse = 0.001
outputs.spearman.loss = 5
seconds.load.total = 60
peak_memory_bytes = 64e9
[[case]]
name = "int2"
config = "int2.toml"
at_least = { "outputs.cosine.mean" = 0.999 }
[[peer]]
name = "other 8 bits"
bits_per_weight = 8.5
accuracy = 0.9
"""
LLAMA = """
text = "text.txt"
sentences = 50
[[case]]
name = "int8"
config = "int8.toml"
set = ["output=a.arrow"]
[case.at_least]
outputs.same_top.rate = 0
[case.at_most]
outputs.perplexity.ratio = 100
outputs.kl.mean = 1
"""


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_validation.bert(tmp_path_factory.mktemp("validate") / "bert")


@pytest.fixture(scope="module")
def printed(bert: Path) -> str:
    """What the command prints of the suite above."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.chdir(bert)
        patch.setenv(FOLDER_VARIABLE, "off")
        Path("v.toml").write_text(SUITE)
        assert cli.main(["validate", "v.toml"]) == 1
    return out.getvalue()


@pytest.fixture(scope="module")
def report(bert: Path, printed: str) -> dict[str, Any]:
    """What it writes."""
    return json.loads((bert / "build" / "validation" / "report.json").read_text())


def drawn(text: Path, count: int) -> list[str]:
    """The lines by which models are judged where no case has seen any."""
    lines = text.read_text().splitlines()
    return [lines[i] for i in np.random.default_rng(0).permutation(len(lines))[:count]]


def test_the_verdict_names_what_does_not_hold(report: dict[str, Any], printed: str) -> None:
    int8, int2 = report["cases"]
    assert (report["ok"], int8["ok"], int2["ok"]) == (False, True, False)
    assert len(int8["criteria"]) == 10 + 3
    (failed,) = [c for c in int2["criteria"] if not c["ok"]]
    assert (failed["name"], failed["wanted"]) == ("outputs.cosine.mean", ">= 0.999")
    assert failed["found"] == int2["outputs"]["cosine"]["mean"]
    assert re.match(r"case +verdict +activations .*\n-+\nint8 +holds +float32 .*\nint2 +FAILS +float32 ", printed)
    assert "\nint2  outputs.cosine.mean  >= 0.999  0." in printed
    assert printed.endswith("\n1 of 17 criteria does not hold, in 1 of 2 cases; see build/validation/report.html\n")


def test_figures_are_those_of_the_models(report: dict[str, Any], bert: Path) -> None:
    weights = bert_oracle.weights(small_validation.BERT)
    assert report["model"]["float32_bytes"] == sum(a.nbytes for a in weights.values())
    assert report["model"]["params"] == sum(a.size for a in weights.values())
    lines = drawn(bert / "text.txt", 100)
    assert (report["text"]["sentences"], report["text"]["excluded"]) == (100, 0)
    ids = [bert_oracle.tokenizer().encode(line).ids for line in lines]
    wanted = bert_oracle.embed(weights, ids, small_validation.BERT)
    for case in report["cases"]:
        table = bert / "build" / "validation" / f"{case['name']}.parquet"
        assert case["activations"] == {"int8": "float32", "int2": "float32"}[case["name"]]
        model = aq.load_model(table, case["activations"])
        found = np.asarray(model.encode(lines))  # pyright: ignore[reportAttributeAccessIssue]
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
        assert case["schemas"] == {"v1_read": True, "v2_written": True}
        assert case["digests"] == {"rows": 21, "unchecked": 0, "ok": True, "table": case["digests"]["table"]}
        assert case["peak_memory_bytes"] > 50e6
    assert report["labels"] == {"name": "labels.tsv", "pairs": 60, "excluded": 0}


def numbers(value: Any, path: str = "") -> Iterator[str]:
    """Paths of all numbers, lists and configs left out."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in ("config", "quant_types"):
                yield from numbers(inner, f"{path}.{key}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path[1:]


def test_thresholds_can_be_of_every_figure_that_a_report_has(report: dict[str, Any]) -> None:
    known, found = set(figure_paths(FAMILIES["bert"])), {path for case in report["cases"] for path in numbers(case)}
    assert found <= known
    # Others are of what these cases do not do: calibration, and kinds that are not quantized.
    done = {f"seconds.convert.{stage}" for stage in ("calibrate", "allocate", "train")}
    assert {path for path in known - found if not path.startswith("kinds.")} == done


def test_the_report_is_for_people_too(report: dict[str, Any], bert: Path) -> None:
    folder = bert / "build" / "validation"
    text = (folder / "report.md").read_text()
    assert text == markdown(report)
    assert text.startswith("# Validation of model: FAILED\n\n1 of 17 criteria does not hold, in 1 of 2 cases.")
    assert "| int2 | outputs.cosine.mean | >= 0.999 | 0." in text
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
    (example,) = re.findall(r"^```toml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "v.toml").write_text(example)
    assert load_validation(tmp_path / "v.toml").cases[0].at_least["outputs.cosine.mean"] == 0.9993


def test_what_is_not_measured_has_no_column(report: dict[str, Any]) -> None:
    header, rows = case_table(report)
    assert [row[header.index("activations")] for row in rows] == ["float32", "float32"]
    assert "Spearman" in header
    report = json.loads(json.dumps(report))
    for case in report["cases"]:
        case["outputs"]["spearman"] = None
    without, fewer = case_table(report)
    assert without == tuple(name for name in header if name != "Spearman")
    assert {len(row) for row in fewer} == {len(without)}


def test_verdicts_count_as_people_do() -> None:
    good, bad = {"ok": True, "criteria": [{"ok": True}] * 5}, {"ok": False, "criteria": [{"ok": False}] * 2}
    assert verdict({"cases": [good]}) == "all 5 criteria hold, in 1 case"
    assert verdict({"cases": [good, good]}) == "all 10 criteria hold, in 2 cases"
    assert verdict({"cases": [bad]}) == "2 of 2 criteria do not hold, in 1 case"
    assert verdict({"cases": [good, bad]}) == "2 of 7 criteria do not hold, in 1 of 2 cases"


def test_a_language_model_is_judged_by_what_it_predicts(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small_validation.llama(tmp_path / "llama"))
    Path("v.toml").write_text(LLAMA)
    text = Path("text.txt")
    text.write_text("\n".join(sorted(text.read_text().splitlines(), key=len)[-80:]))  # one padded length: one program
    status, out, err = run("validate", "v.toml", "--json")
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert report == json.loads(Path("build/validation/report.json").read_text())
    assert report["ok"] is True
    (case,) = report["cases"]
    assert set(numbers(case)) - set(figure_paths(FAMILIES["llama"])) == set()
    assert case["activations"] == "int8"  # as a model of int8 weights has them, unless it is told otherwise
    assert "| int8 | holds | int8 |" in Path("build/validation/report.md").read_text()
    float_model, model = (aq.load_model(f"build/validation/{name}") for name in ("float.parquet", "int8.arrow"))
    lines = drawn(text, 50)
    for which, scored in (("float", float_model), ("quantized", model)):
        scores = [np.asarray(scored.score(line)) for line in lines]  # pyright: ignore[reportAttributeAccessIssue]
        wanted = np.exp(-np.mean(np.concatenate(scores)))
        assert case["outputs"]["perplexity"][which] == pytest.approx(wanted, rel=1e-5)
    assert case["kinds"]["attention"]["tensors"] == 8


def test_bad_input_is_said_and_nothing_is_written(run: Run, bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bert)
    before = listing(bert)
    for sets, wanted in (
        (("labels=",), "case 'int8': at_most: 'outputs.spearman.loss': wanted labels"),
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
    family = FAMILIES["llama" if name.startswith(("model.", "lm_head.")) else "bert"]
    assert family.kind(name) == kind
