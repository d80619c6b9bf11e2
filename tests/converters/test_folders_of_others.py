"""Folders that sentence-transformers and transformers write: through a table and back, and they open them as before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import bert_oracle
import numpy as np
import pytest

import aq_jax as aq
from aq_jax.config import ConversionConfig
from aq_jax.converters import huggingface

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
TEXTS = ["a tin box", "the other one is longer than that"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert") / "bert"
    torch.manual_seed(0)
    config = transformers.BertConfig(**{k: v for k, v in bert_oracle.CONFIG.items() if k != "model_type"})
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bert_oracle.tokenizer(), unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        pad_token=bert_oracle.VOCAB[0], mask_token="[MASK]",
    )  # fmt: skip
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(folder)
    return folder


def test_templates_of_chats_go_with_the_tokenizer(bert: Path, tmp_path: Path) -> None:
    assert (bert / "additional_chat_templates" / "tool_use.jinja").exists()  # the library writes them so
    huggingface.to_table(bert, tmp_path / "t" / "m.parquet")
    back = huggingface.from_table(tmp_path / "t" / "m.parquet", tmp_path / "back").parent
    found = transformers.AutoTokenizer.from_pretrained(back)
    assert found.chat_template == {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    assert found(TEXTS)["input_ids"] == transformers.AutoTokenizer.from_pretrained(bert)(TEXTS)["input_ids"]


@pytest.fixture(scope="module")
def sentences(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A model whose embeddings pass through a Dense and a LayerNorm with weights of their own."""
    st = pytest.importorskip("sentence_transformers")
    models = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    folder = tmp_path_factory.mktemp("sentences") / "st"
    torch.manual_seed(1)
    first = models.Transformer(str(bert))
    width = bert_oracle.CONFIG["hidden_size"]
    dense, norm = models.Dense(width, 5), models.LayerNorm(5)
    torch.nn.init.normal_(norm.norm.weight)
    model = st.SentenceTransformer(modules=[first, models.Pooling(width), dense, norm], device="cpu")
    model.save_pretrained(str(folder))
    return folder, model.encode(TEXTS)


def opened(folder: Path) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu", local_files_only=True).encode(TEXTS)


@pytest.mark.parametrize("output", ["out/m.parquet", "out"])
def test_modules_keep_their_weights(sentences: tuple[Path, Any], tmp_path: Path, output: str) -> None:
    folder, wanted = sentences
    done = aq.convert(ConversionConfig(str(folder), str(tmp_path / output)))
    back = aq.dequantize_file(tmp_path / output, tmp_path / "back")
    assert done.notes == back.notes == []
    np.testing.assert_array_equal(opened(tmp_path / "back"), wanted)


def test_the_old_layout_has_its_weights_where_modules_json_says(sentences: tuple[Path, Any], tmp_path: Path) -> None:
    folder, wanted = sentences
    huggingface.to_table(folder, tmp_path / "m.parquet")
    old = Path(shutil.copytree(folder, tmp_path / "old"))
    modules = json.loads((old / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (old / "modules.json").write_text(json.dumps(modules))
    (old / "0_Transformer").mkdir()
    for file in [f for f in old.iterdir() if f.is_file() and not f.name.startswith(("modules", "config_", "README"))]:
        file.rename(old / "0_Transformer" / file.name)
    np.testing.assert_array_equal(opened(old), wanted)
    done = huggingface.write_folder(tmp_path / "m.parquet", tmp_path / "back", config_from=old)
    assert (Path(done.path).parent.name, done.notes) == ("0_Transformer", [])
    assert not (tmp_path / "back" / "model.safetensors").exists()
    np.testing.assert_array_equal(opened(tmp_path / "back"), wanted)
