"""Describe tables of MiniLM that were calibrated elsewhere: their names, and the lines that they have seen."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VARIABLE = "AQ_JAX_CALIBRATED"
NUMBER = ("text", "sentences", "seed", "digest")  # of a text, as metadata has them


@dataclass(frozen=True)
class Calibrated:
    """A table.

    Args:
        path: of it.
        name: by how it was made.
        made: its digest, and what its metadata says of calibration, allocation and training, in short.
        seen: the lines that it was calibrated, planned or trained on, in lower case.
    """

    path: Path
    name: str
    made: Mapping[str, Any]
    seen: frozenset[str]


def given() -> tuple[list[Path], dict[str, Path]]:
    """Read the tables that the variable names, and the texts, by their names."""
    paths = [Path(part) for part in os.environ.get(VARIABLE, "").split(os.pathsep) if part]
    return [p for p in paths if p.suffix != ".txt"], {p.name: p for p in paths if p.suffix == ".txt"}


def described(path: Path, texts: Mapping[str, Path]) -> Calibrated:
    """Describe a table by its metadata.

    Args:
        path: of the table.
        texts: on which tables may be calibrated, beside Python's manual.

    Raises:
        OSError, ValueError: if it is no table, has not been calibrated, or its text is not there.
    """
    from aq_jax.store import open_table

    with open_table(path) as table:
        metadata = table.metadata
    config = metadata.config if metadata else {}
    if metadata is None or not config.get("calibration"):
        raise ValueError("its metadata says nothing of a calibration")
    try:
        made: dict[str, Any] = {"table": metadata.digest, "calibration": _parts(config["calibration"], NUMBER)}
        if plan := config.get("allocation"):
            made["allocation"] = _parts(plan, ("widths", "bpw", "sentences"))
        if training := config.get("training"):
            text = _parts(training["text"], NUMBER)
            made["training"] = {**_parts(training, ("steps", "seconds", "held_out")), "text": text}
        return Calibrated(path, name_of(config), made, seen_by(made, texts))
    except (KeyError, TypeError) as error:
        raise ValueError(f"its metadata lacks {error}") from None


def _parts(record: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: record[key] for key in keys}


def name_of(config: Mapping[str, Any]) -> str:
    """Name a table by its configuration.

    >>> quantization = {"solver": "gptq", "quant_type": "int2", "group_size": 128, "rotate": True}
    >>> name_of({"quantization": quantization, "allocation": {"widths": ["int2", "int3"], "bpw": 2.3849}})
    'aq_jax gptq int2 int3 mixed to 2.38 bits, g128, rotated'
    """
    made, plan = config["quantization"], config.get("allocation")
    width = f"{' '.join(plan['widths'])} mixed to {plan['bpw']:.2f} bits" if plan else made["quant_type"]
    group = "rows" if made.get("per_channel") else f"g{made['group_size']}"
    endings = [word for word, there in (("rotated", made.get("rotate")), ("trained", config.get("training"))) if there]
    return ", ".join([f"aq_jax {made['solver']} {width}", group, *endings])


def seen_by(made: Mapping[str, Any], texts: Mapping[str, Path]) -> frozenset[str]:
    """Find the lines that a table has seen: of Python's manual, or of one of the texts.

    Raises:
        ValueError: if its text is not among them, or is another.
    """
    import aq_jax as aq
    from aq_jax.calibration.plan import LAST
    from aq_jax.calibration.text import BUILT_IN, read_text
    from aq_jax.validate.data import seen_lines

    record, plan, training = (made.get(key) for key in ("calibration", "allocation", "training"))
    assert record is not None
    name = record["text"]
    if name != BUILT_IN and name not in texts:
        raise ValueError(f"calibrated on {name}, which {VARIABLE} does not name: what it has seen is not known")
    text = "" if name == BUILT_IN else str(texts[name])
    calibration = aq.CalibrationConfig(text, sentences=record["sentences"], seed=record["seed"])
    if read_text(calibration).record()["digest"] != record["digest"]:
        raise ValueError(f"calibrated on another {name} than the one that is here")
    conversion = aq.ConversionConfig(
        "model",
        "model.parquet",
        aq.QuantizationConfig("int2", group_size=128, symmetric=False, solver="gptq"),
        calibration=calibration,
        allocate=aq.AllocationConfig(target_bpw=4.0, sentences=-(-plan["sentences"] // LAST)) if plan else None,
        train=aq.TrainingConfig(sentences=training["text"]["sentences"], held_out=training["held_out"])
        if training
        else None,
    )
    return frozenset(seen_lines(conversion))
