"""Thresholds: what they are keyed by, and when they hold."""

from __future__ import annotations

from typing import Any

import pytest

from aq_jax.errors import ConfigError
from aq_jax.nn.models import FAMILIES
from aq_jax.validate.config import Case, ValidationConfig
from aq_jax.validate.criteria import check_thresholds, judge_case


@pytest.mark.parametrize(
    ("family", "path", "wanted"),
    [
        ("bert", "outputs.kl.mean", "the model is an encoder, whose report has no such figure"),
        ("llama", "outputs.cosine.mean", "the model is a language model, whose report"),
        ("bert", "outputs.cosine.men", "no such figure; did you mean 'outputs.cosine.mean' or "),
        ("bert", "output_cosine_min", "did you mean .*'outputs.cosine.min'"),
        ("bert", "kinds.atention.rel_mse", "did you mean 'kinds.attention.rel_mse'"),
        ("bert", "seconds.load", "did you mean 'seconds.load.open' or .* or 'seconds.load.total'"),
        ("bert", "nonsense", r"known are size\.\*, rel_mse, .*, outputs\.\*, kinds\.\*"),
        ("bert", "outputs.spearman.loss", "wanted labels = FILE, of pairs with scores"),
    ],
)
def test_figures_that_the_report_will_not_have_are_refused(family: str, path: str, wanted: str) -> None:
    config = ValidationConfig((Case("a", "a.toml", at_most={path: 0.5}),))
    with pytest.raises(ConfigError, match=f"^case 'a': at_most: '{path}': .*{wanted}"):
        check_thresholds(config, FAMILIES[family])


@pytest.mark.parametrize(
    ("table", "path", "threshold", "ok"),
    [
        ("at_least", "size.ratio_float32", 4.0, True),
        ("at_least", "size.ratio_float32", 4.001, False),
        ("at_most", "kinds.attention.rel_mse", 0.1, True),
        ("at_most", "kinds.attention.rel_mse", 0.0999, False),
        ("at_least", "layer_cosines.mean", 0, None),  # nothing is quantized
        ("at_most", "kinds.other.rel_mse", 1, None),  # there are none
    ],
)
def test_a_threshold_holds_at_its_number_and_not_beyond(
    table: str, path: str, threshold: float, ok: bool | None
) -> None:
    report: dict[str, Any] = {"digests": {"ok": True}, "schemas": {}, "size": {"ratio_float32": 4.0}}
    report |= {"layer_cosines": None, "kinds": {"attention": {"rel_mse": 0.1}}}
    criterion, digests = judge_case(Case("a", "a.toml", **{table: {path: threshold}}), report)  # pyright: ignore[reportArgumentType]
    assert (criterion["name"], criterion["ok"], criterion["found"] is None) == (path, bool(ok), ok is None)
    assert digests == {"name": "digests", "found": True, "wanted": "true", "ok": True}


def test_damage_is_judged_without_thresholds() -> None:
    (criterion,) = judge_case(Case("a", "a.toml"), {"digests": {"ok": False}, "schemas": {}})
    assert not criterion["ok"]
