"""What llama2.c does, once more: its two files, its forward pass and its tokenizer, in plain NumPy and Python.

Nothing here imports aq_jax. Source: run.c of github.com/karpathy/llama2.c. All arithmetic is float32.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

BOS, EOS = 1, 2
# With these every tokenizer file begins: what is not in the vocabulary is spelled in bytes, b as the token b + 3.
FIRST = ("<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{byte:02X}>" for byte in range(256)))
FIELDS: tuple[str, ...] = ("dim", "hidden", "layers", "heads", "kv_heads", "vocab", "seq")

f32 = np.float32


def write_model(
    path: str | Path,
    *,
    dim: int,
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    seq: int,
    shared: bool = True,
    seed: int = 0,
) -> None:
    """A model file of random weights, whose logits are about 1 in size and depend on every weight."""
    rng = np.random.default_rng(seed)
    kv = dim // heads * kv_heads

    def norm(*shape: int) -> np.ndarray:
        return rng.uniform(0.5, 1.5, shape)

    def matrix(*shape: int) -> np.ndarray:
        return rng.normal(size=shape) / math.sqrt(shape[-1])

    angles = np.arange(seq)[:, None] * 10000.0 ** (-np.arange(0, dim // heads, 2) * heads / dim)
    arrays = [
        rng.normal(size=(vocab, dim)) * 0.5,
        norm(layers, dim),
        matrix(layers, dim, dim), matrix(layers, kv, dim), matrix(layers, kv, dim), matrix(layers, dim, dim),
        norm(layers, dim),
        matrix(layers, hidden, dim), matrix(layers, dim, hidden), matrix(layers, hidden, dim),
        norm(dim),
        np.cos(angles), np.sin(angles),
        *([] if shared else [matrix(vocab, dim)]),
    ]  # fmt: skip
    header = struct.pack("<7i", dim, hidden, layers, heads, kv_heads, vocab if shared else -vocab, seq)
    Path(path).write_bytes(header + b"".join(array.astype("<f4").tobytes() for array in arrays))


def read_model(path: str | Path) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """The header's fields, vocab made positive, and the arrays under their names in run.c; `wcls` is always there."""
    data = Path(path).read_bytes()
    h: dict[str, int] = dict(zip(FIELDS, struct.unpack_from("<7i", data), strict=True))
    shared, h["vocab"] = h["vocab"] > 0, abs(h["vocab"])
    d, f, n, vocab, size = h["dim"], h["hidden"], h["layers"], h["vocab"], h["dim"] // h["heads"]
    kv = size * h["kv_heads"]
    shapes = {
        "token_embedding_table": (vocab, d), "rms_att_weight": (n, d),
        "wq": (n, d, d), "wk": (n, kv, d), "wv": (n, kv, d), "wo": (n, d, d), "rms_ffn_weight": (n, d),
        "w1": (n, f, d), "w2": (n, d, f), "w3": (n, f, d), "rms_final_weight": (d,),
        "freq_cis_real": (h["seq"], size // 2), "freq_cis_imag": (h["seq"], size // 2),
        **({} if shared else {"wcls": (vocab, d)}),
    }  # fmt: skip
    arrays, at = {}, 28
    for name, shape in shapes.items():
        arrays[name] = np.frombuffer(data, "<f4", math.prod(shape), at).reshape(shape)
        at += arrays[name].nbytes
    assert at == len(data), f"{path}: {len(data)} bytes, the header says {at}"
    arrays.setdefault("wcls", arrays["token_embedding_table"])
    return h, arrays


class Forward:
    """A model that is fed one token at a time, and remembers the keys and values of those before.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/model.bin"
    >>> write_model(path, dim=16, hidden=24, layers=2, heads=4, kv_heads=2, vocab=300, seq=8)
    >>> model = Forward(path)
    >>> [model.step(token).shape for token in (1, 270)]
    [(300,), (300,)]
    """

    def __init__(self, path: str | Path) -> None:
        self.h, self.w = read_model(path)
        self.size = self.h["dim"] // self.h["heads"]
        self.pos = 0
        room = (self.h["layers"], self.h["seq"], self.h["kv_heads"], self.size)
        self.keys, self.values = np.zeros(room, f32), np.zeros(room, f32)

    def step(self, token: int) -> np.ndarray:
        """The logits [vocab] of what follows this token."""
        w, pos = self.w, self.pos
        if pos >= self.h["seq"]:
            raise IndexError(f"the model has {self.h['seq']} positions, and all are taken")
        x = w["token_embedding_table"][token].copy()
        for i in range(self.h["layers"]):
            h = rmsnorm(x, w["rms_att_weight"][i])
            q = self.rotate((w["wq"][i] @ h).reshape(self.h["heads"], self.size))
            self.keys[i, pos] = self.rotate((w["wk"][i] @ h).reshape(self.h["kv_heads"], self.size))
            self.values[i, pos] = (w["wv"][i] @ h).reshape(self.h["kv_heads"], self.size)
            x += w["wo"][i] @ self.attend(q, self.keys[i, : pos + 1], self.values[i, : pos + 1])
            h = rmsnorm(x, w["rms_ffn_weight"][i])
            gate = w["w1"][i] @ h
            x += w["w2"][i] @ (gate * (f32(1) / (f32(1) + np.exp(-gate))) * (w["w3"][i] @ h))
        self.pos += 1
        return w["wcls"] @ rmsnorm(x, w["rms_final_weight"])

    def rotate(self, x: np.ndarray) -> np.ndarray:
        """Each pair (2i, 2i + 1) of each head, turned by the position times 10000^(-2i / size)."""
        frequency = f32(1) / f32(10000) ** (np.arange(0, self.size, 2, dtype=f32) / f32(self.size))
        cos, sin = np.cos(f32(self.pos) * frequency), np.sin(f32(self.pos) * frequency)
        out = np.empty_like(x)
        out[:, 0::2] = x[:, 0::2] * cos - x[:, 1::2] * sin
        out[:, 1::2] = x[:, 0::2] * sin + x[:, 1::2] * cos
        return out

    def attend(self, q: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Head by head: neighbouring query heads share a key-value head."""
        out = []
        for head in range(self.h["heads"]):
            shared = head // (self.h["heads"] // self.h["kv_heads"])
            scores = keys[:, shared] @ q[head] / np.sqrt(f32(self.size))
            weights = np.exp(scores - scores.max())
            out.append((weights / weights.sum()) @ values[:, shared])
        return np.concatenate(out)


def rmsnorm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return weight * (x * (f32(1) / np.sqrt(x @ x / f32(x.size) + f32(1e-5))))


def logits(path: str | Path, tokens: Sequence[int]) -> np.ndarray:
    """[len(tokens), vocab]: row i is what follows tokens[: i + 1]."""
    model = Forward(path)
    return np.stack([model.step(token) for token in tokens])


def greedy(path: str | Path, tokens: Sequence[int], n: int) -> list[int]:
    """The n likeliest tokens that follow, one after the other; neither BOS nor EOS ends them. run.c stops at BOS."""
    model, out = Forward(path), []
    for token in tokens[:-1]:
        model.step(token)
    token = tokens[-1]
    for _ in range(n):
        token = int(model.step(token).argmax())
        out.append(token)
    return out


# ------------------------------------------------------------------------------------------------ tokenizer


def write_tokenizer(path: str | Path, pieces: Sequence[str], scores: Sequence[float] | None = None) -> int:
    """A tokenizer file of FIRST and these pieces; the earlier the better, unless scores are given.

    Returns:
        The size of the vocabulary. " " must be among the pieces: every text is encoded with one before it.
    """
    if scores is None:
        scores = [-float(i) for i in range(len(pieces))]
    entries = [(piece.encode(), 0.0) for piece in FIRST]
    entries += [(piece.encode(), score) for piece, score in zip(pieces, scores, strict=True)]
    data = struct.pack("<i", max(len(piece) for piece, _ in entries))
    Path(path).write_bytes(data + b"".join(struct.pack("<fi", score, len(p)) + p for p, score in entries))
    return len(entries)


def read_tokenizer(path: str | Path, vocab_size: int) -> list[tuple[bytes, float]]:
    """Pieces and scores in the order of their ids."""
    data, at, out = Path(path).read_bytes(), 4, []
    for _ in range(vocab_size):
        score, length = struct.unpack_from("<fi", data, at)
        out.append((data[at + 8 : at + 8 + length], score))
        at += 8 + length
    assert at == len(data), f"{path}: {len(data)} bytes, {vocab_size} tokens are {at}"
    return out


def encode(path: str | Path, vocab_size: int, text: str, bos: bool = True) -> list[int]:
    """Token ids: characters, or bytes; then the best pair is merged until there is none. C ends a text at its NUL."""
    vocab = read_tokenizer(path, vocab_size)
    ids = {piece: token for token, (piece, _) in enumerate(vocab)}
    tokens = [ids[b" "]] if text else []
    for character in text:
        raw = character.encode()
        tokens += [ids[raw]] if raw in ids else [byte + 3 for byte in raw]
    while True:
        best_score, best_id, best_at = -1e10, -1, -1
        for at in range(len(tokens) - 1):
            token = ids.get(vocab[tokens[at]][0] + vocab[tokens[at + 1]][0], -1)
            if token >= 0 and vocab[token][1] > best_score:
                best_score, best_id, best_at = vocab[token][1], token, at
        if best_at < 0:
            return [BOS] * bos + tokens
        tokens[best_at : best_at + 2] = [best_id]


def decode(path: str | Path, vocab_size: int, tokens: Sequence[int]) -> bytes:
    """What run.c prints for these tokens: after BOS one space is left out. BOS itself is not printed."""
    vocab = read_tokenizer(path, vocab_size)
    out, before = b"", None
    for token in tokens:
        piece = vocab[token][0]
        if before == BOS and piece.startswith(b" "):
            piece = piece[1:]
        elif 3 <= token < 259:
            piece = bytes([token - 3])
        out += b"" if token == BOS else piece
        before = token
    return out
