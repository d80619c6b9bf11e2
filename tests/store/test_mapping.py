"""Files that are mapped without a descriptor each."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from aq_jax.store.mapping import map_file

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
