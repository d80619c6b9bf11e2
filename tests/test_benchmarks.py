"""The benchmarks' own machinery: what is measured is not measured here."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest

import aq_jax as aq
from aq_jax import CalibrationConfig
from aq_jax.calibration.text import read_text
from aq_jax.io.dense import as_v2, plain_rows
from aq_jax.quantizers.treatment import treat
from aq_jax.store import TableWriter
from benchmarks import __main__ as command
from benchmarks import chart, docs, machine, models, peers, report
from benchmarks.calibrated import VARIABLE, describe
from benchmarks.children import Child, ChildError
from benchmarks.peers import MissingLibrary
from benchmarks.suites import QUICK, SUITES, accuracy, load_suite, memory
from benchmarks.suites.accuracy import LADDER, Measurement, calibrated, contenders, line_of, make_tables
from benchmarks.suites.contenders import peer_children, start_children
from benchmarks.tables import KINDS, accuracy_table, best_within
from benchmarks.timing import Result, Skipped, Timing, compare, race, ratio

ROOT = Path(__file__).parent.parent

# ------------------------------------------------------------------------------------------------ peers


@pytest.fixture
def matrix(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((8, 256), np.float32)


@pytest.mark.parametrize("module", ["numpy_plain", "numpy_vectorized"])
@pytest.mark.parametrize(("bits", "group"), [(8, peers.ROW), (4, 128), (2, 64)])
def test_numpys_round_trip_stays_within_half_a_step(module: str, bits: int, group: int, matrix: np.ndarray) -> None:
    (peer,) = peers.load(module)
    q = peer.quantize(peer.prepare(matrix), bits, group)
    back, size = peer.dequantize(q), group or matrix.shape[1]
    steps = np.abs(matrix.reshape(-1, size)).max(1) / (2 ** (bits - 1) - 1)
    assert (np.abs(back - matrix).reshape(-1, size) <= steps[:, None] * 0.5001).all()
    assert peer.stored_bits(q) == peer.packed_bits(q) == matrix.size * bits + 32 * matrix.size // size


def test_ours_goes_by_the_protocol(matrix: np.ndarray) -> None:
    ours = peers.load("ours")[0]
    q = ours.quantize(ours.prepare(matrix), 4, 128)
    assert np.abs(ours.dequantize(q) - matrix).max() < 0.4
    assert ours.stored_bits(q) >= 4 * matrix.size  # as a table has it, name and digest too
    assert ours.packed_bits(q) == 4 * matrix.size + 32 * matrix.size // 128  # zero points are all zero
    shifted = peers.load("ours")[1]
    assert shifted.packed_bits(shifted.quantize(matrix, 4, 128)) == 4 * matrix.size + 64 * matrix.size // 128


@pytest.mark.parametrize("module", [m for m in peers.MODULES if m.endswith("_peer")])
def test_an_absent_library_gives_a_reason(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The name of a library is that of its adapter, without the ending; quanto's is a part of another.
    for name in ("torch", "qwix", "gguf", "gguf.quants", "onnxruntime", "safetensors.numpy"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingLibrary, match=r"is not installed|halted"):
        peers.load(module)


def test_every_adapter_is_listed_and_shadows_nothing() -> None:
    files = {path.stem for path in (ROOT / "benchmarks" / "peers").glob("*.py")}
    assert files == {*peers.MODULES, "__init__", "torch_threads"}
    pinned = (ROOT / "benchmarks" / "requirements.txt").read_text().splitlines()
    assert all(line.startswith("#") or "==" in line for line in pinned)


def test_the_nearest_group_is_taken() -> None:
    peer = peers.load("numpy_vectorized")[0]
    assert (
        peers.nearest_group(peer, 8, peers.ROW),
        peers.nearest_group(peer, 4, 100),
        peers.nearest_group(peer, 2, 32),
    ) == (0, 128, 32)


# ------------------------------------------------------------------------------------------------ timing, children


def of_tests(name: str) -> str:
    return f"small_contenders:{name}"


@pytest.fixture(autouse=True)
def _children_find_this_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")


def test_a_child_answers_fails_and_dies_in_words() -> None:
    with Child(of_tests("trivial")) as child:
        assert child.names == ["noisy", "slow", "add", "object", "broken", "exit"]
        assert child.call("noisy") == [1, 2]
        assert child.call("add", 2, 3) == 5
        assert child.call("object") is None
        assert 0.05 <= child.remote("slow").seconds() < 5
        assert 0 < child.seconds("object") < 0.01
        with pytest.raises(ChildError, match="ValueError: no such thing"):
            child.call("broken")
        assert child.call("add", 1, 1) == 2  # it lives on
        with pytest.raises(ChildError, match="ended: the end"):
            child.call("exit")


def test_peers_that_are_not_there_are_skipped_with_the_reason() -> None:
    with peer_children(of_tests("absent"), modules=("there", "nowhere_peer")) as (children, skipped):
        assert list(children) == ["there"]
        assert skipped == [Skipped("nowhere", "nowhere_peer is not installed")]
    with start_children({"broken": (of_tests("broken"), 1), "here": (of_tests("trivial"),)}) as (children, skipped):
        assert list(children) == ["here"]
        assert skipped == [Skipped("broken", "ValueError: no such thing")]


def test_rounds_take_turns_and_remotes_time_themselves() -> None:
    order: list[str] = []

    class Remote:
        def __init__(self, name: str, seconds: float) -> None:
            self.name, self.taken = name, seconds

        def seconds(self) -> float:
            order.append(self.name)
            return self.taken

        def __call__(self) -> None:
            raise AssertionError("it times itself")

    race({name: Remote(name, 1.0) for name in "abc"}, 9)
    first, *rounds = ("".join(order[i : i + 3]) for i in range(0, len(order), 3))
    assert (first, len(rounds), {"".join(sorted(each)) for each in rounds}) == ("abc", 9, {"abc"})
    assert len(set(rounds)) > 2  # nobody always has the same one before it
    order.clear()
    times = race({"a": Remote("a", 1.0), "b": Remote("b", 7.0)}, 3, patience=5)
    assert (sorted(order[2:4]), order[4:]) == (["a", "b"], ["a", "a"])  # a round, and two without the slow one
    assert times == {"a": Timing((1.0, 1.0, 1.0), 0.0), "b": Timing((7.0,), 0.0)}


def test_ratios_are_of_rounds() -> None:
    # A machine that is ten times slower in one round changes nothing.
    theirs, ours = Timing((2.0, 20.0, 2.0), 0.0), Timing((1.0, 10.0, 1.0), 0.0)
    found = ratio(theirs, ours)
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)
    line = compare("case", "peer", theirs, ours, "1", "2")
    assert (line.value, line.unit, line.figures["ms"]) == (2.0, "x speed", 1000.0)
    assert compare("case", "peer", theirs, ours, figures={}).figures == {}


def test_every_case_of_memory_has_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "TARGET", of_tests("remembering"))
    line = memory.measure_in_fresh_processes("peer", "peer|8", 2)
    assert isinstance(line, Result)
    assert (line.case, line.value) == ("MiniLM int8 in memory, peer: anonymous memory added", 1.0)
    assert (line.low, line.high) == (1.0, 1.0)


def test_a_suite_runs_and_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report.last_of, "__defaults__", (tmp_path / "results",))
    monkeypatch.setattr(report.record, "__defaults__", (tmp_path / "results",))
    # The suite's process is started as it is for a user, but for the suites that it knows.
    start = "import benchmarks.suites as s, small_contenders as t; s.load_suite = lambda name: getattr(t, name)"
    run = "import sys; sys.argv[1:1] = ['-m']; from benchmarks.__main__ import main; sys.exit(main(sys.argv[4:]))"
    real = subprocess.Popen
    monkeypatch.setattr(
        command.subprocess, "Popen", lambda cmd, **how: real([cmd[0], "-c", f"{start}; {run}", *cmd[1:]], **how)
    )
    monkeypatch.setattr(machine, "accelerator", lambda: None)  # another process would say so
    monkeypatch.setattr("benchmarks.suites.SUITES", dict.fromkeys(("toy", "absent"), ("", "")))
    arguments = ["toy", "--suite", "full", "--record", "--output", str(tmp_path / "bench.json")]
    assert command.main(arguments) == 0
    said = capsys.readouterr().out
    assert "| toy / other | 2 x speed | 0.5 to 3 |" in said
    assert "| gone | skipped: not installed |" in said
    (recorded,) = (tmp_path / "results").iterdir()
    found = json.loads(recorded.read_text())
    assert found == json.loads((tmp_path / "bench.json").read_text())
    assert found["results"] == [
        {"suite": "toy", "case": "toy", "value": 2.0, "unit": "x speed", "peer": "other", "low": 0.5, "high": 3.0}
    ]
    assert found["cpu"] == machine.processor()
    assert "MALLOC_MMAP_THRESHOLD_=" in found["malloc"]
    # A suite that fails is no result, and nothing is recorded with it.
    assert command.main(["absent", *arguments[1:]]) == 1
    assert json.loads(recorded.read_text()) == found


def test_suites_are_there() -> None:
    assert set(QUICK) < set(SUITES)
    assert all(question.endswith("?") for _, question in SUITES.values())
    assert all(callable(load_suite(name)) for name in SUITES)  # and none needs a library to be imported


# ------------------------------------------------------------------------------------------------ reports


def made(*ratios: tuple[str, float, float, float], **fields: object) -> dict:
    results = [
        report.entry("s", Result(case, value, "x speed", peer="p", low=low, high=high))
        for case, value, low, high in ratios
    ]
    base = {
        "date": "2026-01-01",
        "cpu": "A CPU",
        "cores": 2,
        "python": "3.11",
        "suite": "full",
        "versions": {"numpy": "2"},
    }
    return base | {"results": results, "skipped": []} | fields


def test_ratios_are_compared_with_the_last_ones() -> None:
    old = made(("same", 2.0, 1.9, 2.1), ("better", 2.0, 1.9, 2.1), ("perhaps", 2.0, 1.0, 3.0), ("gone", 1.0, 1.0, 1.0))
    new = made(("same", 2.02, 1.9, 2.1), ("better", 3.0, 2.9, 3.1), ("perhaps", 2.5, 2.0, 3.0), ("new", 1.0, 1.0, 1.0))
    found = {name: change for (_, name, _), change in report.changes(new, old).items()}
    assert found == {"same": "=", "better": "+50 %", "perhaps": "+25 % ?"}
    assert report.changes(new, None) == {}
    seconds = report.entry("s", Result("same", 1.0, "s"))
    assert report.changes({"results": [seconds]}, {"results": [seconds]}) == {}  # no ratio


def test_records_are_found_by_processor(tmp_path: Path) -> None:
    first = report.record(made(("a", 1.0, 1.0, 1.0)), tmp_path)
    assert first.name == "2026-01-01-a-cpu-2-cores.json"
    report.record(made(cpu="Another", date="2026-01-03"), tmp_path)
    last = report.last_of("A CPU", 2, tmp_path)
    assert last is not None
    assert last["date"] == "2026-01-01"
    assert report.last_of("A CPU", 64, tmp_path) is None
    assert report.last_of("None", 2, tmp_path) is None
    newest = report.latest(tmp_path)
    assert newest is not None
    assert newest["cpu"] == "Another"
    # An accelerator is a device of its own, beside whichever processor it stands.
    assert report.latest(tmp_path, accelerated=True) is None
    beside = report.record(made(accelerator="A GPU", date="2026-01-04"), tmp_path)
    assert beside.name == "2026-01-04-a-gpu-2-cores.json"
    assert report.latest(tmp_path) == newest
    assert report.last_of("A GPU", 2, tmp_path) == report.latest(tmp_path, accelerated=True) is not None
    assert report.last_of("A CPU", 2, tmp_path) == last
    # What is measured again on the same day replaces its suite, and no other.
    other = report.entry("t", Result("b", 1.0, "s"))
    report.record(made(results=[other]), tmp_path)
    assert [found["suite"] for found in json.loads(first.read_text())["results"]] == ["s", "t"]
    # What it keeps was measured with the versions of then.
    for numpy in ("3", "4"):
        report.record(made(results=[other], versions={"numpy": numpy}), tmp_path)
    found = json.loads(first.read_text())
    assert found["earlier"] == {"s": {"date": "2026-01-01", "python": "3.11", "malloc": "as it comes", "numpy": "2"}}
    assert "Measured with numpy 2: s." in docs.page(found)
    found["earlier"]["s"]["date"] = "2025-12-31"
    assert "Measured on 2025-12-31 with numpy 2: s." in docs.page(found)
    assert report.record(made(cores=4), tmp_path) != first
    with pytest.raises(ValueError, match="quick ones do not replace them"):
        report.record(made(suite="quick"), tmp_path)


def test_the_best_of_no_more_stored_bits_is_shown() -> None:
    fits = [Measurement("a", 4.5, 4.4, 0.9, 0.8, "data-free"), Measurement("b", 3.0, 2.9, 0.95, 0.8, "data-free"),
            Measurement("c", 4.6, 4.52, 0.99, 0.8, "data-free"), Measurement("d", 4.7, 4.1, 1.0, 0.9, "calibrated"),
            Measurement("peer", 4.5, 8.5, 0.97, 0.79, "peer"),
            Measurement("small", 2.5, 2.5, 0.5, 0.4, "peer")]  # fmt: skip
    found = [report.entry("accuracy", line_of(fit)) for fit in fits]
    best = {kind: best_within(found, 4.5, kind) for kind in KINDS}
    assert [each and each["case"] for each in best.values()] == ["b: embedding cosine", "d: embedding cosine"]
    assert best_within(found, 2.0, "data-free") is None
    _, _, peer, small, *_ = accuracy_table(found)
    # Bold where the peer is nearer to the float model than ours without data.
    ours = "b | 2.90 | 0.9500 | 0.8000 | d | 4.10 | 1.0000 | 0.9000"
    assert peer == f"| peer (8.50 as stored) | 4.50 | **0.9700** | 0.7900 | {ours} |"
    assert small == "| small | 2.50 | 0.5000 | 0.4000 | none so small |  |  |  | none so small |  |  |  |"


def test_ours_is_a_ladder_with_and_without_data(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(contenders("ours", full=True)) == len(LADDER) >= 14
    assert contenders("ours", full=False).keys() < contenders("ours", full=True).keys()
    made: list[aq.ConversionConfig] = []
    monkeypatch.setattr(aq, "convert", made.append)
    list(make_tables())
    shapes = {"embeddings.word_embeddings.weight": (30522, 384), "encoder.layer.0.output.dense.weight": (27648, 384)}
    bits = []
    for conversion in made:
        assert conversion.quantization is not None
        found = [treat(conversion.quantization, *each, np.dtype(np.float32)) for each in shapes.items()]
        assert all(each.spec and each.spec.rotation and each.quantizer == aq.QUANTIZERS["gptq"] for each in found)
        bits.append(8 * sum(each.columns["data"] for each in found) / sum(map(math.prod, shapes.values())))
    # From 1.5 to 8 bits, and no rung is more than half a bit, or a fifth, above the one below.
    assert (bits[0], bits[-1]) == (8, 1.5)
    assert all(0 < above - below <= max(0.51, above / 5) for above, below in itertools.pairwise(bits))


# ------------------------------------------------------------------------------------------------ calibrated tables


def calibrated_table(path: Path, text: str, sentences: int, **more: dict) -> Path:
    """A table whose metadata says that it was calibrated."""
    record = read_text(CalibrationConfig(text, sentences=sentences)).record()
    config = {"quantization": {"solver": "gptq", "quant_type": "int2", "group_size": 128, "rotate": True},
              "calibration": record, **more}  # fmt: skip
    with TableWriter(path, version=2, config=config) as table:
        for row in plain_rows("w", np.ones(3, np.float32)):
            table.write(as_v2(row))
    return path


def test_what_calibrated_tables_have_seen_is_known(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"Sentence {i} of a text." for i in range(100)))
    path = calibrated_table(tmp_path / "m.parquet", str(text), 20)
    found = describe(path, {"text.txt": text})
    assert found.name == "aq_jax gptq int2, g128, rotated"
    assert len(found.seen) == 20
    assert found.made["calibration"]["text"] == "text.txt"
    plan = {"widths": ["int2"], "bpw": 2.5, "sentences": 10}
    planned = describe(calibrated_table(path, str(text), 20, allocation=plan), {"text.txt": text})
    assert len(planned.seen) == 20 + 3 * 5
    with pytest.raises(ValueError, match="which AQ_JAX_CALIBRATED does not name"):
        describe(path, {})
    text.write_text("Another text.")
    with pytest.raises(ValueError, match=r"another text\.txt than the given one"):
        describe(path, {"text.txt": text})


def test_tables_that_cannot_be_judged_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fine = calibrated_table(tmp_path / "fine.parquet", "", 100)
    greedy = calibrated_table(tmp_path / "greedy.parquet", "", 2**24)
    (tmp_path / "bad.parquet").write_text("no table")
    paths = [tmp_path / "none.parquet", tmp_path / "bad.parquet", fine, greedy]
    monkeypatch.setenv(VARIABLE, os.pathsep.join(map(str, paths)))
    monkeypatch.setattr(accuracy, "make_tables", lambda: iter([fine]))
    none, bad, kept, left, made = calibrated(full=True)
    assert isinstance(none, Skipped)
    assert "No such file" in none.reason
    assert isinstance(bad, Skipped)
    assert "not a Parquet" in bad.reason
    assert not isinstance(kept, Skipped)
    assert isinstance(left, Skipped)
    assert "fewer than 50 sentences would be left" in left.reason
    assert not isinstance(made, Skipped)
    assert made.name.startswith(f"{kept.name}, table ")
    lines = models.held_out(10**6, kept.seen)
    assert not kept.seen & {" ".join(line.casefold().split()) for line in lines}
    assert len(lines) == len(models.held_out(10**6)) - 100


# ------------------------------------------------------------------------------------------------ the page of figures


def test_the_pages_figures_are_the_recorded_ones() -> None:
    for name, text in docs.files(report.latest(), report.latest(accelerated=True)).items():
        assert (docs.DOCS / name).read_text() == text, f"{name}: python -m benchmarks.docs"


def test_the_chart_has_a_mark_for_each_recorded_point() -> None:
    found = report.latest()
    assert found is not None
    cosines = [result for result in found["results"] if result["unit"] == "cosine"]
    theirs = [result for result in cosines if "note" not in result and not result["case"].startswith("float16")]
    ours = {name: chart.front(chart.points(cosines)[name]) for name in chart.OURS}
    circles: list[ET.Element] = []
    for theme in chart.THEMES.values():
        drawn = ET.fromstring(chart.draw(cosines, theme))
        marks = [path for path in drawn.findall(".//{*}path") if "transform" in path.attrib]
        assert len(marks) == len(theirs) + len(chart.PEERS)  # and the legend
        circles = drawn.findall(".//{*}circle")
        assert len(circles) == sum(map(len, ours.values()))
    # Read back from a pixel: the axis has the logarithm of what is missing to 1.
    (bits, cosine), circle = ours["calibrated"][-1], circles[len(ours["calibrated"]) - 1]
    up = (chart.BOTTOM - float(circle.attrib["cy"])) / (chart.BOTTOM - chart.TOP)
    across = (float(circle.attrib["cx"]) - chart.LEFT) / (chart.RIGHT - chart.LEFT)
    assert 1 - 10 ** (-5 * up) == pytest.approx(cosine, abs=1e-4)
    assert 1.5 + 7.5 * across == pytest.approx(bits, abs=1e-3)


def test_tables_are_made_of_what_is_recorded() -> None:
    def result(suite: str, case: str, value: float, peer: str, unit: str = "x speed", **more: Any) -> dict:
        return report.entry(suite, Result(case, value, unit, peer=peer, **more))

    figures = {"bits": 2.5, "p1": 0.25}
    found = made(
        results=[
            result("quantize", "quantize int4", 12.3, "NumPy"),
            result("quantize", "quantize int4", 0.5, "gguf Q4_0"),
            result("quantize", "quantize int4", 0.25, "gguf Q4_1", note="theirs in groups of 32"),
            result("quantize", "quantize int4", 9.0, "aq_jax mse"),  # no column
            result("load", "load int8 .arrow", 0.5, "safetensors float32 to JAX", "x time"),
            result("memory", "MiniLM int2 in memory, hqq: anonymous memory added", 90.0, "", "MB", low=90, high=91),
            result("accuracy@2", "hqq 2 bits, g64: embedding cosine", 0.5, "", "cosine", figures=figures),
        ],
        skipped=[{"suite": "quantize", "case": "qwix", "reason": "qwix is not installed"}],
    )
    said = docs.page(found)
    assert "| quantize int4 | 12 | **0.25** <sup>a</sup> |" in said  # the best of a library, in bold where it is better
    assert "<sup>a</sup> theirs in groups of 32" in said
    assert "| load int8 .arrow | 2.0 |" in said  # in time: the other way around
    assert "| hqq |  | 90 (90 to 91) |" in said
    assert "| hqq 2 bits, g64 | 2.50 | 0.5000 | 0.2500 | none so small |" in said
    assert "## Left out\n\n- qwix: qwix is not installed" in said
    assert docs.page(None).endswith(docs.NOTHING)
