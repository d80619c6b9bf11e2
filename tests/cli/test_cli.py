"""The command line: what it prints, and its exit status. Most of it in this process, which spares an import of jax."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from helpers import Run, listing

import aq_jax as aq
from aq_jax import cli
from aq_jax.cli import commands
from aq_jax.config import QuantizationConfig
from aq_jax.store import Row, write_table
from aq_jax.store.inspection import inspect_table

pytestmark = pytest.mark.usefixtures("_no_traces")


CACHE = (
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES",
)


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture
def v1(tmp_path: Path) -> Path:
    tensors = {"b.weight": weights(8, 16), "a.weight": weights(16, 16, seed=1), "c.bias": np.ones(5, np.float16)}
    aq.save(tmp_path / "v1.parquet", tensors | {"tied": tensors["b.weight"]})
    return tmp_path / "v1.parquet"


@pytest.fixture
def v2(v1: Path) -> Path:
    config = QuantizationConfig("int8", overrides=(aq.Override("a", quant_type="int4", group_size=8, solver="absmax"),))
    aq.quantize_file(v1, v1.with_name("v2.parquet"), config)
    return v1.with_name("v2.parquet")


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    (tmp_path / "hf").mkdir()
    tensors = {"a.weight": weights(8, 16), "a.bias": weights(8)}
    safetensors.numpy.save_file(tensors, tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "config.json").write_text("{}")
    text = f'source = "{tmp_path}/hf"\noutput = "{tmp_path}/out/m.parquet"\n[quantization]\nquant_type = "int8"\n'
    (tmp_path / "c.toml").write_text(text)
    return tmp_path / "c.toml"


# ------------------------------------------------------------------------------------------------ what is done


def test_convert_writes_a_table_and_says_so(run: Run, toml: Path, tmp_path: Path) -> None:
    status, out, err = run("convert", toml)
    assert (status, err) == (0, "")
    assert out.startswith(f"{tmp_path}/out/m.parquet: 1 tensors quantized, ")
    assert listing(tmp_path / "out") == ["config.json", "m.parquet"]
    status, out, err = run("convert", toml, "--set", "quantization.quant_type=none", "--json")
    report = json.loads(out)
    assert (status, err, report["quantized"]) == (0, "", {})
    assert report["bytes"] == (tmp_path / "out" / "m.parquet").stat().st_size
    assert inspect_table(tmp_path / "out" / "m.parquet").config["quantization"]["quant_type"] == "none"


def test_a_dry_run_writes_nothing(run: Run, toml: Path, tmp_path: Path) -> None:
    before = listing(tmp_path)
    status, out, _ = run("convert", toml, "--dry-run")
    assert status == 0
    assert out.splitlines()[-1].endswith("bytes of tensors; nothing was written")
    status, out, _ = run("convert", toml, "--dry-run", "--json", "--set", "quantization.group_size=8")
    report = json.loads(out)
    assert status == 0
    assert report["rows"][1] == {"name": "a.weight", "shape": [8, 16], "quant_type": "int8", "bytes": 128 + 8 * 16}
    assert report["bytes"] == sum(row["bytes"] for row in report["rows"])
    assert listing(tmp_path) == before


def test_a_dry_run_refuses_what_the_run_would(run: Run, toml: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").write_text('{"another": "model"}')
    before = listing(tmp_path)
    for sets in (
        ["output=m.safetensors"],
        [f"output={tmp_path}"],
        [f"output={tmp_path}/m.arrow", "compression=zstd"],
        [f"output={tmp_path}/taken/m.parquet"],
        ["source=/missing"],
    ):
        flags = [word for text in sets for word in ("--set", text)]
        dry, real = run("convert", toml, "--dry-run", *flags), run("convert", toml, *flags)
        assert dry == real
        assert (dry[0], dry[1], dry[2].count("\n")) == (2, "", 1)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("output", ["m.parquet", "folder"])
def test_a_dry_run_notes_what_the_run_does(run: Run, tmp_path: Path, output: str) -> None:
    tensors = {"a.weight": weights(8, 16), "a.norm.weight": weights(4, 16), "b.norm.weight": weights(4, 16)}
    aq.save(tmp_path / "v1.parquet", tensors | {"tied": tensors["a.weight"]})
    (tmp_path / "plan.toml").write_text('[[override]]\npattern = "a[.]weight"\nquant_type = "int4"\n')
    (tmp_path / "c.toml").write_text(
        f"""
        source = "{tmp_path}/v1.parquet"
        output = "{tmp_path}/out/{output}"
        plan = "{tmp_path}/plan.toml"
        calibration.sentences = 9
        [quantization]
        quant_type = "int8"
        [[override]]
        pattern = "a.*weight$"
        [[override]]
        pattern = "^a[.]w"
        [[override]]
        pattern = "tied"
        """
    )
    flags = ("--json", "--set", "shards.size=256") if output == "folder" else ("--json",)
    dry, real = (run("convert", tmp_path / "c.toml", *flags, *more) for more in (("--dry-run",), ()))
    notes = json.loads(dry[1])["notes"]
    assert notes == json.loads(real[1])["notes"]
    assert [note.partition(":")[0] for note in notes] == [
        "kept as they are, being norms or biases by their names, though of two axes or more",
        "left behind, not recognized as a model's file",
        "override '^a[.]w' holds for no tensor",
        "override 'tied' matches no tensor but tied, which is tied to a.weight",
        "calibration",
    ]


def test_quantize_and_dequantize(run: Run, v1: Path, tmp_path: Path) -> None:
    v2, back = tmp_path / "v2.arrow", tmp_path / "back.parquet"
    assert (
        run("quantize", v1, v2, "--quant-type", "int4", "--group-size", 8, "--solver", "absmax", "--keep", "b.")[0] == 0
    )
    layers = {layer.name: layer for layer in inspect_table(v2).layers}
    assert {name: layer.quant_type for name, layer in layers.items()} == {
        "b.weight": "fp16", "a.weight": "int4", "c.bias": "none",
    }  # fmt: skip
    assert run("dequantize", v2, back)[0] == 0
    assert aq.load(back, "numpy")["c.bias"].dtype == np.float16
    status, out, _ = run("dequantize", v2, tmp_path / "folder", "--json")
    assert (status, json.loads(out)["path"]) == (0, str(tmp_path / "folder" / "model.safetensors"))
    status, out, _ = run("dequantize", v2, back, "--json")
    assert (status, json.loads(out)["path"]) == (0, str(back))


def test_flags_are_the_config(run: Run, v1: Path, tmp_path: Path) -> None:
    cases = {
        (): {"quant_type": "int8", "per_channel": True, "group_size": 0, "symmetric": True, "solver": "absmax"},
        ("--per-tensor",): {"per_channel": False, "group_size": 0},
        ("--group-size", 8, "--asymmetric"): {
            "per_channel": False,
            "group_size": 8,
            "symmetric": False,
            "solver": "minmax",
        },
        ("--quant-type", "int4", "--rotate"): {"quant_type": "int4", "rotate": True, "group_size": 128},
        ("--quant-type", "int5", "--rotate"): {"quant_type": "int5", "rotate": True, "group_size": 128},
        ("--rotate",): {"quant_type": "int8", "rotate": True, "per_channel": True},
        ("--quant-type", "fp16", "--on-nonfinite", "keep"): {"quant_type": "fp16", "on_nonfinite": "keep"},
        ("--keep", "a", "--keep", "b", "--compression", "zstd"): {"mixed_precision_layers": ["a", "b"]},
    }
    for flags, wanted in cases.items():
        assert run("quantize", v1, tmp_path / "m.parquet", *flags)[0] == 0
        config = inspect_table(tmp_path / "m.parquet").config["quantization"]
        assert {key: config[key] for key in wanted} == wanted, flags


def test_rotated_tables(run: Run, v1: Path, tmp_path: Path) -> None:
    flags = ("--quant-type", "int4", "--group-size", 8, "--rotate", "--keep", "b.")
    assert run("quantize", v1, tmp_path / "v2.parquet", *flags)[0] == 0
    status, out, _ = run("inspect", tmp_path / "v2.parquet", "--json")
    types = {layer["name"]: layer["quant_type"] for layer in json.loads(out)["layers"]}
    assert (status, types) == (0, {"b.weight": "fp16", "a.weight": "int4h", "c.bias": "none"})
    assert run("verify", tmp_path / "v2.parquet")[0] == 0
    assert run("dequantize", tmp_path / "v2.parquet", tmp_path / "back.parquet")[0] == 0
    wanted, found = (aq.load(tmp_path / name, "numpy")["a.weight"] for name in ("v1.parquet", "back.parquet"))
    assert np.linalg.norm(found - wanted) < 0.12 * np.linalg.norm(wanted)


def test_tensors_that_are_kept_are_named(run: Run, tmp_path: Path) -> None:
    aq.save(tmp_path / "v1.parquet", {"bad": np.full((2, 8), np.nan, np.float32), "good": weights(2, 8)})
    status, _, err = run("quantize", tmp_path / "v1.parquet", tmp_path / "v2.parquet")
    assert status == 2
    assert err.startswith("aq-jax: bad: 16 of 16 values are not finite (first at [0, 0])")
    assert listing(tmp_path) == ["v1.parquet"]
    status, out, _ = run("quantize", tmp_path / "v1.parquet", tmp_path / "v2.parquet", "--on-nonfinite", "keep")
    assert status == 0
    assert out.startswith("kept unquantized: bad: 16 of 16 values are not finite")
    assert "1 tensors quantized" in out


# ------------------------------------------------------------------------------------------------ inspect


def test_inspect_lists_what_is_there(run: Run, v2: Path) -> None:
    status, out, err = run("inspect", v2)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].split() == ["name", "shape", "type", "params", "bits", "bytes", "cosine", "error"]
    assert [line.split()[0] for line in lines[2:5]] == ["b.weight", "a.weight", "c.bias"]
    assert lines[3].split()[1:4] == ["16x16", "int4", "256"]
    assert lines[6].split()[:3] == ["3", "tensors", "389"]
    assert lines[7] == "tied: tied = b.weight"
    assert lines[8] == f"schema V2, {v2.stat().st_size:,} bytes on disk"


SORTED = {
    "name": ["a.weight", "b.weight", "c.bias"],
    "shape": ["c.bias", "b.weight", "a.weight"],
    "type": ["a.weight", "b.weight", "c.bias"],
    "params": ["c.bias", "b.weight", "a.weight"],
    "bytes": ["c.bias", "b.weight", "a.weight"],
    "cosine": ["a.weight", "b.weight", "c.bias"],
    "error": ["c.bias", "b.weight", "a.weight"],
}


@pytest.mark.parametrize("key", SORTED)
def test_inspect_sorts(run: Run, v2: Path, key: str) -> None:
    for flags, wanted in ((), SORTED[key]), (("--reverse",), SORTED[key][::-1]):
        _, out, _ = run("inspect", v2, "--sort", key, *flags)
        assert [line.split()[0] for line in out.splitlines()[2:5]] == wanted
        _, out, _ = run("inspect", v2, "--sort", key, "--json", *flags)
        assert [layer["name"] for layer in json.loads(out)["layers"]] == wanted


def test_every_column_can_be_sorted_by(run: Run, v2: Path) -> None:
    header = run("inspect", v2)[1].splitlines()[0].split()
    assert set(header) == set(commands.SORT_KEYS)
    bits = [layer["bits"] for layer in json.loads(run("inspect", v2, "--sort", "bits", "--json")[1])["layers"]]
    assert bits == sorted(bits)


def test_inspect_in_json(run: Run, v2: Path) -> None:
    status, out, _ = run("inspect", v2, "--json")
    report = json.loads(out, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    assert (status, report["version"], report["params"], report["aliases"]) == (0, 2, 389, {"tied": "b.weight"})
    assert report["file_bytes"] == v2.stat().st_size
    assert report["layers"][2]["cosine"] is None
    assert report["config"]["quantization"]["quant_type"] == "int8"


def test_statistics_that_are_no_numbers_are_no_json_either(run: Run, tmp_path: Path) -> None:
    one = np.ones(1, np.float32)
    row = Row("w", (2, 4), "float32", np.zeros(8, np.uint8), 8, "int8", one, one - 1, solver="absmax",
              cosine=float("nan"), rel_mse=float("inf"))  # fmt: skip
    write_table(tmp_path / "m.parquet", [row], version=2)
    _, out, _ = run("inspect", tmp_path / "m.parquet", "--json")
    (layer,) = json.loads(out, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))["layers"]
    assert (layer["cosine"], layer["rel_mse"]) == (None, None)


def test_an_empty_table_is_listed(run: Run, tmp_path: Path) -> None:
    aq.save(tmp_path / "m.parquet", {})
    status, out, _ = run("inspect", tmp_path / "m.parquet")
    assert status == 0
    assert "0 tensors" in out
    assert run("verify", tmp_path / "m.parquet")[0] == 0


HOSTILE = "evil\x1b[2J\x07\r\n\u202ename\x9b31m"


def test_names_from_files_do_not_steer_the_terminal(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "m.arrow"
    tensor = np.full((4, 8), np.nan, np.float32)
    aq.save(path, {HOSTILE: tensor, HOSTILE + "tied": tensor})
    outputs = [run("inspect", path), run("inspect", path, "--json"), run("quantize", path, tmp_path / "o.parquet")]
    outputs.append(run("quantize", path, tmp_path / "o.parquet", "--on-nonfinite", "keep"))
    path.write_bytes(path.read_bytes().replace(tensor.tobytes(), b"\1" + tensor.tobytes()[1:]))
    outputs += [run("verify", path), run("verify", path, "--json")]
    assert [status for status, *_ in outputs] == [0, 0, 2, 0, 1, 1]
    for _, out, err in outputs:
        assert "evil" in out + err
        text = (out + err).replace("\n", "")
        assert text.isprintable(), text
        assert "evil\n" not in out + err


# ------------------------------------------------------------------------------------------------ verify


def test_verify_answers_with_its_status(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "m.arrow"
    aq.save(path, {"a": np.full(64, 65, np.uint8), "b": np.full(64, 66, np.uint8)})
    assert run("verify", path) == (0, f"{path}: whole; 2 good rows\n", "")
    assert json.loads(run("verify", path, "--json")[1]) == {
        "path": str(path), "rows": 2, "unchecked": 0, "errors": [], "ok": True, "good": ["a", "b"], "bad": [],
    }  # fmt: skip
    path.write_bytes(path.read_bytes().replace(b"B" * 64, b"B" * 63 + b"?"))
    status, out, err = run("verify", path)
    assert (status, err) == (1, "")
    assert f"{path}: row 1 (b): its bytes have digest" in out
    assert out.endswith(f"{path}: damaged; 1 of 2 tensors are whole (1 good rows); damaged: b\n")
    status, out, _ = run("verify", path, "--json")
    report = json.loads(out)
    assert (status, report["ok"], report["rows"], report["good"]) == (1, False, 1, ["a"])
    (bad,) = report["bad"]
    assert (bad["file"], bad["row"], bad["name"]) == (str(path), 1, "b")
    assert report["errors"] == [bad["problem"]]
    path.write_bytes(b"no table")
    status, out, _ = run("verify", path)
    assert status == 1
    assert "not a Parquet or Arrow IPC file" in out
    assert out.endswith(f"{path}: damaged; no tensor of it can be read\n")


def test_verify_lists_no_more_than_a_screen(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "m.arrow"
    aq.save(path, {f"w{i}": np.full(64, 100 + i, np.uint8) for i in range(30)})
    content = path.read_bytes()
    for i in range(25):
        content = content.replace(bytes([100 + i]) * 64, bytes([100 + i]) * 63 + b"!")
    path.write_bytes(content)
    status, out, _ = run("verify", path)
    assert status == 1
    assert out.count("its bytes have digest") == 20
    assert "and 5 more: --json lists all\n" in out
    assert "5 of 30 tensors are whole (5 good rows); damaged: w0, w1" in out
    assert out.endswith("w19 and 5 more\n")
    assert len(json.loads(run("verify", path, "--json")[1])["bad"]) == 25


def test_verify_says_what_it_could_not_check(run: Run) -> None:
    old = Path(__file__).parent.parent / "golden" / "existing" / "v1.parquet"
    status, out, _ = run("verify", old)
    assert status == 0
    assert "without a digest to check" in out


# ------------------------------------------------------------------------------------------------ bad input


def test_bad_input_is_one_line_and_status_2(run: Run, v1: Path, v2: Path, toml: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "o.parquet", tmp_path / "text.txt"
    text.write_text("text")
    (tmp_path / "broken.toml").write_text("source = [")
    (tmp_path / "strange.toml").write_text('source = "a"\noutputs = "b"\n')
    (tmp_path / "digits.toml").write_text(f'source = "a"\noutput = {"9" * 5000}')
    (tmp_path / "deep.toml").write_text(f"source = {'[' * 3000}{']' * 3000}")
    (tmp_path / "pattern.toml").write_text(toml.read_text() + '[[override]]\npattern = "a{99999999999999}"\n')
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / "empty").mkdir()
    before = listing(tmp_path)
    cases: list[tuple[tuple[Any, ...], str]] = [
        (("inspect", tmp_path / "missing.parquet"), "missing.parquet: does not exist"),
        (("verify", tmp_path / "missing.parquet"), "missing.parquet: No such file or directory"),
        (("inspect", text), "is of no known format; wanted one of these: a Hugging Face folder"),
        (("inspect", tmp_path / "empty"), "is of no known format"),
        (
            ("quantize", text, out),
            "is of no known format; wanted one of these: a Hugging Face folder, which holds one of",
        ),
        (("quantize", v2, out), "is int8 already"),
        (("quantize", v1, out, "--quant-type", "int9"), "quant_type = 'int9': wanted one of"),
        (("quantize", v1, out, "--group-size", -1), "group_size = -1: wanted 0"),
        (("quantize", v1, out, "--group-size", "many"), "invalid int value: 'many'"),
        (("quantize", v1, out, "--per-channel", "--group-size", 8), "not allowed with argument"),
        (("quantize", v1, out, "--per-channel", "--per-tensor"), "not allowed with argument"),
        (("quantize", v1, out, "--solver", "absmax", "--asymmetric"), "'absmax' is symmetric"),
        (("quantize", v1, out, "--solver", "newton"), "solver = 'newton': wanted one of"),
        (("quantize", v1, out, "--compression", "gzip"), "--compression 'gzip': wanted none or zstd"),
        (("quantize", v1, out, "--on-nonfinite", "ignore"), "on_nonfinite = 'ignore'"),
        (("quantize", v1, tmp_path / "o.safetensors"), "a table's name ends in .parquet or .arrow"),
        (("quantize", v1, tmp_path / "folder.parquet"), "is a folder; name a file in it"),
        (("quantize", v1, text / "o.parquet"), "text.txt"),
        (("quantize", v1, "/proc/no/o.parquet"), "/proc/no"),
        (("dequantize", v2, text), "wanted a folder"),
        (("dequantize", v2, tmp_path / "X.ARROW"), "is a name of a file of weights; wanted a folder"),
        (("dequantize", v2, tmp_path / ".parquet"), "is a name of a file of weights; wanted a folder"),
        (("dequantize", v2, tmp_path / "m.gguf"), "m.gguf: is a name of a file of weights"),
        (("dequantize", v2, "/proc/no"), "/proc/no"),
        (("convert", tmp_path / "missing.toml"), "missing.toml: No such file or directory"),
        (("convert", tmp_path), "Is a directory"),
        (("convert", tmp_path / "broken.toml"), "not a TOML file"),
        (("convert", v1), "not a TOML file"),
        (("convert", tmp_path / "strange.toml"), "unknown key 'outputs'; known are"),
        (("convert", toml, "--set", "quantization.bits=4"), "unknown key 'bits'"),
        (("convert", toml, "--set", "nonsense"), "wanted KEY=VALUE"),
        (("convert", toml, "--set", "output=a\0b.parquet"), "output = 'a\\x00b.parquet': wanted the name of a file"),
        (("convert", toml, "--set", "source="), "source = '': wanted the name of a file or folder"),
        (("convert", toml, "--set", 'calibration.text="a\\u0000b"'), "text = 'a\\x00b': wanted the name of a file"),
        (("convert", toml, "--set", 'calibration.text="~/a.txt"'), "text = '~/a.txt': only a shell knows"),
        (("convert", toml, "--set", 'output="~/a.parquet"'), "output = '~/a.parquet': only a shell knows"),
        (("convert", toml, "--set", f"quantization.group_size={'9' * 5000}"), "not a TOML value: Exceeds the limit"),
        (("convert", toml, "--set", f"quantization.group_size=0x{'f' * 5000}"), "Exceeds the limit"),
        (("convert", toml, "--set", f"source={'[' * 3000}{']' * 3000}"), "[[[["),
        (("convert", toml, "--set", f"quantization.solver{'.x' * 3000}=1"), "c.toml"),
        (("convert", tmp_path / "digits.toml"), "digits.toml: not a TOML file: Exceeds the limit"),
        (("convert", tmp_path / "deep.toml"), "deep.toml"),
        (("convert", tmp_path / "pattern.toml"), "override pattern 'a{99999999999999}' is no regular expression"),
        (("convert", toml, "--set", "source.x=1"), "source is no table"),
        (("convert", toml, "--set", "quantization=int8"), "wanted a table of keys"),
        (("convert", toml, "--set", "source=/missing"), "/missing: does not exist"),
        (("convert", toml, "--set", "source=package:missing/model"), "no package 'missing' is installed"),
        (("convert", toml, "--set", "source=package:"), "names no package; wanted package:NAME/FOLDER"),
        (
            ("convert", toml, "--set", f"source={tmp_path / 'empty'}", "--dry-run"),
            "a Hugging Face folder, which",
        ),
        (("convert", toml, "--set", f"output={tmp_path / 'folder.parquet'}"), "is a folder"),
        (("inspect", v1, "--sort", "size"), "invalid choice: 'size'"),
        (("inspect",), "the following arguments are required: FILE"),
        (("explode",), "invalid choice: 'explode'"),
        ((), "the following arguments are required: COMMAND"),
    ]
    for arguments, message in cases:
        status, said, err = run(*arguments)
        assert (status, said) == (2, ""), (arguments, err)
        assert message in err, arguments
        assert "Traceback" not in err
        if not err.startswith("usage:"):
            assert err.startswith("aq-jax: "), err
            assert err.count("\n") == 1, err
    assert listing(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_to(run: Run, v1: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    status, _, err = run("quantize", v1, tmp_path / "closed" / "m.parquet")
    assert status == 2
    assert err.endswith("Permission denied\n")


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (KeyboardInterrupt(), 130, "aq-jax: interrupted; nothing was left half-written\n"),
        (MemoryError(), 2, "aq-jax: out of memory\n"),
        (PermissionError(13, "Permission denied", "/a/b"), 2, "aq-jax: /a/b: Permission denied\n"),
        (OSError(28, "No space left on device"), 2, "aq-jax: [Errno 28] No space left on device\n"),
        (ImportError("framework='torch' needs torch"), 2, "aq-jax: framework='torch' needs torch\n"),
        (aq.FormatError("a\x1bb"), 2, "aq-jax: a\\x1bb\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_what_stops_a_job_is_said_in_one_line(
    run: Run, v1: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, text: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(commands, "inspect", fail)
    assert run("inspect", v1) == (status, "", text)


def test_a_mistake_of_ours_is_not_hidden(v1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "inspect", lambda _: {}["bug"])
    with pytest.raises(KeyError, match="bug"):
        cli.main(["inspect", str(v1)])


@pytest.mark.parametrize(
    ("variable", "by_jax", "hidden"),
    [("JAX_ENABLE_X64", False, True), ("JAX_PLATFORMS", True, True), (CACHE[0], True, True), (CACHE[0], False, False)],
)
def test_a_switch_of_jax_is_named_instead_of_a_traceback(
    run: Run, v1: Path, monkeypatch: pytest.MonkeyPatch, variable: str, by_jax: bool, hidden: bool
) -> None:
    def fail(_: object) -> None:
        scope = {"__name__": "jax.numpy" if by_jax else "aq_jax.core"}
        exec("def call(): raise TypeError('int32 and int64\\nmore')", scope)
        scope["call"]()  # type: ignore[operator]

    for name in [name for name in os.environ if name.startswith("JAX_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(commands, "inspect", fail)
    if not hidden:
        with pytest.raises(TypeError):
            run("inspect", v1)
        return
    assert run("inspect", v1) == (2, "", f"aq-jax: TypeError: int32 and int64; with {variable} set: try without\n")


# What JAX refuses when it is imported, and when it first computes.
SWITCHES = {
    "JAX_NUM_CPU_DEVICES": "abc",
    "JAX_PLATFORMS": "nonsense",
    "JAX_DEFAULT_MATMUL_PRECISION": "nonsense",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "soon",
    "JAX_COMPILATION_CACHE_DIR": "/proc/nowhere",
    "JAX_ENABLE_X64": "1",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_DEBUG_NANS": "1",
    "JAX_DISABLE_JIT": "1",
    "JAX_TRANSFER_GUARD": "disallow",
}


@pytest.mark.parametrize(
    "variable",
    [name if name == "JAX_NUM_CPU_DEVICES" else pytest.param(name, marks=pytest.mark.slow) for name in SWITCHES],
)
def test_no_variable_of_jax_makes_a_traceback(v1: Path, tmp_path: Path, variable: str) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    done = subprocess.run(
        [sys.executable, "-m", "aq_jax.cli", "quantize", str(v1), str(tmp_path / "q.parquet"), "--solver", "mse",
         "--quant-type", "int4"],
        env=env | {variable: SWITCHES[variable], "AQ_JAX_CACHE": "off"}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 2)
    assert (done.returncode == 0) == (tmp_path / "q.parquet").exists()
    if done.returncode:
        assert done.stderr.startswith("aq-jax: ")
        assert variable in done.stderr


# ------------------------------------------------------------------------------------------------ the compile cache

CACHE_CASES: list[tuple[dict[str, str], list[str | None]]] = [
    ({"HOME": "/h"}, ["/h/.cache/aq_jax/xla", "0", "-1"]),
    ({"HOME": "/h", "XDG_CACHE_HOME": "/x"}, ["/x/aq_jax/xla", "0", "-1"]),
    ({"HOME": "/h", "AQ_JAX_CACHE": "/mine"}, ["/mine", "0", "-1"]),
    ({"HOME": "/h", "AQ_JAX_CACHE": "off"}, [None, None, None]),
    ({"HOME": "/h", CACHE[0]: "/yours", CACHE[1]: "5"}, ["/yours", "5", "-1"]),
]


@pytest.mark.parametrize(("given", "wanted"), CACHE_CASES)
def test_the_compile_cache_is_set_up_unless_the_user_has(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], wanted: list[str | None]
) -> None:
    monkeypatch.setattr(os, "environ", dict(given))
    cli.use_compile_cache()
    assert [os.environ.get(name) for name in CACHE] == wanted


def test_a_user_without_a_home_has_no_cache(run: Run, v1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    for name in ("HOME", "XDG_CACHE_HOME", "AQ_JAX_CACHE", *CACHE):
        monkeypatch.delenv(name, raising=False)
    assert run("verify", v1)[0] == 0
    assert not set(CACHE) & set(os.environ)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_not_utf8_are_no_traceback(run: Run, v1: Path, tmp_path: Path) -> None:
    odd, folder = os.fsdecode(b"r\xe9"), tmp_path / "hf"
    safetensors.numpy.save_file({"w": np.ones((4, 8), np.float32)}, tmp_path / "w")
    folder.mkdir()
    (tmp_path / "w").rename(folder / "model.safetensors")
    (folder / f"{odd}.txt").write_text("beside the weights")
    for number, (command, output) in enumerate(
        (("quantize", "m.parquet"), ("quantize", "m.arrow"), ("dequantize", ""))
    ):
        status, out, err = run(command, folder, tmp_path / str(number) / output)
        assert (status, err, "left behind, names that are not plain: r\\udce9.txt" in out) == (0, "", True)
        status, _, err = run(command, v1, tmp_path / f"{odd}{number}" / output)
        assert (status, f"r\\udce9{number}" in err, "is not UTF-8; wanted names that are" in err) == (2, True, True)
    (tmp_path / f"{odd}.parquet").write_bytes(v1.read_bytes())
    assert run("inspect", tmp_path / f"{odd}.parquet")[2].endswith(": rename it, or name another\n")
    assert not list(tmp_path.glob(f"{odd}[0-9]*"))


# ------------------------------------------------------------------------------------------------ processes


def test_what_reads_names_imports_nothing_that_computes(v2: Path) -> None:
    code = """
import sys
from aq_jax import cli
from aq_jax.cli import commands
def main(*arguments):
    try:
        return cli.main(arguments)
    except SystemExit as stop:
        return stop.code
assert [main("--help"), main("--version"), main("quantize", "--help"), main("inspect", sys.argv[1]),
        main("inspect", sys.argv[1], "--json"), main("verify", sys.argv[1])] == [0] * 6
heavy = {"jax", "jaxlib", "torch", "flax", "orbax", "transformers", "rich"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(v2)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "aq-jax" in done.stdout
    assert aq.__version__ in done.stdout


def test_the_version_says_what_is_there(run: Run) -> None:
    status, out, err = run("--version")
    assert (status, err) == (0, "")
    assert re.fullmatch(rf"aq-jax {re.escape(aq.__version__)}\nnative kernels: .+\n", out)
    status, out, _ = run("--version", "--json")
    found = json.loads(out)
    assert (status, found["aq_jax"]) == (0, aq.__version__)
    assert {"int8", "int5", "int2h"} <= set(found["codes"])
    operations = {"product", "rows", "attention", "cached_attention", "quantize", "dequantize"}
    assert found["kernels"] == {name: ["native", "xla"] for name in operations}
    assert {"absmax", "minmax", "mse", "gptq"} <= set(found["quantizers"])
    assert {"bert", "llama"} <= set(found["families"])
    assert {"huggingface", "orbax", "table"} <= set(found["formats"])
    status, out, err = run("--version", "please")
    assert (status, out, "wanted --version, or --version --json" in err) == (2, "", True)


def test_a_reader_that_has_seen_enough_is_no_error(v2: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "aq_jax.cli", "inspect", str(v2)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()  # before anything is written
    assert child.stderr.read() == b""
    child.stderr.close()
    assert child.wait(30) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="other systems have no such file")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_streams_that_are_closed_or_full_are_one_line(v2: Path, unbuffered: str) -> None:
    full, closed = "standard output: No space left on device", "standard output: is closed"
    for arguments, wanted in (
        ('inspect "$0" >&-', closed),
        ("--version >/dev/full", full),
        ('inspect "$0" >/dev/full', full),
        ('rank "$0" query --input - <&-', "the standard input is closed"),
        ('inspect "$0" 2>&-', ""),
    ):
        done = subprocess.run(
            ["sh", "-c", f'exec "{sys.executable}" -m aq_jax.cli {arguments}', str(v2)],
            capture_output=True, text=True, timeout=60, check=False,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
        assert (done.returncode, done.stderr.count("\n")) == ((2, 1) if wanted else (0, 0)), done.stderr
        assert wanted in done.stderr


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_signal_leaves_nothing_half_written(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "hf").mkdir()
    tensor = weights(512, 512)
    safetensors.numpy.save_file({f"w{i}": tensor for i in range(64)}, tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "config.json").write_text("{}")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "m.parquet").write_bytes(b"old")
    text = f'source = "{tmp_path}/hf"\noutput = "{tmp_path}/out/m.parquet"\n[quantization]\nquant_type = "tcq2"\n'
    (tmp_path / "c.toml").write_text(text)
    child = subprocess.Popen(
        [sys.executable, "-m", "aq_jax.cli", "convert", str(tmp_path / "c.toml")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"AQ_JAX_CACHE": "off"},
    )  # fmt: skip
    stop = time.monotonic() + 60
    while time.monotonic() < stop and child.poll() is None:
        if any(f.name.endswith(".tmp") for f in (tmp_path / "out").iterdir()):
            break  # tensors are being quantized, which takes seconds
        time.sleep(0.05)
    time.sleep(0.3)
    child.send_signal(number)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (130, ""), err
    assert err == "aq-jax: interrupted; nothing was left half-written\n"
    assert listing(tmp_path / "out") == ["m.parquet"]
    assert (tmp_path / "out" / "m.parquet").read_bytes() == b"old"
