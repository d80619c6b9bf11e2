"""The parts of the page that have charts: each takes the cases, and stands for any number of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aq_jax.validate import charts, pareto
from aq_jax.validate.heatmap import Plan, Scale, heat_map
from aq_jax.validate.markup import (
    TIMES,
    Child,
    Html,
    at,
    cosine,
    el,
    error,
    join,
    number,
    real,
    scroll,
    seconds,
    table,
    words,
)

Case = Mapping[str, Any]


def case_name(case: Case, hue: int, mark: bool = False) -> Html:
    """A case's name behind its colour and, on demand, before what came of it.

    >>> case_name({"name": "int8"}, 0)
    '<span class="swatch s0" aria-hidden="true"></span><b>int8</b>'
    """
    ok = bool(case.get("ok"))
    result = el("span", el("span", "passed" if ok else "failed", class_="hidden"), class_="yes" if ok else "no")
    swatch = el("span", class_=f"swatch s{hue % charts.HUES}", aria_hidden="true")
    return join([swatch, el("b", words(case.get("name"))), result if mark else None])


def layers_of(case: Case) -> list[Mapping[str, Any]]:
    """The rows of a case's tensors."""
    return [row for row in case.get("layers") or () if isinstance(row, Mapping)]


def scale_of(cases: Sequence[Case]) -> Scale:
    """The one scale of colours for the errors of all cases."""
    return Scale.of([e for case in cases for row in layers_of(case) if (e := real(row.get("rel_mse"))) is not None])


def total(spent: object) -> float | None:
    """Seconds of all stages, None if there are none.

    >>> total({"read": 1, "write": 0.5, "train": None}), total({}), total(None)
    (1.5, None, None)
    """
    found = [s for value in spent.values() if (s := real(value)) is not None] if isinstance(spent, Mapping) else []
    return sum(found) if found else None


def pairs(items: Sequence[tuple[str, object]]) -> Html:
    """Names and values.

    >>> pairs([("cores", "2")])
    '<dl><div><dt>cores</dt><dd>2</dd></div></dl>'
    """
    return el("dl", [el("div", el("dt", key), el("dd", words(value))) for key, value in items])


def _muted(said: str) -> Html:
    return el("p", said, class_="muted")


# What cases are compared by, the first that any of them has: where it is, how it is called, as the loss that is drawn,
# as that loss is written on the axis, and as it is written beside a point.
Measure = tuple[tuple[str, ...], str, str, Callable[[float], float], Callable[[float], str], Callable[[float], str]]
MEASURES: tuple[Measure, ...] = (
    (
        ("cosine", "mean"),
        "output cosine",
        "cosine",
        lambda found: max(0.0, 1 - found),
        lambda loss: f"{1 - loss:.6g}",
        cosine,
    ),
    (("kl", "mean"), "KL divergence from float", "KL", lambda found: found, lambda loss: f"{loss:.3g}", error),
    (
        ("perplexity", "quantized"),
        "perplexity",
        "perplexity",
        lambda found: found,
        lambda loss: f"{loss:.4g}",
        lambda found: f"{found:.3f}",
    ),
)


def tradeoff(cases: Sequence[Case]) -> Child:
    """Bits a weight against accuracy.

    >>> tradeoff([])
    '<p class="muted">No case has both a size and an accuracy.</p>'
    """
    for path, axis, unit, as_loss, tick, show in MEASURES:
        points = []
        for i, case in enumerate(cases):
            bits, found = real(at(case, "size", "bits_per_weight")), real(at(case, "outputs", *path))
            if bits is not None and found is not None and bits >= 0 and as_loss(found) >= 0:
                note = f"{number(at(case, 'size', 'ratio_float32'), '.2f', TIMES)}, {unit} {show(found)}"
                points.append(pareto.Point(words(case.get("name")), bits, as_loss(found), note, i))
        if points:
            chart = scroll(f"Chart of bits per weight against {axis}", pareto.tradeoff(points, axis, tick))
            caption = (
                "Bits per weight are all bytes of the file over all parameters. Up and to the left is better; "
                "the vertical axis is logarithmic.",
                "The dotted line is the frontier: what is on it is beaten in both by no other case. "
                "Hollow points are beaten.",
            )
            return el("figure", chart, el("figcaption", [el("p", line) for line in caption]), class_="side")
    return _muted("No case has both a size and an accuracy.")


def errors(cases: Sequence[Case]) -> Child:
    """A map of relative errors for each case, all on one scale.

    >>> errors([{"name": "float", "layers": []}])
    '<p class="muted">No case has quantized tensors.</p>'
    """
    plan, scale = Plan.of([layers_of(case) for case in cases]), scale_of(cases)
    if not plan.names:
        return _muted("No case has quantized tensors.")
    maps = []
    for i, case in enumerate(cases):
        drawn = heat_map(f"map-{i}", words(case.get("name")), layers_of(case), plan, scale)
        content = scroll(f"Map of {words(case.get('name'))}", drawn) if drawn else _muted("Nothing is quantized.")
        maps.append(el("figure", el("h3", case_name(case, i)), content))
    lead = "Squared error of the weights over their squares, for each quantized tensor; one scale for all cases."
    return [_muted(lead), scroll("Scale of the maps", scale.legend()), el("div", maps, class_="maps")]


def distributions(cases: Sequence[Case]) -> Child:
    """Histograms: cosines of outputs, where these are embeddings, cosines of the weights, and their errors.

    >>> distributions([])
    '<p class="muted">The report has no cases.</p>'
    """
    if not cases:
        return _muted("The report has no cases.")
    found = [
        _muted(
            "Each histogram has an axis of its own. The line is the mean, the dotted one the percentile at the worse "
            "end. Weights are counted by tensor; their errors are relative, as in the maps."
        )
    ]
    for i, case in enumerate(cases):
        figures = [
            _histogram(f"outputs-{i}", "Cosines of outputs", at(case, "outputs", "cosine"), case, i) or _tokens(case),
            _histogram(f"weights-{i}", "Cosines of quantized weights", at(case, "layer_cosines"), case, i),
            _histogram(f"weight-errors-{i}", "Errors of quantized weights", at(case, "layer_errors"), case, i, error),
        ]
        content = [figure or el("figure", _muted("Nothing to count.")) for figure in figures]
        found.append(el("div", el("h3", case_name(case, i)), content, class_="spread"))
    return found


def _histogram(
    key: str, title: str, data: object, case: Case, hue: int, show: Callable[[object], str] = cosine
) -> Html | None:
    worst = ("p1", "min") if show is cosine else ("p99", "max")
    chart = charts.histogram(key, f"{title}, {words(case.get('name'))}", data, hue, worst)
    if chart is None:
        return None
    said = [f"{name} {show(at(data, name))}" for name in ("mean", *worst)] + [f"std {error(at(data, 'std'))}"]
    head = el("figcaption", el("b", title), f", {number(at(data, 'count'))}")
    return el("figure", head, chart, el("figcaption", [el("span", words) for words in said], class_="facts"))


def _tokens(case: Case) -> Html | None:
    """What is measured of a language model, which has no cosines: numbers, and how sure they are."""
    outputs = at(case, "outputs")
    if at(outputs, "kind") != "tokens":
        return None
    ppl, kl, same = (at(outputs, key) for key in ("perplexity", "kl", "same_top"))
    facts = [
        ("tokens", number(at(outputs, "tokens"))),
        ("perplexity of float", number(at(ppl, "float"), ".3f")),
        ("perplexity", f"{number(at(ppl, 'quantized'), '.3f')} ± {number(at(ppl, 'standard_error'), '.3f')}"),
        (
            "perplexity over float's",
            f"{number(at(ppl, 'ratio'), '.4f')} ± {number(at(ppl, 'ratio_standard_error'), '.4f')}",
        ),
        ("KL divergence", f"{error(at(kl, 'mean'))} ± {error(at(kl, 'standard_error'))}"),
        ("same next token", f"{number(at(same, 'rate'), '.2%')} ± {number(at(same, 'standard_error'), '.2%')}"),
    ]
    return el("figure", el("figcaption", el("b", "Predictions")), pairs(facts))


# What a stage's name does not say.
STAGES = {
    "convert": "Local files are mapped: “read” is what it takes to map a tensor. Its bytes come in where they are "
    "first used, in “calibrate” or “quantize”, and are counted there.",
    "load": "From the file cache, the fastest of a few loads; “read” checks every digest, and so reads every byte.",
}


def times(cases: Sequence[Case]) -> Child:
    """Seconds of each stage of converting and of loading.

    >>> times([])
    '<p class="muted">No times were measured.</p>'
    """
    found: list[Child] = []
    for key, title in (("convert", "Conversion"), ("load", "Loading")):
        rows = [(words(case.get("name")), at(case, "seconds", key) or {}) for case in cases]
        chart = charts.bars(key, title, rows)
        if chart is None:
            continue
        order = charts.stages([row for _, row in rows])
        keys = [el("li", el("span", class_=f"swatch square t{charts.hue_of(s)}", aria_hidden="true"), s) for s in order]
        body = [
            [case_name(case, i), *(seconds(row.get(s)) for s in order), seconds(total(row))]
            for i, (case, (_, row)) in enumerate(zip(cases, rows, strict=True))
        ]
        caption = el("figcaption", el("ul", keys, class_="keys"), el("p", STAGES[key]))
        drawn = el("figure", scroll(f"Chart: {title}", chart), caption, class_="side")
        found += [
            el("h3", title),
            drawn,
            table(f"{title}: time of each stage", ["Case", *order, "total"], body, "small"),
        ]
    return found or _muted("No times were measured.")
