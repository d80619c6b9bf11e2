"""The real files of `make gguf`: every tensor is gguf-py's, texts are transformers', and tables are no larger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import aq_jax as aq
from aq_jax.config import ConversionConfig
from aq_jax.converters.gguf.names import ARCHITECTURES

FOLDER = Path(__file__).parents[3] / "build" / "gguf"
FILES = ("smollm2", "gemma3")
PROMPT = "The capital of France is"
TEXTS = (
    PROMPT,
    "  two  spaces\nand 12345 lines é ü 你好 🎉",
    "def f(x):\n    return x**2\n\n\n",
    "a</s><|im_end|>b",
    "don't I'll we've",
)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=FILES)
def model(request: pytest.FixtureRequest) -> Path:
    path = FOLDER / f"{request.param}.gguf"
    if not path.exists():
        pytest.skip(f"{path} is not there: `make gguf` fetches it")
    return path


@pytest.fixture(scope="module")
def table(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp(model.stem) / "m.parquet"
    aq.convert(ConversionConfig(str(model), str(output)))
    return output


@pytest.fixture
def gguf() -> Any:
    return pytest.importorskip("gguf", reason="`make peers` fetches it")


def test_every_tensor_is_gguf_pys(model: Path, table: Path, gguf: Any) -> None:
    reader = gguf.GGUFReader(model)
    name = reader.fields["general.architecture"].contents()
    heads = {
        change: reader.fields[f"{name}.attention.{key}"].contents()
        for change, key in (("query", "head_count"), ("key", "head_count_kv"))
    }
    with aq.WeightLoader(table) as loader:
        assert len(loader.get_layer_names()) - len(loader.aliases) == len(reader.tensors)
        for tensor in reader.tensors:
            wanted = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            ours, change = ARCHITECTURES[name].find(tensor.name, model)
            if change in heads:
                wanted = wanted.reshape(heads[change], -1, 2, wanted.shape[-1]).swapaxes(1, 2).reshape(wanted.shape)
            elif change == "plus_one":
                wanted = wanted - np.float32(1)
            found = loader.get_layer(ours, framework="numpy")
            assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), ours
            assert found.tobytes() == wanted.tobytes(), ours


def test_a_table_is_no_larger(model: Path, table: Path) -> None:
    assert table.stat().st_size < 1.05 * model.stat().st_size


def test_texts_are_those_of_transformers(model: Path, table: Path, tmp_path: Path, gguf: Any) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    aq.dequantize_file(table, tmp_path / "floats")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "floats")
    theirs = transformers.AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name)
    assert [tokenizer(text)["input_ids"] for text in TEXTS] == [theirs(text)["input_ids"] for text in TEXTS]
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "floats", dtype=torch.float32)
    ids = tokenizer(PROMPT, return_tensors="pt")
    said = whole.generate(**ids, do_sample=False, max_new_tokens=12)[0][ids["input_ids"].shape[1] :]
    ours = aq.load_model(table).generate(PROMPT, max_tokens=12)
    assert ours == tokenizer.decode(said, skip_special_tokens=True)
