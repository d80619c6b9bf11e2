"""A process that is killed, a disk that is full, a folder that is shut: the old file or the new one, and no litter."""

from __future__ import annotations

import errno
import functools
import os
import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import killing
import numpy as np
import pytest
import safetensors.numpy
from killing import Server, contents

import aq_jax as aq
from aq_jax import cli
from aq_jax.config import ConversionConfig
from aq_jax.store.files import atomic_write

pytestmark = pytest.mark.skipif(
    not hasattr(os, "pidfd_open"), reason="needs Linux: SIGKILL, and descriptors of processes"
)

# What was there before: safetensors without tensors, for `dequantize` replaces none but those that aq_jax wrote.
_HEADER = b'{"__metadata__":{"writer":"aq_jax"}}'
OLD = len(_HEADER).to_bytes(8, "little") + _HEADER
LITTER = re.compile(r"\.(.+)\.\d+\.[0-9a-f]{8}\.tmp")
# Job -> the file that it is about. The first four compute nothing, and take milliseconds.
CHEAP = {"save.parquet": "m.parquet", "save.arrow": "m.arrow", "convert plain": "out/m.parquet",
         "dequantize": "out/model.safetensors"}  # fmt: skip
COMPUTED = {"quantize": "m.parquet", "quantize in place": "v1.parquet", "convert": "out/m.parquet"}
OUTPUTS = CHEAP | COMPUTED


class Case:
    """A job in a folder: what it is given, and what there is when it is done."""

    def __init__(self, job: str, folder: Path, server: Server) -> None:
        self.job, self.folder, self.server = job, folder, server
        folder.mkdir()
        if job.startswith(("quantize", "dequantize")):
            aq.save(folder / "v1.parquet", killing.tensors())
        if job.startswith("convert"):
            (folder / "hf").mkdir()
            kept = {name: a for name, a in killing.tensors().items() if name != "head.weight"}
            notes = {"format": "pt", "head.weight": "embed.weight"}
            safetensors.numpy.save_file(kept, folder / "hf" / "model.safetensors", notes)
            for name, text in killing.SIDE_FILES.items():
                (folder / "hf" / name).write_text(text)
        self.given = contents(folder)
        self.output = OUTPUTS[job]
        server(job, folder)  # and from here on what it computes is compiled
        self.done = contents(folder)
        assert set(self.done) > set(self.given) or job.endswith("in place")
        assert self.done[self.output] != self.given.get(self.output)

    def prepare(self, old: bool) -> None:
        """As before the job; the output is there already if `old`."""
        shutil.rmtree(self.folder)
        files = dict(self.given)
        if old:
            files.setdefault(self.output, OLD)
        for name, data in files.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_bytes(data)
        self.before = files

    def check(self) -> bool:
        """Every file is as it was, or as it will be; whether the output is new already."""
        found = contents(self.folder)
        for name, data in found.items():
            if match := LITTER.fullmatch(Path(name).name):
                target = str(Path(name).with_name(match[1]))
                assert target in self.done, f"a temporary file of no output: {name}"
                continue
            assert data in (self.before.get(name), self.done.get(name)), f"{name} is neither the old file nor the new"
        assert set(found) >= set(self.before), "a file is gone"
        return found.get(self.output) == self.done[self.output]

    def kill(self, old: bool, **how: float) -> tuple[bool, bool]:
        """Kill the job, look, run it again, look. Whether it was killed, and whether its output was new by then."""
        self.prepare(old)
        killed = self.server(self.job, self.folder, **how)["killed"]
        new = self.check()
        assert killed or new
        if new and self.output in self.given:  # in place, and done: it cannot be done a second time
            (self.folder / self.output).write_bytes(self.given[self.output])
        self.server(self.job, self.folder)
        assert contents(self.folder) == self.done, "the next run leaves litter, or other files"
        return killed, new


@pytest.fixture(scope="module")
def case(server: Server) -> Iterator[Callable[[str], Case]]:
    # In memory, where there is such a place: most of the time would be spent waiting for a disk.
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as folder:
        yield functools.cache(lambda job: Case(job, Path(folder, job.replace(" ", "_")), server))


# ------------------------------------------------------------------------------------------------ killed


def kill_at_events(case: Case, step: int) -> None:
    """Killed at every `step`-th event, the last one among them."""
    case.prepare(old=True)
    count = case.server(case.job, case.folder, at=0)["events"]
    assert contents(case.folder) == case.done
    assert count > 15, "events are not seen any more: does the library write in another way now?"
    outcomes = []
    for n in range(1 + (count - 1) % step, count + 1, step):
        killed, new = case.kill(old=(count - n) // step % 2 == 0, at=n)  # the last one is counted where there is one
        assert killed, f"event {n} of {count} did not come"
        outcomes.append(new)
    # The output changes once, when all of it has been written.
    assert outcomes == sorted(outcomes)
    assert outcomes[0] is False
    assert outcomes[-1] is True


@pytest.mark.parametrize("job", CHEAP)
def test_killed_at_each_step_the_file_is_the_old_one_or_the_new_one(case: Callable[[str], Case], job: str) -> None:
    kill_at_events(case(job), step=11)


@pytest.mark.slow
@pytest.mark.parametrize("job", OUTPUTS)
def test_killed_at_every_single_step(case: Callable[[str], Case], job: str) -> None:
    kill_at_events(case(job), step=1 if job in CHEAP else 3)  # of those that compute, at every third one


def kill_at_random(case: Case, count: int) -> None:
    case.prepare(old=False)
    usual, generator = case.server(case.job, case.folder)["seconds"], random.Random(case.job)
    results = [case.kill(old=n % 2 == 0, after=generator.uniform(0, usual)) for n in range(count)]
    assert count < 100 or any(killed for killed, _ in results)


@pytest.mark.parametrize(("job", "count"), [("save.parquet", 8), ("quantize in place", 1)])
def test_killed_at_random_moments(case: Callable[[str], Case], job: str, count: int) -> None:
    kill_at_random(case(job), count)


@pytest.mark.slow
@pytest.mark.parametrize("job", ["save.parquet", "save.arrow", "quantize", "quantize in place", "convert"])
def test_killed_at_two_hundred_random_moments(case: Callable[[str], Case], job: str) -> None:
    kill_at_random(case(job), 200)


def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_name_before_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed loses nothing that it wrote; a machine without power does, unless it was flushed."""
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def seen(descriptor: int) -> None:
        steps.append(f"flush {Path(os.readlink(f'/proc/self/fd/{descriptor}')).suffix}")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", seen)
    monkeypatch.setattr(os, "replace", lambda a, b: (steps.append("rename"), replace(a, b)))
    aq.save(tmp_path / "m.parquet", killing.tensors())
    assert steps == ["flush .tmp", "rename", "flush "]


def test_what_a_process_of_the_same_number_has_left_is_removed(tmp_path: Path) -> None:
    """In a container every run is process 1: the one that was killed, and the one that comes after it."""
    path = tmp_path / "m.txt"
    left = tmp_path / f".m.txt.{os.getpid()}.0123abcd.tmp"
    left.write_text("half")
    with atomic_write(path) as outer:
        outer.write_text("outer")
        with atomic_write(path) as inner:  # as another thread would
            inner.write_text("inner")
        assert outer.exists()
    assert contents(tmp_path) == {"m.txt": b"outer"}


def test_what_is_not_written_leaves_no_folder(tmp_path: Path) -> None:
    """Folders that were made for it go; one that is used by then stays."""
    path = tmp_path / "a" / "b" / "m.txt"
    with pytest.raises(FileNotFoundError), atomic_write(path):
        pass
    assert not (tmp_path / "a").exists()
    with pytest.raises(FileNotFoundError), atomic_write(path):
        (tmp_path / "a" / "other.txt").write_text("another's")
    assert [each.name for each in (tmp_path / "a").iterdir()] == ["other.txt"]


# ------------------------------------------------------------------------------------------------ no room


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As if the disk were full after so many bytes (the signal that goes with it is ignored by Python)."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def inputs(folder: Path) -> None:
    """A table, a folder of weights, and a config that converts them."""
    aq.save(folder / "v1.parquet", killing.tensors())
    (folder / "hf").mkdir()
    kept = {name: a for name, a in killing.tensors().items() if name != "head.weight"}
    safetensors.numpy.save_file(kept, folder / "hf" / "model.safetensors")
    (folder / "hf" / "config.json").write_text("{}" + " " * 5000)
    (folder / "c.toml").write_text(f'source = "{folder}/hf"\noutput = "{folder}/out/m.parquet"\n')


# Arguments of the command line, and the file that it writes.
WRITERS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "quantize": (("quantize", "v1.parquet", "out/m.arrow", "--quant-type", "int8"), "out/m.arrow"),
    "quantize in place": (("quantize", "v1.parquet", "v1.parquet"), "v1.parquet"),
    "dequantize": (("dequantize", "v1.parquet", "out/m.parquet"), "out/m.parquet"),
    "dequantize to a folder": (("dequantize", "v1.parquet", "out"), "out/model.safetensors"),
    "convert": (("convert", "c.toml"), "out/m.parquet"),
}


@pytest.mark.parametrize("what", WRITERS)
@pytest.mark.usefixtures("_no_traces")
def test_a_full_disk_is_one_line_and_changes_nothing(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    arguments, output = WRITERS[what]
    monkeypatch.chdir(tmp_path)
    inputs(tmp_path)
    assert run(*arguments)[0] == 0  # and what must be compiled is
    size = (tmp_path / output).stat().st_size
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    (tmp_path / "v1.parquet").unlink()
    shutil.rmtree(tmp_path / "hf")
    inputs(tmp_path)
    (tmp_path / "out").mkdir()
    if not (tmp_path / output).exists():
        (tmp_path / output).write_bytes(OLD)
    before = contents(tmp_path)
    for limit in (0, 1, size // 2, size - 1):
        with largest_file(limit):
            status, out, err = run(*arguments)
        assert status == cli.BAD_INPUT
        assert out == ""
        named = Path(output) if what != "convert" else tmp_path / output
        assert err == f"aq-jax: {named}: {os.strerror(errno.EFBIG)}\n"
        assert contents(tmp_path) == before


def test_a_side_file_for_which_there_is_no_room_is_named(tmp_path: Path) -> None:
    inputs(tmp_path)
    config = ConversionConfig(str(tmp_path / "hf"), str(tmp_path / "out" / "m.arrow"))
    (tmp_path / "hf" / "tokenizer.json").write_text("{}" + " " * 100_000)  # larger than the table
    with largest_file(60_000), pytest.raises(OSError, match="File too large") as caught:
        aq.convert(config)
    assert caught.value.filename == str(tmp_path / "out" / "tokenizer.json")
    assert sorted(contents(tmp_path / "out")) == ["config.json", "m.arrow"]
    aq.convert(config)
    assert sorted(contents(tmp_path / "out")) == ["config.json", "m.arrow", "tokenizer.json"]


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A small disk of its own."""
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("needs the program mount")
    if done.returncode:
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("suffix", ["parquet", "arrow", ""])
def test_a_disk_that_is_really_full(tmp_path: Path, run: Callable[..., tuple[int, str, str]], suffix: str) -> None:
    inputs(tmp_path)
    disk = tmp_path / "disk"
    disk.mkdir()
    output = disk / (f"m.{suffix}" if suffix else "model.safetensors")
    with mounted(disk, "size=16k"):
        output.write_bytes(OLD)
        status, _, err = run("dequantize", tmp_path / "v1.parquet", output if suffix else disk)
        assert (status, err) == (cli.BAD_INPUT, f"aq-jax: {output}: {os.strerror(errno.ENOSPC)}\n")
        assert contents(disk) == {output.name: OLD}


# ------------------------------------------------------------------------------------------------ no way in


@contextmanager
def closed(folder: Path) -> Iterator[None]:
    """A folder in which nothing can be made or removed: permissions do not keep root out."""
    if os.geteuid():
        shut, opened = (lambda: folder.chmod(0o555)), (lambda: folder.chmod(0o755))
    else:
        if shutil.which("chattr") is None:
            pytest.skip("root needs the program chattr to close a folder")

        def change(flag: str) -> None:
            done = subprocess.run(["chattr", flag, str(folder)], capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"this disk has no immutable folders: {done.stderr.strip()}")

        shut, opened = (lambda: change("+i")), (lambda: change("-i"))
    shut()
    try:
        yield
    finally:
        opened()


@pytest.mark.parametrize("what", [what for what in WRITERS if what != "quantize in place"])
def test_a_read_only_folder_is_one_line_and_changes_nothing(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    arguments, output = WRITERS[what]
    monkeypatch.chdir(tmp_path)
    inputs(tmp_path)
    (tmp_path / output).parent.mkdir()
    (tmp_path / output).write_bytes(OLD)
    before = contents(tmp_path)
    with closed(tmp_path / "out"):
        status, out, err = run(*arguments)
    named = re.escape(output if what != "convert" else str(tmp_path / output))
    assert (status, out) == (cli.BAD_INPUT, "")
    assert re.fullmatch(rf"aq-jax: {named}: (Permission denied|Operation not permitted)\n", err), err
    assert contents(tmp_path) == before


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    aq.save(tmp_path / "v1.parquet", {"w": np.ones(2)})
    (tmp_path / "shut").mkdir()
    with closed(tmp_path / "shut"):
        status, _, err = run("dequantize", tmp_path / "v1.parquet", tmp_path / "shut" / "new" / "m.parquet")
    assert status == cli.BAD_INPUT
    assert re.fullmatch(rf"aq-jax: {tmp_path}/shut/new: (Permission denied|Operation not permitted)\n", err), err


# ------------------------------------------------------------------------------------------------ output and input


def test_a_table_may_be_written_into_the_folder_that_it_is_converted_from(tmp_path: Path) -> None:
    inputs(tmp_path)
    before = contents(tmp_path / "hf")
    config = ConversionConfig(str(tmp_path / "hf"), str(tmp_path / "hf" / "m.parquet"))
    for _ in range(2):
        aq.convert(config)
        found = contents(tmp_path / "hf")
        assert found.pop("m.parquet")[:4] == b"PAR1"
        assert found == before


def test_links_are_replaced_and_what_they_led_to_is_kept(tmp_path: Path) -> None:
    v1 = tmp_path / "v1.parquet"
    aq.save(v1, killing.tensors())
    before = v1.read_bytes()
    (tmp_path / "symbolic.parquet").symlink_to(v1)
    (tmp_path / "hard.parquet").hardlink_to(v1)
    for name in ("symbolic.parquet", "hard.parquet"):
        aq.quantize_file(v1, tmp_path / name, "fp16")
        assert v1.read_bytes() == before
        assert not (tmp_path / name).is_symlink()
        with aq.WeightLoader(tmp_path / name) as loader:
            assert loader.describe("embed.weight").quant_type == "fp16"


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_table_is_not_written_into_the_folder_of_tables_that_it_is_made_of(tmp_path: Path, suffix: str) -> None:
    """It would take the place of a part of its own source, or become one."""
    aq.save(tmp_path / "a.parquet", {"a": np.ones((4, 8), np.float32)})
    aq.save(tmp_path / "b.parquet", {"b": np.ones((4, 8), np.float32)})
    before = contents(tmp_path)
    for name in (f"a.{suffix}", f"new.{suffix}", f"../{tmp_path.name}/new.{suffix}"):
        for call in (lambda output: aq.quantize_file(tmp_path, output, "fp16"),
                     lambda output: aq.dequantize_file(tmp_path, output)):  # fmt: skip
            with pytest.raises(aq.FormatError, match=r"is in .*, which is the source; wanted another folder"):
                call(tmp_path / name)
    assert contents(tmp_path) == before
    aq.quantize_file(tmp_path, tmp_path / "sub" / f"new.{suffix}", "fp16")
