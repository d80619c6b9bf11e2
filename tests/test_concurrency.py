"""Many threads, many processes, one file: and the file changes while they read it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import killing
import numpy as np
import pytest
from killing import Server

import aq_jax as aq
from aq_jax.store.shard import Shard


@pytest.fixture(params=["parquet", "arrow"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / f"m.{request.param}"


def bits(tensors: dict[str, Any]) -> dict[str, bytes]:
    """The bytes of all leaves, packed tensors taken apart."""
    leaves = jax.tree_util.tree_leaves_with_path(tensors)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def at_once(count: int, work: Callable[[int], object]) -> None:
    """Call `work` in so many threads, which begin together; what one of them raises is raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(count)

    def run(index: int) -> None:
        try:
            start.wait()
            work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.fixture
def model() -> dict[str, Any]:
    """Rows of several kinds, in several row groups."""
    made: dict[str, Any] = {**killing.tensors()}
    for i, config in enumerate((aq.QuantizationConfig("int8"), aq.QuantizationConfig("int4", solver="absmax"))):
        made[f"packed.{i}"] = aq.quantize(made["embed.weight"], config)
    return made


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aq_jax.store.writer.GROUP_BYTES", 4096)


# ------------------------------------------------------------------------------------------------ one file


@pytest.mark.parametrize("shared", [True, False], ids=["one loader", "a loader each"])
def test_eight_threads_load_all_of_one_file(path: Path, model: dict[str, Any], shared: bool) -> None:
    aq.save(path, model)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    calls: list[Callable[[aq.WeightLoader], Any]] = [
        lambda loader: loader.load_weights("numpy"),
        lambda loader: loader.load_weights("numpy", copy=False),
        lambda loader: loader.load_weights(packed=True),
        lambda loader: {name: loader.load_sharded(name, device, packed=True) for name in loader.get_layer_names()},
        lambda loader: {name: loader.get_layer(name, "numpy") for name in reversed(loader.get_layer_names())},
    ]
    with aq.WeightLoader(path) as one:
        wanted = [bits(call(one)) for call in calls]
        before = one.bytes_read

        def work(index: int) -> None:
            for turn in range(5):
                which = (index + turn) % len(calls)
                if shared:
                    found = calls[which](one)
                else:
                    with aq.WeightLoader(path) as loader:
                        found = calls[which](loader)
                assert bits(found) == wanted[which]

        at_once(8, work)
        assert one.bytes_read == before * (1 + 8 * shared)  # 40 calls are 8 times the five: no count was lost


@pytest.mark.parametrize("how", ["read", "mapped"])
def test_a_file_is_read_by_one_thread_at_a_time(path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Arrow does not promise that its readers may be shared; what threads do at once is all that follows."""
    aq.save(path, {"a": np.ones(2), "b": np.ones(2)})
    inside, most, real = 0, 0, getattr(Shard, how)

    def slowly(*args: Any) -> Any:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.02)
        inside -= 1
        return real(*args)

    monkeypatch.setattr(Shard, how, slowly)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with aq.WeightLoader(path) as loader:
        load = (lambda name: loader.get_layer(name, "numpy")) if how == "read" else loader.load_sharded
        at_once(4, lambda index: load("ab"[index % 2], *([device] if how == "mapped" else [])))
    assert most == 1


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux: descriptors of processes")
def test_four_processes_of_eight_threads_load_a_file_that_is_replaced_all_the_time(path: Path, server: Server) -> None:
    """What each of them loads is one version of the table, and all of it; and each of them sees both."""
    versions, folder = [killing.versions(i) for i in range(2)], path.parent
    aq.save(path, versions[0])
    found: list[dict[str, Any]] = []
    reading = threading.Thread(target=lambda: found.append(server(f"load{path.suffix}", folder, copies=4)))
    reading.start()
    written = 0
    # Until all of them have loaded a few times; then they are told to stop.
    while len(list(folder.glob("loaded.*"))) < 4 and reading.is_alive():
        written += 1
        aq.save(path, versions[written % 2])
        time.sleep(0.002)
    (folder / "stop").touch()
    reading.join()
    assert found, "a process failed: see its errors above"
    assert not found[0]["killed"]
    assert [file.read_text() for file in folder.glob("loaded.*")] == ["[0, 1]"] * 4
    assert written > 2


def test_threads_that_write_one_file_leave_one_of_theirs_and_nothing_else(path: Path) -> None:
    versions = [{"w": np.full(2000, i)} for i in range(4)]

    def work(index: int) -> None:
        for _ in range(5):
            aq.save(path, versions[index])
            (found,) = set(aq.load(path, "numpy")["w"].tolist())
            assert found in range(4)

    at_once(4, work)
    assert os.listdir(path.parent) == [path.name]


# ------------------------------------------------------------------------------------------------ one that changes


def test_an_open_loader_keeps_the_file_that_it_opened(path: Path, model: dict[str, Any]) -> None:
    aq.save(path, model)
    old = bits(aq.load(path, packed=True))
    new = {name: a + a.dtype.type(1) for name, a in killing.tensors().items()}
    with aq.WeightLoader(path) as loader:
        names = loader.get_layer_names()
        seen = {names[0]: loader.get_layer(names[0], "numpy", copy=False)}
        aq.save(path, new)
        # What was not yet read, too, and read again what was; also views of the file's memory.
        assert bits(loader.load_weights(packed=True)) == old
        assert loader.get_layer_names() == names
        seen |= {name: loader.get_layer(name, "numpy", copy=False) for name in names[1:]}
        with aq.WeightLoader(path) as later:
            assert bits(later.load_weights("numpy")) == bits(new)
        path.unlink()
        assert bits(loader.load_weights(packed=True)) == old
    assert all(seen[name].tobytes() == a.tobytes() for name, a in killing.tensors().items())


def test_a_table_can_be_quantized_over_itself_while_another_reads_it(path: Path) -> None:
    aq.save(path, killing.tensors())
    with aq.WeightLoader(path) as loader:
        aq.quantize_file(path, path, "int8")
        assert bits(loader.load_weights("numpy")) == bits(killing.tensors())
    with aq.WeightLoader(path) as loader:
        assert loader.describe("embed.weight").quant_type == "int8"


def test_a_loader_that_is_closed_under_its_readers_says_so(path: Path) -> None:
    """Whoever comes too late has an error; nobody reads memory that is gone."""
    tensors = {f"w{i}": np.full(5000, i) for i in range(20)}
    aq.save(path, tensors)
    for turn in range(5):
        loader = aq.WeightLoader(path)
        loaded: list[int] = []

        def work(index: int, loader: aq.WeightLoader = loader, loaded: list[int] = loaded, turn: int = turn) -> None:
            if index == 0:
                while len(loaded) < 8 * turn + 1:
                    time.sleep(0)
                loader.close()
                return
            try:
                for i in range(10**6):
                    view = loader.get_layer(f"w{i % 20}", "numpy", copy=False)
                    loaded.append(i)
                    assert view.min() == view.max() == i % 20
            except ValueError as error:
                assert "is closed" in str(error)  # noqa: PT017

        at_once(8, work)
        assert loaded
