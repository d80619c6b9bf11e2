"""From one table to another: quantized, or plain again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from aq_jax.config import CalibrationConfig, Compression, QuantizationConfig
from aq_jax.errors import FormatError
from aq_jax.jobs.solving import solver
from aq_jax.store.folders import Folder

if TYPE_CHECKING:
    from aq_jax.pipeline import Progress, Written


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
        FormatError: for a source that is no table, or is quantized already, by us or by others; for an output inside
            the folder of tables that is the source.
        AqError: for a tensor that cannot be quantized, by name.

    >>> import numpy as np, tempfile
    >>> import aq_jax as aq
    >>> folder = tempfile.mkdtemp()
    >>> aq.save(folder + "/v1.parquet", {"w": np.ones((4, 8), np.float32)})
    >>> aq.quantize_file(folder + "/v1.parquet", folder + "/v2.parquet", "int4").quantized
    {'w': 1.0}
    """
    from aq_jax.converters.prequantized import check_quantizable
    from aq_jax.converters.sidefiles import RECORD
    from aq_jax.loader import WeightLoader
    from aq_jax.pipeline import TableSource, write_model
    from aq_jax.store import TableWriter

    _refuse_among(source, output)
    config = QuantizationConfig(quant_type=config) if isinstance(config, str) else config
    solve = solver(config, calibration or CalibrationConfig(), progress)
    folder = Path(source) if Path(source).is_dir() else Path(source).parent
    with WeightLoader(source) as table:
        weights = TableSource(table, allow_quantized=False)
        notes = check_quantizable(weights.shapes, Folder(folder), quantizes=True)
        TableWriter(output, version=2, compression=compression)  # refuses what could not be written
        solved = solve(weights, folder) if solve else None
        more = {RECORD: table.config[RECORD]} if RECORD in table.config else {}
        done = write_model(
            weights, output, config, solved=solved, compression=compression, progress=progress, more=more
        )
        done.notes += notes
        return done


def dequantize_file(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    compression: Compression = "none",
    progress: Progress | None = None,
) -> Written:
    """Dequantize a table: into a V1 table or, where output is no .parquet or .arrow, a folder of safetensors.

    Args:
        source: a table, or a folder of them.
        output: appears whole, or not at all, and may be the source.
        compression: "zstd" compresses the weights too (.parquet only).
        progress: called with each tensor's name, its bytes, and the bytes of all.

    Returns:
        What was written; of a folder, `path` is that of its model.safetensors.

    Raises:
        FormatError: for a source that is no table, or an output that cannot be, or that is a table inside the folder
            of tables that is the source.
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

        return huggingface.write_folder(source, output, progress=progress)
    from aq_jax.converters.sidefiles import RECORD
    from aq_jax.loader import WeightLoader
    from aq_jax.pipeline import TableSource, write_model

    _refuse_among(source, output)
    with WeightLoader(source) as table:
        more = {RECORD: table.config[RECORD]} if RECORD in table.config else {}
        weights = TableSource(table, allow_quantized=True)
        return write_model(weights, output, None, compression=compression, progress=progress, more=more)


def _refuse_among(source: str | os.PathLike[str], output: str | os.PathLike[str]) -> None:
    """Refuse to write a table among those that it is made of: it would replace one of them, or be read as one."""
    if Path(source).is_dir() and Path(output).parent.resolve() == Path(source).resolve():
        raise FormatError(f"{output}: lies in {source}, which is the source; wanted another folder, or one below it")
