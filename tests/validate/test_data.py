"""Models are judged by lines and pairs that no case has seen; files that are no such thing are refused by line."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Literal

import pytest
import small_validation

from aq_jax.calibration.allocation import JUDGE_FACTOR
from aq_jax.calibration.solve import TrainingRequest, draw_texts
from aq_jax.errors import ConfigError
from aq_jax.validate.config import Case, ValidationConfig, read_conversions
from aq_jax.validate.data import HeldOut, _is_seen, _plain, held_out, read_pairs, seen_lines

COLUMNS = ("sentence1", "sentence2", "score")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(small_validation.bert(tmp_path / "bert"))
    return tmp_path / "bert"


def held(*cases: Case, text: str = "text.txt", seed: int = 0, labels: str = "") -> HeldOut:
    config = ValidationConfig(cases, text=text, seed=seed, labels=labels)
    return held_out(config, read_conversions(config))


@pytest.mark.parametrize("seed", [0, 1])
def test_no_line_that_a_case_calibrates_on_judges_any(seed: int) -> None:
    cases = (Case("int8", "int8.toml"), Case("gptq", "gptq.toml"))
    found = held(*cases, seed=seed, labels="labels.tsv")
    calibration = read_conversions(ValidationConfig(cases))[1].calibration
    (used,) = draw_texts(calibration, None)
    assert not set(used.lines) & set(found.text.lines)
    assert found.excluded == len(used.lines) == 40
    assert len(found.text.lines) + 40 == len(Path("text.txt").read_text().splitlines())
    assert found.pairs is not None
    assert not set(used.lines) & {sentence for a, b, _ in found.pairs.rows for sentence in (a, b)}
    assert 0 < found.pairs.excluded == 60 - len(found.pairs.rows)


def test_the_same_line_in_another_file_is_seen_too() -> None:
    lines = Path("text.txt").read_text().splitlines()
    Path("other.txt").write_text("\n".join(f"  {line.upper()}" for line in lines))
    assert held(Case("gptq", "gptq.toml"), text="other.txt").excluded == 40


def test_windows_judge_nothing_if_a_case_has_seen_a_line_of_theirs() -> None:
    lines = [each for i in range(300) for each in ("= Notes =", f"{i}: " + "many words of prose, " * 5)]
    Path("book.txt").write_text("\n".join(lines))
    sets = ("calibration.text=book.txt", "calibration.joined=true", "calibration.max_tokens=40")
    case = Case("gptq", "gptq.toml", sets)
    config = ValidationConfig((case,), text="book.txt", joined=True, max_tokens=60)  # other windows of the same lines
    found = held_out(config, (conversions := read_conversions(config)))
    (used,) = draw_texts(conversions[0].calibration, None)
    seen, judged = ({line for each in text.lines for line in each.split("\n")} for text in (used, found.text))
    assert (len(used.lines), max(map(len, used.lines)), seen & judged) == (40, 240, {"= Notes ="})
    assert 27 <= found.excluded <= 80
    assert len(found.text.lines) + found.excluded == 100


SHORT = "quantization.solver=gptq", "calibration.text=poem.txt", "calibration.joined=true", "calibration.max_tokens=32"


@pytest.mark.parametrize(("joined", "max_tokens"), [(True, 32), (True, 50), (False, 512)])
def test_short_lines_of_windows_are_seen_too(joined: bool, max_tokens: int) -> None:
    lines = [f"verse {i} says again what it said" for i in range(2000)]  # some 30 letters, as verse and Chinese have
    Path("poem.txt").write_text("\n".join(lines))
    case = Case("gptq", "int8.toml", (*SHORT, "calibration.sentences=100"))
    config = ValidationConfig((case,), text="poem.txt", joined=joined, max_tokens=max_tokens)
    found = held_out(config, (conversions := read_conversions(config)))
    (used,) = draw_texts(conversions[0].calibration, None)
    seen, judged = ({line for each in text.lines for line in each.split("\n")} for text in (used, found.text))
    assert len(used.lines) == 100
    assert not seen & judged
    assert found.excluded >= 100
    assert joined or found.excluded == len(seen)


def test_a_window_may_share_headings_but_not_more_of_its_letters() -> None:
    prose = ["", *(f"{i}: " + "many words of prose, " * 5 for i in range(4)), ""]
    heads = ["Notes and other things", "= See also =", "= Further reading =", "= References ="]
    assert not _is_seen("\n".join(heads[:2] + prose), {_plain(line) for line in heads})
    assert _is_seen("\n".join(heads + prose), {_plain(line) for line in heads})
    assert _is_seen("\n".join(heads[:1] + prose), {_plain(prose[2])})
    assert not _is_seen("\n".join(prose[:3] + heads[:2] + prose * 4), {_plain(line) for line in heads})
    assert _is_seen("\n".join(prose[:3] + heads + prose * 4), {_plain(line) for line in heads})  # 64 letters in a row
    assert _is_seen("\n".join(heads[:1] + prose), {_plain(" ".join(heads[:1] + prose))})
    assert _is_seen("Notes", {"notes"})


def test_pairs_with_a_short_line_of_a_window_are_left_out() -> None:
    lines = [f"verse {i} says again" for i in range(800)]
    Path("poem.txt").write_text("\n".join(lines))
    Path("l.csv").write_text("a,b,s\n" + "".join(f"{line},another {i},{i}\n" for i, line in enumerate(lines)))
    case = Case("gptq", "int8.toml", (*SHORT, "calibration.sentences=20"))
    config = ValidationConfig((case,), text="text.txt", labels="l.csv", label_columns=("a", "b", "s"))
    found = held_out(config, (conversions := read_conversions(config)))
    (used,) = draw_texts(conversions[0].calibration, None)
    seen = {line for each in used.lines for line in each.split("\n")}
    assert found.pairs is not None
    assert found.pairs.excluded == len(seen)
    assert not seen & {first for first, _, _ in found.pairs.rows}


def test_what_is_not_calibrated_sees_nothing() -> None:
    assert held(Case("int8", "int8.toml"), Case("int2", "int2.toml")).excluded == 0


def test_the_built_in_text_is_shared_fairly() -> None:
    case = Case("gptq", "gptq.toml", ("calibration.text=",))
    found = held(case, text="")
    assert found.text.name == "pydoc_data.topics"
    assert found.excluded == 40


def test_planning_and_training_see_more() -> None:
    plan = Case("a", "gptq.toml", ("quantization.rotate=true", "allocate.target_bpw=3", "allocate.sentences=5"))
    assert held(plan).excluded == 40 + (1 + JUDGE_FACTOR) * 5
    limited = ("calibration.sentences=20", "train.sentences=30", "train.held_out=10")
    trained = Case("t", "trained.toml", limited)
    (conversion,) = read_conversions(ValidationConfig((trained,)))
    assert conversion.train is not None
    lines = {
        line
        for each in draw_texts(conversion.calibration, TrainingRequest(conversion.train, Path()))
        for line in each.lines
    }
    assert lines <= seen_lines(conversion)
    assert held(trained).excluded == 20 + 30 + 10


def test_a_plan_may_ask_for_calibration() -> None:
    Path("plan.toml").write_text('[[override]]\npattern = "dense"\nquant_type = "int4"\nsolver = "gptq"')
    sets = ("plan=plan.toml", "calibration.text=text.txt", "calibration.sentences=30")
    assert held(Case("a", "int8.toml", sets)).excluded == 30


def test_too_few_lines_are_refused_with_what_to_do() -> None:
    with pytest.raises(
        ConfigError, match=r"text = 'text.txt': 0 of \d+ lines are left .* wanted 50 .*train\.sentences"
    ):
        held(Case("t", "trained.toml"))


def test_text_that_is_none_is_refused_by_its_own_key() -> None:
    with pytest.raises(ConfigError, match=r"^text = 'none\.txt': no such file"):
        held(Case("int8", "int8.toml"), text="none.txt")


@pytest.mark.parametrize("separator", [",", "\t"])
def test_pairs_of_named_columns(separator: str) -> None:
    rows = [separator.join(("id", "score", "sentence2", "sentence1"))]
    rows += [separator.join((str(i), str(i / 2), f"two {i}", f"one {i}")) for i in range(20)]
    Path("l.csv").write_text("\ufeff" + "\r\n".join(rows) + "\r\n\r\n", "utf-8")
    found = read_pairs("l.csv", COLUMNS, {"one 3", "two 5"})
    assert found.rows[:2] == (("one 0", "two 0", 0.0), ("one 1", "two 1", 0.5))
    assert (len(found.rows), found.excluded) == (18, 2)


@pytest.mark.parametrize("separator", [",", "\t"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_quotes_are_read_as_csv_writes_them(separator: str, quoting: Literal[0, 1]) -> None:
    wanted = tuple((f'one,\t"{i}"', "x\ny", float(i)) for i in range(12))
    with Path("l").open("w", newline="") as file:
        csv.writer(file, delimiter=separator, quoting=quoting).writerows([("a", "b", "s"), *wanted])
    assert read_pairs("l", ("a", "b", "s")).rows == wanted


def test_quotes_of_the_benchmark_are_letters() -> None:
    Path("l.tsv").write_text("".join(f'g\tf\ty\t{i}\t{i}\t"one\ttwo\n' for i in range(12)))
    assert read_pairs("l.tsv", COLUMNS).rows[1] == ('"one', "two", 1.0)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (None, "No such file"),
        (b"", "0 pairs are left"),
        (b"\xff\xfe", "labels = 'l.csv': .*can't decode"),
        (b"a,b,c\n1,2,3\n", "its first row is .*; wanted a first row with sentence1, sentence2, score"),
        (b"a\tb\n", "its first row is"),
        (b"sentence1,sentence2,score\nx,y\n", "line 2: found 2 columns; wanted 3 or more"),
        (b"sentence1,sentence2,score\nx,y,high\n", "line 2: the score is 'high'; wanted a number"),
        (b"sentence1,sentence2,score\nx,y,nan\n", "line 2: the score is 'nan'"),
        (b"sentence1,sentence2,score\nx,y,1\n", "1 pairs are left .*wanted 10 or more"),
        (b"sentence1,sentence2,score\n" + b"x,y,1\n" * 20, "scores that differ"),
        (b'sentence1,sentence2,score\n"x,y,1\n', "line 2: unexpected end of data"),
        (b"sentence1,sentence2,score\n" + b"x" * 200_000 + b",y,1\n", "line 2: field larger than field limit"),
        (b'sentence1\tsentence2\tscore\n"x" y\tz\t1\n', "line 2: '\t' expected after '\"'; wanted a first row with"),
        (b"g\tf\ty\t1\t5.0\tone\ttwo\ng\tf\n", "line 2: found 2 columns; wanted 7"),
    ],
)
def test_labels_that_are_none_are_refused_by_line(content: bytes | None, wanted: str) -> None:
    if content is not None:
        Path("l.csv").write_bytes(content)
    with pytest.raises(ConfigError, match=wanted):
        read_pairs("l.csv", COLUMNS)
