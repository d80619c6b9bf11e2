"""Tell a validation's report in tables of words: the terminal, report.md and report.html show the same ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Report = Mapping[str, Any]
Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


def lookup(report: Any, path: str) -> Any:
    """Look up a path such as "outputs.cosine.mean"; None where a part of it is missing.

    >>> lookup({"size": {"ratio_float32": 3.94}}, "size.ratio_float32"), lookup({"outputs": None}, "outputs.cosine")
    (3.94, None)
    """
    for key in path.split("."):
        report = report.get(key) if isinstance(report, Mapping) else None
    return report


def case_table(report: Report) -> Table:
    """Give each case a row: verdict, size, accuracy and speed; without the columns that no case has a figure for."""
    columns = {
        "case": lambda c: c["name"],
        "verdict": lambda c: "holds" if c["ok"] else "FAILS",
        "activations": lambda c: c["activations"],
        "MB": lambda c: number(lookup(c, "size.file_bytes") / 1e6, 2),
        "x f32": lambda c: number(lookup(c, "size.ratio_float32"), 2),
        "bits": lambda c: number(lookup(c, "size.bits_per_weight"), 2),
        "output cosine": lambda c: cosine(lookup(c, "outputs.cosine.mean")),
        "p1": lambda c: cosine(lookup(c, "outputs.cosine.p1")),
        "worst": lambda c: cosine(lookup(c, "outputs.cosine.min")),
        "Spearman": lambda c: number(lookup(c, "outputs.spearman.quantized"), 2),
        "perplexity": lambda c: number(lookup(c, "outputs.perplexity.quantized"), 3),
        "KL": lambda c: error(lookup(c, "outputs.kl.mean")),
        "same top": lambda c: number(lookup(c, "outputs.same_top.rate"), 3),
        "weight cosine": lambda c: cosine(lookup(c, "layer_cosines.mean")),
        "weight error": lambda c: error(c["rel_mse"]),
        "convert s": lambda c: number(lookup(c, "seconds.convert.total"), 1),
        "load ms": lambda c: number(1e3 * lookup(c, "seconds.load.total"), 0),
        "texts/s": lambda c: number(lookup(c, "seconds.encode.sentences_a_second"), 0),
        "peak MB": lambda c: number(c["peak_memory_bytes"] / 1e6, 0),
    }
    cells = {head: [say(case) for case in report["cases"]] for head, say in columns.items()}
    told = {head: column for head, column in cells.items() if any(column)}
    return tuple(told), list(zip(*told.values(), strict=True))


def criteria_table(report: Report) -> Table:
    """Give each criterion a row, with what was found and wanted in each case; "✗" marks what does not hold."""
    names = dict.fromkeys(c["name"] for case in report["cases"] for c in case["criteria"])
    rows = [
        (name, *(", ".join(_judged(c) for c in case["criteria"] if c["name"] == name) for case in report["cases"]))
        for name in names
    ]
    return ("criterion", *(case["name"] for case in report["cases"])), rows


def _judged(criterion: Report) -> str:
    found, wanted = found_text(criterion), criterion["wanted"]
    return f"{found}{'' if found == wanted else f' {wanted}'}{'' if criterion['ok'] else ' ✗'}"


def failed_table(report: Report) -> Table:
    """Give each criterion that does not hold a row."""
    failed = [(case["name"], c) for case in report["cases"] for c in case["criteria"] if not c["ok"]]
    return ("case", "criterion", "wanted", "found"), [
        (name, c["name"], c["wanted"], found_text(c)) for name, c in failed
    ]


def kind_table(case: Report) -> Table:
    """Give each kind of tensors a row."""
    rows = [
        (kind, f"{k['tensors']}", f"{k['params']:,}", cosine(k["cosine_mean"]), cosine(k["cosine_min"]),
         error(k["rel_mse"]))
        for kind, k in case["kinds"].items()
    ]  # fmt: skip
    return ("kind", "tensors", "parameters", "cosine", "worst", "relative error"), rows


def tensor_table(case: Report, most: int | None = None) -> Table:
    """Give each quantized tensor a row, those that fit worst first.

    Args:
        case: case of the report.
        most: number of rows at most.
    """
    quantized = [layer for layer in case["layers"] if layer["cosine"] is not None]
    rows = [
        (x["name"], " x ".join(map(str, x["shape"])), x["quant_type"], number(x["bits"], 2), cosine(x["cosine"]),
         error(x["rel_mse"]))
        for x in sorted(quantized, key=lambda x: x["cosine"])[:most]
    ]  # fmt: skip
    return ("name", "shape", "type", "bits", "cosine", "relative error"), rows


def verdict(report: Report) -> str:
    """Say the whole of it in one line.

    >>> verdict({"cases": [{"criteria": [{"ok": True}, {"ok": False}], "ok": False}]})
    '1 of 2 criteria does not hold, in 1 case'
    """
    cases = report["cases"]
    judged, every = [c["ok"] for case in cases for c in case["criteria"]], f"{len(cases)} case{'s' * (len(cases) != 1)}"
    if all(judged):
        return f"all {len(judged)} criteria hold, in {every}"
    broken, failed = judged.count(False), sum(not case["ok"] for case in cases)
    where = f"{failed} of {every}" if len(cases) > 1 else every
    return f"{broken} of {len(judged)} criteria {'does' if broken == 1 else 'do'} not hold, in {where}"


def basis(report: Report) -> list[str]:
    """Say in sentences on which texts the cases were judged."""
    text, labels, config = report["text"], report["labels"], report["config"]
    unit = f"windows of {config['max_tokens']} tokens" if config.get("joined") else "lines"
    said = [
        f"Judged on {text['sentences']} {unit} of {text['name']} (seed {text['seed']}); {text['excluded']} others are "
        "left out, which a case has calibrated or trained on."
    ]
    outputs = report["cases"][0]["outputs"]
    if labels:
        said.append(
            f"Spearman x 100 on {labels['pairs']} pairs of {labels['name']}, the float model's is "
            f"{number(lookup(outputs, 'spearman.float'), 2)}; {labels['excluded']} are left out likewise."
        )
    if outputs["kind"] == "tokens":
        said.append(f"The float model's perplexity is {number(lookup(outputs, 'perplexity.float'), 3)}.")
    return said


def machine(report: Report) -> str:
    """Say in a sentence where the report was made, and with what."""
    where = report["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return (
        f"{where['machine']}, {where['cores']} cores; Python {where['python']}, {where['platform']}; {versions}. "
        f"Made {report['created']}."
    )


def number(value: float | None, digits: int) -> str:
    """Write a number with so many digits after the point; nothing for None.

    >>> number(22713.5, 1), number(None, 1)
    ('22,713.5', '')
    """
    return "" if value is None else f"{value:,.{digits}f}"


def cosine(value: float | None) -> str:
    """Write four decimals, and as many more as it takes not to say 1 of what is less.

    >>> cosine(0.9), cosine(0.999987), cosine(1.0), cosine(None)
    ('0.9000', '0.99999', '1.0000', '')
    """
    if value is None:
        return ""
    digits = next((n for n in range(4, 9) if value >= 1 or float(f"{value:.{n}f}") < 1), 9)
    return f"{value:.{digits}f}"


def error(value: float | None) -> str:
    """Write two digits that count.

    >>> error(0.0625), error(0.9), error(0.00999), error(6.1e-5), error(0.0), error(None)
    ('0.062', '0.90', '0.010', '6.1e-05', '0', '')
    """
    if value is None:
        return ""
    return f"{value:#.2g}" if value else "0"


def found_text(criterion: Report) -> str:
    """Write what was found: a number of five digits, a fact, or that nothing was measured.

    >>> found_text({"found": 0.99987654}), found_text({"found": True}), found_text({"found": None})
    ('0.99988', 'true', 'nothing')
    """
    found = criterion["found"]
    if found is None:
        return "nothing"
    return str(found).lower() if isinstance(found, bool) else f"{found:.5g}"
