"""The format of Hugging Face's folders of weights: model.safetensors, its shards, or pickles; quantized or not."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from aq_jax.converters.formats.locations import source_folder

if TYPE_CHECKING:
    from aq_jax.conversion.source import Source


class HuggingFace:
    """A Hugging Face folder. Its side files are all but weights: config, tokenizer, modules, code, licences."""

    about = (
        "a Hugging Face folder, which holds one of model.safetensors, model.safetensors.index.json, pytorch_model.bin, "
        "pytorch_model.bin.index.json"
    )

    def recognizes(self, location: str) -> bool:
        from aq_jax.converters.checkpoint import weights_folder

        folder = source_folder(location)
        return folder.exists() and weights_folder(folder) is not None

    def open(self, location: str, *, packed: bool, allow_pickle: bool) -> AbstractContextManager[Source]:
        from aq_jax.converters.schemes import open_folder

        return open_folder(source_folder(location), packed=packed, allow_pickle=allow_pickle)
