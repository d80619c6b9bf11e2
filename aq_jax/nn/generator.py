"""Generate the continuation of prompts, and score texts, with a language model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Unpack, cast, overload

import numpy as np
from jaxtyping import Array, Float

from aq_jax.errors import AqError, ConfigError
from aq_jax.nn.chat import ChatTemplate, Message
from aq_jax.nn.compiled import check_token_ids, nbytes
from aq_jax.nn.continuation import Continuation
from aq_jax.nn.decoding import PIECE, Decoding
from aq_jax.nn.models import LanguageModel
from aq_jax.nn.requests import Options, Request, read_request
from aq_jax.nn.sampling import Sampling, check_number
from aq_jax.nn.scoring import Scoring
from aq_jax.nn.tokenizer import tokenize_texts
from aq_jax.ops import CacheType

if TYPE_CHECKING:
    from tokenizers import Tokenizer

STOPPING_PIECE = 8
"""Tokens that are computed before stop strings are looked for: what follows one is computed in vain."""


class TooLongError(AqError):
    """Messages have more tokens than the model has positions."""


class Generator:
    """A language model with its tokenizer, as `aq_jax.load_model` returns it.

    Args:
        model: A model with its weights.
        tokenizer: The model's tokenizer.
        eos_ids: The ids that end a text.
        sampling: How tokens are chosen unless a call says otherwise.
        template: The template of chats; None if there is none.
    """

    about: ClassVar = "a language model"

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        eos_ids: tuple[int, ...] = (),
        sampling: Sampling = Sampling(),  # noqa: B008
        template: ChatTemplate | None = None,
    ) -> None:
        self.model, self.tokenizer, self.eos_ids, self.sampling = model, tokenizer, eos_ids, sampling
        self.template = template
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._decoding = Decoding(model, eos_ids)
        self._scoring = Scoring(model)

    @property
    def compiles(self) -> int:
        """Count the programs compiled so far: a few for each number of prompts and size of the cache."""
        return self._decoding.compiles + self._scoring.compiles

    @property
    def nbytes(self) -> int:
        """Count the bytes of the model's arrays in memory: weights as they are packed, or as kernels prepared them."""
        return nbytes(self.model)

    @overload
    def generate(  # type: ignore[reportOverlappingOverload]  # a string is a sequence of strings, too
        self, prompt: str, max_tokens: int = ..., **options: Unpack[Options]
    ) -> str: ...
    @overload
    def generate(self, prompt: Sequence[str], max_tokens: int = ..., **options: Unpack[Options]) -> list[str]: ...
    @overload
    def generate(self, *, messages: Sequence[Message], max_tokens: int = ..., **options: Unpack[Options]) -> str: ...
    @overload
    def generate(
        self, *, messages: Sequence[Sequence[Message]], max_tokens: int = ..., **options: Unpack[Options]
    ) -> list[str]: ...
    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        max_tokens: int = 128,
        *,
        messages: Sequence[Message] | Sequence[Sequence[Message]] | None = None,
        **options: Unpack[Options],
    ) -> str | list[str]:
        """Generate the continuation of a prompt, without the prompt, or of each of several, as it would be alone.

        Args:
            prompt: Any text, or several. If one leaves none of the model's positions free, only its first token, which
                tells the model where texts begin, and its end are kept, with a warning.
            max_tokens: The most tokens of the continuation, which also ends where the model has no more positions.
            messages: Instead of a prompt, the messages of a chat, as `{"role": "user", "content": "Hello"}`, which the
                tokenizer's own template makes a prompt of; or several chats.
            options: How tokens are chosen, and what ends the text: see `Options`.

        Raises:
            AqError: for a prompt that is no string, or that has no tokens; for messages that are none, that the
                template refuses, or that the model has no positions for; if there is no template.
            TypeError: for an option that is unknown.
            ConfigError: for one that is out of its range, by name.
        """
        request = read_request(options, self.sampling, self.eos_ids)
        if messages is None:
            several = isinstance(prompt, Iterable) and not isinstance(prompt, str | Mapping)
            ids = self._prompts(cast("Sequence[str]", prompt if several else [prompt]))
        else:
            self._check_no_prompt(prompt)
            several = isinstance(messages, Sequence) and messages and not isinstance(messages[0], Mapping | str)
            ids = self._chats(cast("Sequence[Sequence[Message]]", messages if several else [messages]))
            request = request._replace(ends=self._ends_of_messages())
        found = self._texts(*self._fit(ids, max_tokens), request)
        return found if several else found[0]

    def stream(
        self,
        prompt: str | None = None,
        max_tokens: int = 128,
        *,
        messages: Sequence[Message] | None = None,
        **options: Unpack[Options],
    ) -> Iterator[str]:
        """Generate as `generate`, and yield the text as it comes: after each token the characters that are certain."""
        request = read_request(options, self.sampling, self.eos_ids)
        if messages is None:
            ids = self._prompts([cast(str, prompt)])
        else:
            self._check_no_prompt(prompt)
            ids = self._chats([messages])
            request = request._replace(ends=self._ends_of_messages())
        return self._stream(*self._fit(ids, max_tokens), request)

    def _prompts(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._tokenize(text, "generate: the prompt") for text in texts]

    def _chats(self, chats: Sequence[Sequence[Message]]) -> list[list[int]]:
        """Render chats and tokenize them; the template has the special tokens that belong there.

        Raises:
            AqError: as `generate`.
        """
        if self.template is None:
            raise AqError("generate: the tokenizer has no chat template; wanted a prompt instead of messages")
        texts = [self.template.render(messages) for messages in chats]
        vocabulary, limit = self.model.config.vocab_size, self.model.config.max_position_embeddings
        found = tokenize_texts(self.tokenizer, texts, vocabulary, "generate: the chat", special_tokens=False)
        for each in found:
            if len(each.ids) >= limit:
                raise TooLongError(f"generate: the messages have {len(each.ids)} tokens; wanted at most {limit - 1}")
        return [each.ids for each in found]

    def _check_no_prompt(self, prompt: object) -> None:
        if prompt is not None:
            raise AqError("generate: found a prompt and messages; wanted one of them")

    def _ends_of_messages(self) -> tuple[int, ...]:
        """Return the ids that end a message: those that end a text, and the tokenizer's own."""
        own = self.tokenizer.token_to_id((self.template and self.template.tokens.get("eos_token")) or "")
        return self.eos_ids if own is None else (*self.eos_ids, own)

    @overload
    def generate_ids(self, ids: Sequence[int], max_tokens: int, **options: Unpack[Options]) -> list[int]: ...
    @overload
    def generate_ids(
        self, ids: Sequence[Sequence[int]], max_tokens: int, **options: Unpack[Options]
    ) -> list[list[int]]: ...
    def generate_ids(
        self, ids: Sequence[int] | Sequence[Sequence[int]], max_tokens: int, **options: Unpack[Options]
    ) -> list[int] | list[list[int]]:
        """Generate as `generate`, from token ids to the ids that follow, without the one that ends the text."""
        request = read_request(options, self.sampling, self.eos_ids)
        if request.stop:
            raise ConfigError(f"generate_ids: stop = {request.stop}; wanted none, as ids have no text: use generate")
        several = len(ids) > 0 and np.ndim(ids[0]) > 0
        given = cast("Sequence[Sequence[int]]", ids if several else [ids])
        prompts, counts = self._fit(given, max_tokens)
        found: list[list[int]] = [[] for _ in prompts]
        for pieces in self._pieces(prompts, counts, request):
            for row, tokens in zip(found, pieces, strict=True):
                row += tokens
        ended = [row[: next((i for i, token in enumerate(row) if token in self.eos_ids), len(row))] for row in found]
        return ended if several else ended[0]

    def _fit(self, given: Sequence[Sequence[int]], max_tokens: int) -> tuple[list[list[int]], list[int]]:
        """Check prompts, cut those that are too long, and count the tokens that may follow each.

        Methods that are called from outside call it directly, so that the warning names the line that called them.
        """
        check_number("max_tokens", max_tokens, "generate")
        limit, prompts = self.model.config.max_position_embeddings, []
        for each in given:
            ids = check_token_ids(each, self.model.config.vocab_size, "generate").tolist()
            if not ids:
                raise AqError("generate: found no ids; wanted one or more, such as the one that begins a text")
            if len(ids) >= limit:
                kept = max(limit - max_tokens, limit // 2)
                note = f"the prompt has {len(ids)} tokens, of which the first and the last {kept - 1} are kept"
                warnings.warn(note, stacklevel=3)
                ids = [ids[0], *ids[len(ids) - kept + 1 :]]
            prompts.append(ids)
        return prompts, [min(int(max_tokens), limit - len(ids)) for ids in prompts]

    def _texts(self, prompts: list[list[int]], counts: list[int], request: Request) -> list[str]:
        texts = [Continuation(self.tokenizer, prompt, request.ends, request.stop) for prompt in prompts]
        found = [""] * len(prompts)
        for pieces in self._pieces(prompts, counts, request, texts):
            for i, tokens in enumerate(pieces):
                found[i] += texts[i].add(tokens)
        return [text + rest.end() for text, rest in zip(found, texts, strict=True)]

    def _stream(self, prompts: list[list[int]], counts: list[int], request: Request) -> Iterator[str]:
        text = Continuation(self.tokenizer, prompts[0], request.ends, request.stop)
        for (tokens,) in self._pieces(prompts, counts, request, [text], 1):
            if new := text.add(tokens):
                yield new
        if new := text.end():
            yield new

    def _pieces(
        self,
        prompts: list[list[int]],
        counts: list[int],
        request: Request,
        texts: Sequence[Continuation] = (),
        piece: int | None = None,
    ) -> Iterator[list[list[int]]]:
        """Yield tokens until all texts are over, which those that get them know."""
        if not prompts:
            return
        piece = piece or (STOPPING_PIECE if request.stop else PIECE)
        how = request.sampling, request.seed, request.cache, piece, request.prompt_cache
        for pieces in self._decoding.run(prompts, counts, *how):
            yield pieces
            if texts and all(text.over for text in texts):
                return

    def score(self, text: str) -> Float[Array, "tokens"]:
        """Compute the log-probability of each token of a text but the first, given those before it.

        Raises:
            AqError: for a text that is no string, for fewer than two tokens, and for more than the model takes.
        """
        return self._scoring.likelihoods(self._tokenize(text, "score: the text"))

    def log_probabilities(
        self, ids: Sequence[int], cache: CacheType = "float32"
    ) -> Float[np.ndarray, "following vocabulary"]:
        """Compute the log-probability of every token of the vocabulary, after each of these ids but the last.

        Args:
            ids: The ids.
            cache: The type in which keys and values are kept (see `Options`).

        Raises:
            AqError: for ids outside the vocabulary, for fewer than two, and for more than the model takes.
            ConfigError: for another type.
        """
        return self._scoring.probabilities(ids, cache)

    def _tokenize(self, text: str, what: str) -> list[int]:
        if not isinstance(text, str):
            raise AqError(f"{what} is {type(text).__name__}; wanted a string")
        return tokenize_texts(self.tokenizer, [text], self.model.config.vocab_size, what)[0].ids
