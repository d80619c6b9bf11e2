"""What a config or a command asks for, done. Nothing is printed here, and jax is imported by the jobs that compute."""

from __future__ import annotations

import math
import os
import re
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aq_jax.config import BITS, CalibrationConfig, Compression, ConversionConfig, QuantizationConfig, TrainingConfig
from aq_jax.configfile import load_plan
from aq_jax.errors import AqError, ConfigError, FormatError
from aq_jax.store import RowInfo, TableWriter, open_table

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from aq_jax.calibration.plan import Allocation
    from aq_jax.core.dispatch import Activations
    from aq_jax.evaluate.config import ValidationConfig
    from aq_jax.pipeline import Progress, Solved, Source, Written


def convert(config: ConversionConfig, progress: Progress | None = None) -> Written:
    """Do what a TOML file says: a folder of weights becomes a table, its config and tokenizer files beside it.

    Args:
        config: from `load_config`, or made by hand.
        progress: called with each tensor's name, its bytes, and the bytes of all.

    Raises:
        ConfigError, FormatError, AqError: see `converters.huggingface.to_table`.

    >>> import numpy as np, safetensors.numpy, tempfile
    >>> import aq_jax as aq
    >>> folder = tempfile.mkdtemp()
    >>> safetensors.numpy.save_file({"w": np.ones((4, 8), np.float32)}, folder + "/model.safetensors")
    >>> config = ConversionConfig(folder, folder + "/m.parquet", QuantizationConfig("int8"))
    >>> aq.convert(config).quantized
    {'w': 1.0}
    """
    from aq_jax.converters import huggingface

    allocation, config = allocate(config, progress) if config.allocate else None, planned(config)
    if allocation is not None:
        config = replace(config, allocate=None, quantization=allocation.config)
        if allocation.goal.save:
            allocation.save(allocation.goal.save)
    checkpoints = Path(f"{config.output}.training")
    done = huggingface.to_table(
        config.source,
        config.output,
        config.quantization,
        solve=_solver(config.quantization, config.calibration, progress, allocation, config.train, checkpoints),
        allow_pickle=config.allow_pickle,
        compression=config.compression,
        progress=progress,
    )
    if config.train is not None:
        shutil.rmtree(checkpoints, ignore_errors=True)  # only now: the table is there
    if allocation is not None:
        done.seconds = {"allocate": allocation.seconds} | done.seconds
    return done


def _solver(
    config: QuantizationConfig | None,
    calibration: CalibrationConfig,
    progress: Progress | None,
    allocation: Allocation | None = None,
    train: TrainingConfig | None = None,
    checkpoints: Path = Path(),
) -> Callable[[Source, Path], Solved | None] | None:
    """What solves the weights for which the model must run, if the config asks for it anywhere."""
    if config is None or not config.calibrated:
        return None
    from aq_jax.calibration.plan import LAST
    from aq_jax.calibration.solve import Training, solve_model

    measure = None if allocation is None else allocation.record
    planned_on = 0 if allocation is None else (1 + LAST) * allocation.goal.sentences  # and judged by: not trained on
    training = None if train is None else Training(train, checkpoints, planned_on)
    return lambda source, folder: solve_model(source, folder, config, calibration, progress, measure, training)


def allocate(config: ConversionConfig, progress: Progress | None = None) -> Allocation:
    """Choose the width of each tensor, as `config.allocate` asks for; nothing is written.

    Args:
        config: of the conversion.
        progress: called with each tensor's name, its bytes, and the bytes of all.

    Raises:
        ConfigError, FormatError, AqError: as `calibration.plan.allocate`, and as `convert` for a source or an output.
    """
    from aq_jax.calibration.plan import allocate
    from aq_jax.converters.checkpoint import open_checkpoint
    from aq_jax.converters.huggingface import check_side_files, resolve_source

    if config.allocate is None or config.quantization is None:
        raise ConfigError("[allocate]: is not in the config; wanted target_bpw or min_cosine in it")
    if Path(config.allocate.save).is_dir() and config.allocate.save:
        raise ConfigError(f"allocate.save = {config.allocate.save!r}: is a folder; wanted the name of a file")
    # What could not be written is said before minutes are spent.
    TableWriter(config.output, version=2, compression=config.compression)
    folder = resolve_source(config.source)
    check_side_files(folder, Path(config.output).parent)
    with open_checkpoint(folder, config.allow_pickle) as checkpoint:
        return allocate(checkpoint, folder, config.quantization, config.calibration, config.allocate, progress)


def planned(config: ConversionConfig) -> ConversionConfig:
    """The config with the overrides of its plan, if it has one, before its own.

    Raises:
        ConfigError: for a file that is no plan, and for one that is of another model: an override that matches nothing.
    """
    if not config.plan or config.quantization is None:
        return config
    from aq_jax.converters.checkpoint import open_checkpoint
    from aq_jax.converters.huggingface import resolve_source

    overrides = load_plan(config.plan)
    with open_checkpoint(resolve_source(config.source), config.allow_pickle) as checkpoint:
        for i, override in enumerate(overrides):
            if not any(re.search(override.pattern, name) for name in checkpoint.shapes):
                raise ConfigError(
                    f"{config.plan}: override {i + 1}: pattern {override.pattern!r} matches no tensor of "
                    f"{config.source}; wanted a plan of this model"
                )
    merged = replace(config.quantization, overrides=overrides + config.quantization.overrides)
    return replace(config, plan="", quantization=merged)


@dataclass(frozen=True, slots=True)
class Planned:
    """A row that a conversion will write: bytes are an upper bound, before scales are compressed."""

    name: str
    shape: tuple[int, ...]
    quant_type: str
    bytes: int


def plan(config: ConversionConfig) -> list[Planned]:
    """What `convert` will write. Only tensors that may be kept in float16 are looked at; nothing is written.

    Raises:
        ConfigError, FormatError: as `convert` would, for a source or an output that cannot be.
    """
    from aq_jax.converters.checkpoint import open_checkpoint
    from aq_jax.converters.huggingface import check_side_files, resolve_source
    from aq_jax.solvers.screen import is_floating, is_quantizable, to_half

    config = planned(config)
    if config.allocate is not None:
        config = replace(config, allocate=None, quantization=allocate(config).config)
    TableWriter(config.output, version=2 if config.quantization else 1, compression=config.compression)
    folder, rows = resolve_source(config.source), []
    check_side_files(folder, Path(config.output).parent)
    with open_checkpoint(folder, config.allow_pickle) as checkpoint:
        for name, (shape, dtype) in checkpoint.shapes.items():
            kind, size = dtype.name, math.prod(shape) * dtype.itemsize
            if config.quantization:
                policy, kind = config.quantization.for_tensor(name), "none"
                if policy.quant_type in BITS and is_quantizable(shape, dtype):
                    spec = policy.spec_for(shape)
                    kind = spec.quant_type
                    size = -(-math.prod(shape) * spec.bits // 8) + 8 * spec.group_count(shape)
                elif policy.quant_type == "fp16" and is_floating(dtype):
                    half = to_half(checkpoint.array(name))
                    kind, size = ("fp16" if half.dtype == "float16" else "none"), half.nbytes
            rows.append(Planned(name, shape, kind, size))
    return rows


def quantize_file(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: QuantizationConfig | str,
    *,
    calibration: CalibrationConfig | None = None,
    compression: Compression = "none",
    progress: Progress | None = None,
) -> Written:
    """Quantize a table of plain weights into another one, tensor by tensor.

    Args:
        source: a V1 table, or a folder of them.
        output: .parquet or .arrow; appears whole, or not at all, and may be the source.
        config: or just a quant_type.
        calibration: for solver = "gptq", which runs the model: config.json and tokenizer files are beside the table.
        compression: "zstd" compresses the weights too (.parquet only).
        progress: called with each tensor's name, its bytes, and the bytes of all.

    Raises:
        FormatError: for a source that is no table, or is quantized already.
        AqError: for a tensor that cannot be quantized, by name.

    >>> import numpy as np, tempfile
    >>> import aq_jax as aq
    >>> folder = tempfile.mkdtemp()
    >>> aq.save(folder + "/v1.parquet", {"w": np.ones((4, 8), np.float32)})
    >>> aq.quantize_file(folder + "/v1.parquet", folder + "/v2.parquet", "int4").quantized
    {'w': 1.0}
    """
    from aq_jax.loader import WeightLoader
    from aq_jax.pipeline import TableSource, write_model

    config = QuantizationConfig(quant_type=config) if isinstance(config, str) else config
    solve = _solver(config, calibration or CalibrationConfig(), progress)
    folder = Path(source) if Path(source).is_dir() else Path(source).parent
    with WeightLoader(source) as table:
        weights = TableSource(table, allow_quantized=False)
        solved = solve(weights, folder) if solve else None
        return write_model(weights, output, config, solved=solved, compression=compression, progress=progress)


def dequantize_file(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    compression: Compression = "none",
    progress: Progress | None = None,
) -> Written | Path:
    """Dequantize a table: into a V1 table or, where output is no .parquet or .arrow, a folder of safetensors.

    Args:
        source: a table, or a folder of them.
        output: appears whole, or not at all, and may be the source.
        compression: "zstd" compresses the weights too (.parquet only).
        progress: called with each tensor's name, its bytes, and the bytes of all (tables only).

    Returns:
        What was written; for a folder, the path of its model.safetensors.

    Raises:
        FormatError: for a source that is no table, or an output that cannot be.
        IntegrityError: if a row is not what was written.

    >>> import numpy as np, tempfile
    >>> import aq_jax as aq
    >>> folder = tempfile.mkdtemp()
    >>> aq.save(folder + "/v2.parquet", {"w": aq.quantize(np.ones((4, 8), np.float32), "int8")})
    >>> _ = aq.dequantize_file(folder + "/v2.parquet", folder + "/v1.parquet")
    >>> aq.load(folder + "/v1.parquet", "numpy")["w"].sum()
    np.float32(32.0)
    """
    if Path(output).suffix not in (".parquet", ".arrow"):
        from aq_jax.converters import huggingface

        return huggingface.from_table(source, output)
    from aq_jax.loader import WeightLoader
    from aq_jax.pipeline import TableSource, write_model

    with WeightLoader(source) as table:
        return write_model(
            TableSource(table, allow_quantized=True), output, None, compression=compression, progress=progress
        )


@dataclass(frozen=True, slots=True)
class Layer:
    """A tensor as `inspect` lists it: its rows taken together."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    quant_type: str
    params: int
    bytes: int
    bits: float
    cosine: float | None
    rel_mse: float | None


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a table holds, from its small columns alone.

    Args:
        path: the file or folder.
        version: of the schema.
        file_bytes: on disk, everything counted.
        layers: one for each tensor.
        aliases: tied tensors.
        config: what made the table, if it says so.
    """

    path: str
    version: int
    file_bytes: int
    layers: tuple[Layer, ...]
    aliases: Mapping[str, str]
    config: Mapping[str, Any]

    @property
    def params(self) -> int:
        return sum(layer.params for layer in self.layers)


def inspect_table(path: str | os.PathLike[str]) -> Inspection:
    """List the tensors of a table: shape, type, true bits per weight (bytes on disk), fit. No tensor is read.

    Args:
        path: a table, or a folder of them.

    Raises:
        FormatError: if it is no table of this format.
        IntegrityError: if its metadata and its rows do not belong together.

    >>> import numpy as np, tempfile
    >>> import aq_jax as aq
    >>> path = tempfile.mkdtemp() + "/m.arrow"
    >>> aq.save(path, {"w": aq.quantize(np.ones((4, 8), np.float32), "int8")})
    >>> [(layer.name, layer.quant_type, layer.bits) for layer in inspect_table(path).layers]
    [('w', 'int8', 16.0)]
    """
    with open_table(path) as table:
        layers = tuple(_layer(table.pieces(name)) for name in table.names)
        config = table.metadata.config if table.metadata else {}
        return Inspection(str(path), table.version, _size(Path(path)), layers, dict(table.aliases), config)


def _layer(rows: list[RowInfo]) -> Layer:
    first, params = rows[0], sum(row.num_params for row in rows)
    size = sum(row.disk_bytes for row in rows)
    # Pieces of one tensor: the worst of their cosines, the mean of their errors.
    # (NaN, which another writer may have stored, is as good as none.)
    cosines = [row.cosine for row in rows if row.cosine is not None and math.isfinite(row.cosine)]
    errors = [row.rel_mse * row.num_params for row in rows if row.rel_mse is not None and math.isfinite(row.rel_mse)]
    return Layer(
        name=first.layer_name,
        shape=first.shape,
        dtype=first.dtype,
        quant_type=first.quant_type or first.dtype,
        params=params,
        bytes=size,
        bits=size * 8 / params if params else 0.0,
        cosine=min(cosines) if cosines else None,
        rel_mse=sum(errors) / params if errors and params else None,
    )


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [f for f in path.iterdir() if f.suffix in (".parquet", ".arrow")]
    return sum(f.stat().st_size for f in files)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a table is what was written.

    Args:
        path: the file or folder.
        rows: how many rows are whole.
        unchecked: rows without a digest (files of other writers).
        errors: what is wrong, one text each.
    """

    path: str
    rows: int
    unchecked: int
    errors: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.errors


def verify_table(path: str | os.PathLike[str]) -> Verdict:
    """Read every row, compare it with its digest, and the rows with the table's; say which rows are wrong.

    Args:
        path: a table, or a folder of them.

    Raises:
        FormatError: if the file cannot be read as a table at all.
        IntegrityError: if its metadata and its rows do not belong together.

    >>> import numpy as np, tempfile
    >>> import aq_jax as aq
    >>> path = tempfile.mkdtemp() + "/m.arrow"
    >>> aq.save(path, {"w": np.ones(3)})
    >>> verify_table(path).ok
    True
    """
    good, unchecked, errors = 0, 0, []
    with open_table(path) as table:
        for info in table.infos:
            try:
                table.read(info.position, verify=True)
            except AqError as error:
                errors.append(str(error))
            else:
                good += 1
                unchecked += info.digest is None
    return Verdict(str(path), good, unchecked, tuple(errors))


def validate(config: ValidationConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Convert a model as each case says, judge what comes of it, and write report.json, report.md and report.html.

    Args:
        config: from `evaluate.config.load_validation`, or made by hand.
        progress: called with what is being done, its size, and the size of all.

    Returns:
        The report, as docs/validation.md describes it; `report["ok"]` is the verdict.

    Raises:
        ConfigError, FormatError, AqError: see `evaluate.validation.validate`.

    >>> from aq_jax.evaluate.config import load_validation  # doctest: +SKIP
    >>> validate(load_validation("configs/validate_minilm.toml"))["ok"]  # doctest: +SKIP
    True
    """
    from aq_jax.evaluate.report import write_report
    from aq_jax.evaluate.validation import validate

    report = validate(config, convert, inspect_table, verify_table, progress)
    write_report(report, config.folder)
    return report


@dataclass(frozen=True, slots=True)
class Embedded:
    """What `embed` wrote, and how many programs it compiled for that."""

    path: str
    texts: int
    width: int
    compiles: int
    seconds: Mapping[str, float]


def embed(
    model: str | os.PathLike[str],
    texts: Sequence[str],
    path: str | os.PathLike[str],
    activations: Activations | None = None,
    progress: Progress | None = None,
) -> Embedded:
    """Write the embedding of each text to a file.

    Args:
        model: a table with config.json and tokenizer files beside it (see `load_model`).
        texts: in the order in which they are written.
        path: .npy (the array) or .parquet (columns text and embedding); appears whole, or not at all.
        activations: as in `load_model`.
        progress: called with a word, how many texts were just done, and how many there are.

    Raises:
        FormatError, ConfigError: as `load_model`; for a model that is no encoder, or a path of another suffix.
    """
    from aq_jax.nn import Encoder, load_model
    from aq_jax.store.embeddings import check_embeddings_path, write_embeddings

    check_embeddings_path(path)
    start = time.perf_counter()
    encoder = load_model(model, activations)
    if not isinstance(encoder, Encoder):
        raise FormatError(f"{model}: holds a language model, which generates; wanted an encoder, such as BERT")
    loaded = time.perf_counter()
    embeddings = np.asarray(encoder.encode(texts, progress))
    done = time.perf_counter()
    write_embeddings(path, texts, embeddings)
    seconds = {"load": loaded - start, "encode": done - loaded, "write": time.perf_counter() - done}
    return Embedded(str(path), len(texts), embeddings.shape[1], encoder.compiles, seconds)


def generate(
    model: str | os.PathLike[str],
    prompt: str,
    max_tokens: int = 128,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    activations: Activations | None = None,
) -> str:
    """The continuation of a prompt (see `Generator.generate`).

    Raises:
        FormatError, ConfigError: as `load_model`; for a model that does not generate.
        AqError: for numbers out of their range.
    """
    from aq_jax.nn import Generator, load_model

    generator = load_model(model, activations)
    if not isinstance(generator, Generator):
        raise FormatError(f"{model}: holds an encoder, which embeds; wanted a language model, such as Llama")
    return generator.generate(prompt, max_tokens, temperature=temperature, top_p=top_p, seed=seed)
