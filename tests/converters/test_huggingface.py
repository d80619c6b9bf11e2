"""Hugging Face folders to tables and back to folders that transformers loads."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from helpers import listing

import aq_jax as aq
from aq_jax.config import QuantizationConfig
from aq_jax.converters import huggingface

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

CONFIG = QuantizationConfig("int8")
SIDE_FILES = {
    "config.json": '{"a": 1}',
    "tokenizer.json": "{}",
    "vocab.txt": "a\nb",
    "tokenizer.model": "m",
    "chat_template.jinja": "{{ x }}",
    "1_Pooling/config.json": "{}",
    "README.md": "read",
    "code.py": "raise RuntimeError('imported')",
}
LEFT_BEHIND = {
    "model.safetensors.index.json.bak.safetensors": "",
    "old.safetensors.index.json": "{}",
    "pytorch_model.bin": "",
    "onnx/config.json": "{}",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    out = tmp_path / "hf"
    rng = np.random.default_rng(0)
    tensors = {
        "a.weight": rng.normal(size=(8, 16)).astype(np.float32),
        "b.weight": rng.normal(size=(8, 16)).astype(np.float16),
        "b.bias": np.ones(8, np.float16),
        "ids": np.arange(4),
    }
    for name, text in (SIDE_FILES | LEFT_BEHIND).items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)
    safetensors.numpy.save_file(tensors, out / "model.safetensors", {"format": "pt", "tied.weight": "a.weight"})
    return out


def test_weights_and_side_files_go_to_a_table_and_back(folder: Path, tmp_path: Path) -> None:
    out, back = tmp_path / "out", tmp_path / "back"
    done = huggingface.to_table(folder, out / "m.parquet", CONFIG)
    assert set(done.quantized) == {"a.weight", "b.weight"}
    assert listing(out) == sorted(["m.parquet", "1_Pooling", *SIDE_FILES])
    assert all((out / name).read_text() == text for name, text in SIDE_FILES.items())

    assert huggingface.from_table(out / "m.parquet", back) == back / "model.safetensors"
    assert listing(back) == sorted(["model.safetensors", "1_Pooling", *SIDE_FILES])
    found = safetensors_torch.load_file(back / "model.safetensors")
    wanted = aq.load(out / "m.parquet", "torch")
    assert set(found) == {"a.weight", "b.weight", "b.bias", "ids", "tied.weight"}
    assert torch.equal(found["tied.weight"], found["a.weight"])
    for name, tensor in found.items():
        original = {"b.weight": torch.float16, "b.bias": torch.float16, "ids": torch.int64}.get(name, torch.float32)
        assert tensor.dtype == original
        assert torch.equal(tensor, wanted[name].to(original)), name
    with safetensors.safe_open(back / "model.safetensors", "numpy") as file:
        # transformers refuses a file that does not say its format
        assert file.metadata() == {"format": "pt", "writer": "aq_jax"}


def test_weights_that_aq_jax_did_not_write_are_never_replaced(folder: Path, tmp_path: Path) -> None:
    table, originals = folder / "int8.parquet", (folder / "model.safetensors").read_bytes()
    huggingface.to_table(folder, table, CONFIG)
    with pytest.raises(
        aq.FormatError, match=r"model\.safetensors: already exists.* write to another folder, or remove"
    ):
        huggingface.from_table(table, folder)
    assert (folder / "model.safetensors").read_bytes() == originals
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(aq.FormatError, match=r"index\.json: already exists"):
        huggingface.from_table(table, folder)
    (folder / "model.safetensors.index.json").unlink()
    assert huggingface.from_table(table, folder) == huggingface.from_table(table, folder)  # its own is replaced


def test_plain_tables_are_bit_exact_both_ways(folder: Path, tmp_path: Path) -> None:
    huggingface.to_table(folder, tmp_path / "v1.arrow")
    huggingface.from_table(tmp_path / "v1.arrow", tmp_path / "back", config_from=folder)
    before = safetensors.numpy.load_file(folder / "model.safetensors")
    after = safetensors.numpy.load_file(tmp_path / "back" / "model.safetensors")
    for name, array in before.items():
        assert (after[name].dtype, after[name].tobytes()) == (array.dtype, array.tobytes())
    assert (tmp_path / "back" / "config.json").exists()


def test_every_dtype_goes_into_safetensors_or_is_refused_by_name(tmp_path: Path) -> None:
    tensors = {
        "bool": torch.tensor([True, False, True]),  # three bytes: what follows is not aligned
        "bfloat16": torch.ones(3, dtype=torch.bfloat16),
        "float8": torch.ones(3).to(torch.float8_e5m2),
        "float32": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
    }
    aq.save(tmp_path / "m.parquet", tensors)
    huggingface.from_table(tmp_path / "m.parquet", tmp_path / "out")
    found = safetensors_torch.load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name].float(), tensor.float())
    for bad, message in (
        ({"w": np.ones(2, np.complex128)}, "w: safetensors has no dtype complex128"),
        ({"__metadata__": np.ones(2)}, "__metadata__: is the name of safetensors' own metadata"),
    ):
        aq.save(tmp_path / "bad.parquet", bad)
        with pytest.raises(aq.FormatError, match=message):
            huggingface.from_table(tmp_path / "bad.parquet", tmp_path / "bad")
        assert listing(tmp_path / "bad") == []


def test_sharded_weights_are_one_table(folder: Path, tmp_path: Path) -> None:
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    places = {}
    for i, (name, array) in enumerate(tensors.items()):
        places[name] = f"model-{i}.safetensors"
        safetensors.numpy.save_file({name: array}, folder / places[name])
    huggingface.to_table(folder, tmp_path / "single" / "m.parquet", CONFIG)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    huggingface.to_table(folder, tmp_path / "sharded" / "m.parquet", CONFIG)
    a, b = (aq.load(tmp_path / name / "m.parquet", "numpy") for name in ("single", "sharded"))
    assert {n: x.tobytes() for n, x in b.items()} == {n: x.tobytes() for n, x in a.items() if n != "tied.weight"}
    assert "model.safetensors.index.json" not in listing(tmp_path / "sharded")  # it would name files that are not there


def test_nothing_is_copied_when_the_table_is_not_written(folder: Path, tmp_path: Path) -> None:
    bad = {"w": np.full((2, 2), np.nan, np.float32)}
    safetensors.numpy.save_file(bad, folder / "model.safetensors")
    with pytest.raises(aq.AqError, match="w: 4 of 4 values are not finite"):
        huggingface.to_table(folder, tmp_path / "out" / "m.parquet", CONFIG)
    assert listing(tmp_path / "out") == []


def test_another_models_side_files_are_not_replaced(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    huggingface.to_table(folder, out / "m.parquet", CONFIG)
    huggingface.to_table(folder, out / "n.parquet", CONFIG)  # equal ones are its own
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"a": 2}')
    for write in (
        lambda: huggingface.to_table(folder, tmp_path / "other" / "m.parquet", CONFIG),
        lambda: huggingface.from_table(out / "m.parquet", tmp_path / "other"),
    ):
        with pytest.raises(aq.FormatError, match=r"other/config\.json: already exists and differs from"):
            write()
        assert listing(tmp_path / "other") == ["config.json"]
    assert (tmp_path / "other" / "config.json").read_text() == '{"a": 2}'


def test_a_table_may_lie_in_the_folder_of_its_weights(folder: Path) -> None:
    before = listing(folder)
    huggingface.to_table(folder, folder / "m.parquet", CONFIG)
    assert listing(folder) == sorted([*before, "m.parquet"])
    assert (folder / "config.json").read_text() == SIDE_FILES["config.json"]


def test_targets_that_cannot_be_are_named(folder: Path, tmp_path: Path) -> None:
    huggingface.to_table(folder, tmp_path / "m.parquet", CONFIG)
    (tmp_path / "file").write_text("")
    with pytest.raises(aq.FormatError, match="file: wanted a folder"):
        huggingface.from_table(tmp_path / "m.parquet", tmp_path / "file")
    with pytest.raises(FileNotFoundError):
        huggingface.from_table(tmp_path / "missing.parquet", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_folder_inside_a_package_is_found_without_importing_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "shipped_weights"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    folder.rename(package / "model")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert huggingface.resolve_source("package:shipped_weights/model") == package / "model"
    done = huggingface.to_table("package:shipped_weights/model", tmp_path / "m.parquet")
    assert "shipped_weights" not in sys.modules
    assert done.source_bytes > 0
    assert huggingface.resolve_source("some/folder") == Path("some/folder")


@pytest.mark.parametrize("name", ["no_such_package", "sys", "a.b", "", "../x", "json.decoder"])
def test_a_package_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(aq.ConfigError, match=r"no package '.+' is installed" if name else "names no package; wanted"):
        huggingface.resolve_source(f"package:{name}/model")
