"""The config of a whole conversion, which a TOML file holds."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Literal

from aq_jax.config.calibration import AllocationConfig, CalibrationConfig, TrainingConfig, check_path
from aq_jax.config.quantization import QuantizationConfig, check_choice
from aq_jax.errors import ConfigError

Compression = Literal["none", "zstd"]
Engine = Literal["local", "ray"]


@dataclass(frozen=True, slots=True)
class ShardsConfig:
    """The files, the memory and the processes with which a model is converted into a folder of tables.

    Args:
        size: The bytes of one file's tensors before they are quantized; a larger tensor has a file of its own.
        max_memory: The bytes, such as "1.5 GB", that all processes of this machine may take together; by default a
            quarter of the machine's. Pages of mapped files, which the system takes back when it needs them, do not
            count.
        workers: The largest number of processes; 0 for one a core. Never more than fit in `max_memory`.
        engine: "local" runs them on this machine, "ray" on a Ray cluster, which knows its own memory.

    Raises:
        ConfigError: for an invalid number of bytes, a number of workers below 0, and an unknown engine.

    >>> ShardsConfig(size="256 MiB").size_bytes
    268435456
    """

    size: str | int = "1 GiB"
    max_memory: str | int = ""
    workers: int = 0
    engine: Engine = "local"

    def __post_init__(self) -> None:
        check_choice("engine", self.engine, ("local", "ray"))
        if not 0 <= self.workers <= 2**16:
            raise ConfigError(f"workers = {self.workers!r}: wanted 0 (one a core) to {2**16}")
        for key in ("size",) if self.max_memory == "" else ("size", "max_memory"):
            try:
                parse_bytes(getattr(self, key))
            except ConfigError as error:
                raise ConfigError(f"{key} = {error}") from None

    @property
    def size_bytes(self) -> int:
        return parse_bytes(self.size)

    @property
    def max_memory_bytes(self) -> int | None:
        return None if self.max_memory == "" else parse_bytes(self.max_memory)


def parse_bytes(text: str | int) -> int:
    """Parse a number of bytes, with or without a unit: B, KB, MB, GB, TB, or KiB, MiB, GiB, TiB.

    Raises:
        ConfigError: for anything else, and for less than one byte.

    >>> parse_bytes("1.5 GB"), parse_bytes("2MiB"), parse_bytes("100")
    (1500000000, 2097152, 100)
    """
    pattern = r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*(?:([KMGT])(i?))?B?\s*"
    match = re.fullmatch(pattern, str(text), re.IGNORECASE | re.ASCII)
    if match is None or not (count := int(float(match[1]) * (1024 if match[3] else 1000) ** _unit(match[2]))):
        raise ConfigError(f"{text!r}: wanted a number of bytes, such as 1.5 GB or 512 MiB")
    return count


def _unit(letter: str | None) -> int:
    return " KMGT".index(letter.upper()) if letter else 0


@dataclass(frozen=True, slots=True)
class ConversionConfig:
    """A conversion, as a TOML file describes it.

    Args:
        source: The location of the weights, in any of `converters.FORMATS`: a path, `package:NAME/FOLDER` for a folder
            inside an installed package, `hf:ORG/NAME[@REVISION]` for a model of Hugging Face's hub,
            `hf:ORG/NAME/FILE.gguf` for a GGUF file there, or a URL on any filesystem that pyarrow knows, such as
            s3://bucket/model.
        output: The path or URL of the table, .parquet or .arrow, or of a folder for a table of several files.
        quantization: The policy; None writes plain weights (schema V1).
        calibration: The text for solver = "gptq".
        allocate: The goal for which each tensor's width is chosen; needs solver = "gptq".
        plan: The path of a file of [[override]] tables, as `allocate.save` writes it; they go before those of
            `quantization`.
        train: The training of the calibrated weights; needs solver = "gptq", and an encoder.
        compression: "zstd" compresses the weights too (.parquet only).
        allow_pickle: Whether to read pytorch_model.bin, which can run code when loaded, if there is nothing safer.
        requantize: Whether to quantize weights again that are quantized already, from their dequantized values.
        shards: The settings for an output that is a folder.

    Raises:
        ConfigError: for an unknown compression, a source or output that is no valid name, an allocation or a plan
            without a quantization, or both of them. `convert` refuses what solvers cannot do, before anything is read.

    >>> ConversionConfig("path/to/folder", "build/model.parquet", QuantizationConfig("int8")).compression
    'none'
    """

    source: str
    output: str
    quantization: QuantizationConfig | None = None
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    allocate: AllocationConfig | None = None
    plan: str = ""
    train: TrainingConfig | None = None
    compression: Compression = "none"
    allow_pickle: bool = False
    requantize: bool = False
    shards: ShardsConfig | None = None

    @property
    def in_shards(self) -> bool:
        """Return whether the output is a folder."""
        return PurePath(self.output).suffix not in (".parquet", ".arrow")

    def __post_init__(self) -> None:
        check_choice("compression", self.compression, ("none", "zstd"))
        for key in ("source", "output"):
            path = getattr(self, key)
            if not path:
                raise ConfigError(f"{key} = {path!r}: wanted the name of a file or folder")
            check_path(key, path, "file or folder")
        check_path("plan", self.plan)
        if self.plan and self.allocate is not None:
            raise ConfigError(f"plan = {self.plan!r} and [allocate]: a plan is used or made; leave one of them out")
        if self.plan and self.quantization is None:
            raise ConfigError(f"plan = {self.plan!r} without [quantization]: there is nothing that it could change")
        if self.quantization is None and (self.train, self.allocate) != (None, None):
            table = "train" if self.train is not None else "allocate"
            raise ConfigError(
                f'[{table}]: found no [quantization]; wanted one with a solver that runs the model, such as "gptq"'
            )
        if self.requantize and self.quantization is None:
            raise ConfigError("requantize = true without [quantization]: weights are written as they are")
        if not self.in_shards and self.shards is not None:
            raise ConfigError(
                f"[shards]: output = {self.output!r} is a single file; name a folder, or leave [shards] out"
            )
        if (name := PurePath(self.output).name) in (".parquet", ".arrow") and self.output[-1] != "/":
            raise ConfigError(f"output = {self.output!r}: wanted a name before {name}, such as model{name}")
        if self.in_shards and re.fullmatch(r"\.[A-Za-z]\w*", PurePath(self.output).suffix) and self.output[-1] != "/":
            raise ConfigError(
                f"output = {self.output!r}: a table's name ends in .parquet or .arrow; for a folder of that name, end "
                "it with /"
            )
        if self.in_shards and self.allow_pickle:
            raise ConfigError(
                f"output = {self.output!r}: is a folder, which is written from safetensors only; name a .parquet or "
                ".arrow file, or leave allow_pickle out"
            )
