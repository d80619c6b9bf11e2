"""Folders of PyTorch weights as they are found, including broken and hostile ones."""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import struct
import subprocess
import tarfile
import warnings
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from aq_jax.converters.checkpoint import open_checkpoint
from aq_jax.errors import FormatError
from aq_jax.io.tensorfile import SAFETENSORS_DTYPES

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")
unsupported_tensor_ops = pytest.importorskip("torch.jit.unsupported_tensor_ops")
pytest.importorskip("torch.utils.collect_env")


def write_raw(path: Path, header: dict[str, Any] | bytes, data: bytes = b"") -> None:
    """A safetensors file without the library, which would not write a wrong one."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def read(folder: Path, **options: Any) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    with open_checkpoint(folder, **options) as found:
        arrays = {name: found.read(name) for name in found.shapes}
        assert found.shapes == {name: (a.shape, a.dtype) for name, a in arrays.items()}
        return arrays, dict(found.aliases)


def shards(folder: Path, weight_map: dict[str, Any], **files: dict[str, np.ndarray]) -> None:
    for name, tensors in files.items():
        safetensors.numpy.save_file(tensors, folder / f"{name}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# ------------------------------------------------------------------------------------------------ what is there


def test_every_dtype_is_read_bit_for_bit(tmp_path: Path) -> None:
    header, data, wanted = {}, b"", {}
    for safe, name in SAFETENSORS_DTYPES.items():
        wanted[name] = (np.arange(6) % 2).astype(np.dtype(getattr(ml_dtypes, name, name))).tobytes()
        header[name] = entry(safe, [2, 3], len(data), len(data) + len(wanted[name]))
        data += wanted[name]
    write_raw(tmp_path / "model.safetensors", header, data)
    arrays, _ = read(tmp_path)
    assert list(arrays) == list(SAFETENSORS_DTYPES.values())
    for name, array in arrays.items():
        assert array.dtype.name == name
        assert array.shape == (2, 3)
        assert array.tobytes() == wanted[name], name


def test_numbers_that_no_smaller_dtype_holds_are_exact(tmp_path: Path) -> None:
    tensors = {
        "bfloat16": torch.tensor([1.0, -3e38, 2.0**-130], dtype=torch.bfloat16),
        "float8": torch.tensor([448.0, -0.5]).to(torch.float8_e4m3fn),
        "int64": torch.tensor([2**62 + 1, -(2**63)]),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
    }
    safetensors_torch.save_file(tensors, tmp_path / "model.safetensors")
    arrays, _ = read(tmp_path)
    for name, tensor in tensors.items():
        assert arrays[name].shape == tuple(tensor.shape)
        assert arrays[name].tobytes() == tensor.reshape(-1).view(torch.uint8).numpy().tobytes(), name


def test_arrays_are_views_of_the_file_that_cannot_be_written_to(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"w": np.ones(4, np.float32)}, tmp_path / "model.safetensors")
    arrays, _ = read(tmp_path)
    assert not arrays["w"].flags.writeable
    assert arrays["w"].tolist() == [1, 1, 1, 1]  # and they outlive the checkpoint


def test_shards_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    a, b = np.ones(2, np.float32), np.arange(3)
    shards(tmp_path, {"b": "two.safetensors", "a": "one.safetensors"}, one={"a": a}, two={"b": b})
    arrays, _ = read(tmp_path)
    assert list(arrays) == ["a", "b"]
    assert arrays["b"].tolist() == [0, 1, 2]
    # A single file goes before shards, as it does in transformers.
    safetensors.numpy.save_file({"whole": a}, tmp_path / "model.safetensors")
    arrays, _ = read(tmp_path)
    assert list(arrays) == ["whole"]


def test_names_that_safetensors_has_tied_come_back(tmp_path: Path) -> None:
    embed = torch.nn.Embedding(4, 3)
    head = torch.nn.Linear(3, 4, bias=False)
    head.weight = embed.weight
    model = torch.nn.ModuleDict({"embed": embed, "head": head})
    safetensors_torch.save_model(model, str(tmp_path / "model.safetensors"), {"format": "pt"})
    arrays, aliases = read(tmp_path)
    assert (list(arrays), aliases) == (["embed.weight"], {"head.weight": "embed.weight"})
    # Notes of another kind are no ties.
    notes = {"format": "pt", "author": "nobody", "embed.weight": "other"}
    safetensors.numpy.save_file(
        {"embed.weight": np.ones(2), "other": np.ones(2)}, tmp_path / "model.safetensors", notes
    )
    assert read(tmp_path)[1] == {}
    own = {"format": "pt", "writer": "aq_jax"}
    safetensors.numpy.save_file(dict.fromkeys(own.values(), np.ones(2)), tmp_path / "model.safetensors", own)
    assert read(tmp_path)[1] == {}


def test_a_tied_name_in_the_index_is_not_missing(tmp_path: Path) -> None:
    shards(tmp_path, {"a": "one.safetensors", "b": "one.safetensors"})
    safetensors.numpy.save_file({"a": np.ones(2)}, tmp_path / "one.safetensors", {"b": "a"})
    assert read(tmp_path)[1] == {"b": "a"}


# ------------------------------------------------------------------------------------------------ what is wrong

ONE = {"a": np.ones(2, np.float32)}
INDEX = "model.safetensors.index.json"
WRONG_INDEX = {
    "missing shard": (
        {"a": "one.safetensors", "b": "two.safetensors"},
        "names 'two.safetensors', which does not exist",
    ),
    "a name that no shard has": (
        {"a": "one.safetensors", "b": "one.safetensors"},
        r"the shards lack \['b'\], and hold \[\]",
    ),
    "a tensor that is not named": ({"x": "one.safetensors"}, r"the shards lack \['x'\], and hold \['a'\]"),
    "one tensor too many": ({"b": "sub.safetensors"}, r"the shards lack \[\], and hold \['a'\] that it does not name"),
    "parent folder": ({"a": "../one.safetensors"}, r"names the file '\.\./one\.safetensors'; wanted a plain file name"),
    "folder": ({"a": "sub/one.safetensors"}, "wanted a plain file name in the same folder"),
    "absolute": ({"a": "/etc/passwd"}, "wanted a plain file name in the same folder"),
    "dots": ({"a": ".."}, "wanted a plain file name in the same folder"),
    "hidden": ({"a": ".one.safetensors"}, "wanted a plain file name in the same folder"),
    "empty": ({"a": ""}, "which does not exist"),
    "number": ({"a": 1}, "wanted a plain file name in the same folder"),
    "null": ({"a": None}, "wanted a plain file name in the same folder"),
    "list": ({"a": ["one.safetensors"]}, "has no weight_map of names and files"),
    "mixed": ({"a": "one.safetensors", "b": 1}, "has no weight_map of names and files"),
}


@pytest.mark.parametrize("what", WRONG_INDEX)
def test_an_index_that_lies_is_refused(tmp_path: Path, what: str) -> None:
    weight_map, message = WRONG_INDEX[what]
    safetensors.numpy.save_file(ONE, tmp_path / "one.safetensors")  # where a path that leads out would find it
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    shards(folder, weight_map, one=ONE, sub={**ONE, "b": np.ones(1)})
    safetensors.numpy.save_file(ONE, folder / "sub" / "one.safetensors")
    with pytest.raises(FormatError, match=message) as caught:
        read(folder)
    assert str(folder / INDEX) in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": 1}', '{"weight_map": ["a"]}', "\xff", "[" * 10**5]
)
def test_an_index_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_bytes(text.encode("latin1"))
    with pytest.raises(FormatError, match="has no weight_map of names and files"):
        read(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    shards(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"}, one=ONE, two={**ONE, "b": np.ones(1)})
    with pytest.raises(FormatError, match=r"two.safetensors: holds tensor 'a', which another file holds too"):
        read(tmp_path)


GOOD = {"a": entry("F32", [2], 0, 8)}
WRONG_FILES: dict[str, tuple[dict[str, Any] | bytes, bytes, str]] = {
    "truncated": (GOOD, b"1234", "not a safetensors file"),
    "too long": (GOOD, b"12345678?", "not a safetensors file"),
    "no JSON": (b"{", b"", "not a safetensors file"),
    "unknown dtype": ({"a": entry("F128", [1], 0, 16)}, bytes(16), "not a safetensors file"),
    "dtype that cannot be stored": ({"a": entry("F4", [2], 0, 1)}, bytes(1), "a has dtype F4; wanted one of F64"),
    "overlapping": ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, bytes(12), "not a safetensors file"),
    "hole": ({"a": entry("F32", [2], 4, 12)}, bytes(12), "not a safetensors file"),
    "shape and size": ({"a": entry("F32", [3], 0, 8)}, bytes(8), "not a safetensors file"),
    "overflowing": ({"a": entry("F32", [2**62, 8], 0, 8)}, bytes(8), "not a safetensors file"),
    "same name twice": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        bytes(1),
        "the header repeats a name",
    ),
}


@pytest.mark.parametrize("what", WRONG_FILES)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, what: str) -> None:
    header, data, message = WRONG_FILES[what]
    write_raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(FormatError, match=message) as caught:
        read(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x00" * 7, b"\xff" * 64, b"\x80\x02}q\x00."])
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(FormatError, match="not a safetensors file"):
        read(tmp_path)


def test_folders_without_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"holds none of model.safetensors, .* pytorch_model.bin"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read(tmp_path / "file")


# ------------------------------------------------------------------------------------------------ pickles


def pickled(folder: Path, state: object) -> Path:
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def test_a_pickle_is_refused_until_it_is_asked_for(tmp_path: Path) -> None:
    pickled(tmp_path, {"a": torch.ones(2)})
    with pytest.raises(FormatError, match=r"is a pickle, which can run code .* set allow_pickle = true"):
        read(tmp_path)
    assert read(tmp_path, allow_pickle=True)[0]["a"].tolist() == [1, 1]
    # What is safe goes first, also when a pickle is allowed.
    safetensors.numpy.save_file({"b": np.ones(1)}, tmp_path / "model.safetensors")
    assert list(read(tmp_path, allow_pickle=True)[0]) == ["b"]


def test_a_pickle_keeps_values_and_ties(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    state = {
        "embed": whole,
        "turned": whole.T,  # the same memory, other values: not tied
        "part": whole[1:],
        "head": whole,
        "bfloat16": torch.tensor([1.5, -3e38], dtype=torch.bfloat16),
        "ids": torch.tensor([2**40]),
        "scalar": torch.tensor(True),
        "empty": torch.zeros(0, 2),
        "also_empty": torch.zeros(0, 2),
        "parameter": torch.nn.Parameter(torch.ones(1)),
    }
    arrays, aliases = read(pickled(tmp_path, state), allow_pickle=True)
    assert aliases == {"head": "embed"}
    assert list(arrays) == [name for name in state if name != "head"]
    for name, array in arrays.items():
        wanted = state[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert array.tobytes() == wanted, name
        assert array.dtype.name == str(state[name].dtype).removeprefix("torch."), name


class Runs:
    """Calls something when it is unpickled."""

    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> Any:
        return self.call, self.args


def shell(marker: Path) -> Runs:
    return Runs(os.system, f"touch '{marker}'")


def code(marker: Path) -> str:
    return f"open({str(marker)!r}, 'w').close()"


# Ways from a pickle to code, as they are found in the wild: all that they do here is to write a file.
GADGETS: dict[str, Callable[[Path], Runs]] = {
    "os.system": shell,
    "subprocess": lambda marker: Runs(subprocess.getoutput, f"touch '{marker}'"),
    "eval": lambda marker: Runs(eval, code(marker)),
    "exec": lambda marker: Runs(exec, code(marker)),
    "a call of a call": lambda marker: Runs(functools.partial(eval, code(marker))),
    "a pickle in a pickle": lambda marker: Runs(pickle.loads, pickle.dumps(shell(marker))),
    "numpy runs a string": lambda marker: Runs(np.testing.runstring, code(marker), {}),
    "torch loads a storage": lambda marker: Runs(torch.storage._load_from_bytes, pickle.dumps(shell(marker))),
    "torch runs a string": lambda marker: Runs(unsupported_tensor_ops.execWrapper, code(marker), {}, {}),
    "torch runs a command": lambda marker: Runs(torch.utils.collect_env.run, ["touch", str(marker)]),
    # Which weights_only allows, and which calls what it is given.
    "torch rebuilds a type": lambda marker: Runs(
        torch._tensor._rebuild_from_type_v2, os.system, object, (f"touch '{marker}'",), None
    ),
}


def in_tar(path: Path, state: Runs) -> None:
    """The form of torch before 0.1.10, by which CVE-2025-32434 got around weights_only."""
    with tarfile.open(path, "w") as tar:
        for name in ("storages", "tensors", "pickle"):
            data = pickle.dumps(state, 2)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


CONTAINERS: dict[str, Callable[[Path, Runs], object]] = {
    "plain": lambda path, state: path.write_bytes(pickle.dumps({"a": state}, 2)),
    "zip": lambda path, state: torch.save({"good": torch.ones(2), "a": state}, path),
    "zip, instead of the weights": lambda path, state: torch.save(state, path),
    "zip, deep inside": lambda path, state: torch.save(OrderedDict(a=[({"b": (state,)},)]), path),
    "zip, as a name": lambda path, state: torch.save({state: torch.ones(2)}, path),
    "before 1.6": lambda path, state: torch.save({"a": state}, path, _use_new_zipfile_serialization=False),
    "tar": in_tar,
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("gadget", GADGETS)
def test_a_pickle_that_would_run_code_does_not(tmp_path: Path, gadget: str, container: str) -> None:
    marker, file = tmp_path / "marker", tmp_path / "pytorch_model.bin"
    CONTAINERS[container](file, GADGETS[gadget](marker))
    with suppress(Exception), warnings.catch_warnings(action="ignore"):
        torch.load(file, weights_only=False)
    assert marker.exists(), "the payload does not work, so that the test would show nothing"
    marker.unlink()
    for allowed in (False, True):
        with pytest.raises(FormatError, match="torch refuses it" if allowed else "is a pickle, which can run code"):
            read(tmp_path, allow_pickle=allowed)
        assert not marker.exists()


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("command", [(), ("--dry-run",)])
def test_convert_runs_nothing_either(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]], command: tuple[str, ...], allowed: bool
) -> None:
    marker = tmp_path / "marker"
    (tmp_path / "model").mkdir()
    torch.save({"good": torch.ones(2, 8), "a": shell(marker)}, tmp_path / "model" / "pytorch_model.bin")
    (tmp_path / "c.toml").write_text(f'source = "{tmp_path}/model"\noutput = "{tmp_path}/m.parquet"\n')
    before = sorted(os.listdir(tmp_path))
    flags = ("--set", f"allow_pickle={str(allowed).lower()}")
    status, out, err = run("convert", tmp_path / "c.toml", *flags, *command)
    assert (status, out) == (2, "")
    assert err.startswith(f"aq-jax: {tmp_path}/model/pytorch_model.bin: ")
    assert err.count("\n") == 1
    assert ("torch refuses it" if allowed else "set allow_pickle = true") in err
    assert sorted(os.listdir(tmp_path)) == before
    assert not marker.exists()


WRONG_PICKLES = {
    "a module": torch.nn.Linear(2, 2),
    "a list": [torch.ones(1)],
    "nested": {"state_dict": {"a": torch.ones(1)}},
    "numbered": {0: torch.ones(1)},
    "sparse": {"a": torch.eye(2).to_sparse()},
}


@pytest.mark.parametrize("what", WRONG_PICKLES)
def test_a_pickle_of_something_else_is_refused(tmp_path: Path, what: str) -> None:
    with pytest.raises(
        FormatError, match=r"pytorch_model.bin: (holds something other than named tensors|torch refuses)"
    ):
        read(pickled(tmp_path, WRONG_PICKLES[what]), allow_pickle=True)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not a pickle", b"\x80\x02."])
def test_a_pickle_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(FormatError, match=r"torch refuses it: ."):
        read(tmp_path, allow_pickle=True)


def test_an_error_of_torch_without_a_word_is_named_by_its_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError

    pickled(tmp_path, {"a": torch.ones(1)})
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(FormatError, match="torch refuses it: AssertionError"):
        read(tmp_path, allow_pickle=True)


OLD_AND_NEW = {
    "1.13.1": False,
    "2.5.1+cu121": False,
    "2.9.1": False,
    "2.10.0": True,
    "2.11.0a0+git1": True,
    "3.0": True,
}


@pytest.mark.parametrize(("version", "allowed"), OLD_AND_NEW.items())
def test_an_old_torch_is_not_trusted_with_a_pickle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, allowed: bool
) -> None:
    pickled(tmp_path, {"a": torch.ones(1)})
    monkeypatch.setattr(torch, "__version__", version)
    if allowed:
        assert list(read(tmp_path, allow_pickle=True)[0]) == ["a"]
    else:
        monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
        with pytest.raises(FormatError, match=r"CVE-2026-24747\); install torch >= 2.10"):
            read(tmp_path, allow_pickle=True)


def test_notes_that_cannot_be_ties_are_none(tmp_path: Path) -> None:
    ones = np.ones(2, np.float32)
    shards(tmp_path, {"a": "1.safetensors", "head": "2.safetensors"})
    # A name that another file stores, and one that two files would tie to two tensors.
    safetensors.numpy.save_file({"a": ones}, tmp_path / "1.safetensors", {"head": "a", "of": "a"})
    safetensors.numpy.save_file({"head": ones * 2}, tmp_path / "2.safetensors", {"of": "head"})
    arrays, aliases = read(tmp_path)
    assert {name: array.tolist() for name, array in arrays.items()} == {"a": [1, 1], "head": [2, 2]}
    assert aliases == {}
    # A name that the index lists is a tensor, which is missing then.
    shards(tmp_path, {"a": "1.safetensors", "head": "2.safetensors", "of": "2.safetensors"})
    with pytest.raises(FormatError, match=r"the shards lack \['of'\]"):
        read(tmp_path)


TIED = {"lm_head.weight": "one.safetensors", "model.embed_tokens.weight": "one.safetensors"}


@pytest.mark.parametrize(
    ("fields", "there"),
    [
        ({"tie_word_embeddings": True}, True),
        ({"model_type": "gemma"}, True),  # which ties them without saying so, as transformers takes it
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"tie_word_embeddings": False}, False),
        ({"text_config": {"tie_word_embeddings": False}}, False),
        (None, False),
    ],
)
def test_a_head_that_is_listed_and_tied_need_not_be_there(
    tmp_path: Path, fields: dict[str, Any] | None, there: bool
) -> None:
    shards(tmp_path, TIED, one={"model.embed_tokens.weight": np.ones((2, 2), np.float32)})
    if fields is not None:
        (tmp_path / "config.json").write_text(json.dumps(fields))
    if not there:
        with pytest.raises(FormatError, match=r"the shards lack \['lm_head.weight'\]"):
            read(tmp_path)
        return
    with open_checkpoint(tmp_path) as found:
        assert (list(found.shapes), found.aliases) == (["model.embed_tokens.weight"], {})
        (note,) = found.notes
    assert "lists lm_head.weight, which no file holds: tied to the embedding" in note
    # Without the embedding there is nothing that it could be tied to.
    shards(tmp_path, TIED | {"a": "one.safetensors"}, one={"a": np.ones(2)})
    with pytest.raises(FormatError, match="the shards lack"):
        read(tmp_path)


def test_pickles_in_shards_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    states = {"pytorch_model-00001-of-00002.bin": {"a": torch.ones(2)}, "pytorch_model-00002-of-00002.bin": {}}
    embed = torch.arange(4.0)
    states["pytorch_model-00002-of-00002.bin"] = {"b": embed, "tied": embed}
    for file, state in states.items():
        torch.save(state, tmp_path / file)
    places = {name: file for file, state in states.items() for name in state}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(FormatError, match=r"index\.json: is a pickle, which can run code"):
        read(tmp_path)
    arrays, aliases = read(tmp_path, allow_pickle=True)
    assert {name: array.tolist() for name, array in arrays.items()} == {"a": [1, 1], "b": [0, 1, 2, 3]}
    assert aliases == {"tied": "b"}
    marker = tmp_path / "ran"
    torch.save({"a": shell(marker)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(FormatError, match=r"00001-of-00002\.bin: torch refuses it"):
        read(tmp_path, allow_pickle=True)
    assert not marker.exists()
    index.write_text(json.dumps({"weight_map": places | {"a": "../elsewhere.bin"}}))
    with pytest.raises(FormatError, match="wanted a plain file name in the same folder"):
        read(tmp_path, allow_pickle=True)
