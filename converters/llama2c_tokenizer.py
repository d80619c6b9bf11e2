"""Convert llama2.c's tokenizer file to one that transformers loads: github.com/karpathy/llama2.c, run.c."""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from aq_jax.errors import FormatError

BOS, EOS, BYTES = 1, 2, 3  # ids that run.c knows; the byte b is the token BYTES + b
LONGEST = 4096  # bytes of a piece: more than any real one has, and few enough to try every split
_PIECE = struct.Struct("<fi")
_LEAST_SCORE = -1e10  # run.c merges only pieces that score above this


def read_pieces(path: str | os.PathLike[str], vocab_size: int) -> list[tuple[str, float]]:
    """Read the pieces of a tokenizer file and their scores, in the order of their ids.

    Args:
        path: The path of the tokenizer.
        vocab_size: The number of tokens that it must hold; the file does not state it.

    Raises:
        FileNotFoundError: if there is no such file.
        FormatError: if it is truncated, holds more, or has pieces with which run.c could not encode every text.
    """
    path = existing_file(path)
    with path.open("rb") as file:
        longest = int.from_bytes(file.read(4), "little", signed=True)
        if not 1 <= longest <= LONGEST:
            raise FormatError(f"{path}: max_token_length is {longest}; wanted 1 to {LONGEST}: is it a tokenizer.bin?")
        found: dict[str, float] = {}
        for token in range(vocab_size):
            at = f"{path}: token {token} of {vocab_size}, at byte {file.tell()},"
            head = file.read(_PIECE.size)
            if len(head) < _PIECE.size:
                raise FormatError(f"{at} ends after {len(head)} of {_PIECE.size} bytes; is it this model's tokenizer?")
            score, length = _PIECE.unpack(head)
            if not 1 <= length <= longest:
                raise FormatError(f"{at} has length {length}; wanted 1 to max_token_length, {longest}")
            raw = file.read(length)
            if len(raw) < length:
                raise FormatError(f"{at} ends after {len(raw)} of {length} bytes; fetch the file again")
            try:
                piece = raw.decode()
            except UnicodeDecodeError as error:
                raise FormatError(f"{at} is {raw!r}; wanted UTF-8: {error.reason}") from None
            if not math.isfinite(score):
                raise FormatError(f"{at} {piece!r}, has score {score}; wanted a finite one")
            if piece in found:
                raise FormatError(f"{at} is {piece!r}, as is token {list(found).index(piece)}; wanted each piece once")
            if BYTES <= token < BYTES + 256 and piece != (byte := f"<0x{token - BYTES:02X}>"):
                raise FormatError(f"{at} is {piece!r}; wanted {byte!r}: run.c encodes unknown characters with it")
            found[piece] = score
        if extra := os.fstat(file.fileno()).st_size - file.tell():
            raise FormatError(f"{path}: has {extra} bytes after its {vocab_size} tokens; is it this model's tokenizer?")
    if vocab_size < BYTES + 256:
        raise FormatError(f"{path}: has {vocab_size} tokens; wanted at least {BYTES + 256}: three, and one for a byte")
    if " " not in found:
        raise FormatError(f"{path}: has no token ' ', with which run.c begins every text; fetch the file again")
    return list(found.items())


def build_tokenizer(pieces: list[tuple[str, float]], where: object = "tokenizer") -> Tokenizer:
    """Build a byte-pair encoder that equals run.c's on any text but the names of BOS and EOS.

    run.c joins the neighbours whose piece has the best score, the leftmost first; here every split of a piece in two is
    a merge, and the best piece comes first. BOS and EOS keep the names that the file gives them, spaces stay spaces. A
    text that spells out one of those names gets that token, unless `encode_special_tokens` is set, as
    tokenizer_config.json does for transformers.

    Args:
        pieces: The pieces and scores that `read_pieces` returns.
        where: The name of the tokenizer, for errors.

    Raises:
        FormatError: if two pieces that merges can make have one score: between them run.c goes by their position in the
            text, which a list of merges cannot express.

    >>> texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), " ", "a", " a"]
    >>> tokenizer = build_tokenizer([(text, -i) for i, text in enumerate(texts)])
    >>> tokenizer.encode("aé").ids, tokenizer.decode(tokenizer.encode("aé").ids)
    ([1, 261, 198, 172], 'aé')
    """
    vocabulary = {piece: token for token, (piece, _) in enumerate(pieces)}
    merges: list[tuple[str, str]] = []
    before: tuple[float, str] | None = None
    for piece, score in sorted(pieces, key=lambda pair: -pair[1]):
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        splits = [(left, right) for left, right in splits if left in vocabulary and right in vocabulary]
        if not splits or score <= _LEAST_SCORE:
            continue
        if before and before[0] == score:
            raise FormatError(
                f"{where}: {before[1]!r} and {piece!r} both have score {score}; wanted different ones: which of them "
                "run.c merges depends on their position in the text"
            )
        before = score, piece
        merges += splits  # in any order: only one ever occurs, the halves that the piece alone ends in

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True))
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    bos = {"id": "bos", "ids": [BOS], "tokens": [pieces[BOS][0]]}
    tokenizer.post_processor = processors.TemplateProcessing("bos $A", "bos $A bos:1 $B:1", [bos])
    tokenizer.add_special_tokens([AddedToken(pieces[i][0], special=True, normalized=False) for i in (BOS, EOS)])
    return tokenizer


def tokenizer_config(pieces: list[tuple[str, float]], positions: int) -> dict[str, object]:
    """Build tokenizer_config.json, without which transformers would build a Llama tokenizer of its own.

    Args:
        pieces: The pieces and scores that `read_pieces` returns.
        positions: The number of tokens that the model takes.

    >>> tokenizer_config([("<unk>", 0), ("<s>", 0), ("</s>", 0)], 512)["eos_token"]
    '</s>'
    """
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": pieces[BOS][0],
        "eos_token": pieces[EOS][0],
        "model_max_length": positions,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
    }


def existing_file(path: str | os.PathLike[str]) -> Path:
    """Return the path of a file that exists.

    Raises:
        FileNotFoundError: if there is none.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: does not exist")
    return path
