"""Files that are mapped without a descriptor each."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from aq_jax.config import QuantizationConfig
from aq_jax.conversion.write import write_model
from aq_jax.converters.checkpoint import open_checkpoint
from aq_jax.store.mapping import map_file, release_pages

linux = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="wants /proc")


def test_views_outlive_the_file_and_cannot_be_written_to(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(range(256)) * 100)
    with path.open("rb") as file:
        array = np.frombuffer(map_file(file)[512:768], np.uint8)
    path.unlink()
    assert array.tolist() == list(range(256))
    assert not array.flags.writeable
    with pytest.raises(ValueError, match="WRITEABLE"):
        array.flags.writeable = True
    with pytest.raises(TypeError):
        memoryview(array)[0] = 1


def test_an_empty_file_is_empty(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with (tmp_path / "empty").open("rb") as file:
        assert len(map_file(file)) == 0


@linux
def test_a_mapping_goes_with_its_last_view_and_holds_no_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "mapped-here"
    path.write_bytes(bytes(1 << 16))
    before = len(os.listdir("/proc/self/fd"))
    with path.open("rb") as file:
        views = [np.frombuffer(map_file(file), np.uint8)[:10] for _ in range(50)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert Path("/proc/self/maps").read_text().count("mapped-here") == 50
    del views
    gc.collect()
    assert "mapped-here" not in Path("/proc/self/maps").read_text()


def resident(name: str) -> int:
    """Count the bytes of a mapped file that are in this process's memory."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    return sum(
        next(int(line.split()[1]) << 10 for line in lines if line.startswith("Rss:"))
        for line in lines
        if line.endswith(name)
    )


@linux
def test_pages_that_were_released_are_read_again(tmp_path: Path) -> None:
    path = tmp_path / "released-here"
    path.write_bytes(bytes(range(256)) * 4096)
    with path.open("rb") as file:
        view = map_file(file)
    array = np.frombuffer(view, np.uint8)
    total = int(array.sum())
    assert resident("released-here") == array.nbytes
    release_pages(view)
    assert resident("released-here") == 0
    assert int(array.sum()) == total
    release_pages(memoryview(b""))  # as `map_file` gives for an empty file


@linux
def test_a_conversion_gives_back_what_it_has_read(tmp_path: Path) -> None:
    weights = {"w": np.arange(1 << 18, dtype=np.float32).reshape(512, 512)}
    safetensors.numpy.save_file(weights, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as source:
        write_model(source, tmp_path / "m.arrow", QuantizationConfig("int8"))
        assert resident("model.safetensors") == 0
        assert np.array_equal(source.read("w"), weights["w"])


def test_more_files_than_a_process_may_open(tmp_path: Path) -> None:
    """A folder of 100 tables, and a checkpoint of 100 shards, where 40 files may be open."""
    code = """
import json, resource, sys
from pathlib import Path
import numpy as np, safetensors.numpy
from aq_jax.converters.checkpoint import open_checkpoint
from aq_jax.store import Row, open_table, write_table
folder = Path(sys.argv[1])
(folder / "tables").mkdir()
places = {}
for i in range(100):
    name, array = f"w{i:03}", np.full(4, i, np.float32)
    suffix = "arrow" if i % 2 else "parquet"
    row = Row(name, (4,), "float32", array.view(np.uint8), 4)
    write_table(folder / "tables" / f"{name}.{suffix}", [row], version=1)
    places[name] = f"{name}.safetensors"
    safetensors.numpy.save_file({name: array}, folder / places[name])
(folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
with open_table(folder / "tables") as table:
    rows = list(table.rows())
assert [row.data.view(np.float32)[0] for row in rows] == list(range(100))
with open_checkpoint(folder) as found:
    arrays = [found.read(name) for name in found.shapes]
assert [array[0] for array in arrays] == list(range(100))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
