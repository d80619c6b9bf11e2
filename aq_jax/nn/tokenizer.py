"""Read a folder's tokenizer as transformers would build it from tokenizer.json and tokenizer_config.json.

transformers rebuilds a BERT's tokenizer from the vocabulary and tokenizer_config.json, and ignores tokenizer.json's
normalizer. Importing transformers takes seconds. So its work for BERT, and for tokenizers that tokenizer.json fully
describes, is done here; any other folder is left to transformers itself.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aq_jax.errors import AqError, FormatError
from aq_jax.nn.models import family_of
from aq_jax.store.jsonfile import read_json

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
MAP, ADDED = "special_tokens_map.json", "added_tokens.json"  # files of older versions
VOCABULARIES = ("vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
BERT = ("BertTokenizer", "BertTokenizerFast")
PLAIN = ("PreTrainedTokenizerFast", "TokenizersBackend")
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
BERT_TOKENS = {
    "unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]",
}  # fmt: skip
TYPES = "token_type_ids"
# Classes of transformers whose tokenizers give types of tokens though tokenizer_config.json has no model_input_names.
WITH_TYPES = {
    "BertTokenizer", "CanineTokenizer", "ConvBertTokenizer", "DPRContextEncoderTokenizer",
    "DPRContextEncoderTokenizerFast", "DPRQuestionEncoderTokenizer", "DPRQuestionEncoderTokenizerFast",
    "DebertaTokenizer", "DebertaV2Tokenizer", "FNetTokenizer", "FNetTokenizerFast", "LayoutLMv2Tokenizer",
    "LxmertTokenizer", "MarkupLMTokenizer", "MarkupLMTokenizerFast", "MobileBertTokenizer", "MobileBertTokenizerFast",
    "SqueezeBertTokenizer", "SqueezeBertTokenizerFast", "TapasTokenizer",
}  # fmt: skip
# Fields of tokenizer_config.json that are applied here, and fields that change no id of a text.
APPLIED = {"do_lower_case", "strip_accents", "tokenize_chinese_chars", "split_special_tokens", "truncation_side"}
APPLIED |= {"model_max_length", "max_len", "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"}
IDLE = {
    "backend", "chat_template", "clean_up_tokenization_spaces", "do_basic_tokenize", "is_local", "local_files_only",
    "max_length", "model_input_names", "name_or_path", "never_split", "pad_to_multiple_of", "pad_token_type_id",
    "padding_side", "processor_class", "special_tokens_map_file", "stride", "tokenizer_class", "tokenizer_file",
    "truncation_strategy", "use_fast", "add_bos_token", "add_eos_token",
}  # fmt: skip


def read_tokenizer(folder: Path, extra: Mapping[str, Any] | None = None) -> Tokenizer:
    """Read a folder's tokenizer; its truncation holds the side on which it cuts (see `set_truncation`).

    Args:
        folder: The folder with tokenizer.json, or older files, and config.json.
        extra: Fields that override tokenizer_config.json.

    Raises:
        FormatError: if there is none, or it is damaged, or needs code of the folder's own.
    """
    from tokenizers import Tokenizer

    file = folder / FILE
    said = (read_json(folder, CONFIG, dict) or {}) | dict(extra or {})
    model = read_json(folder, "config.json", dict) or {}
    try:
        if file.exists():
            found = Tokenizer.from_file(str(file))
            if not _configure_like_transformers(found, folder, said, model):
                found = _by_transformers(folder, extra)
        elif not any((folder / name).exists() for name in VOCABULARIES):  # transformers would build an empty one
            raise FileNotFoundError(f"wanted it, or one of {', '.join(VOCABULARIES)}, which `convert` copies there")
        else:
            found = _by_transformers(folder, extra)
    except Exception as error:  # tokenizers raises no other class
        raise FormatError(f"{file}: holds no tokenizer that can be built: {error}") from None
    side = said.get("truncation_side") or (found.truncation or {}).get("direction", "right")
    if side not in ("left", "right"):
        raise FormatError(f"{folder / CONFIG}: truncation_side is {side!r}; wanted 'left' or 'right'")
    found.no_padding()
    found.enable_truncation(2**31, direction=side)
    return found


def gives_types(folder: Path, extra: Mapping[str, Any] | None = None) -> bool:
    """Tell whether a folder's tokenizer gives a model types of tokens: by model_input_names, or else by its class.

    Args:
        folder: The folder with tokenizer_config.json and config.json.
        extra: Fields that override tokenizer_config.json.

    Raises:
        FormatError: for names that are no list of strings.
    """
    said = (read_json(folder, CONFIG, dict) or {}) | dict(extra or {})
    if "model_input_names" in said:
        names = said["model_input_names"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            found = str(names)[:80]
            raise FormatError(f"{folder / CONFIG}: model_input_names is {found!r}; wanted a list of strings")
        return TYPES in names
    kind, own = _classes(said, read_json(folder, "config.json", dict) or {})
    return own in BERT if kind is None or (own in BERT and kind in BERT) else kind in WITH_TYPES


def _classes(said: Mapping[str, Any], model: Mapping[str, Any]) -> tuple[Any, str | None]:
    """Return the class of transformers that the files name, and that which the family has."""
    family = family_of(model)
    return said.get("tokenizer_class") or model.get("tokenizer_class"), None if family is None else family.tokenizer


def read_special_tokens(folder: Path, needed: Collection[str]) -> dict[str, str]:
    """Read the special tokens that transformers gives to templates, by their names, such as "eos_token".

    Classes have tokens of their own, which the files need not name: then transformers itself is asked.

    Args:
        folder: The folder of `read_tokenizer`.
        needed: The names that matter: of others, some that only a class has may be missing.

    Raises:
        FormatError: if transformers cannot tell.
    """
    said, model = read_json(folder, CONFIG, dict) or {}, read_json(folder, "config.json", dict) or {}
    tokens = _with_map(folder, said)
    extra = tokens.get("extra_special_tokens")
    given = {name: _content(token) for name, token in tokens.items() if name.endswith("_token")}
    given |= {name: _content(token) for name, token in (extra.items() if isinstance(extra, dict) else ())}
    kind, own = _classes(said, model)
    if (kind or own) not in (None, *PLAIN) and not given.keys() >= set(needed):
        try:
            given = _transformers(folder).special_tokens_map
        except Exception as error:  # whatever transformers raises
            unnamed = ", ".join(sorted(set(needed) - given.keys()))
            raise FormatError(
                f"{folder / CONFIG}: names no {unnamed}, which the chat template may need, and no {kind or own} can be "
                f"built to ask: {error}"
            ) from None
    return {name: token for name, token in given.items() if isinstance(token, str)}


def _with_map(folder: Path, said: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of tokenizer_config.json, under those of the file of older versions where that is read."""
    older = {} if "added_tokens_decoder" in said else read_json(folder, MAP, dict)
    return dict(said) | (older or {})


def _transformers(folder: Path, extra: Mapping[str, Any] | None = None) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **(extra or {}))


def _by_transformers(folder: Path, extra: Mapping[str, Any] | None) -> Tokenizer:
    return _transformers(folder, extra).backend_tokenizer


def _configure_like_transformers(found: Tokenizer, folder: Path, said: dict[str, Any], model: dict[str, Any]) -> bool:
    """Configure a tokenizer as transformers would; return False if only transformers itself can."""
    from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import WordPiece

    kind, own = _classes(said, model)
    is_bert = own in BERT and kind in (None, *BERT)
    if not said and (kind or own) is None and not any((folder / name).exists() for name in (MAP, ADDED)):
        return True  # nothing overrides it
    if not is_bert and kind not in PLAIN:
        return False
    added, known = found.get_added_tokens_decoder(), "added_tokens_decoder" in said
    tokens = _with_map(folder, said)
    named = {name: _content(tokens[name]) for name in NAMED if tokens.get(name) is not None}
    if is_bert:
        named = BERT_TOKENS | named
    others = [_content(token) for token in _extra_special_tokens(tokens)]
    here = {token.content: token for token in added.values()}
    if not (
        said.keys() <= APPLIED | IDLE | set(NAMED)
        and tokens.keys() <= APPLIED | IDLE | set(NAMED)
        and all(isinstance(each, str) for each in (*named.values(), *others))
        and all(other in here for other in others)
        and all(token.special for token in added.values() if token.content in named.values())
        and all(_is_plain(tokens.get(name)) for name, content in named.items() if content not in here)
        and (known or not (folder / ADDED).exists())
        and (not known or _same_tokens(said["added_tokens_decoder"], added))
    ):
        return False
    if is_bert:
        words = found.model
        if not (
            isinstance(words, WordPiece)
            and (words.unk_token, words.continuing_subword_prefix) == (named["unk_token"], "##")
            and words.max_input_chars_per_word == 100
            and _keep_ids(added, found.get_vocab(with_added_tokens=False))
        ):
            return False
        found.normalizer = normalizers.BertNormalizer(
            clean_text=True,
            handle_chinese_chars=said.get("tokenize_chinese_chars", True),
            strip_accents=said.get("strip_accents"),
            lowercase=said.get("do_lower_case", True),
        )
        found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        found.decoder = decoders.WordPiece(prefix="##")
    missing = [named[name] for name in NAMED if name in named and named[name] not in here]
    found.add_tokens([AddedToken(content, special=True) for content in dict.fromkeys(missing)])
    if is_bert:
        first, last = named["cls_token"], named["sep_token"]
        found.post_processor = processors.TemplateProcessing(
            single=f"{first}:0 $A:0 {last}:0",
            pair=f"{first}:0 $A:0 {last}:0 $B:1 {last}:1",
            special_tokens=[(token, found.token_to_id(token)) for token in (first, last)],
        )
    found.encode_special_tokens = said.get("split_special_tokens", False)
    return True


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _extra_special_tokens(said: Mapping[str, Any]) -> Sequence[Any]:
    more = said.get("extra_special_tokens") or said.get("additional_special_tokens") or ()
    return more if isinstance(more, list | tuple) else (more,)  # any other type is refused later


def _is_plain(token: Any) -> bool:
    """Return whether an added token has no settings of its own."""
    flags = ("lstrip", "rstrip", "single_word", "normalized")
    return not isinstance(token, dict) or not any(token.get(flag) for flag in flags)


def _same_tokens(said: Any, added: Mapping[int, Any]) -> bool:
    """Return whether two files give the same tokens the same settings."""
    flags = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return isinstance(said, dict) and {
        str(i): [getattr(token, flag) for flag in flags] for i, token in added.items()
    } == {i: [token.get(flag) for flag in flags] if isinstance(token, dict) else token for i, token in said.items()}


def _keep_ids(added: Mapping[int, Any], vocabulary: Mapping[str, int]) -> bool:
    """Return whether added tokens are in the vocabulary, or follow it: only then do they get the same ids again."""
    new = [i for i, token in sorted(added.items()) if vocabulary.get(token.content) != i]
    return new == list(range(len(vocabulary), len(vocabulary) + len(new)))


def prepend_lower_case(tokenizer: Tokenizer) -> None:
    """Make a tokenizer lower-case texts first, as sentence-transformers' do_lower_case does."""
    from tokenizers import normalizers

    own: Any = tokenizer.normalizer
    parts: list[Any] = [own] if own is not None else []
    if isinstance(own, normalizers.Sequence):
        parts = [own[i] for i in range(len(own))]  # type: ignore[reportArgumentType]
    if not any(isinstance(part, normalizers.Lowercase) for part in parts):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *parts])


def set_truncation(tokenizer: Tokenizer, max_tokens: int) -> None:
    """Make a tokenizer cut texts at so many tokens, on the side on which it cut before, and pad none."""
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens, direction=(tokenizer.truncation or {}).get("direction", "right"))


def tokenize_texts(
    tokenizer: Tokenizer,
    texts: Sequence[str | tuple[str, str]],
    vocabulary: int,
    where: str,
    *,
    special_tokens: bool = True,
) -> list[Encoding]:
    """Tokenize texts, or pairs of texts, for a model with so many tokens, by default with the special tokens around.

    Raises:
        AqError: for a text with a token that the model has no row for, naming both.
    """
    clean = [
        replace_surrogates(text) if isinstance(text, str) else tuple(map(replace_surrogates, text)) for text in texts
    ]
    found = tokenizer.encode_batch(clean, add_special_tokens=special_tokens)
    for number, encoding in enumerate(found):
        if encoding.ids and (most := max(encoding.ids)) >= vocabulary:
            token = encoding.tokens[encoding.ids.index(most)]
            raise AqError(
                f"{where}: text {number} has the token {token!r}, which the tokenizer numbers {most}; vocab_size in "
                f"config.json is {vocabulary}: leave the token out"
            )
    return found


def replace_surrogates(text: str) -> str:
    """Replace lone surrogates, which no tokenizer takes, by the replacement character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
