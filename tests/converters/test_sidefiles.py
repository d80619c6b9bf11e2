"""What goes with a model beside its weights, and what stays: by kind, size, number, and where links lead."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from helpers import listing

import aq_jax as aq
from aq_jax.config import ConversionConfig, QuantizationConfig
from aq_jax.conversion import model_files, sidefiles
from aq_jax.converters import huggingface
from aq_jax.converters.convert import dequantize_file
from aq_jax.store.folders import Folder

CONFIG = QuantizationConfig("int8")
TAKEN = (
    "config.json", "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "spm.model",
    "normalizer.json", "qwen.tiktoken", "additional_chat_templates/tool_use.jinja", "modeling_own.py", "LICENSE",
    "README.md", "vocab.json", "assets/logo.svg", "a/b/c/d/deep.json", "2_Dense/config.json",
    "2_Dense/model.safetensors", "3_Dense/pytorch_model.bin", "modules.json",
)  # fmt: skip
LEFT = {
    "weights of another kind": (
        "tf_model.h5", "flax_model.msgpack", "pytorch_model.bin", "rust_model.ot", "m.gguf", "training_args.bin",
        "optimizer.pt", "2_Dense/pytorch_model.bin", "onnx/", "original/", "checkpoint-5/", "model.ckpt.index",
        "openvino_model.xml", "tables.parquet",
    ),
    "caches": (".git/", ".gitattributes", ".cache/", "__pycache__/"),
    "named like a table's manifest": ("manifest.json",),
    "nested too deep": ("a/b/c/d/e/",),
    "names that are not plain": ("a\x1bb.json",),
}  # fmt: skip
INSIDE = {
    "onnx/": "onnx/config.json", "original/": "original/params.json", "checkpoint-5/": "checkpoint-5/model.safetensors",
    ".git/": ".git/HEAD", ".cache/": ".cache/x.json", "__pycache__/": "__pycache__/x.pyc",
    "a/b/c/d/e/": "a/b/c/d/e/deeper.json",
}  # fmt: skip
MODULES = [
    {"path": "", "type": "sentence_transformers.models.Transformer"},
    {"path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    {"path": "3_Dense/", "type": "sentence_transformers.models.Dense"},
]


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{{}} {name}")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "hf"
    folder.mkdir()
    safetensors.numpy.save_file({"w": np.ones((4, 8), np.float32)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("where", ["path", "url"])
def test_all_goes_that_is_no_weight_no_cache_and_not_strange(
    model: Path, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(model, *TAKEN, *(INSIDE.get(name, name) for names in LEFT.values() for name in names))
    (model / "modules.json").write_text(json.dumps(MODULES))
    folder = Folder(model)
    if where == "url":  # as pyarrow sees a filesystem elsewhere
        monkeypatch.setattr(folder, "local", None)
    found = sidefiles.side_files(folder)
    assert sorted(found.names) == sorted(TAKEN)
    assert found.pickles == ["3_Dense/pytorch_model.bin"]
    assert any(
        "no model is loaded with them, because they are pickles: 3_Dense/pytorch_model.bin" in note
        for note in found.notes
    )
    assert {why: sorted(names) for why, names in found.left_behind.items()} == {
        w: sorted(names) for w, names in LEFT.items()
    }
    # Of a list of modules that nobody can load, none is believed.
    (model / "modules.json").write_text(json.dumps([*MODULES, {"path": "../outside", "type": "x.Dense"}]))
    assert "2_Dense/" in sidefiles.side_files(folder).left_behind["weights of another kind"]


def test_what_was_left_behind_is_said(model: Path, tmp_path: Path, run: Any) -> None:
    fill(model, "config.json", "tf_model.h5", ".gitattributes")
    (tmp_path / "one.toml").write_text(f'source = "{model}"\noutput = "{tmp_path}/out/m.parquet"\n')
    (tmp_path / "shards.toml").write_text(f'source = "{model}"\noutput = "{tmp_path}/shards"\n')
    said = "note: left behind, weights of another kind: tf_model.h5\n"
    for name in ("one", "shards"):
        status, out, _ = run("convert", tmp_path / f"{name}.toml")
        assert status == 0
        assert said in out
    huggingface.write_folder(tmp_path / "out" / "m.parquet", tmp_path / "hf2", config_from=model)
    done = huggingface.write_folder(tmp_path / "out" / "m.parquet", tmp_path / "hf3", config_from=model)
    assert "left behind, weights of another kind: tf_model.h5" in done.notes
    (tmp_path / "out" / "config.json").unlink()
    status, out, _ = run("dequantize", tmp_path / "out" / "m.parquet", tmp_path / "hf4")
    assert (status, "note: left behind, no longer beside the table: config.json\n" in out) == (0, True)


def test_sizes_and_numbers_have_a_limit(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(model, "config.json", "large.json", "z/deep.json")
    with (model / "large.json").open("r+") as file:
        file.truncate(model_files.MAX_FILE + 1)  # which takes no room on the disk
    found = sidefiles.side_files(Folder(model))
    assert (found.names, found.left_behind) == (["config.json", "z/deep.json"], {"more than 128 MB": ["large.json"]})
    monkeypatch.setattr(sidefiles, "MAX_FILES", 1)
    found = sidefiles.side_files(Folder(model))
    assert (found.names, found.left_behind["beyond 1 files or 1,024 MB"]) == (["config.json"], ["z/deep.json"])
    monkeypatch.setattr(sidefiles, "MAX_FILES", 10)
    monkeypatch.setattr(sidefiles, "MAX_BYTES", 20)
    assert sidefiles.side_files(Folder(model)).names == ["config.json"]
    monkeypatch.setattr(sidefiles, "_MAX_ENTRIES", 4)
    assert sidefiles.side_files(Folder(model)).left_behind["beyond 4 names"] == ["z/"]


def test_what_cannot_be_read_does_not_stop_a_conversion_at_its_end(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(model, "config.json", "shut.json")
    os.mkfifo(model / "pipe")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("shut.json") and access(path, mode))
    done = huggingface.to_table(model, tmp_path / "out" / "m.parquet")
    assert done.notes == ["left behind, cannot be read: pipe, shut.json"]


# ------------------------------------------------------------------------------------------------ links


def test_no_link_leads_out_of_the_folder(model: Path, tmp_path: Path) -> None:
    fill(tmp_path, "secret.json", "elsewhere/x.json")
    fill(model, "config.json", "real/x.json")
    for name, target in (
        ("out.json", tmp_path / "secret.json"), ("up.json", "../secret.json"), ("hop.json", "out.json"),
        ("folder", tmp_path / "elsewhere"), ("inner", "real"), ("nowhere.json", "missing"), ("self.json", "self.json"),
        ("device.json", "/dev/zero"),
    ):  # fmt: skip
        (model / name).symlink_to(target)
    (model / "within.json").symlink_to("real/x.json")
    found = sidefiles.side_files(Folder(model))
    assert sorted(found.names) == ["config.json", "real/x.json", "within.json"]
    assert found.left_behind == {
        "links out of the folder": sorted(
            ["out.json", "up.json", "hop.json", "folder", "inner", "nowhere.json", "self.json", "device.json"]
        )
    }
    huggingface.to_table(model, tmp_path / "out" / "m.parquet")
    assert listing(tmp_path / "out") == ["config.json", "m.parquet", "real", "real/x.json", "within.json"]


def hub(root: Path) -> Path:
    """A model in the hub's cache: a snapshot of links to blobs."""
    blobs, snapshot = root / "models--a--b" / "blobs", root / "models--a--b" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    safetensors.numpy.save_file({"w": np.ones((4, 8), np.float32)}, blobs / "1")
    (blobs / "2").write_text("{}")
    (snapshot / "1_Pooling").mkdir()
    (snapshot / "model.safetensors").symlink_to("../../blobs/1")
    (snapshot / "config.json").symlink_to("../../blobs/2")
    (snapshot / "1_Pooling" / "config.json").symlink_to("../../../blobs/2")
    return snapshot


def test_the_hubs_cache_is_read_through_its_own_links(tmp_path: Path) -> None:
    snapshot = hub(tmp_path)
    fill(tmp_path, "secret.json", "models--c--d/blobs/1")
    (snapshot / "out.json").symlink_to(tmp_path / "secret.json")
    (snapshot / "other.json").symlink_to("../../../models--c--d/blobs/1")
    done = huggingface.to_table(snapshot, tmp_path / "out" / "m.parquet")
    assert listing(tmp_path / "out") == ["1_Pooling", "1_Pooling/config.json", "config.json", "m.parquet"]
    assert not (tmp_path / "out" / "config.json").is_symlink()
    assert done.notes == ["left behind, links out of the folder: other.json, out.json"]
    # By a link to the snapshot, and where the blobs are themselves a link to elsewhere.
    (tmp_path / "short").symlink_to(snapshot)
    assert sidefiles.side_files(Folder(tmp_path / "short")).names == ["config.json", "1_Pooling/config.json"]
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    assert sidefiles.side_files(Folder(snapshot)).names == []


# ------------------------------------------------------------------------------------------------ tables' folders


def test_of_a_table_s_folder_only_its_own_files_go(model: Path, tmp_path: Path) -> None:
    fill(model, "config.json", "code.py", "a/b.json")
    build = tmp_path / "build"
    huggingface.to_table(model, build / "int8.parquet", CONFIG)
    huggingface.to_table(model, build / "plain.arrow")
    aq.quantize_file(build / "plain.arrow", build / "int4.parquet", "int4")
    fill(build, "report.json", "report.html", "notes.py", "int8.parquet.training/x.json", "other/config.json")
    for table in ("int8.parquet", "plain.arrow", "int4.parquet"):
        done = dequantize_file(build / table, build / "hf" / table.partition(".")[0])
        assert listing(Path(done.path).parent) == ["a", "a/b.json", "code.py", "config.json", "model.safetensors"]
        assert done.notes == []
    # A table that does not say what came with it: what is called as such files are; the rest is named.
    aq.save(build / "mine.parquet", {"w": np.ones(2)})
    done = dequantize_file(build / "mine.parquet", tmp_path / "mine")
    assert listing(tmp_path / "mine") == ["config.json", "model.safetensors"]
    (note,) = done.notes
    assert "not recognized as a model's file: code.py, notes.py, report.html, report.json" in note


def test_a_table_s_record_is_not_trusted(tmp_path: Path) -> None:
    fill(tmp_path, "secret.json", "t/.hidden", "t/fine.py", "t/x.parquet")
    (tmp_path / "t" / "link.json").symlink_to("../secret.json")
    names = ["../secret.json", "/etc/passwd", ".hidden", "fine.py", "x.parquet", "link.json", 1, None]
    aq.save(tmp_path / "t" / "m.parquet", {"w": np.ones(2)}, config={"side_files": names})
    done = dequantize_file(tmp_path / "t" / "m.parquet", tmp_path / "out")
    assert listing(tmp_path / "out") == ["fine.py", "model.safetensors"]
    for record in ("x", {"a": 1}, 7):
        aq.save(tmp_path / "t" / "m.parquet", {"w": np.ones(2)}, config={"side_files": record})
        dequantize_file(tmp_path / "t" / "m.parquet", tmp_path / "out")
    assert "../secret.json" in done.notes[0]


def test_an_output_inside_the_source_is_not_copied_into_itself(model: Path) -> None:
    fill(model, "config.json")
    for output in ("out", "out2"):
        for _ in range(2):
            huggingface.to_table(model, model / output / "m.parquet")
            assert listing(model / output) == ["config.json", "m.parquet"]


def test_documents_of_others_stay_and_configs_of_others_refuse(model: Path, tmp_path: Path) -> None:
    fill(model, "README.md", "LICENSE", "config.json")
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("mine")
    done = huggingface.to_table(model, out / "m.parquet")
    assert (out / "README.md").read_text() == "mine"
    assert (out / "LICENSE").exists()
    assert done.notes == ["left behind, another already exists: README.md"]
    aq.convert(ConversionConfig(str(model), str(tmp_path / "shards")))
    assert (tmp_path / "shards" / "README.md").read_text() == (model / "README.md").read_text()
    fill(model, "assets/x.json")
    (out / "assets").write_text("a file")
    with pytest.raises(aq.FormatError, match=r"assets: is a file, and assets/x\.json needs a folder"):
        huggingface.to_table(model, out / "m.parquet")
    (out / "assets").unlink()
    (out / "config.json").write_text("another")
    with pytest.raises(aq.FormatError, match=r"config\.json: already exists and differs from"):
        huggingface.to_table(model, out / "m.parquet")
