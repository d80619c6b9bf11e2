"""Run a validation: convert, measure and judge every case; the report is as docs/validation.md says."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import math
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aq_jax._version import __version__
from aq_jax.conversion import corridor
from aq_jax.converters import open_source
from aq_jax.converters.convert import convert
from aq_jax.cores import cores
from aq_jax.io.loader import WeightLoader
from aq_jax.nn.architecture import read_architecture
from aq_jax.nn.load import load_model
from aq_jax.quantizers.eligibility import is_floating
from aq_jax.store import open_table
from aq_jax.validate.config import FLOAT, Case, ValidationConfig, read_conversions
from aq_jax.validate.criteria import check_thresholds, judge_case
from aq_jax.validate.data import HeldOut, held_out
from aq_jax.validate.measure import measure
from aq_jax.validate.outputs import make_judge
from aq_jax.validate.process import run_measured
from aq_jax.validate.report import write_report

if TYPE_CHECKING:
    from aq_jax.conversion.source import Source
    from aq_jax.progress import Progress

SCHEMA = 2
LIBRARIES = ("jax", "jaxlib", "numpy", "pyarrow", "flax", "tokenizers")


def validate(
    config: ValidationConfig,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Convert a model as each case says, judge what comes of it, and write report.json, report.md and report.html.

    Each case is converted in a process of its own, whose peak memory is measured.

    Args:
        config: the validation, from `load_validation` or made by hand.
        progress: callback that is given what is being done, its size, and the size of all.

    Returns:
        The report, of JSON types, as docs/validation.md describes it; `report["ok"]` is the verdict.

    Raises:
        ConfigError: for a config of which something cannot be judged, before anything is converted.
        FormatError, AqError, OSError: as `convert` and `load_model`.

    >>> from aq_jax.validate.config import load_validation  # doctest: +SKIP
    >>> validate(load_validation("configs/validate_minilm.toml"))["ok"]  # doctest: +SKIP
    True
    """
    asked = read_conversions(config)
    location, plain = asked[0].source, str(Path(config.folder, f"{FLOAT}.parquet"))
    allow_pickle = any(conversion.allow_pickle for conversion in asked)
    # Dequantized, if it is quantized already.
    with open_source(location, packed=False, allow_pickle=allow_pickle) as source:
        with source.model_folder() as folder:
            architecture = read_architecture(folder)
        family, name = architecture.family, str(architecture.fields["model_type"])
        check_thresholds(config, family)
        held = held_out(config, asked)
        corridor.to_table(source, plain, progress=progress)
        model, v1_read = _model(source, location, name, plain)
    judge = make_judge(load_model(plain), held, config.max_tokens if config.joined else None)
    cases = []
    for case, conversion in zip(config.cases, asked, strict=True):

        def tell(name: str, size: int, total: int, case: Case = case) -> None:
            if progress is not None:
                progress(f"{case.name}: {name}", size, total)

        done, peak = run_measured(convert, conversion, tell)
        measures = measure(case, conversion, done, model, family, judge)
        measures["schemas"]["v1_read"] = v1_read
        measures["peak_memory_bytes"] = peak
        criteria = judge_case(case, measures)
        cases.append(measures | {"ok": all(c["ok"] for c in criteria), "criteria": criteria})
    found = {
        "schema": SCHEMA, "ok": all(case["ok"] for case in cases),
        "created": dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "model": model, **_texts(held), "environment": environment(),
        "config": dataclasses.asdict(config), "cases": cases,
    }  # fmt: skip
    # JSON has no NaN and no infinity: what cannot be said is null.
    report = json.loads(json.dumps(found), parse_constant=lambda _: None)
    write_report(report, config.folder)
    return report


def _texts(held: HeldOut) -> dict[str, Any]:
    record = held.text.record()
    text = {"name": record.pop("text"), **record, "excluded": held.excluded}
    pairs = held.pairs
    return {
        "text": text,
        "labels": pairs and {"name": pairs.name, "pairs": len(pairs.rows), "excluded": pairs.excluded},
    }


def _model(source: Source, location: str, architecture: str, plain: str) -> tuple[dict[str, Any], bool]:
    """Describe the model, and tell whether a V1 table of it is read back bit for bit."""
    names, shapes = list(source.shapes), source.shapes.values()
    with WeightLoader(plain) as table, open_table(plain) as opened:
        same = opened.version == 1 and list(opened.names) == names
        same = same and all(_same(table.get_layer(n, "numpy", copy=False), np.asarray(source.read(n))) for n in names)
    floats = sum(math.prod(shape) for shape, dtype in shapes if is_floating(dtype))
    others = sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes if not is_floating(dtype))
    model = {
        "source": location, "architecture": architecture, "tensors": len(names),
        "params": sum(math.prod(shape) for shape, _ in shapes),
        "float32_bytes": 4 * floats + others, "float16_bytes": 2 * floats + others,
    }  # fmt: skip
    return model, same


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def environment() -> dict[str, Any]:
    """Describe the machine and the libraries.

    >>> sorted(environment())
    ['cores', 'machine', 'platform', 'python', 'versions']
    """
    about = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.+)", about.read_text()) if about.exists() else None
    return {
        "machine": named[1] if named else platform.processor() or platform.machine(),
        "cores": cores(),
        "python": platform.python_version(), "platform": platform.platform(),
        "versions": {"aq_jax": __version__} | {name: version(name) for name in LIBRARIES},
    }  # fmt: skip
