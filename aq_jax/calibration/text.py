"""Text that a model is run on, and token ids in batches of few shapes."""

from __future__ import annotations

import bisect
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3

from aq_jax.config import CalibrationConfig
from aq_jax.errors import ConfigError
from aq_jax.nn.compiled import padded_length
from aq_jax.nn.tokenizer import cut_at, encoded

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BUILT_IN = "pydoc_data.topics"
TOKENS = 1024  # of a batch, padding counted
SHAPES = 3  # of batches; each is several programs
MOST_CUT = 0.1  # of the texts are cut for the sake of one shape
Batch = tuple[np.ndarray, np.ndarray]  # ids [rows, tokens], lengths [rows]; a row of padding only has length 0


@dataclass(frozen=True)
class Text:
    """Lines that were drawn from a text.

    Args:
        name: where they are from.
        lines: in the order in which they were drawn.
        seed: of the draw.
    """

    name: str
    lines: tuple[str, ...]
    seed: int

    def record(self) -> dict[str, Any]:
        """What a table's metadata says of the text: enough to tell whether another is the same."""
        digest = blake3("\n".join(self.lines).encode("utf-8", "surrogatepass")).hexdigest()
        return {"text": self.name, "sentences": len(self.lines), "digest": digest, "seed": self.seed}


def read_text(config: CalibrationConfig) -> Text:
    """Draw the lines that a config asks for; empty ones do not count, and equal ones count once.

    Raises:
        ConfigError: for a file that is not there, is no UTF-8, or has no line with text.

    >>> read_text(CalibrationConfig(sentences=2)).name
    'pydoc_data.topics'
    """
    name = Path(config.text).name if config.text else BUILT_IN
    lines = _lines(Path(config.text)) if config.text else built_in_sentences()
    if not lines:
        raise ConfigError(f"calibration.text = {config.text!r}: holds no line of text; wanted a sentence a line")
    drawn = np.random.default_rng(config.seed).permutation(len(lines))[: config.sentences]
    return Text(name, tuple(lines[i] for i in drawn), config.seed)


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"calibration.text = {str(path)!r}: no such file; wanted UTF-8, a sentence a line") from None
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise ConfigError(f"calibration.text = {str(path)!r}: {error}; wanted UTF-8, a sentence a line") from None
    return list(dict.fromkeys(line for line in (raw.strip() for raw in text.split("\n")) if line))


def built_in_sentences() -> list[str]:
    """English sentences of Python's reference manual, which every Python carries: prose, but about one subject."""
    from pydoc_data.topics import topics

    found: list[str] = []
    for topic in topics.values():
        for paragraph in re.split(r"\n\s*\n", topic):
            prose = " ".join(paragraph.split())
            found += [s for s in re.split(r"(?<=[.?!])\s+(?=[A-Z])", prose) if _is_prose(s)]
    return list(dict.fromkeys(found))


def _is_prose(sentence: str) -> bool:
    letters = sum(c.isalpha() or c == " " for c in sentence)
    return 5 <= len(sentence.split()) <= 60 and letters > 0.93 * len(sentence) and sentence[0].isupper()


def tokenized(
    lines: Sequence[str], tokenizer: Tokenizer, max_tokens: int, vocabulary: int, prompt: str = ""
) -> list[list[int]]:
    """Ids of each line, with special tokens and the prompt before it, cut at `max_tokens`.

    Raises:
        AqError: for a line with a token that is none of the model's.
    """
    cut_at(tokenizer, max_tokens)
    found = encoded(tokenizer, [prompt + line for line in lines], vocabulary, "calibration")
    return [encoding.ids for encoding in found if encoding.ids]


def padded_batches(ids: Sequence[Sequence[int]]) -> list[Batch]:
    """All ids in batches of about TOKENS tokens, of SHAPES shapes at most.

    >>> [ids.shape for ids, _ in padded_batches([[1, 2, 3]] * 300 + [[1] * 50] * 20)]
    [(341, 3), (20, 50)]
    """
    out, shortest_first, start = [], sorted(ids, key=len), 0
    for length in padded_lengths([len(text) for text in ids], SHAPES):
        stop = bisect.bisect_right(shortest_first, length, key=len)
        rows = max(1, TOKENS // length)
        out += [padded(shortest_first[i : min(i + rows, stop)], rows, length) for i in range(start, stop, rows)]
        start = stop
    return out


def common_length(lengths: Sequence[int], longest: int) -> int:
    """The padded length that all texts are given: nine in ten fit.

    >>> common_length([8] * 18 + [90, 90], 128)
    16
    """
    return padded_length(int(np.quantile(lengths, 1 - MOST_CUT, method="lower")), longest)


def one_shape(ids: Sequence[Sequence[int]], length: int) -> list[Batch]:
    """Texts in batches of one shape, cut at its length; the last one is filled up with empty texts.

    >>> [(batch.shape, lengths.sum()) for batch, lengths in one_shape([[1, 2, 3]] * 70, 16)]
    [((64, 16), np.int64(192)), ((64, 16), np.int64(18))]
    """
    rows = max(1, TOKENS // length)
    return [padded(ids[start : start + rows], rows, length) for start in range(0, len(ids), rows)]


def padded(texts: Sequence[Sequence[int]], rows: int, length: int) -> Batch:
    """Texts in one batch, cut at its length; rows that are left are empty texts."""
    ids, lengths = np.zeros((rows, length), np.int32), np.zeros(rows, np.int32)
    for row, text in enumerate(texts):
        lengths[row] = min(len(text), length)
        ids[row, : lengths[row]] = text[:length]
    return ids, lengths


def padded_lengths(lengths: Sequence[int], shapes: int) -> list[int]:
    """So many lengths, at most, to which these are padded with the least padding; rising.

    >>> padded_lengths([3, 3, 3, 4, 9, 9, 50], 3)
    [4, 9, 50]
    """
    counts = sorted(Counter(lengths).items())
    before_each = np.cumsum([0, *(count for _, count in counts)]).tolist()
    # best[j]: the fewest tokens for the j shortest lengths, and the padded lengths that need so few.
    best: list[tuple[int, list[int]]] = [(0, []), *[(sys.maxsize, [])] * len(counts)]
    for _ in range(shapes):
        before = best.copy()
        for j, (longest, _) in enumerate(counts, 1):
            for i in range(j):
                if before[i][0] < sys.maxsize:
                    tokens = before[i][0] + longest * (before_each[j] - before_each[i])
                    best[j] = min(best[j], (tokens, [*before[i][1], longest]))
    return best[-1][1]
