"""An encoder's pooling goes into the files that sentence-transformers has for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import aq_jax as aq
from aq_jax.converters.gguf.model_config import Fields
from aq_jax.converters.gguf.pooling import pooling_files
from aq_jax.nn.pooling import Pooling
from aq_jax.nn.sentences import read_sentences


def fields(kind: Any, architecture: str = "bert") -> Fields:
    return Fields("m.gguf", {f"{architecture}.pooling_type": kind}, architecture)


@pytest.mark.parametrize(("kind", "mode"), [(1, "mean"), (2, "cls"), (3, "lasttoken")])
def test_a_pooling_is_read_as_the_file_says_it(kind: int, mode: Any, tmp_path: Path) -> None:
    for name, content in pooling_files(fields(kind), 8).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert read_sentences(tmp_path, 512, 8).stages == (Pooling((mode,)),)


def test_no_pooling_writes_nothing_and_decoders_are_left_alone() -> None:
    assert not pooling_files(fields(0), 8)
    assert not pooling_files(Fields("m.gguf", {}, "bert"), 8)
    decoder = fields(3, "qwen3")
    assert not pooling_files(decoder, 8)
    assert decoder.left() == ["qwen3.pooling_type"]  # and so it is noted


@pytest.mark.parametrize("kind", [4, True, -1, "cls", np.array([1, 2])])
def test_another_pooling_is_refused(kind: Any) -> None:
    with pytest.raises(
        aq.FormatError, match=r"m\.gguf: bert\.pooling_type is .*; wanted (1 \(mean\), 2 \(cls\)|a whole)"
    ):
        pooling_files(fields(kind), 8)
