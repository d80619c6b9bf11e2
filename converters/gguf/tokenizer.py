"""Rebuild tokenizer.json and tokenizer_config.json from a file's fields.

    gpt2      byte-pair encoding over bytes, with the merges of the file
    llama     SentencePiece's byte-pair encoding: the merges follow from the scores
    bert      WordPiece

Other kinds, and byte-pair encodings that split a text in a way that is not known, are noted, and no tokenizer is
written. Source: github.com/ggml-org/llama.cpp, src/llama-vocab.cpp and convert_hf_to_gguf.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from aq_jax.converters.gguf.vocabulary import PREFIX, Vocabulary
from aq_jax.errors import FormatError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_UNKNOWN, _CONTROL, _USER = 2, 3, 4
_SPACE = "▁"
_MAX_PIECE = 128
"""The most characters of a piece whose splits are tried: more than any real one that is merged has."""
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class _Split(NamedTuple):
    """A way in which byte pairs split a text.

    Args:
        expressions: The expressions that split it, one after the other; none for GPT-2's own.
        digits: Whether digits stand alone first.
        whole: Whether a whole word that is a token is not merged.
        begins: Whether a text begins with the token of beginnings where the file does not say.
    """

    expressions: tuple[str, ...] = ()
    digits: bool = False
    whole: bool = False
    begins: bool = False


# By the name that a file has in `tokenizer.ggml.pre`. Of the others, llama.cpp begins a text where the name is llama3,
# llama-v3, falcon3, falcon-h1, pixtral, midm-2.0, lfm2, jina-v5-nano, tekken or chameleon.
_SPLITS: Mapping[str, _Split] = MappingProxyType({
    "gpt-2": _Split(),
    "default": _Split((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9]{3}")),
    "smollm": _Split(digits=True),
    "qwen2": _Split((_CONTRACTIONS + r"\p{N}" + _REST,)),
    "llama-bpe": _Split((_CONTRACTIONS + r"\p{N}{1,3}" + _REST,), whole=True, begins=True),
})  # fmt: skip
_NAMES = {
    "bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id", "sep_token": "seperator_token_id", "cls_token": "cls_token_id",
    "mask_token": "mask_token_id",
}  # fmt: skip


def tokenizer_files(words: Vocabulary, positions: int) -> tuple[dict[str, bytes], list[str]]:
    """Build tokenizer.json and tokenizer_config.json; return them, and notes.

    Args:
        words: The tokenizer's fields.
        positions: The number of tokens that the model takes.

    Raises:
        FormatError: for fields that are damaged.
    """
    if not words.tokens:
        return {}, ["the file holds no tokenizer, and none is written"]
    if words.kind not in _BUILDERS:
        return {}, [f"its tokenizer is of the kind {words.kind[:40]!r}, of which no tokenizer.json is built"]
    if words.kind == "gpt2" and words.pre not in _SPLITS:
        return {}, [f"its tokenizer splits texts as {words.pre[:40]!r}, of which no tokenizer.json is built"]
    try:
        made = _BUILDERS[words.kind](words)
    except FormatError:
        raise
    except Exception as error:  # tokenizers raises no other class
        raise FormatError(f"{words.where}: holds no tokenizer that can be built: {str(error)[:200]}") from None
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": positions,
        "clean_up_tokenization_spaces": False,
    }
    config |= {name: found[1] for name, key in _special_tokens(words).items() if (found := words.token(key))}
    if templates := words.templates:
        several = [{"name": name, "template": template} for name, template in templates.items()]
        config["chat_template"] = several if len(several) > 1 else templates["default"]
    files = {"tokenizer.json": made.to_str(), "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False)}
    return {name: f"{text}\n".encode() for name, text in files.items()}, _notes(words)


def _notes(words: Vocabulary) -> list[str]:
    """Note what the file does not say: the tokens that texts begin or end with, and how texts are split."""
    found = zip(("begin", "end"), _marks(words), _around(words), strict=True)
    missing = [where for where, marked, token in found if marked and token is None]
    notes = [f"texts {where} with no token: its tokenizer adds one there, and has no id of it" for where in missing]
    if words.kind == "gpt2" and not words.fields.get(f"{PREFIX}pre"):
        notes.append(f"it has no {PREFIX}pre: texts are split by llama.cpp's default, which may not be the model's way")
    return notes


def _special_tokens(words: Vocabulary) -> dict[str, str]:
    """Choose which special tokens tokenizer_config.json names; a BERT's begin and end of a text are not its own."""
    if words.kind != "bert":
        return _NAMES
    return {name: key for name, key in _NAMES.items() if name not in ("bos_token", "eos_token")}


def _gpt2(words: Vocabulary) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    split = _SPLITS[words.pre]
    vocabulary = {token: index for index, token in enumerate(words.tokens)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=words.merges, ignore_merges=split.whole))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if split.digits else []
    steps += [pre_tokenizers.Split(Regex(expression), behavior="isolated") for expression in split.expressions]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split.expressions))
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if words.pre == "qwen2":
        made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    return _finish(made, words)


def _llama(words: Vocabulary) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = {token: index for index, token in enumerate(words.tokens)}
    merges = merges_of(vocabulary, dict(zip(words.tokens, words.scores, strict=True)))
    unknown = words.token("unknown_token_id")
    made = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            byte_fallback=True,
            fuse_unk=True,
            unk_token=unknown[1] if unknown else None,
        )
    )
    prefix = words.flag("add_space_prefix", True)
    spaces = normalizers.Replace(" ", _SPACE)
    made.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return _finish(made, words)


def merges_of(vocabulary: Mapping[str, int], scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """List the merges of a vocabulary whose best piece is joined first: every split of a piece in two.

    >>> merges_of({"a": 0, "b": 1, "ab": 2, "bab": 3}, {"a": 0, "b": 0, "ab": -1, "bab": -2})
    [('a', 'b'), ('b', 'ab')]
    """
    merges: list[tuple[str, str]] = []
    for piece in sorted(vocabulary, key=lambda piece: -scores[piece]):
        if not 1 < len(piece) <= _MAX_PIECE:
            continue
        splits = [
            (left, right)
            for i in range(1, len(piece))
            if (left := piece[:i]) in vocabulary and (right := piece[i:]) in vocabulary
        ]
        merges += sorted(splits, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    return merges


def _bert(words: Vocabulary) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    # llama.cpp's converter marks the beginnings of words, WordPiece what goes on with one.
    tokens = [
        token if kind == _CONTROL or (token[:1], token[-1:]) == ("[", "]")
        else token[1:] if token[:1] == _SPACE
        else f"##{token}"
        for token, kind in zip(words.tokens, words.types, strict=True)
    ]  # fmt: skip
    words.tokens = tokens
    vocabulary = {token: index for index, token in enumerate(tokens)}
    unknown = words.token("unknown_token_id")
    made = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token=unknown[1] if unknown else "[UNK]"))
    lower = not any(token != token.lower() for token in tokens if not token.startswith("["))
    made.normalizer = normalizers.BertNormalizer(
        lowercase=words.flag("normalizer.lowercase", lower), strip_accents=words.said("normalizer.strip_accents")
    )
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    first, last = _around(words)
    if first and last:
        made.post_processor = processors.TemplateProcessing(
            f"{first[1]} $A {last[1]}",
            f"{first[1]} $A {last[1]} $B:1 {last[1]}:1",
            [(first[1], first[0]), (last[1], last[0])],
        )
    return _finish(made, words)


def _marks(words: Vocabulary) -> tuple[bool, bool]:
    """Tell whether texts begin with a token of beginnings, and end with one of ends."""
    if words.kind == "bert":
        return True, True
    begins = words.flag("add_bos_token", words.kind == "llama" or _SPLITS[words.pre].begins)
    return begins, words.flag("add_eos_token", False)


def _around(words: Vocabulary) -> tuple[tuple[int, str] | None, tuple[int, str] | None]:
    """Find the tokens that texts begin and end with; a BERT's are none if one is missing."""
    if words.kind == "bert":
        first = words.token("cls_token_id") or words.token("bos_token_id")
        said = words.token("seperator_token_id", default=False) or words.token("eos_token_id")
        last = said or words.token("seperator_token_id")
        return (first, last) if first and last else (None, None)
    begins, ends = _marks(words)
    return words.token("bos_token_id") if begins else None, words.token("eos_token_id") if ends else None


def _finish(made: Tokenizer, words: Vocabulary) -> Tokenizer:
    """Add the special tokens, and those that a text begins and ends with."""
    from tokenizers import AddedToken, processors

    special = [words.tokens[i] for i, kind in enumerate(words.types) if kind in (_CONTROL, _UNKNOWN)]
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    own = [words.tokens[i] for i, kind in enumerate(words.types) if kind == _USER]
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in own])
    if words.kind == "bert":
        return made
    first, last = _around(words)
    parts = [(found[1], found[0]) for found in (first, last) if found]
    if parts:
        one, two = (
            " ".join(
                ([f"{first[1]}{mark}"] if first else []) + [f"${text}{mark}"] + ([f"{last[1]}{mark}"] if last else [])
            )
            for text, mark in (("A", ":0"), ("B", ":1"))
        )
        made.post_processor = processors.TemplateProcessing(one, f"{one} {two}", parts)
    return made


_BUILDERS: Mapping[str, Callable[[Vocabulary], Any]] = MappingProxyType({"gpt2": _gpt2, "llama": _llama, "bert": _bert})
