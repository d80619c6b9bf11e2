"""Models of Hugging Face's hub: a folder of its cache, with its links, and a name, without a network."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf_file
import huggingface_hub
import numpy as np
import pytest
import safetensors.numpy
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects

import aq_jax as aq
from aq_jax.config import ConversionConfig
from aq_jax.converters import open_source
from aq_jax.converters.formats.locations import resolve_source
from aq_jax.converters.inspection import inspect

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
    return float(np.asarray(aq.load(done.path, "numpy")["w"])[0, 0])


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


# ------------------------------------------------------------------------------------------- what is fetched

PARTS = [f"q8/m-0000{number}-of-00002.gguf" for number in (1, 2)]
NORM = {"type": "sentence_transformers.models.Normalize", "path": "3_Normalize"}
DENSE = {"type": "sentence_transformers.models.Dense", "path": "2_Dense"}
CONTENTS: dict[str, Any] = {"modules.json": json.dumps([DENSE, NORM]).encode()}
PICKLE, SHARDS = "pytorch_model.bin", ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The files of a hub with one model, which `snapshot_download` writes to a folder as the library chooses them."""
    files: dict[str, bytes] = {}
    snapshot = tmp_path / "snapshot"

    def download(
        repository: str, revision: str | None, allow_patterns: Any, ignore_patterns: Any = None, **_: Any
    ) -> str:
        assert (repository, revision) == ("org/name", "v1")
        for name in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / name).write_bytes(files[name])
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

    def info(*_: Any, **__: Any) -> Any:
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    return files


def fetched(hub: dict[str, bytes], tmp_path: Path) -> set[str]:
    return {name for name in hub if (tmp_path / "snapshot" / name).exists()}


@pytest.mark.parametrize(
    ("inside", "allowed", "weights", "wanted"),
    [
        ("", False, ["model.safetensors", "m.gguf", PICKLE, "onnx/model.safetensors"], ["model.safetensors"]),
        ("", True, ["model.safetensors", PICKLE, "rust_model.ot"], ["model.safetensors"]),
        ("", False, ["model.safetensors", "modules.json", f"2_Dense/{PICKLE}", f"3_Normalize/{PICKLE}"],
         ["model.safetensors", "modules.json", f"2_Dense/{PICKLE}"]),
        ("", True, [PICKLE, "tf_model.h5", "training_args.bin", f"onnx/{PICKLE}"], [PICKLE]),
        ("", True, SHARDS, SHARDS),
        ("", False, SHARDS, SHARDS[:1]),
        ("/a", True, [f"a/{PICKLE}", PICKLE, "a/m.gguf", "ab/model.safetensors"], [f"a/{PICKLE}"]),
        ("/m.gguf", False, ["m.gguf", "m.gguf.gguf", "model.safetensors"], ["m.gguf"]),
        (f"/{PARTS[1]}", False, [*PARTS, "q8/m-00001-of-00003.gguf", "q4/m.gguf"], PARTS),
        ("/a[1].gguf", False, ["a[1].gguf", "a1.gguf"], ["a[1].gguf"]),
    ],
)  # fmt: skip
def test_what_is_read_is_fetched_and_no_other_weights(
    hub: dict[str, bytes], inside: str, allowed: bool, weights: list[str], wanted: list[str], tmp_path: Path
) -> None:
    hub.update({name: CONTENTS.get(name, b"") for name in weights})
    assert resolve_source(f"hf:org/name{inside}@v1", allowed) == Path(tmp_path, "snapshot", inside.lstrip("/"))
    assert fetched(hub, tmp_path) == set(wanted)


def test_a_gguf_model_is_read_by_the_name_of_a_part(hub: dict[str, bytes], tmp_path: Path) -> None:
    split = {"split.count": 2, "split.tensors.count": 2}
    for number, name in enumerate(("token_embd.weight", "output_norm.weight")):
        fields = gguf_file.LLAMA | split | {"split.no": number}
        hub[PARTS[number]] = gguf_file.whole(fields, {name: gguf_file.floats((3, 8))})
    found = inspect(f"hf:org/name/{PARTS[1]}@v1")
    assert [layer.name for layer in found.layers] == ["model.embed_tokens.weight", "model.norm.weight"]


@pytest.mark.parametrize(
    ("inside", "files", "error", "text"),
    [
        ("", ["README.md", "b.gguf", *PARTS], aq.FormatError,
         f"hf:org/name@v1: holds b.gguf, {PARTS[0]}; name one, as hf:org/name/b.gguf@v1"),
        ("/q8", PARTS, aq.FormatError, f"holds {PARTS[0]}; name one, as hf:org/name/{PARTS[0]}@v1"),
        ("/a.gguf", ["b.gguf"], FileNotFoundError, "has no such file or folder; it holds b.gguf; name one"),
        ("/a.gguf", ["README.md"], FileNotFoundError, "has no such file or folder; it holds README.md"),
        ("", [PICKLE], aq.FormatError, f"holds {PICKLE}, a pickle, .* set allow_pickle = true"),
        ("", ["a/model.safetensors"], aq.FormatError, "holds weights in a; name one, as hf:org/name/a@v1"),
        ("", ["gptq_model-4bit.safetensors"], aq.FormatError, "holds gptq_model-4bit.safetensors, .*give it that name"),
        ("", ["README.md", "m.h5"], aq.FormatError, "the model holds no weights that are read; wanted one of these: "),
    ],
)  # fmt: skip
def test_a_model_without_weights_that_are_known_says_what_it_holds(
    hub: dict[str, bytes], inside: str, files: list[str], error: type[Exception], text: str
) -> None:
    hub.update(dict.fromkeys(files, b""))
    with pytest.raises(error, match=text):
        inspect(f"hf:org/name{inside}@v1")


def test_without_a_network_the_cache_says_what_it_holds(model: Path, tmp_path: Path) -> None:
    (model / "snapshots" / SECOND / "model.safetensors").unlink()
    with pytest.raises(aq.FormatError, match=r"hf:org/name: its part in the hub's cache, .* holds no weights"):
        inspect("hf:org/name")
    (model / "snapshots" / SECOND / "m.gguf").write_bytes(b"")
    with pytest.raises(aq.FormatError, match=r"hf:org/name: holds m\.gguf; name one, as hf:org/name/m\.gguf"):
        number("hf:org/name", tmp_path)


def test_a_folder_says_what_it_holds(tmp_path: Path) -> None:
    for name in ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "n.gguf", "other.safetensors"):
        (tmp_path / name).write_bytes(b"")
    wanted = r": holds m-00001-of-00002\.gguf, n\.gguf; name one, as .*; holds other\.safetensors, .* give it that name"
    for action in (inspect, lambda folder: number(folder, tmp_path)):
        with pytest.raises(aq.FormatError, match=wanted):
            action(tmp_path)
