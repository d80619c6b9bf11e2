"""Describe tables of MiniLM that were calibrated elsewhere: their names, and the lines that they have seen."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VARIABLE = "AQ_JAX_CALIBRATED"
WORD_EMBEDDING = "embeddings.word_embeddings.weight"
TEXT_FIELDS = ("text", "sentences", "seed", "digest")  # a text's record in metadata


@dataclass(frozen=True)
class CalibratedTable:
    """A calibrated table.

    Args:
        path: The path of the table.
        name: The name, which says how it was made.
        made: The digest, and the metadata's records of calibration, allocation and training, in short.
        seen: The lines on which it was calibrated, its widths were chosen, or it was trained, in lower case.
    """

    path: Path
    name: str
    made: Mapping[str, Any]
    seen: frozenset[str]


def given_tables() -> tuple[list[Path], dict[str, Path]]:
    """List the tables and, by name, the texts that the environment variable names."""
    paths = [Path(part) for part in os.environ.get(VARIABLE, "").split(os.pathsep) if part]
    return [p for p in paths if p.suffix != ".txt"], {p.name: p for p in paths if p.suffix == ".txt"}


def describe(path: Path, texts: Mapping[str, Path]) -> CalibratedTable:
    """Describe a table by its metadata.

    Args:
        path: The path of the table.
        texts: The texts on which tables may be calibrated, beside Python's manual.

    Raises:
        OSError, ValueError: if it is no table, has not been calibrated, or its text is missing.
    """
    from aq_jax.store import open_table

    with open_table(path) as table:
        metadata = table.metadata
    config = metadata.config if metadata else {}
    if metadata is None or not config.get("calibration"):
        raise ValueError("its metadata says nothing of a calibration")
    try:
        made: dict[str, Any] = {"table": metadata.digest, "calibration": _parts(config["calibration"], TEXT_FIELDS)}
        if allocation := config.get("allocation"):
            made["allocation"] = _parts(allocation, ("widths", "bpw", "sentences"))
        if training := config.get("training"):
            text = _parts(training["text"], TEXT_FIELDS)
            made["training"] = {**_parts(training, ("steps", "seconds", "held_out")), "text": text}
        return CalibratedTable(path, table_name(config), made, seen_by(made, texts))
    except (KeyError, TypeError) as error:
        raise ValueError(f"its metadata lacks {error}") from None


def _parts(record: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: record[key] for key in keys}


def table_name(config: Mapping[str, Any]) -> str:
    """Derive a table's name from its config.

    >>> quantization = {"solver": "gptq", "quant_type": "int2", "group_size": 128, "rotate": True}
    >>> table_name({"quantization": quantization, "allocation": {"widths": ["int2", "int3"], "bpw": 2.3849}})
    'aq_jax gptq int2 int3 mixed to 2.38 bits, g128, rotated'
    """
    made, allocation = config["quantization"], config.get("allocation")
    table = next((o for o in made.get("overrides", ()) if re.search(o["pattern"], WORD_EMBEDDING)), {})
    width = rung_name(made["quant_type"], table.get("quant_type", made["quant_type"]))
    if allocation:
        widths = allocation["widths"]
        mixed = " ".join(widths) if len(widths) <= 4 else f"{len(widths)} codes"
        width = f"{mixed} mixed to {allocation['bpw']:.2f} bits"
    group = "rows" if made.get("per_channel") else f"g{made['group_size']}"
    endings = [word for word, there in (("rotated", made.get("rotate")), ("trained", config.get("training"))) if there]
    return ", ".join([f"aq_jax {made['solver']} {width}", group, *endings])


def rung_name(linears: str, table: str) -> str:
    """Name the codes of the linears and of the word embedding.

    >>> rung_name("tcq3", "tcq1.5"), rung_name("int8", "int8")
    ('tcq3, words tcq1.5', 'int8')
    """
    return linears if table == linears else f"{linears}, words {table}"


def seen_by(made: Mapping[str, Any], texts: Mapping[str, Path]) -> frozenset[str]:
    """Collect the lines that a table has seen: of Python's manual, or of one of the texts.

    Raises:
        ValueError: if its text is not among them, or differs.
    """
    import aq_jax as aq
    from aq_jax.calibration.allocation import JUDGE_FACTOR
    from aq_jax.calibration.text import BUILT_IN, read_text
    from aq_jax.validate.data import seen_lines

    record, allocation, training = (made.get(key) for key in ("calibration", "allocation", "training"))
    assert record is not None
    name = record["text"]
    if name != BUILT_IN and name not in texts:
        raise ValueError(f"calibrated on {name}, which {VARIABLE} does not name: its lines are not known")
    text = "" if name == BUILT_IN else str(texts[name])
    calibration = aq.CalibrationConfig(text, sentences=record["sentences"], seed=record["seed"])
    if read_text(calibration).record()["digest"] != record["digest"]:
        raise ValueError(f"calibrated on another {name} than the given one")
    conversion = aq.ConversionConfig(
        "model",
        "model.parquet",
        aq.QuantizationConfig("int2", group_size=128, symmetric=False, solver="gptq"),
        calibration=calibration,
        allocate=aq.AllocationConfig(target_bpw=4.0, sentences=-(-allocation["sentences"] // JUDGE_FACTOR))
        if allocation
        else None,
        train=aq.TrainingConfig(sentences=training["text"]["sentences"], held_out=training["held_out"])
        if training
        else None,
    )
    return frozenset(seen_lines(conversion))
