"""Convert llama2.c's model and tokenizer files to a table, and to a config and a tokenizer that transformers loads.

The files are of version 0, which carry no version number: github.com/karpathy/llama2.c, run.c and export.py.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from aq_jax.config import Compression, QuantizationConfig
from aq_jax.conversion import corridor
from aq_jax.conversion.sidefiles import GeneratedFiles, SideFiles
from aq_jax.conversion.source import GeneratingSource
from aq_jax.conversion.write import ConversionResult
from aq_jax.converters.llama2c_tokenizer import BOS, EOS, build_tokenizer, existing_file, read_pieces, tokenizer_config
from aq_jax.errors import FormatError
from aq_jax.progress import Progress
from aq_jax.store.folders import Folder

EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
FLOAT = np.dtype("<f4")
_HEADER = struct.Struct("<7i")
_MAGIC = 0x616B3432  # files of version 1 and above begin with it


@dataclass(frozen=True, slots=True)
class Header:
    """The seven integers that a file begins with, in order; `shared` is the sign of vocab_size.

    >>> Header(dim=64, hidden_dim=172, n_layers=5, n_heads=8, n_kv_heads=4, vocab_size=512, seq_len=512).head_size
    8
    """

    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    seq_len: int
    shared: bool = True

    @property
    def head_size(self) -> int:
        return self.dim // self.n_heads

    @property
    def layer(self) -> dict[str, tuple[int, ...]]:
        """List a layer's tensors in the order of the file, which holds each of them for all layers in turn."""
        d, h, kv = self.dim, self.hidden_dim, self.n_kv_heads * self.head_size
        return {
            "input_layernorm": (d,),
            "self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d),
            "self_attn.v_proj": (kv, d), "self_attn.o_proj": (d, d),
            "post_attention_layernorm": (d,),
            "mlp.gate_proj": (h, d), "mlp.down_proj": (d, h), "mlp.up_proj": (h, d),
        }  # fmt: skip

    @property
    def file_bytes(self) -> int:
        """Compute the file's length; cosines and sines, which nobody needs, lie before a separate head."""
        layers = self.n_layers * sum(math.prod(shape) for shape in self.layer.values())
        ends = (1 if self.shared else 2) * self.vocab_size * self.dim + self.dim + self.seq_len * self.head_size
        return _HEADER.size + FLOAT.itemsize * (layers + ends)


class Llama2cFile(GeneratingSource):
    """The tensors of a llama2.c file under their Hugging Face names, read through a memory map.

    Its side files are config.json, tokenizer.json and tokenizer_config.json, which are generated from both files.

    Args:
        path: The path of a model file of version 0.
        tokenizer: The path of a tokenizer with as many tokens as the model's vocabulary.

    Raises:
        FileNotFoundError: if there is no such file.
        FormatError: if it is not of version 0, or not as long as its header says.
    """

    def __init__(self, path: str | os.PathLike[str], tokenizer: str | os.PathLike[str] = "") -> None:
        path = existing_file(path)
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            self.header = h = _parse_header(path, file.read(_HEADER.size), size)
            self._floats = np.asarray(np.memmap(file, FLOAT, "r", offset=_HEADER.size))
        super().__init__(Folder(path.parent), None, {HEAD: EMBED} if h.shared else {}, [path.name])
        self._path, self._tokenizer = path, tokenizer
        self._starts: dict[str, int] = {}

        parts, start = [], h.vocab_size * h.dim
        self._add_tensor(EMBED, (h.vocab_size, h.dim), 0)
        for part, shape in h.layer.items():
            parts.append((part, shape, start))
            start += h.n_layers * math.prod(shape)
        for layer in range(h.n_layers):
            for part, shape, first in parts:
                self._add_tensor(f"model.layers.{layer}.{part}.weight", shape, first + layer * math.prod(shape))
        self._add_tensor(NORM, (h.dim,), start)
        if not h.shared:
            self._add_tensor(HEAD, (h.vocab_size, h.dim), start + h.dim + h.seq_len * h.head_size)

    def _add_tensor(self, name: str, shape: tuple[int, ...], start: int) -> None:
        self.shapes[name] = (shape, FLOAT)
        self._starts[name] = start

    def side_files(self, target: Folder) -> SideFiles:
        """Generate the config and the tokenizer.

        Raises:
            FileNotFoundError: if there is no tokenizer.
            FormatError: for a tokenizer that is damaged, or that no list of merges can express.
        """
        pieces = read_pieces(self._tokenizer, self.header.vocab_size)
        files = {
            "config.json": json.dumps(llama_config(self.header), indent=2) + "\n",
            "tokenizer.json": build_tokenizer(pieces, self._tokenizer).to_str(pretty=True) + "\n",
            "tokenizer_config.json": json.dumps(tokenizer_config(pieces, self.header.seq_len), indent=2) + "\n",
        }
        made = GeneratedFiles(str(self._path), {name: text.encode() for name, text in files.items()})
        return SideFiles(list(files), origin=made)

    def read(self, name: str) -> np.ndarray:
        """Read one tensor: a view, except of queries and keys, whose rows are permuted."""
        shape, start = self.shapes[name][0], self._starts[name]
        array = self._floats[start : start + math.prod(shape)].reshape(shape)
        if name.endswith("q_proj.weight"):
            return permute_rotary(array, self.header.n_heads)
        return permute_rotary(array, self.header.n_kv_heads) if name.endswith("k_proj.weight") else array


def permute_rotary(w: Float32[np.ndarray, "rows columns"], heads: int) -> Float32[np.ndarray, "rows columns"]:
    """Permute rows from llama2.c's rotary embedding to Hugging Face's: in each head, 2i -> i, and 2i + 1 -> d/2 + i.

    llama2.c rotates the pair (2i, 2i + 1) by the i-th angle, Hugging Face the pair (i, d/2 + i).

    Args:
        w: A query or key projection, [heads * d, inputs].
        heads: The number of heads.

    >>> permute_rotary(np.arange(8, dtype=np.float32)[:, None], 2)[:, 0].tolist()
    [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]
    """
    return w.reshape(heads, -1, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def to_table(
    model: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str],
    path: str | os.PathLike[str],
    config: QuantizationConfig | None = None,
    *,
    compression: Compression = "none",
    progress: Progress | None = None,
) -> ConversionResult:
    """Write a llama2.c model as a table with Hugging Face's names, its config and tokenizer files beside it.

    The files are config.json, tokenizer.json and tokenizer_config.json. A shared classifier is an alias of the
    embedding.

    Args:
        model: The path of a model file of version 0, such as stories15M.bin.
        tokenizer: The path of a tokenizer with as many tokens as the model's vocabulary, such as tokenizer.bin.
        path: The path of a .parquet or .arrow file; it appears whole, or not at all.
        config: The quantization (schema V2); None writes plain weights (V1).
        compression: "zstd" compresses the weights too.
        progress: A callback that gets each tensor's name, its bytes, and the bytes of all.

    Raises:
        FileNotFoundError: if the model or the tokenizer does not exist.
        FormatError: for one that is damaged or of another version, a tokenizer that no list of merges can express, and
            an output whose folder holds another model's config or tokenizer files.
        AqError: for a tensor that cannot be quantized.

    Source: github.com/karpathy/llama2.c.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> header = Header(dim=4, hidden_dim=8, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=260, seq_len=8)
    >>> fields = struct.pack("<7i", 4, 8, 1, 2, 1, 260, 8)
    >>> _ = (folder / "model.bin").write_bytes(fields + bytes(header.file_bytes - len(fields)))
    >>> pieces = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % byte for byte in range(256)), b" "]
    >>> tokens = b"".join(struct.pack("<fi", 0, len(piece)) + piece for piece in pieces)
    >>> _ = (folder / "tok.bin").write_bytes(struct.pack("<i", 6) + tokens)
    >>> done = to_table(folder / "model.bin", folder / "tok.bin", folder / "out" / "m.parquet")
    >>> sorted(file.name for file in (folder / "out").iterdir())
    ['config.json', 'm.parquet', 'tokenizer.json', 'tokenizer_config.json']
    >>> from tokenizers import Tokenizer
    >>> Tokenizer.from_file(str(folder / "out" / "tokenizer.json")).encode("a").ids  # BOS, space, byte
    [1, 259, 100]
    """
    source = Llama2cFile(model, tokenizer)
    return corridor.to_table(source, path, config, compression=compression, progress=progress)


def llama_config(header: Header) -> dict[str, object]:
    """Build the config.json of a model, as transformers reads it.

    Args:
        header: The header of the model file.

    >>> llama_config(Header(64, 172, 5, 8, 4, 512, 512, shared=False))["tie_word_embeddings"]
    False
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": header.dim,
        "intermediate_size": header.hidden_dim,
        "num_hidden_layers": header.n_layers,
        "num_attention_heads": header.n_heads,
        "num_key_value_heads": header.n_kv_heads,
        "head_dim": header.head_size,
        "vocab_size": header.vocab_size,
        "max_position_embeddings": header.seq_len,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": header.shared,
        "bos_token_id": BOS,
        "eos_token_id": [BOS, EOS],  # run.c stops at BOS, which divides the texts that a model was trained on
        "dtype": "float32",
    }


def _parse_header(path: Path, data: bytes, size: int) -> Header:
    if len(data) < _HEADER.size:
        raise FormatError(
            f"{path}: holds {size} bytes; wanted a header of {_HEADER.size} first: is it a llama2.c file?"
        )
    fields = _HEADER.unpack(data)
    if fields[0] == _MAGIC:
        raise FormatError(f"{path}: is of version {fields[1]}; wanted version 0: export it with --version 0")
    dim, hidden_dim, layers, heads, kv_heads, vocab_size, seq_len = fields
    header = Header(dim, hidden_dim, layers, heads, kv_heads, abs(vocab_size), seq_len, shared=vocab_size > 0)
    for name, value in asdict(header).items():
        if name != "shared" and value < 1:
            raise FormatError(f"{path}: {name} is {value}; wanted 1 or more: is it a llama2.c file?")
    if dim % (2 * heads) or heads % kv_heads:
        raise FormatError(
            f"{path}: has dim {dim}, n_heads {heads}, n_kv_heads {kv_heads}; wanted an even dim for each head, and as "
            "many heads for each key-value head: is it a llama2.c file?"
        )
    if (wanted := header.file_bytes) != size:
        kind = f"cut, {wanted - size} bytes short" if size < wanted else f"{size - wanted} bytes too long"
        raise FormatError(f"{path}: is {kind}: holds {size}, wanted {wanted} for {header}; fetch it again")
    return header
