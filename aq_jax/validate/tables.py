"""The parts of the page that are tables: each takes the cases, and stands for any number of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aq_jax.validate.figures import Case, case_name, layers_of, pairs, scale_of, total
from aq_jax.validate.heatmap import Scale
from aq_jax.validate.markup import (
    DASH,
    TIMES,
    Child,
    Html,
    at,
    cosine,
    el,
    error,
    megabytes,
    number,
    real,
    scroll,
    seconds,
    table,
    text,
    words,
)


def found(value: object) -> str:
    """What was found, for a criterion.

    >>> found(0.57423456), found(1024), found(True), found(None)
    ('0.57423', '1,024', 'yes', 'not measured')
    """
    if value is None:
        return "not measured"
    return words(value) if isinstance(value, bool) else number(value, ",.0f" if isinstance(value, int) else ".5g")


def wanted(value: object) -> str:
    """What was wanted, for a criterion.

    >>> wanted(">= 3.9"), wanted("true")
    ('≥ 3.9', 'yes')
    """
    said = {"true": "yes", "false": "no"}.get(words(value), words(value))
    return said.replace(">=", "≥").replace("<=", "≤")


# The columns of the first table. One that has nothing to say in any case is left out.
GROUPS: Mapping[str, Mapping[str, Callable[[Case], str]]] = {
    "Size": {
        "file": lambda c: megabytes(at(c, "size", "file_bytes")),
        "against float32": lambda c: number(at(c, "size", "ratio_float32"), ".2f", TIMES),
        "against float16": lambda c: number(at(c, "size", "ratio_float16"), ".2f", TIMES),
        "bits per weight": lambda c: number(at(c, "size", "bits_per_weight"), ".2f"),
    },
    "Accuracy": {
        "activations": lambda c: words(at(c, "activations")),
        "output cosine": lambda c: cosine(at(c, "outputs", "cosine", "mean")),
        "1st percentile": lambda c: cosine(at(c, "outputs", "cosine", "p1")),
        "Spearman": lambda c: number(at(c, "outputs", "spearman", "quantized"), ".2f"),
        "Spearman of float": lambda c: number(at(c, "outputs", "spearman", "float"), ".2f"),
        "perplexity": lambda c: number(at(c, "outputs", "perplexity", "quantized"), ".3f"),
        "perplexity of float": lambda c: number(at(c, "outputs", "perplexity", "float"), ".3f"),
        "KL": lambda c: error(at(c, "outputs", "kl", "mean")),
        "same next token": lambda c: number(at(c, "outputs", "same_top", "rate"), ".1%"),
        "weight cosine": lambda c: cosine(at(c, "layer_cosines", "mean")),
        "weight error": lambda c: error(at(c, "rel_mse")),
    },
    "Speed": {
        "to convert": lambda c: seconds(total(at(c, "seconds", "convert"))),
        "to load": lambda c: seconds(total(at(c, "seconds", "load"))),
        "sentences a second": lambda c: number(at(c, "seconds", "encode", "sentences_a_second")),
        "the float model's": lambda c: number(at(c, "seconds", "encode", "float_sentences_a_second")),
        "peak memory": lambda c: megabytes(at(c, "peak_memory_bytes")),
    },
}


def cases(cases: Sequence[Case]) -> Html:
    """Size, accuracy and speed of each case.

    >>> "3.94" in cases([{"name": "int8", "size": {"ratio_float32": 3.941}}])
    True
    """
    if not cases:
        return el("p", "The report has no cases.", class_="muted")
    upper, lower = [el("th", "Case", scope="col", rowspan="2")], []
    rows: list[list[Child]] = [[case_name(case, i, mark=True)] for i, case in enumerate(cases)]
    for group, columns in GROUPS.items():
        shown = {head: [f(case) for case in cases] for head, f in columns.items()}
        shown = {head: cells for head, cells in shown.items() if set(cells) != {DASH}}
        if shown:
            upper.append(el("th", group, scope="colgroup", colspan=str(len(shown)), class_="group start"))
        for i, (head, cells) in enumerate(shown.items()):
            class_ = None if i else "start"
            lower.append(el("th", head, scope="col", class_=class_))
            for row, cell in zip(rows, cells, strict=True):
                row.append(el("td", cell, class_=class_))
    heads = Html(el("tr", upper) + el("tr", lower))
    return table("Size, accuracy and speed of each case", heads, rows, "cases")


def criteria(cases: Sequence[Case]) -> Child:
    """A row for each criterion, a column for each case.

    >>> criteria([{"name": "int8", "criteria": []}])
    '<p class="muted">No criteria were set.</p>'
    """
    names = list(dict.fromkeys(words(c.get("name")) for case in cases for c in case.get("criteria") or ()))
    if not names:
        return el("p", "No criteria were set.", class_="muted")
    rows = []
    for name in names:
        cells = []
        for case in cases:
            here = [_criterion(c) for c in case.get("criteria") or () if words(c.get("name")) == name]
            cells.append(el("td", here or DASH))
        rows.append([name, *cells])
    head = el(
        "tr", el("th", "Criterion", scope="col"), [el("th", case_name(c, i), scope="col") for i, c in enumerate(cases)]
    )
    lead = el("p", "What was found and, beside it, what was wanted.", class_="muted")
    return [lead, table("What was found, and what was wanted, in each case", head, rows)]


def _criterion(c: Mapping[str, Any]) -> Html:
    ok, what, goal = bool(c.get("ok")), found(c.get("found")), wanted(c.get("wanted"))
    beside = el("span", f" {goal}", class_="muted") if goal != what else None
    said = el("span", " holds" if ok else " does not hold", class_="hidden")
    return el("span", what, beside, said, class_="yes" if ok else "no")


LAYER = {"Name": 0, "Kind": 1, "Layer": 0, "Shape": 0, "Type": 1, "Parameters": 0, "Bytes": 0, "Bits": 0, "Cosine": 0}
KIND = ("Kind", "Tensors", "Parameters", "Mean cosine", "Least cosine", "Relative error")


def layers(cases: Sequence[Case]) -> Child:
    """Every tensor of every case; the first case is open.

    >>> "768 " in layers([{"name": "int8", "layers": [{"name": "w", "shape": [768, 2], "bits": 8.1}]}])[1]
    True
    """
    if not cases:
        return el("p", "The report has no cases.", class_="muted")
    lead = "Every tensor of every case. What was not quantized has no error; colours are those of the maps above."
    scale, found = scale_of(cases), [el("p", lead, class_="muted")]
    heads = {**LAYER, "Relative error": 0}
    head = el("tr", [el("th", h, scope="col", class_="left" if left else None) for h, left in heads.items()])
    for i, case in enumerate(cases):
        label = words(case.get("name"))
        notes = [el("li", words(note)) for note in case.get("notes") or ()]
        content: list[Child] = [
            pairs(
                [
                    ("activations", words(case.get("activations"))),
                    ("bits per quantized weight", number(at(case, "size", "bits_per_quantized_weight"), ".3f")),
                    ("neither weights nor scales, of the file", number(at(case, "size", "metadata_share"), ".2%")),
                ]
            ),
            el("ul", notes, class_="notes") if notes else None,
        ]
        if kinds := at(case, "kinds"):
            rows = [
                [
                    words(kind),
                    number(at(facts, "tensors")),
                    number(at(facts, "params")),
                    cosine(at(facts, "cosine_mean")),
                    cosine(at(facts, "cosine_min")),
                    error(at(facts, "rel_mse")),
                ]
                for kind, facts in kinds.items()
            ]
            content.append(table(f"Kinds of tensors of {label}", KIND, rows, "small"))
        content.append(table(f"Layers of {label}", head, [_layer(row, scale) for row in layers_of(case)], "sortable"))
        types = ", ".join(
            f"{number(n)} {'as they were' if kind == 'none' else kind}"
            for kind, n in (at(case, "quant_types") or {}).items()
        )
        about = el("span", f"{len(layers_of(case))} tensors: {types or DASH}", class_="muted")
        found.append(
            el("details", el("summary", case_name(case, i, mark=True), about), content, open=i == 0, id=f"case-{i}")
        )
    return found


def _layer(row: Mapping[str, Any], scale: Scale) -> list[Child]:
    step, shape = scale.step(row.get("rel_mse")), row.get("shape") or ()
    swatch = el("span", class_=f"swatch square c{step}", aria_hidden="true") if step is not None else None

    def by_value(key: str, *shown: Child) -> Html:
        value = real(row.get(key))
        return el("td", shown, data_value="" if value is None else f"{value:.12g}")

    return [
        words(row.get("name")),
        el("td", words(row.get("kind")), class_="left"),
        by_value("layer", words(row.get("layer"))),
        f" {TIMES} ".join(words(n) for n in shape) or "scalar",
        el("td", words(row.get("quant_type")), class_="left"),
        by_value("params", number(row.get("params"))),
        by_value("bytes", number(row.get("bytes"))),
        by_value("bits", number(row.get("bits"), ".2f")),
        by_value("cosine", cosine(row.get("cosine"))),
        by_value("rel_mse", swatch, error(row.get("rel_mse"))),
    ]


def about(report: Mapping[str, Any], cases: Sequence[Case]) -> Child:
    """Where and of what the report was made: environment, digests, configs.

    >>> "<dt>seed</dt><dd>7</dd>" in about({"text": {"seed": 7}}, [])[0]
    True
    """
    model, sentences, labels, machine = (at(report, key) for key in ("model", "text", "labels", "environment"))
    facts = {
        "model": words(at(model, "source")),
        "text": words(at(sentences, "name")),
        "seed": words(at(sentences, "seed")),
        "lines left out": number(at(sentences, "excluded")),
        "labels": f"{words(at(labels, 'name'))}, {number(at(labels, 'pairs'))} pairs" if labels else DASH,
        "pairs left out": number(at(labels, "excluded")),
        "machine": words(at(machine, "machine")),
        "cores": number(at(machine, "cores")),
        "platform": words(at(machine, "platform")),
        "Python": words(at(machine, "python")),
    }
    versions = at(machine, "versions") or {}
    found: list[Child] = [pairs([*facts.items(), *((words(key), words(value)) for key, value in versions.items())])]
    found.append(el("p", "Digest of the text: ", el("code", words(at(sentences, "digest")), class_="wrap")))
    if cases:
        schemas = list(dict.fromkeys(key for case in cases for key in at(case, "schemas") or {}))
        heads = (
            "Case",
            "Rows",
            "Unchecked",
            "Digests",
            *(words(s).replace("_", " ") for s in schemas),
            "Digest of the table",
        )
        rows = []
        for i, case in enumerate(cases):
            checks = [at(case, "digests", "ok"), *(at(case, "schemas", key) for key in schemas)]
            rows.append(
                [
                    case_name(case, i),
                    number(at(case, "digests", "rows")),
                    number(at(case, "digests", "unchecked")),
                    *(
                        el("td", el("span", words(ok), class_=None if ok is None else "yes" if ok else "no"))
                        for ok in checks
                    ),
                    el("td", el("code", words(at(case, "digests", "table"))), class_="digest"),
                ]
            )
        found += [el("h3", "Digests and schemas"), table("Digests and schemas of each file", heads, rows)]
    configs = [("Validation", "", at(report, "config"))]
    configs += [(words(c.get("name")), words(c.get("config_file")), c.get("config")) for c in cases]
    found.append(el("h3", "Configs"))
    for name, file, config in configs:
        lines = json.dumps(config, indent=2, ensure_ascii=False, default=str).split("\n")
        block = scroll(f"Config of {name}", el("pre", Html("\n".join(text(line) for line in lines))))
        found.append(el("details", el("summary", el("b", name), el("span", file, class_="muted")), block))
    return found
