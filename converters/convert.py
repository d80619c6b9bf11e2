"""Convert, quantize and dequantize weights, wherever they lie, or list what would be written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from aq_jax.config import CalibrationConfig, Compression, ConversionConfig, QuantizationConfig

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from aq_jax.conversion.dry_run import ExpectedResult
    from aq_jax.conversion.source import Source
    from aq_jax.conversion.write import ConversionResult
    from aq_jax.progress import Progress

_TABLES = ("table", "shards")


def convert(config: ConversionConfig, progress: Progress | None = None) -> ConversionResult:
    """Convert weights to a table as a config says, with config and tokenizer files beside it.

    If the output is a folder, the table is several files in it (see `conversion.shards.run.convert_to_shards`).

    Args:
        config: The conversion, from `load_config` or made by hand; its source is of any of `converters.FORMATS`.
        progress: A callback that gets each tensor's name, its bytes, and the bytes of all.

    Raises:
        FileNotFoundError: if there is no such source.
        ConfigError, FormatError, AqError, OSError: see `conversion.corridor.to_table`.

    >>> import numpy as np, safetensors.numpy, tempfile
    >>> import aq_jax as aq
    >>> folder = tempfile.mkdtemp()
    >>> safetensors.numpy.save_file({"w": np.ones((4, 8), np.float32)}, folder + "/model.safetensors")
    >>> config = ConversionConfig(folder, folder + "/m.parquet", aq.QuantizationConfig("int8"))
    >>> aq.convert(config).quantized
    {'w': 1.0}
    """
    from aq_jax.conversion import corridor

    with _open(config) as source:
        config = corridor.apply_plan(source, config)
        if config.in_shards:
            from aq_jax.conversion.shards.run import convert_to_shards

            return convert_to_shards(source, config, progress)
        return corridor.to_table(
            source, config.output, config.quantization,
            calibration=config.calibration, goal=config.allocate, train=config.train,
            compression=config.compression, requantize=config.requantize, progress=progress,
        )  # fmt: skip


def dry_run(config: ConversionConfig, progress: Progress | None = None) -> ExpectedResult:
    """List the rows that `convert` would write, and its notes, with the widths that it would choose; write nothing.

    Args:
        config: The conversion.
        progress: A callback that gets each tensor's name, its bytes, and the bytes of all, while widths are chosen.

    Raises:
        ConfigError, FormatError, AqError, OSError: as `convert`, for a source or an output that it would refuse.
    """
    from aq_jax.conversion import corridor
    from aq_jax.conversion.dry_run import expected_result

    with _open(config) as source:
        return expected_result(source, corridor.apply_plan(source, config), progress)


def quantize_file(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: QuantizationConfig | str,
    *,
    calibration: CalibrationConfig | None = None,
    compression: Compression = "none",
    requantize: bool = False,
    progress: Progress | None = None,
) -> ConversionResult:
    """Quantize plain weights into a table, tensor by tensor; config and tokenizer files go with them.

    Args:
        source: The path of a V1 table, or of a folder of them; or any location that `converters.FORMATS` recognizes.
        output: The path of a .parquet or .arrow file; it appears whole, or not at all, and may be the source.
        config: The quantization, or just a quant_type.
        calibration: The text for solver = "gptq", which runs the model: config.json and tokenizer files must lie beside
            the table.
        compression: "zstd" compresses the weights too (.parquet only).
        requantize: Whether weights that are quantized already are quantized again, from their dequantized values.
        progress: A callback that gets each tensor's name, its bytes, and the bytes of all.

    Raises:
        FileNotFoundError: if there is no such source.
        ConfigError: for an unknown solver.
        FormatError: for a source of no known format, or one that is quantized already, without `requantize`; for an
            output inside the folder of tables that is the source, or beside another model's config or tokenizer files.
        AqError: for a tensor that cannot be quantized, by name.

    >>> import numpy as np, tempfile
    >>> import aq_jax as aq
    >>> folder = tempfile.mkdtemp()
    >>> aq.save(folder + "/v1.parquet", {"w": np.ones((4, 8), np.float32)})
    >>> aq.quantize_file(folder + "/v1.parquet", folder + "/v2.parquet", "int4").quantized
    {'w': 1.0}
    """
    from aq_jax.conversion import corridor
    from aq_jax.converters import open_source
    from aq_jax.quantizers.lookup import check_policy

    config = QuantizationConfig(quant_type=config) if isinstance(config, str) else config
    check_policy(config)
    with open_source(source, first=_TABLES) as found:
        return corridor.to_table(
            found, output, config, calibration=calibration, compression=compression, requantize=requantize,
            progress=progress,
        )  # fmt: skip


def dequantize_file(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    compression: Compression = "none",
    progress: Progress | None = None,
) -> ConversionResult:
    """Dequantize a table into a V1 table or, if the output is no .parquet or .arrow, a folder of safetensors.

    Config and tokenizer files go with the weights.

    Args:
        source: The path of a table, or of a folder of them; or any location that `converters.FORMATS` recognizes.
        output: The path to write; it appears whole, or not at all, and may be the source. A folder with the name of a
            file of weights, such as m.gguf, has a / at its end.
        compression: "zstd" compresses the weights too (.parquet only).
        progress: A callback that gets each tensor's name, its bytes, and the bytes of all.

    Returns:
        The result; for a folder, its `path` is that of model.safetensors.

    Raises:
        FileNotFoundError: if there is no such source.
        FormatError: for a source of no known format; for an output that cannot be written, or that is a table inside
            the folder of tables that is the source.
        IntegrityError: if a row was damaged or changed.

    >>> import numpy as np, tempfile
    >>> import aq_jax as aq
    >>> folder = tempfile.mkdtemp()
    >>> aq.save(folder + "/v2.parquet", {"w": aq.quantize(np.ones((4, 8), np.float32), "int8")})
    >>> _ = aq.dequantize_file(folder + "/v2.parquet", folder + "/v1.parquet")
    >>> aq.load(folder + "/v1.parquet", "numpy")["w"].sum()
    np.float32(32.0)
    """
    from aq_jax.conversion import corridor
    from aq_jax.converters import huggingface, open_source

    with open_source(source, first=_TABLES) as found:
        if Path(output).suffix not in (".parquet", ".arrow"):
            return huggingface.write_source(found, output, progress=progress)
        return corridor.to_table(found, output, compression=compression, progress=progress)


def _open(config: ConversionConfig) -> AbstractContextManager[Source]:
    from aq_jax.converters import open_source
    from aq_jax.quantizers.lookup import check_conversion

    check_conversion(config)
    return open_source(config.source, packed=config.quantization is None, allow_pickle=config.allow_pickle)
