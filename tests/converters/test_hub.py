"""Models of Hugging Face's hub: a folder of its cache, with its links, and a name, without a network."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from huggingface_hub import constants

import aq_jax as aq
from aq_jax.config import ConversionConfig
from aq_jax.converters import open_source

FIRST, SECOND = "1" * 40, "2" * 40


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model in a cache as the hub's library lays it out: blobs, two snapshots of links, a branch."""
    folder = tmp_path / "hub" / "models--org--name"
    (folder / "blobs").mkdir(parents=True)
    for number, revision in enumerate((FIRST, SECOND), 1):
        weights = safetensors.numpy.save({"w": np.full((2, 8), number, np.float32)})
        (folder / "snapshots" / revision).mkdir(parents=True)
        for name, data in {"model.safetensors": weights, "config.json": json.dumps({"n": number}).encode()}.items():
            (folder / "blobs" / f"{name[0]}{number}").write_bytes(data)
            (folder / "snapshots" / revision / name).symlink_to(f"../../blobs/{name[0]}{number}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(SECOND)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


def number(source: object, tmp_path: Path) -> float:
    done = aq.convert(ConversionConfig(str(source), str(tmp_path / "out" / "m.parquet")))
    return float(aq.load(done.path, "numpy")["w"][0, 0])


def test_a_folder_of_the_cache_is_the_snapshot_of_main(model: Path, tmp_path: Path) -> None:
    assert number(model, tmp_path) == 2
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"n": 2}
    assert not (tmp_path / "out" / "config.json").is_symlink()
    (model / "refs" / "main").write_text(FIRST)
    with open_source(model) as source:
        assert float(source.read("w")[0, 0]) == 1
    (model / "refs" / "main").unlink()
    with pytest.raises(aq.FormatError, match=r"models--org--name: holds the snapshots 111.*, 222.*; name one"):
        number(model, tmp_path)


@pytest.mark.parametrize(
    ("source", "wanted"), [("hf:org/name", 2), (f"hf:org/name@{FIRST}", 1), ("hf:org/name@main", 2)]
)
def test_a_name_is_looked_up_in_the_cache(model: Path, source: str, wanted: int, tmp_path: Path) -> None:
    assert number(source, tmp_path) == wanted


@pytest.mark.parametrize(
    ("source", "error", "text"),
    [
        ("hf:org/other", FileNotFoundError, "hf:org/other: is not in the hub's cache, and could not be fetched"),
        ("hf:org/name@v9", FileNotFoundError, "hf:org/name@v9: is not in the hub's cache"),
        ("hf:name", aq.ConfigError, "wanted hf:ORG/NAME"),
        ("hf:../..", aq.ConfigError, "'hf:../..'"),
        ("hf:org/name@../x", aq.ConfigError, "wanted hf:ORG/NAME"),
    ],
)
def test_what_is_not_there_is_told_without_a_network(
    model: Path, source: str, error: type[Exception], text: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=text):
        number(source, tmp_path)
    assert not (tmp_path / "out").exists()
