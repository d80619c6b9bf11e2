"""Check the options of a call that generates text."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import NamedTuple, TypedDict, cast

from aq_jax.errors import ConfigError
from aq_jax.nn.continuation import check_stop
from aq_jax.nn.prompt_cache import PromptCache
from aq_jax.nn.sampling import Sampling, check_number
from aq_jax.ops import CacheType, check_cache_type

_OF_DRAWS = ("top_k", "top_p", "min_p", "seed")


class Options(TypedDict, total=False):
    """The options of a call that say how tokens are chosen (see `Sampling`); the model's defaults otherwise.

    Args:
        seed: The random seed, 0 by default: the same seed draws the same text, in a batch as alone.
        stop: A string that ends the text, which is cut before it, or several. One that is a special token ends it too.
        cache: The type in which keys and values of tokens are kept: "float32" (the default), "bfloat16", or "int8" with
            a scale a head and token.
        prompt_cache: What keeps the text of one call for the next, which reads only what is new (see `PromptCache`);
            of a single prompt.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int
    stop: str | Sequence[str] | None
    cache: CacheType
    prompt_cache: PromptCache | None


class Request(NamedTuple):
    """The checked options of a call."""

    sampling: Sampling
    seed: int
    stop: tuple[str, ...]
    cache: CacheType
    prompt_cache: PromptCache | None
    ends: tuple[int, ...]


def read_request(options: Options, sampling: Sampling, ends: tuple[int, ...]) -> Request:
    """Check the options of a call.

    Args:
        options: The options.
        sampling: How tokens are chosen where they do not say.
        ends: The ids that end a text.

    Options that say how to draw, where nothing is drawn and no temperature is given, are warned of.

    Raises:
        TypeError: for an option that is unknown.
        ConfigError: for one that is out of its range, by name.

    >>> read_request({"temperature": 0.5, "stop": "END"}, Sampling(top_k=4), (2,))
    Request(sampling=Sampling(temperature=0.5, top_k=4, ...), seed=0, stop=('END',), cache='float32', ..., ends=(2,))
    """
    given = dict(options)
    seed, stop, cache = given.pop("seed", 0), given.pop("stop", ()), given.pop("cache", "float32")
    prompt_cache = given.pop("prompt_cache", None)
    names = [field.name for field in dataclasses.fields(Sampling)]
    if unknown := sorted(given.keys() - set(names)):
        known = ", ".join((*names, "seed", "stop", "cache", "prompt_cache"))
        raise TypeError(f"generate: unknown {', '.join(unknown)}; known are {known}")
    chosen = dataclasses.replace(sampling, **given).check("generate")  # type: ignore[reportArgumentType]
    check_number("seed", seed, "generate")
    idle = [key for key in _OF_DRAWS if key in options]
    if idle and not chosen.temperature and "temperature" not in options:
        text = f"generate: {', '.join(idle)}: without effect at temperature 0, which takes the likeliest token"
        warnings.warn(text, stacklevel=3)
    check_cache_type(cast(str, cache))
    if not isinstance(prompt_cache, PromptCache | None):
        raise ConfigError(f"generate: prompt_cache is {type(prompt_cache).__name__}; wanted a PromptCache")
    strings = check_stop(cast("str | Sequence[str] | None", stop), "generate")
    return Request(chosen, int(cast(int, seed)), strings, cast(CacheType, cache), prompt_cache, ends)
