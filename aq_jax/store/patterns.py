"""Match names with regular expressions that come from a file, in time that is proportional to the names."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from aq_jax.errors import FormatError


def names_matching(pattern: str, names: Sequence[str]) -> frozenset[str]:
    """Return the names at whose beginning a pattern matches.

    Python's own engine takes exponential time for some patterns; RE2 does not, and knows neither look-arounds nor
    references to groups.

    Raises:
        FormatError: for a pattern that RE2 does not know.

    >>> sorted(names_matching(r"layers[.][01][.]", ["layers.1.q_proj", "layers.2.q_proj", "lm_head"]))
    ['layers.1.q_proj']
    """
    try:
        options = pc.MatchSubstringOptions(f"^(?:{pattern})")
        found = pc.call_function("match_substring_regex", [pa.array(names, pa.string())], options)
    except (pa.ArrowException, ValueError) as error:
        raise FormatError(
            f"the pattern {pattern[:80]!r} is not understood ({str(error)[:200]}); wanted one without look-arounds"
        ) from None
    return frozenset(name for name, hit in zip(names, found.to_pylist(), strict=True) if hit)
