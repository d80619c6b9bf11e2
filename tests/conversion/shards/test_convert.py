"""A folder of shards: the same weights as one file, the same bytes however it came about, and never half of it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crossed import crossed
from limited import limited

import aq_jax as aq
from aq_jax.conversion.shards import engines
from aq_jax.conversion.shards import run as conversion
from aq_jax.conversion.shards.journal import JOURNAL
from aq_jax.conversion.shards.task import ShardResult, ShardTask
from aq_jax.errors import AqError, ConfigError, FormatError
from aq_jax.quantizers.treatment import treat
from benchmarks import checkpoints

SHAPES = checkpoints.llama_shapes(layers=3, width=64, inner=160, vocabulary=300)
SIZE = 60_000
INT4 = aq.QuantizationConfig("int4", group_size=32, solver="absmax", mixed_precision_layers=("lm_head",))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "model"
    checkpoints.write_checkpoint(folder, SHAPES, 100_000)
    return folder


def config(source: Any, output: Any, quantization: aq.QuantizationConfig | None = INT4, **shards: Any) -> Any:
    given = {"size": SIZE, "workers": 1} | shards
    return aq.ConversionConfig(str(source), str(output), quantization, shards=aq.ShardsConfig(**given))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What every run must give, whatever happens to it."""
    output = tmp_path_factory.mktemp("whole") / "int4"
    aq.convert(config(source, output))
    found = contents(output)
    assert len([name for name in found if name.endswith(".parquet")]) >= 5
    assert set(found) - {name for name in found if name.endswith(".parquet")} == {"manifest.json", "config.json"}
    return found


@pytest.mark.parametrize("quantization", [None, INT4], ids=["plain", "int4"])
def test_shards_hold_what_one_file_holds(
    source: Path, tmp_path: Path, quantization: aq.QuantizationConfig | None
) -> None:
    one = aq.ConversionConfig(str(source), str(tmp_path / "one" / "m.parquet"), quantization)
    whole, parts = aq.convert(one), aq.convert(config(source, tmp_path / "many", quantization))
    assert parts.quantized == whole.quantized
    assert parts.source_bytes == whole.source_bytes == sum(2 * np.prod(shape) for shape in SHAPES.values())
    assert parts.bytes == sum(path.stat().st_size for path in (tmp_path / "many").glob("*.parquet"))
    expected, found = aq.load(tmp_path / "one" / "m.parquet", "numpy"), aq.load(tmp_path / "many", "numpy")
    assert list(found) == list(expected) == list(SHAPES)
    for name, values in expected.items():
        assert values.dtype == found[name].dtype
        np.testing.assert_array_equal(values, found[name])


def test_several_workers_give_the_same_bytes_and_say_what_they_do(
    source: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    said: list[tuple[str, int, int]] = []
    aq.convert(config(source, tmp_path / "out", workers=2), lambda *step: said.append(step))
    assert contents(tmp_path / "out") == undisturbed
    assert sorted(name for name, _, _ in said) == sorted(SHAPES)
    assert sum(size for _, size, _ in said) == said[0][2]


def test_what_is_finished_is_not_done_again(
    source: Path, tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    real = engines.convert_shard

    def stopping(task: ShardTask, step: Any = None) -> ShardResult:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(task.file)
        return real(task, step)

    monkeypatch.setattr(engines, "convert_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        aq.convert(config(source, tmp_path / "out"))
    with pytest.raises(FormatError, match=r"lacks weights-00003-of-.* goes on when it is run again"):
        aq.load(tmp_path / "out")
    first, done = done, []
    monkeypatch.setattr(engines, "convert_shard", lambda task, step=None: (done.append(task.file), real(task, step))[1])
    said: list[tuple[str, int, int]] = []
    written = aq.convert(config(source, tmp_path / "out"), lambda *step: said.append(step))
    assert contents(tmp_path / "out") == undisturbed
    assert len(first) == 2
    assert not set(first) & set(done)
    assert len(written.quantized) == len([n for n in SHAPES if "norm" not in n and n != "lm_head.weight"])
    assert said[0][0] == "2 files were finished before"
    assert sum(size for _, size, _ in said) == said[0][2]


def stop_before_the_manifest(asked: aq.ConversionConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: object, manifest: bytes) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(conversion.Journal, "close", stop)
        with pytest.raises(KeyboardInterrupt):
            aq.convert(asked)


def test_a_shard_that_was_damaged_since_is_done_again(
    source: Path, tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_before_the_manifest(config(source, tmp_path / "out"), monkeypatch)
    first = next((tmp_path / "out").glob("weights-00001-*"))
    first.write_bytes(first.read_bytes()[:-1])
    next((tmp_path / "out" / JOURNAL).glob("00002.json")).write_text("{")
    aq.convert(config(source, tmp_path / "out"))
    assert contents(tmp_path / "out") == undisturbed


def test_what_another_config_has_begun_is_thrown_away(
    source: Path, tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_before_the_manifest(
        config(source, tmp_path / "out", aq.QuantizationConfig("int8"), size=SIZE // 2), monkeypatch
    )
    aq.convert(config(source, tmp_path / "out"))
    assert contents(tmp_path / "out") == undisturbed


def test_a_source_that_changed_is_converted_anew(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: object, manifest: bytes) -> None:
        raise KeyboardInterrupt

    changing = tmp_path / "model"
    checkpoints.write_checkpoint(changing, SHAPES, 100_000)
    with monkeypatch.context() as patch:
        patch.setattr(conversion.Journal, "close", stop)
        with pytest.raises(KeyboardInterrupt):
            aq.convert(config(changing, tmp_path / "out"))
    file = next(changing.glob("model-00001-*"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(0, 12345))
    aq.convert(config(changing, tmp_path / "out"))
    aq.convert(config(changing, tmp_path / "again"))
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


KILLED = """
import sys, time
import aq_jax as aq
source, output, workers = sys.argv[1:]
shards = aq.ShardsConfig(size={size}, workers=int(workers))
quantization = aq.QuantizationConfig("int4", group_size=32, mixed_precision_layers=("lm_head",))
if __name__ == "__main__":
    def step(name, size, total):
        print(name, flush=True)
        time.sleep(0.05)  # so that whoever kills it comes in time
    aq.convert(aq.ConversionConfig(source, output, quantization, shards=shards), step)
"""


def lives_in_group(stat: Path, group: int) -> bool:
    try:
        state, _, found = stat.read_text().rpartition(")")[2].split()[:3]
    except OSError:  # just gone
        return False
    return int(found) == group and state not in "ZX"


@pytest.mark.slow
def test_two_workers_that_are_killed_are_taken_up_and_give_the_same_bytes(
    source: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    """Of one worker, test_killed.py asks more."""
    script = tmp_path / "convert.py"
    script.write_text(KILLED.format(size=SIZE))
    output = tmp_path / "out"
    command = [sys.executable, str(script), str(source), str(output), "2"]
    for lines in (14, 4):  # killed after so many tensors
        with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
            assert process.stdout is not None
            for _ in range(lines):
                process.stdout.readline()
            os.killpg(process.pid, signal.SIGKILL)
        while any(lives_in_group(stat, process.pid) for stat in Path("/proc").glob("[0-9]*/stat")):
            time.sleep(0.02)  # workers die a moment later than the one that started them
        assert not (output / "manifest.json").exists()
    there = {name for name in contents(output) if name.endswith(".parquet") and not name.startswith(".")}
    assert there
    aq.convert(config(source, output))
    assert contents(output) == undisturbed  # and no litter


def test_a_worker_that_is_killed_is_named_and_the_rest_is_kept(
    source: Path, tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    workers: list[Any] = []
    spawn = multiprocessing.get_context("spawn")
    real = spawn.Process.start

    def start(process: Any) -> None:
        real(process)
        workers.append(process)

    monkeypatch.setattr(spawn.Process, "start", start)

    def kill(name: str, size: int, total: int) -> None:
        workers[0].kill()

    with pytest.raises(AqError, match=r"weights-.* ended with status -9 .* run again: finished files are kept"):
        aq.convert(config(source, tmp_path / "out", workers=2), kill)
    assert not any(process.is_alive() for process in workers)
    aq.convert(config(source, tmp_path / "out"))
    assert contents(tmp_path / "out") == undisturbed


def test_an_error_in_a_worker_is_the_one_that_is_reported(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    checkpoints.write_checkpoint(folder, SHAPES, 100_000)
    file = next(folder.glob("model-00002-*"))
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start : start + 2] = b"\xc0\x7f"  # NaN
    file.write_bytes(data)
    with pytest.raises(AqError, match="are not finite"):
        aq.convert(config(folder, tmp_path / "out", workers=2))


def test_a_folder_that_is_finished_or_another_s_is_left_alone(source: Path, tmp_path: Path) -> None:
    aq.convert(config(source, tmp_path / "out"))
    before = contents(tmp_path / "out")
    with pytest.raises(FormatError, match="already exists; wanted an empty folder"):
        aq.convert(config(source, tmp_path / "out"))
    assert contents(tmp_path / "out") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "m.arrow").write_bytes(b"mine")
    with pytest.raises(FormatError, match=r"m\.arrow: already exists"):
        aq.convert(config(source, tmp_path / "mine"))
    assert contents(tmp_path / "mine") == {"m.arrow": b"mine"}


def test_a_folder_of_shards_becomes_safetensors_with_its_own_config(source: Path, tmp_path: Path) -> None:
    aq.convert(config(source, tmp_path / "models" / "int4"))
    (tmp_path / "models" / "config.json").write_text('{"another": "model"}')
    aq.dequantize_file(tmp_path / "models" / "int4", tmp_path / "hf")
    assert (tmp_path / "hf" / "config.json").read_text() == (source / "config.json").read_text()


def test_what_a_run_left_that_was_killed_while_it_tidied_up_goes(source: Path, tmp_path: Path) -> None:
    aq.convert(config(source, tmp_path / "out"))
    before = contents(tmp_path / "out")
    (tmp_path / "out" / JOURNAL).mkdir()
    (tmp_path / "out" / JOURNAL / "lock").touch()
    with pytest.raises(FormatError, match="already exists"):
        aq.convert(config(source, tmp_path / "out"))
    assert contents(tmp_path / "out") == before
    assert not (tmp_path / "out" / JOURNAL).exists()


def test_compression_takes_memory_too() -> None:
    plain, packed = (
        treat(None, "w", (1 << 14, 1 << 14), np.dtype(np.float32)).peak_bytes(kind) for kind in ("none", "zstd")
    )
    assert packed - plain == 4 << 28


def test_two_processes_do_not_convert_into_one_folder(source: Path, tmp_path: Path) -> None:
    from aq_jax.conversion.shards.journal import Journal
    from aq_jax.store.folders import Folder

    with (
        Journal(Folder(tmp_path / "out"), "another"),
        pytest.raises(ConfigError, match="another process converts into this folder"),
    ):
        aq.convert(config(source, tmp_path / "out"))


@pytest.fixture
def elsewhere(source: Path) -> str:
    """The same folder, as a filesystem of which only streams are known."""
    pytest.importorskip("fsspec")
    return f"fsspec+file://{source}"


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_source_and_output_may_be_elsewhere(
    elsewhere: str, tmp_path: Path, undisturbed: dict[str, bytes], workers: int
) -> None:
    done = aq.convert(config(elsewhere, f"fsspec+file://{tmp_path}/out", workers=workers))
    assert contents(tmp_path / "out") == undisturbed
    assert done.path == f"fsspec+file://{tmp_path}/out"


def test_one_file_may_go_elsewhere_too(elsewhere: str, source: Path, tmp_path: Path) -> None:
    for name, location in (("a", f"{tmp_path}/a/m.arrow"), ("b", f"file://{tmp_path}/b/m.arrow")):
        aq.convert(aq.ConversionConfig(str(source), location, INT4))
        assert sorted(contents(tmp_path / name)) == ["config.json", "m.arrow"]
    aq.convert(aq.ConversionConfig(elsewhere, f"fsspec+file://{tmp_path}/c/m.arrow", INT4))
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")


@pytest.mark.parametrize("location", ["nowhere://bucket/model", "s3", "fsspec+nothing:///x"])
def test_an_unknown_place_is_refused(source: Path, tmp_path: Path, location: str) -> None:
    with pytest.raises((ConfigError, FileNotFoundError), match=r"no such filesystem|does not exist"):
        aq.convert(config(location, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"output": "out/m.txt"}, r"ends in .parquet or .arrow; for a folder of that name, end it with /"),
        ({"output": "out/.parquet"}, r"output = 'out/.parquet': wanted a name before .parquet, such as model.parquet"),
        ({"output": ".arrow"}, r"wanted a name before .arrow"),
        ({"output": "out/m.parquet"}, r"\[shards\]: output = 'out/m.parquet' is a single file"),
        ({"quantization": aq.QuantizationConfig("int4", solver="gptq")}, "solver = 'gptq' runs it"),
        ({"allow_pickle": True}, "is written from safetensors only"),
        ({"size": "1 parsec"}, "size = '1 parsec': wanted a number of bytes, such as 1.5 GB"),
        ({"max_memory": 0}, "max_memory = 0: wanted a number of bytes"),
        ({"max_memory": "-3GB"}, "max_memory = '-3GB': wanted"),
        ({"workers": -1}, "workers = -1: wanted 0"),
        ({"engine": "spark"}, "engine = 'spark'"),
    ],
)
def test_what_cannot_be_is_said_at_once(change: dict[str, Any], error: str) -> None:
    given: dict[str, Any] = {"source": "model", "output": "out", "quantization": INT4} | change
    shards = {key: given.pop(key) for key in ("size", "max_memory", "workers", "engine") if key in given}
    with pytest.raises(ConfigError, match=error):
        aq.convert(aq.ConversionConfig(**given, shards=aq.ShardsConfig(**shards)))


def test_too_little_memory_is_said_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"max_memory = 100,000,000 bytes: .* \[.*\] takes about [\d,]+; allow as much"
    ):
        aq.convert(config(source, tmp_path / "out", max_memory="100MB"))
    assert not (tmp_path / "out").exists()


def test_the_command_takes_the_limits(source: Path, tmp_path: Path, run: Any) -> None:
    toml = tmp_path / "c.toml"
    toml.write_text(f'source = "{source}"\noutput = "{tmp_path}/out"\n[quantization]\nquant_type = "int8"\n')
    status, out, err = run("convert", toml, "--max-memory", "4GB", "--workers", "1", "--set", "shards.size=60000")
    assert (status, err) == (0, "")
    assert "tensors quantized" in out
    assert len(list((tmp_path / "out").glob("*.parquet"))) > 3
    status, out, err = run("convert", toml, "--max-memory", "1GB", "--engine", "spark")
    assert status == 2
    assert "engine = 'spark': wanted" in err
    dry = run("convert", toml, "--dry-run")
    assert dry == run("convert", toml)
    assert "already exists" in dry[2]
    status, out, err = run("convert", toml, "--dry-run", "--set", f"output={tmp_path}/other")
    assert (status, err) == (0, "")
    assert "nothing was written" in out


def test_a_manifest_that_lies_is_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    aq.convert(config(source, out))
    manifest = json.loads((out / "manifest.json").read_text())
    assert sum(shard["bytes"] for shard in manifest["shards"]) == manifest["bytes"]
    assert [name for shard in manifest["shards"] for name in shard["tensors"]] == list(SHAPES)
    assert manifest["config"]["quantization"]["quant_type"] == "int4"
    (out / "weights-00001-of-00002.parquet").write_bytes(b"a stranger, whom nobody named")
    assert list(aq.load(out, "numpy")) == list(SHAPES)


@pytest.mark.parametrize(
    ("sizes", "file_size", "filled", "total", "limit", "allowed"),
    [
        pytest.param((2, 2048, 4096, 4000), 64 << 20, 0.05, 180e6, 500, 450, id="small"),
        pytest.param((18, 4096, 11008, 32000), 2 << 30, 0.01, 7.5e9, 1500, 1500, id="8 GB", marks=pytest.mark.slow),
    ],
)
def test_a_llama_is_converted_within_a_limit_that_the_system_enforces(
    tmp_path: Path, sizes: tuple[int, ...], file_size: int, filled: float, total: float, limit: int, allowed: int
) -> None:
    """On anonymous memory, in MB: it is little more than the largest tensor."""
    shapes = checkpoints.llama_shapes(*sizes)
    assert checkpoints.write_checkpoint(tmp_path / "model", shapes, file_size, filled=filled) > total
    assert limited(tmp_path / "model", tmp_path / "out", limit * 10**6, f"{allowed}MB") < allowed * 10**6
    with aq.WeightLoader(tmp_path / "out") as loader:
        assert loader.get_layer_names() == list(shapes)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["int8", "none"])
def test_a_tensor_of_more_than_two_gigabytes(tmp_path: Path, quantization: str) -> None:
    shape = (140_000, 8192)  # 2.3 GB
    checkpoints.write_checkpoint(tmp_path / "model", {"w": shape, "b": (8,)}, 1 << 40, filled=0.02)
    peak = limited(tmp_path / "model", tmp_path / "out", 1_500_000_000, "1.5GB", quantization)
    assert peak < 1.5e9
    from aq_jax.converters.checkpoint import open_checkpoint
    from aq_jax.store.verify import verify_table

    assert verify_table(tmp_path / "out").ok
    with aq.WeightLoader(tmp_path / "out") as loader, open_checkpoint(tmp_path / "model") as checkpoint:
        found, wanted = loader.get_layer("w", "numpy"), checkpoint.read("w")
        assert found.shape == shape
        for start in range(0, shape[0], 4096):  # each row has a grid of its own
            part = wanted[start : start + 4096].astype(np.float32)
            error = np.abs(found[start : start + 4096].astype(np.float32) - part).max(axis=1)
            assert (error <= (np.abs(part).max(axis=1) / 127 * 0.51 if quantization == "int8" else 0)).all()


@pytest.mark.parametrize(("scheme", "name"), crossed(["file", "fsspec+file"], ["a b", "100%", "ä #1", "what?"]))
def test_urls_name_what_paths_do(source: Path, tmp_path: Path, scheme: str, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "in").symlink_to(source)
    there = f"{scheme}://{tmp_path}/{name}"
    aq.convert(aq.ConversionConfig(f"{there}/in", f"{there}/out/{name}.parquet"))
    aq.convert(config(f"{there}/in", f"{there}/shards", None))
    assert sorted(contents(tmp_path / name / "out")) == sorted(["config.json", f"{name}.parquet"])
    for table in (f"out/{name}.parquet", "shards"):
        assert aq.load(tmp_path / name / table, "numpy").keys() == SHAPES.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]
