"""Draw the text that a model runs on, and pad its token ids to batches of few shapes."""

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
from aq_jax.nn.tokenizer import set_truncation, tokenize_texts

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BUILT_IN = "pydoc_data.topics"
BATCH_TOKENS = 1024  # with padding
BATCH_SHAPES = 3  # each shape is several programs
LETTERS = 5  # of a token, hardly ever more: joined lines have enough of them to fill a window of tokens
CUT_SHARE = 0.1  # of the texts, at most, are cut where all run in one shape
Batch = tuple[np.ndarray, np.ndarray]  # ids [rows, tokens], lengths [rows]; a row of padding only has length 0


@dataclass(frozen=True)
class Text:
    """Lines that were drawn from a text.

    Args:
        name: The name of the file, or of the built-in text.
        lines: The lines in the order in which they were drawn.
        seed: The seed of the draw.
    """

    name: str
    lines: tuple[str, ...]
    seed: int

    def record(self) -> dict[str, Any]:
        """Build the record for a table's metadata: enough to tell whether another text is the same."""
        digest = blake3("\n".join(self.lines).encode("utf-8", "surrogatepass")).hexdigest()
        return {"text": self.name, "sentences": len(self.lines), "digest": digest, "seed": self.seed}


def read_text(config: CalibrationConfig) -> Text:
    """Draw the lines that a config asks for; empty lines do not count, and equal ones count once.

    Of a config whose lines are joined, a line of the result is one piece of text, with line breaks.

    Raises:
        ConfigError: for a file that cannot be read, is not UTF-8, or has no line with text.

    >>> read_text(CalibrationConfig(sentences=2)).name
    'pydoc_data.topics'
    """
    name = Path(config.text).name if config.text else BUILT_IN
    raw = _read_lines(Path(config.text)) if config.text else built_in_sentences()
    if config.joined:
        raw = join_lines(raw, LETTERS * config.max_tokens)
    lines = list(dict.fromkeys(line for line in (each.strip() for each in raw) if line))
    if not lines:
        raise ConfigError(f"calibration.text = {config.text!r}: holds no text; wanted a sentence a line")
    drawn = np.random.default_rng(config.seed).permutation(len(lines))[: config.sentences]
    return Text(name, tuple(lines[i] for i in drawn), config.seed)


def join_lines(lines: Sequence[str], letters: int) -> list[str]:
    r"""Join lines that follow each other until a piece has so many letters; a shorter last piece is left out.

    >>> join_lines(["One.", "Two.", "Three.", "Four."], 8)
    ['One.\nTwo.', 'Three.\nFour.']
    """
    pieces, start, size = [], 0, 0
    for stop, line in enumerate(lines, 1):
        size += len(line)
        if size >= letters or (stop == len(lines) and not pieces):
            pieces.append("\n".join(lines[start:stop]))
            start, size = stop, 0
    return pieces


def _read_lines(path: Path) -> list[str]:
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"calibration.text = {str(path)!r}: no such file; wanted UTF-8, a sentence a line") from None
    except (OSError, UnicodeDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"calibration.text = {str(path)!r}: {said}; wanted UTF-8, a sentence a line") from None
    return text.split("\n")


def built_in_sentences() -> list[str]:
    """List English sentences of Python's reference manual, which every Python carries: prose, but about one subject."""
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


def tokenize(
    lines: Sequence[str], tokenizer: Tokenizer, max_tokens: int, vocabulary: int, prompt: str = ""
) -> tuple[list[list[int]], int]:
    """Tokenize lines, with special tokens and the prompt before each, cut at `max_tokens`; count those that were cut.

    Raises:
        AqError: for a line with a token that the model does not have.
    """
    set_truncation(tokenizer, max_tokens)
    found = tokenize_texts(tokenizer, [prompt + line for line in lines], vocabulary, "calibration")
    return [encoding.ids for encoding in found if encoding.ids], sum(bool(each.overflowing) for each in found)


def pad_batches(ids: Sequence[Sequence[int]]) -> list[Batch]:
    """Pad all texts to batches of about BATCH_TOKENS tokens, in BATCH_SHAPES shapes at most.

    >>> [ids.shape for ids, _ in pad_batches([[1, 2, 3]] * 300 + [[1] * 50] * 20)]
    [(341, 3), (20, 50)]
    """
    out, shortest_first, start = [], sorted(ids, key=len), 0
    for length in choose_padded_lengths([len(text) for text in ids], BATCH_SHAPES):
        stop = bisect.bisect_right(shortest_first, length, key=len)
        rows = max(1, BATCH_TOKENS // length)
        out += [pad_batch(shortest_first[i : min(i + rows, stop)], rows, length) for i in range(start, stop, rows)]
        start = stop
    return out


def choose_common_length(lengths: Sequence[int], longest: int) -> int:
    """Choose the one length to which all texts are padded, or cut: nine in ten fit.

    >>> choose_common_length([8] * 18 + [90, 90], 128)
    16
    """
    return padded_length(int(np.quantile(lengths, 1 - CUT_SHARE, method="lower")), longest)


def pad_to_one_shape(ids: Sequence[Sequence[int]], length: int) -> list[Batch]:
    """Pad texts to batches of one shape, cut at its length; empty texts fill up the last batch.

    >>> [(batch.shape, lengths.sum()) for batch, lengths in pad_to_one_shape([[1, 2, 3]] * 70, 16)]
    [((64, 16), np.int64(192)), ((64, 16), np.int64(18))]
    """
    rows = max(1, BATCH_TOKENS // length)
    return [pad_batch(ids[start : start + rows], rows, length) for start in range(0, len(ids), rows)]


def pad_batch(texts: Sequence[Sequence[int]], rows: int, length: int) -> Batch:
    """Pad texts to one batch, cut at its length; the remaining rows are empty texts."""
    ids, lengths = np.zeros((rows, length), np.int32), np.zeros(rows, np.int32)
    for row, text in enumerate(texts):
        lengths[row] = min(len(text), length)
        ids[row, : lengths[row]] = text[:length]
    return ids, lengths


def choose_padded_lengths(lengths: Sequence[int], shapes: int) -> list[int]:
    """Choose the padded lengths, so many at most, that need the least padding; in rising order.

    >>> choose_padded_lengths([3, 3, 3, 4, 9, 9, 50], 3)
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
