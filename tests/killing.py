"""A process that forks a child for each run of a job, and kills it: everything is imported once, before any fork.

Started as a program. A request is a line of JSON on the standard input, and so is its answer on the standard output:

    {"job": "save.parquet", "folder": "/tmp/x"}                undisturbed
    {"job": "save.parquet", "folder": "/tmp/x", "after": 0.02} SIGKILL after so many seconds
    {"job": "save.parquet", "folder": "/tmp/x", "at": 17}      SIGKILL at the 17th event (0 counts them)
    {"job": "load.arrow", "folder": "/tmp/x", "copies": 4}     so many at once

    {"killed": true, "seconds": 0.0201, "events": 17}

An event is whatever a job does to a disk: a file opened for writing, a write, each half of it, a flush to the disk, a
rename, a removal, a folder made. Nothing is computed by JAX before a fork: a child of a process in which XLA has
started threads would wait for them forever.
"""

from __future__ import annotations

import importlib
import io
import json
import mmap
import os
import pkgutil
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np

SIDE_FILES = {"config.json": "{}", "vocab.txt": "one\ntwo\n", "tokenizer.json": '{"version": "1.0"}'}


def tensors() -> dict[str, np.ndarray]:
    """Several row groups, once those are small; and two names of one tensor."""
    rng = np.random.default_rng(7)
    embed = rng.normal(size=(64, 32)).astype(np.float32)
    layers = {f"layer.{i}.weight": rng.normal(size=(32, 48)).astype(np.float32) for i in range(2)}
    return {"embed.weight": embed, **layers, "norm.weight": np.ones(32, np.float16), "head.weight": embed}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


class Server:
    """The program, seen from a test."""

    def __init__(self, cache: Path) -> None:
        # A cache of its own: a process that is killed while it writes there would leave half an entry to other tests.
        env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self.process:
            assert self.process.stdin is not None
            self.process.stdin.close()

    def __call__(self, job: str, folder: Path, **how: float) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"job": job, "folder": str(folder), **how}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the job failed: see its errors above"
        return json.loads(line)


# ------------------------------------------------------------------------------------------------ jobs


def _save(name: str) -> Callable[[Path], object]:
    import aq_jax as aq

    return lambda folder: aq.save(folder / name, tensors())


def _quantize(source: str, output: str) -> Callable[[Path], object]:
    import aq_jax as aq

    config = aq.QuantizationConfig("int8", mixed_precision_layers=("embed",))
    return lambda folder: aq.quantize_file(folder / source, folder / output, config)


def _convert(quant_type: str | None) -> Callable[[Path], object]:
    import aq_jax as aq
    from aq_jax.config import ConversionConfig

    config = None if quant_type is None else aq.QuantizationConfig(quant_type)
    return lambda folder: aq.convert(ConversionConfig(str(folder / "hf"), str(folder / "out" / "m.parquet"), config))


def _shards(quant_type: str | None) -> Callable[[Path], object]:
    import aq_jax as aq

    config = None if quant_type is None else aq.QuantizationConfig(quant_type)
    shards = aq.ShardsConfig(size=8192, workers=1)
    return lambda folder: aq.convert(
        aq.ConversionConfig(str(folder / "hf"), str(folder / "out"), config, shards=shards)
    )


def _dequantize(folder: Path) -> object:
    import aq_jax as aq

    return aq.dequantize_file(folder / "v1.parquet", folder / "out")


def _load(name: str) -> Callable[[Path], object]:
    """In eight threads, until a file `stop` appears: what is loaded is one version of the table, and all of it."""
    import aq_jax as aq

    def load(folder: Path) -> object:
        wanted = [{name: a.tobytes() for name, a in versions(i).items()} for i in range(2)]
        seen: set[int] = set()
        wrong: list[object] = []

        def work(seed: int) -> None:
            try:
                for turn in range(10**6):
                    framework = "jax" if (seed + turn) % 4 == 0 else "numpy"
                    found = {key: np.asarray(a) for key, a in aq.load(folder / name, framework).items()}  # type: ignore[arg-type]
                    version = int(found["version"][0])
                    seen.add(version)
                    assert {key: a.tobytes() for key, a in found.items()} == wanted[version], "a mixture of versions"
                    if len(seen) == 2 and turn >= 3:
                        (folder / f"loaded.{os.getpid()}").write_text(str(sorted(seen)))
                    if (folder / "stop").exists():
                        return
            except BaseException as error:
                wrong.append(error)
                raise

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if wrong:
            raise AssertionError(wrong)
        return None

    return load


def versions(version: int) -> dict[str, np.ndarray]:
    """Two models of the same names and shapes."""
    return {name: a + a.dtype.type(version) for name, a in tensors().items()} | {
        "version": np.full(1, version, np.int32)
    }


def jobs() -> dict[str, Callable[[Path], object]]:
    return {
        "save.parquet": _save("m.parquet"),
        "save.arrow": _save("m.arrow"),
        "quantize": _quantize("v1.parquet", "m.parquet"),
        "quantize in place": _quantize("v1.parquet", "v1.parquet"),
        "convert": _convert("int8"),
        "convert plain": _convert(None),
        "shards": _shards("int8"),
        "shards plain": _shards(None),
        "dequantize": _dequantize,
        "load.parquet": _load("m.parquet"),
        "load.arrow": _load("m.arrow"),
    }


# ------------------------------------------------------------------------------------------------ events


class Events:
    """Counts events where the parent sees it, and ends the process at one of them."""

    def __init__(self, shared: mmap.mmap, at: int, folder: str) -> None:
        self.shared, self.at, self.folder, self.count = shared, at, folder, 0

    def __call__(self) -> None:
        self.count += 1
        self.shared[:8] = self.count.to_bytes(8, "little")
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        """A hook of `sys.addaudithook`, for what Python does itself."""
        if event in ("os.mkdir", "os.remove", "os.rename", "open") and str(args[0]).startswith(self.folder):
            flags = args[2] if event == "open" and isinstance(args[2], int) else 0
            if event != "open" or flags & (os.O_WRONLY | os.O_RDWR):
                self()

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self()
            done = call(*args, **kwargs)
            self()
            return done

        return counted

    def install(self) -> None:
        """Every road by which the library writes, cut into small steps."""
        import pyarrow as pa

        event, opened, sendfile = self, io.open, os.sendfile

        class Torn(io.FileIO):
            def write(self, data: Any) -> int:
                view = memoryview(data).cast("B")
                event()
                first = super().write(view[: len(view) // 2]) if len(view) > 1 else 0
                event()
                return (first or 0) + (super().write(view[first:]) or 0)

        def open_torn(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if "w" not in mode or not str(file).startswith(self.folder):
                return opened(file, mode, *args, **kwargs)
            raw = io.BufferedWriter(Torn(str(file), "w"))
            return raw if "b" in mode else io.TextIOWrapper(raw, "utf-8")

        def send_a_little(out: int, source: int, offset: int, count: int) -> int:
            event()
            return sendfile(out, source, offset, min(count, 8))

        pa.OSFile = lambda path, mode: pa.PythonFile(Torn(path, "w"), mode="w")  # type: ignore[misc]
        io.open, os.sendfile = open_torn, send_a_little  # type: ignore[assignment]
        os.fsync, os.replace = self.around(os.fsync), self.around(os.replace)
        sys.addaudithook(self.audit)


# ------------------------------------------------------------------------------------------------ the server


def answer(request: dict[str, Any], job: Callable[[Path], object], shared: mmap.mmap) -> dict[str, Any]:
    shared[:8] = bytes(8)
    started = time.perf_counter()
    children = [fork(request, job, shared) for _ in range(request.get("copies", 1))]
    for child in children:
        ended = os.pidfd_open(child)
        if not select.select([ended], [], [], request.get("after", 600))[0]:
            os.kill(child, signal.SIGKILL)
        os.close(ended)
    ends = [os.waitpid(child, 0)[1] for child in children]
    seconds = time.perf_counter() - started
    if any(os.WIFEXITED(end) and os.WEXITSTATUS(end) for end in ends):
        raise SystemExit(f"the job failed: {request}")
    killed = any(os.WIFSIGNALED(end) for end in ends)
    return {"killed": killed, "seconds": seconds, "events": int.from_bytes(shared[:8], "little")}


def fork(request: dict[str, Any], job: Callable[[Path], object], shared: mmap.mmap) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        if "at" in request:
            Events(shared, request["at"], request["folder"]).install()
        before = set(sys.modules)
        job(Path(request["folder"]))
        late = [name for name in sys.modules.keys() - before if name.startswith(("aq_jax.", "jax.", "flax."))]
        assert not late, f"a job spends its time on imports, and is killed there: {late[:5]}"
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def import_everything() -> None:
    """Import what jobs would: names of aq_jax are resolved when they are used, which would be in each child anew."""
    import safetensors.numpy  # noqa: F401

    import aq_jax

    for module in pkgutil.walk_packages(aq_jax.__path__, "aq_jax."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def main() -> None:
    from aq_jax.store import writer

    import_everything()
    writer.GROUP_BYTES = 4096  # type: ignore[misc]  # a small model, too, is written bit by bit
    known, shared = jobs(), mmap.mmap(-1, 8)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(answer(request, known[request["job"]], shared)), flush=True)


if __name__ == "__main__":
    main()
