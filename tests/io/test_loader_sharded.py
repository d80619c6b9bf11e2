"""Tensors over many devices: each process reads its own rows, and nobody trusts what is read in part more than that."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import eight_devices
import jax
import numpy as np
import pytest
import small_bert

import aq_jax as aq
from aq_jax.config import QuantSpec
from aq_jax.io import dense, qtensors
from aq_jax.store import PartialTensor, open_table, pieces
from aq_jax.store.parquet.values import plain_values
from aq_jax.store.parquet.wire import Chunk, read_groups
from aq_jax.store.partial import merged

TESTS = Path(__file__).parent.parent


def two_devices() -> dict[str, str]:
    """The environment of a process that has them."""
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    return os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}


# ------------------------------------------------------------------------------------------------ two processes

BIG = {
    "float": np.random.default_rng(0).normal(size=(1024, 2048)).astype(np.float32),
    "int8": eight_devices.random_qtensor((1024, 512), QuantSpec(8, per_channel=True), 1),
    "int4": eight_devices.random_qtensor((1024, 512), QuantSpec(4, group_size=32), 2),
}
# In 16 pieces.
CUT = eight_devices.random_qtensor((64, 256), QuantSpec(4, group_size=32), 3)
WIDE = 48 << 20
GRIDS = eight_devices.random_qtensor(
    (64, 3 << 17), QuantSpec(8, group_size=8), 4
)  # as many bytes of scales as of codes
SENTENCES = ["A quick red cat.", "The moon"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("both")
    for suffix in ("parquet", "arrow"):
        aq.save(folder / f"big.{suffix}", BIG)
        aq.save(folder / f"wide.{suffix}", {"first": np.ones(8), "w": np.ones((64, WIDE // 64), np.uint8)})
    with pytest.MonkeyPatch.context() as patch:
        for module in (dense, qtensors):
            patch.setattr(module, "pieces", functools.partial(pieces, limit=1 << 12))
        aq.save(folder / "cut.parquet", {"w": CUT})
    aq.save(folder / "grids.arrow", {"w": GRIDS})
    small_bert.make(folder / "bert", aq.QuantizationConfig("int4", group_size=16, solver="absmax"))
    return folder


@pytest.fixture(scope="module")
def both(folder: Path) -> list[dict[str, Any]]:
    """What two processes of `jax.distributed` say."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-W", "error", str(TESTS / "one_of_two.py")]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(port), str(folder)],
            env=two_devices(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, said, strict=True):
        assert process.returncode == 0, errors[-5_000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in said]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("name", list(BIG))
def test_each_of_two_processes_reads_its_half(both: list[dict[str, Any]], suffix: str, name: str) -> None:
    value = BIG[name]
    q = isinstance(value, aq.QTensor)
    data, grids = (value.codes.nbytes, 2 * value.scale.nbytes) if q else (value.nbytes, 0)
    for found in both:
        for packed in (False, True):
            count = {how: found[f"{suffix} {name} {packed} {how}"]["bytes"] for how in ("rows", "columns", "whole")}
            # In Parquet, scales and zero points are compressed.
            own = grids if suffix == ".parquet" else grids // 2
            assert count == {"rows": data // 2 + own, "columns": data + grids, "whole": data + grids}
        assert found[f"{suffix} {name} False rows"]["partly"]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_two_processes_have_all_of_it_together(both: list[dict[str, Any]], folder: Path, suffix: str) -> None:
    with aq.WeightLoader(folder / f"big{suffix}") as loader:
        for name in BIG:
            for packed in (False, True):
                wanted = jax.tree.leaves(loader.get_quantized(name) if packed else loader.get_layer(name))
                for how in ("rows", "columns", "whole"):
                    shards = [found[f"{suffix} {name} {packed} {how}"]["shards"] for found in both]
                    for leaf, *parts in zip(wanted, *shards, strict=True):
                        assert_parts_of(np.asarray(leaf), parts)
                    if how == "rows":
                        assert not shards[0][0].keys() & shards[1][0].keys()
    total = float((BIG["float"].astype(np.float64) ** 2).sum())
    assert [found[f"{suffix} sum"] for found in both] == pytest.approx([total] * 2, rel=1e-5)


def assert_parts_of(whole: np.ndarray, parts: list[dict[str, str]]) -> None:
    """Shards of two processes are those parts of the whole that they say they are, and none of it is missing."""
    seen = np.zeros(whole.shape, bool)
    for shards in parts:
        for place, digest in shards.items():
            index = tuple(slice(*ends) for ends in json.loads(place.replace("(", "[").replace(")", "]")))
            assert hashlib.sha256(np.ascontiguousarray(whole[index]).tobytes()).hexdigest() == digest
            seen[index] = True
    assert seen.all()


def test_scales_of_other_pieces_are_not_read(both: list[dict[str, Any]], folder: Path) -> None:
    with aq.WeightLoader(folder / "cut.parquet") as loader:
        assert len(loader._table.pieces("w")) == 16
    for count, _ in (found["cut"] for found in both):
        assert count == (CUT.codes.nbytes + 2 * CUT.scale.nbytes) // 2
    for leaf, *parts in zip(jax.tree.leaves(CUT), *(found["cut"][1] for found in both), strict=True):
        assert_parts_of(leaf, parts)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux, which says which pages were looked at")
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_no_more_of_the_file_is_looked_at_than_is_counted(both: list[dict[str, Any]], suffix: str) -> None:
    """By the kernel's count of the pages of the file that each process has touched."""
    for found in both:
        opened, after = found[f"{suffix} resident"]
        assert opened < 0.1 * WIDE
        assert 0.5 * WIDE <= after <= 0.6 * WIDE
        opened, after = found["grids resident"]
        assert opened < 0.1 * GRIDS.nbytes
        assert 0.5 * GRIDS.nbytes <= after <= 0.7 * GRIDS.nbytes


def test_two_processes_are_one_model(both: list[dict[str, Any]], folder: Path) -> None:
    encoder = aq.load_model(folder / "bert" / "m.parquet")
    wanted = np.asarray(encoder.encode(SENTENCES))  # type: ignore[union-attr]
    for found in both:
        assert found["spread"] == "P('model', None)"
        np.testing.assert_allclose(found["embeddings"], wanted, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------ parts of a tensor


@pytest.fixture(scope="module", params=eight_devices.FILES)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tables") / request.param
    eight_devices.FILES[request.param](path)
    return path


def test_parts_are_those_of_the_whole(path: Path) -> None:
    """Ranges that begin and end anywhere: inside bytes, groups, rotated blocks and pieces."""
    generator = random.Random(0)
    with aq.WeightLoader(path) as loader, open_table(path) as table:
        for name in eight_devices.ALL:
            whole = np.asarray(loader.get_layer(name, "numpy")).reshape(-1)
            cuts = sorted(generator.randrange(whole.size + 1) for _ in range(6)) if whole.size else [0] * 6
            ranges = list(zip(cuts[::2], cuts[1::2], strict=True))
            parts = PartialTensor(table, name, reversed(ranges))
            for start, stop in ranges:
                found = parts.values(start, stop)
                assert found.dtype == whole.dtype
                if name in eight_devices.ROTATED:
                    np.testing.assert_allclose(found, whole[start:stop], rtol=0, atol=1e-6 * np.abs(whole).max())
                else:
                    assert found.tobytes() == whole[start:stop].tobytes(), (name, start, stop)


def test_ranges_are_joined_where_they_touch() -> None:
    assert merged([]) == []
    assert merged([(3, 3), (0, 1), (4, 9), (5, 6), (1, 2)]) == [(0, 2), (4, 9)]


@pytest.mark.parametrize("name", ["m.parquet", "m.arrow"])
def test_what_was_not_asked_for_is_refused(tmp_path: Path, name: str) -> None:
    aq.save(tmp_path / name, {"w": np.arange(64, dtype=np.float32)})
    with open_table(tmp_path / name) as table:
        parts = PartialTensor(table, "w", [(8, 16), (16, 24), (40, 48)])
        assert parts.values(10, 22).tolist() == list(range(10, 22))
        for start, stop in ((7, 9), (20, 44), (48, 49)):
            with pytest.raises(ValueError, match=f"w: elements {start} to {stop} were not asked for"):
                parts.values(start, stop)
        assert table.bytes_read == 4 * 24
        assert table.partly_read == {"w"}


# ------------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize("name", ["m.parquet", "m.arrow"])
def test_a_digest_is_compared_if_and_only_if_a_row_is_read_whole(tmp_path: Path, name: str) -> None:
    marker = b"these bytes are found in the file" * 4
    aq.save(tmp_path / name, {"w": np.frombuffer(marker, np.uint8)})
    content = (tmp_path / name).read_bytes()
    assert content.count(marker) == 1
    (tmp_path / name).write_bytes(content.replace(b"these bytes", b"those bytes", 1))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with aq.WeightLoader(tmp_path / name) as loader:
        with pytest.raises(aq.IntegrityError, match=r"row 0 \(w\): its bytes have digest"):
            loader.load_sharded("w", one)
        assert not loader.partly_read
    with aq.WeightLoader(tmp_path / name, verify=False) as loader:
        assert bytes(np.asarray(loader.load_sharded("w", one))).startswith(b"those")
    with open_table(tmp_path / name) as table:
        parts = PartialTensor(table, "w", [(0, 33)])
        assert parts.values(0, 11).tobytes() == b"those bytes"
        assert table.partly_read == {"w"}


def test_scales_are_checked_where_codes_are_read_in_part(tmp_path: Path) -> None:
    q = eight_devices.random_qtensor((16, 64), QuantSpec(4, group_size=8), 0)
    aq.save(tmp_path / "m.arrow", {"w": q})
    content = (tmp_path / "m.arrow").read_bytes()
    scales = np.asarray(q.scale).tobytes()
    assert content.count(scales) == 1
    (tmp_path / "m.arrow").write_bytes(content.replace(scales, np.full(128, np.nan, np.float32).tobytes()))
    with open_table(tmp_path / "m.arrow") as table, pytest.raises(aq.FormatError, match=r"row 0 \(w\): scales are nan"):
        PartialTensor(table, "w", [(0, 64)])


def flips(content: bytes, start: int, stop: int) -> list[bytes]:
    """The content with one bit changed, for every bit of these bytes."""
    places = [(at, bit) for at in range(start, stop) for bit in range(8)]
    return [content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :] for at, bit in places]


def test_a_damaged_page_is_an_error_or_makes_no_difference(tmp_path: Path) -> None:
    """All bits of the header, of the levels, and of the lengths of values: the values themselves have digests only."""
    path = tmp_path / "m.parquet"
    arrays = {"a": np.arange(12, dtype=np.uint8) + 100, "b": np.arange(9, dtype=np.uint8) + 50}
    aq.save(path, arrays)
    content = path.read_bytes()
    first, second = (content.index(array.tobytes()) for array in arrays.values())
    assert second == first + 12 + 4
    damaged = flips(content, first - 60, first) + flips(content, first + 12, second)
    refused = 0
    for changed in damaged:
        path.write_bytes(changed)
        try:
            with open_table(path) as table:
                found = [PartialTensor(table, name, [(2, 7)]).values(2, 7).tobytes() for name in arrays]
        except aq.AqError:
            refused += 1
        else:
            assert found == [array[2:7].tobytes() for array in arrays.values()]
    assert refused > len(damaged) // 4


def test_a_damaged_footer_is_an_error_or_makes_no_difference(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    aq.save(path, {"a": np.arange(12, dtype=np.uint8) + 100, "b": np.arange(9, dtype=np.uint8) + 50})
    content = path.read_bytes()
    length = int.from_bytes(content[-8:-4], "little")
    generator = random.Random(0)
    for changed in generator.sample(flips(content, len(content) - 8 - length, len(content) - 8), 600):
        path.write_bytes(changed)
        try:
            with open_table(path) as table:
                found = [PartialTensor(table, name, [(2, 7)]).values(2, 7).tobytes() for name in "ab"]
        except (aq.AqError, KeyError):
            continue
        assert found == [bytes(range(102, 107)), bytes(range(52, 57))]


# ------------------------------------------------------------------------------------------------ pages


def chunk_of(path: Path) -> tuple[memoryview, Chunk]:
    content = path.read_bytes()
    length = int.from_bytes(content[-8:-4], "little")
    (group,) = read_groups(content[-8 - length : -8])
    return memoryview(content), group.chunks["data"]


@pytest.mark.parametrize("count", [1, 7, 8, 9, 63, 64, 600])
def test_values_are_found_in_pages_of_any_number_of_them(tmp_path: Path, count: int) -> None:
    """Few definition levels are packed as bits, many are runs."""
    arrays = [np.full(i % 5, i % 256, np.uint8) for i in range(count)]
    aq.save(tmp_path / "m.parquet", {f"t{i}": array for i, array in enumerate(arrays)})
    file, chunk = chunk_of(tmp_path / "m.parquet")
    found = plain_values(file, chunk, True)
    assert found is not None
    assert [value.tobytes() for value in found] == [array.tobytes() for array in arrays]
    assert all(value.base is not None for value in found)


def test_what_is_not_plain_is_left_to_arrow(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    values = [b"abc", b"", b"d" * 100, b"abc"]
    table = pa.table({"data": pa.array(values, pa.binary())})
    for found, options in (
        (True, {"compression": "none", "use_dictionary": False}),
        (True, {"compression": "none", "use_dictionary": False, "data_page_size": 1, "write_batch_size": 1}),
        (False, {"compression": "zstd", "use_dictionary": False}),
        (False, {"compression": "none", "use_dictionary": True}),
        (False, {"compression": "none", "use_dictionary": False, "data_page_version": "2.0"}),
        (False, {"compression": "none", "use_dictionary": False, "column_encoding": "DELTA_BYTE_ARRAY"}),
    ):
        pq.write_table(table, tmp_path / "t.parquet", **options)
        views = plain_values(*chunk_of(tmp_path / "t.parquet"), True)
        assert (views is not None) == found, options
        if views is not None:
            assert [view.tobytes() for view in views] == values
    pq.write_table(
        pa.table({"data": pa.array([b"a", None], pa.binary())}), tmp_path / "t.parquet", compression="none",
        use_dictionary=False,
    )  # fmt: skip
    assert plain_values(*chunk_of(tmp_path / "t.parquet"), True) is None
    required = pa.table(
        [pa.array(values, pa.binary())], schema=pa.schema([pa.field("data", pa.binary(), nullable=False)])
    )
    pq.write_table(required, tmp_path / "t.parquet", compression="none", use_dictionary=False)
    views = plain_values(*chunk_of(tmp_path / "t.parquet"), False)
    assert views is not None
    assert [view.tobytes() for view in views] == values
