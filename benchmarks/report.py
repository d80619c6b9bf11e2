"""Write results as a Markdown table, as a file, and beside the last file of the same processor."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.machine import slug
from benchmarks.timing import Result

RESULTS = Path(__file__).parent / "results"
HEADER = "| what | measured | quartiles | at least | goal | since | |\n|---|---|---|---|---|---|---|"
SHOWN = 0.05  # a ratio that changed by less is the same


def entry(suite: str, result: Result) -> dict[str, Any]:
    """Write a result as a file holds it: four digits, nothing that is empty."""
    fields = {"suite": suite, **dataclasses.asdict(result)}
    short = {key: _rounded(value) for key, value in fields.items() if value not in ("", None, {})}
    return {**short, "value": _rounded(result.value), "unit": result.unit}  # which may be 0, and empty


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if not isinstance(value, float):
        return value
    return float(f"{value:.4g}" if abs(value) < 0.9 or abs(value) > 1 else f"{value:.6g}")  # cosines near 1


def key(found: Mapping[str, Any]) -> tuple[str, str, str]:
    """Identify the measurement that results of different files share."""
    return found["suite"], found["case"], found.get("peer", "")


def is_ratio(found: Mapping[str, Any]) -> bool:
    """Tell whether a figure may be compared from day to day."""
    return found["unit"].startswith("x ")


def changes(new: Mapping[str, Any], old: Mapping[str, Any] | None) -> dict[tuple[str, str, str], str]:
    """Tell how each ratio changed: "+12 %", "=", or "+12 % ?" where the quartiles of both overlap.

    Args:
        new, old: reports; without an old one nothing changed.
    """
    if old is None:
        return {}
    before = {key(found): found for found in old["results"] if is_ratio(found)}
    out = {}
    for found in new["results"]:
        last = before.get(key(found))
        if last is None or not is_ratio(found) or not last["value"]:
            continue
        share = found["value"] / last["value"] - 1
        apart = found.get("low", found["value"]) > last.get("high", last["value"]) or (
            found.get("high", found["value"]) < last.get("low", last["value"])
        )
        out[key(found)] = "=" if abs(share) < SHOWN else f"{100 * share:+.0f} %" + ("" if apart else " ?")
    return out


def row(found: Mapping[str, Any], change: str = "") -> str:
    """Write a line of the table."""
    beside = f" / {found['peer']}" if "peer" in found else ""
    spread = f"{found['low']:.3g} to {found['high']:.3g}" if "low" in found else ""
    figures = ", ".join(f"{name} {value:.4g}" for name, value in found.get("figures", {}).items())
    note = "; ".join(part for part in (figures, found.get("note", "")) if part)
    least, goal = found.get("least", "") + (" **missed**" if misses(found) else ""), found.get("goal", "")
    measured = f"{found['value']:.4g} {found['unit']}".strip()
    return f"| {found['case']}{beside} | {measured} | {spread} | {least} | {goal} | {change} | {note} |"


def misses(found: Mapping[str, Any]) -> bool:
    """Tell whether a figure is not what it must be at least, or at most.

    >>> [misses({"value": 2.0, "least": least}) for least in ("3", "2", "<= 1", "1.9 +- 0.2", "reported")]
    [True, False, True, False, False]
    """
    least, value = found.get("least", ""), found["value"]
    try:
        if " +- " in least:
            middle, width = map(float, least.split(" +- "))
            return abs(value - middle) > width
        return value > float(least[2:]) if least.startswith("<=") else value < float(least)
    except ValueError:  # no number is demanded
        return False


def skipped_row(skipped: Mapping[str, Any]) -> str:
    """Write a line for what was not measured."""
    return f"| {skipped['case']} | skipped: {skipped['reason']} | | | | | |"


def device(report: Mapping[str, Any]) -> str:
    """Name what computed: an accelerator, or else the processor."""
    return report.get("accelerator", report["cpu"])


def last_of(name: str, cores: int, folder: Path = RESULTS) -> dict[str, Any] | None:
    """Read the last recorded report of the same device and number of cores."""
    for path in sorted(folder.glob(f"*-{slug(name)}-{cores}-cores.json"), reverse=True):
        report = json.loads(path.read_text())
        if device(report) == name and report["cores"] == cores:
            return report
    return None


def latest(folder: Path = RESULTS, accelerated: bool = False) -> dict[str, Any] | None:
    """Read the last recorded full report, of any processor; or, without one, the last report.

    Args:
        folder: The folder of recorded reports.
        accelerated: Whether the report is that of an accelerator, or of a processor alone.
    """
    reports = (json.loads(path.read_text()) for path in sorted(folder.glob("*.json"), reverse=True))
    found = [report for report in reports if ("accelerator" in report) == accelerated]
    return next((report for report in found if report["suite"] == "full"), found[0] if found else None)


def conditions(report: Mapping[str, Any]) -> dict[str, str]:
    """List what figures depend on, beside the processor: the day, versions, and how memory is handed out."""
    return {
        "date": report["date"],
        "python": report["python"],
        "malloc": report.get("malloc", "as it comes"),
        **report["versions"],
    }


def record(report: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write a report where later ones are compared with it; a file of the same day keeps what was not measured again.

    The conditions of a suite that is kept stand under "earlier" if they were others.

    Args:
        report: what was measured.
        folder: of recorded reports.

    Raises:
        ValueError: for quick results where there are full ones of the day.
    """
    folder.mkdir(exist_ok=True)
    path = folder / f"{report['date']}-{slug(device(report))}-{report['cores']}-cores.json"
    if path.exists():
        old = json.loads(path.read_text())
        if old["suite"] == "full" != report["suite"]:
            raise ValueError(f"{path.name} holds full results; quick ones do not replace them")
        if old["suite"] != report["suite"]:
            old |= {"results": [], "skipped": []}
        again = {found["suite"] for found in report["results"]} | {part["suite"] for part in report["skipped"]}
        for part in ("results", "skipped"):
            kept = [found for found in old[part] if found["suite"] not in again]
            report = {**report, part: kept + report[part]}
        now, before = conditions(report), conditions(old)
        kept = {found["suite"] for part in ("results", "skipped") for found in report[part]} - again
        with_others = {suite: old.get("earlier", {}).get(suite, before) for suite in sorted(kept)}
        if earlier := {suite: versions for suite, versions in with_others.items() if versions != now}:
            report = {**report, "earlier": earlier}
    path.write_text(text(report))
    return path


def text(report: Mapping[str, Any]) -> str:
    """JSON, a result a line, so that differences can be read."""
    parts = []
    for name, value in report.items():
        if isinstance(value, list):
            lines = ",\n".join("  " + json.dumps(item, ensure_ascii=False) for item in value)
            parts.append(f' "{name}": [\n{lines}\n ]' if value else f' "{name}": []')
        else:
            parts.append(f" {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"
