"""Entries of JAX's compile cache that a killed run left half-written."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from aq_jax.cli.compilecache import remove_truncated


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


def entry(folder: Path, name: str, data: bytes, age: float = 3600) -> Path:
    path = folder / f"{name}-cache"
    path.write_bytes(data)
    now = path.stat().st_mtime
    os.utime(path, (now - age, now - age))
    return path


NOISE = np.random.default_rng(0).bytes(300_000)
WHOLE = {
    f"{codec.__name__}-{what}": codec(data)
    for codec in (zlib.compress, zstd)
    for what, data in {
        "small": b"x",
        "noise": NOISE,
        "zeros": bytes(300_000),
        "mixed": NOISE + bytes(9) + NOISE,
    }.items()
}


@pytest.mark.parametrize("what", WHOLE)
def test_what_is_whole_stays_and_any_cut_goes(tmp_path: Path, what: str) -> None:
    whole = WHOLE[what]
    cuts = {0, 1, 4, 5, len(whole) // 3, len(whole) - 5, len(whole) - 4, len(whole) - 1}
    cuts |= {131_072 + 9, 131_072 + 12} if len(whole) > 200_000 else set()  # about the ends of a zstd block
    for cut in cuts:
        entry(tmp_path, f"cut{cut}", whole[:cut])
    entry(tmp_path, "whole", whole)
    remove_truncated(tmp_path)
    assert [path.name for path in tmp_path.glob("*-cache")] == ["whole-cache"]


def test_other_files_and_what_is_being_written_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = zlib.compress(NOISE)[:1000]
    now = entry(tmp_path, "now", half, age=0)
    entry(tmp_path, "other format", b"MAGIC" + half)
    (tmp_path / "mine.txt").write_bytes(b"")
    (tmp_path / "folder-cache").mkdir()
    remove_truncated(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == [
        "folder-cache", "mine.txt", "now-cache", "other format-cache",
    ]  # fmt: skip
    later = time.time() + 11
    monkeypatch.setattr(time, "time", lambda: later)
    remove_truncated(tmp_path)
    assert not now.exists()
    remove_truncated(tmp_path / "missing")
    assert not (tmp_path / "missing").exists()


def test_entries_are_looked_at_once(tmp_path: Path) -> None:
    entry(tmp_path, "old", zlib.compress(b"x"))
    remove_truncated(tmp_path)
    late = entry(tmp_path, "late", zlib.compress(b"x")[:-1])  # older than the last look, by its date
    remove_truncated(tmp_path)
    assert late.exists()


@pytest.mark.slow
def test_what_jax_writes_is_known_and_a_cut_entry_is_written_again(tmp_path: Path) -> None:
    code = """
import sys, warnings
from pathlib import Path
from aq_jax.cli import compilecache
warnings.simplefilter("error")
folder = compilecache.use_compile_cache()
assert folder == Path(sys.argv[1])
compilecache.remove_truncated(folder)
import jax
jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((8, 8))).block_until_ready()
"""
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")} | {"AQ_JAX_CACHE": str(tmp_path)}

    def run() -> dict[str, int]:
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], env=env, capture_output=True, text=True, timeout=120,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return {path.name: path.stat().st_size for path in tmp_path.glob("*-cache")}

    first = run()
    assert first
    for path in tmp_path.glob("*-cache"):
        entry(tmp_path, path.name.removesuffix("-cache"), path.read_bytes())
    remove_truncated(tmp_path)
    assert first == {path.name: path.stat().st_size for path in tmp_path.glob("*-cache")}
    (tmp_path / ".aq_jax_checked").unlink()
    for path in tmp_path.glob("*-cache"):
        entry(tmp_path, path.name.removesuffix("-cache"), path.read_bytes()[:-9])
    assert run() == first
