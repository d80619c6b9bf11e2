"""Draw the texts and labelled pairs that models are judged by: no case has calibrated or trained on them."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from aq_jax.calibration.allocation import JUDGE_FACTOR
from aq_jax.calibration.text import Text, read_text
from aq_jax.config import CalibrationConfig, ConversionConfig
from aq_jax.config.schema import load_plan
from aq_jax.errors import ConfigError
from aq_jax.quantizers.lookup import calibrated
from aq_jax.validate.config import MIN_TEXTS, ValidationConfig

MAX_LINES = 2**24  # lines, as many as a text may be asked for
MIN_PAIRS = 10
# Texts share headings: lines of a window may have been seen that in a row have fewer letters, up to a share of all.
HEADING, SHARED = 60, 0.1
STS = (5, 6, 4)  # columns of the STS benchmark's rows, which no row names


@dataclass(frozen=True)
class Pairs:
    """Pairs of sentences that people have scored.

    Args:
        name: name of the file.
        rows: pairs as (first, second, score).
        excluded: number of other pairs, with a sentence that a case has seen.
    """

    name: str
    rows: tuple[tuple[str, str, float], ...]
    excluded: int


@dataclass(frozen=True)
class HeldOut:
    """Lines and pairs that models are judged by.

    Args:
        text: the lines.
        excluded: number of other lines, which a case has seen.
        pairs: labelled pairs, if there are labels.
    """

    text: Text
    excluded: int
    pairs: Pairs | None


def held_out(config: ValidationConfig, conversions: Sequence[ConversionConfig]) -> HeldOut:
    """Draw the lines that no case has seen: the same for all, so that cases compare.

    Raises:
        ConfigError: for files that cannot be read as text or labels, and if fewer lines are left than can be judged by.

    >>> from aq_jax.validate.config import Case
    >>> config = ValidationConfig((Case("int8", "int8.toml"),), sentences=50)
    >>> found = held_out(config, [ConversionConfig("m", "m.parquet")])
    >>> found.text.name, len(found.text.lines), found.excluded
    ('pydoc_data.topics', 50, 0)
    """
    seen = {line for conversion in conversions for line in seen_lines(conversion)}
    try:
        wanted = CalibrationConfig(
            config.text, sentences=MAX_LINES, seed=config.seed, joined=config.joined, max_tokens=config.max_tokens
        )
        text = read_text(wanted)
    except ConfigError as error:
        raise ConfigError(str(error).removeprefix("calibration.")) from None
    left = [line for line in text.lines if not _is_seen(line, seen)]
    if len(left) < MIN_TEXTS:
        raise ConfigError(
            f"text = {config.text!r}: {len(left)} of {len(text.lines)} lines are left on which no case calibrates or "
            f"trains; wanted {MIN_TEXTS} or more: name another text, or a longer one, or limit calibration.sentences "
            "and train.sentences by a case's set"
        )
    pairs = read_pairs(config.labels, config.label_columns, seen) if config.labels else None
    chosen = dataclasses.replace(text, lines=tuple(left[: config.sentences]))
    return HeldOut(chosen, len(text.lines) - len(left), pairs)


def seen_lines(conversion: ConversionConfig) -> set[str]:
    """List the lines that a conversion solves, plans or trains by, or picks its best weights by, in lower case.

    Each of those takes the next lines of one draw, so that the longest beginning that they can take holds them all. Of
    joined lines the list holds each line, and each window as a whole.

    >>> len(seen_lines(ConversionConfig("m", "m.parquet")))
    0
    """
    policy = conversion.quantization
    if policy is not None and conversion.plan:
        policy = dataclasses.replace(policy, overrides=load_plan(conversion.plan) + policy.overrides)
    if policy is None or not calibrated(policy):
        return set()
    calibration, train = conversion.calibration, conversion.train
    beside = (1 + JUDGE_FACTOR) * conversion.allocate.sentences if conversion.allocate else 0
    if train is not None:
        beside += train.held_out + train.sentences
    taken = dataclasses.replace(calibration, sentences=min(calibration.sentences + beside, MAX_LINES))
    drawn = read_text(taken).lines
    return {plain for line in drawn for part in (line, *line.split("\n")) if (plain := _plain(part))}


def _is_seen(line: str, seen: Collection[str]) -> bool:
    """Tell whether a line was seen; or of a window: itself, or more of its lines than headings that texts share."""
    parts = [plain for part in line.split("\n") if (plain := _plain(part))]
    runs = [sum(map(len, run)) for is_in, run in groupby(parts, lambda part: part in seen) if is_in]
    return _plain(line) in seen or max(runs, default=0) >= HEADING or sum(runs) > SHARED * sum(map(len, parts))


def _plain(line: str) -> str:
    return " ".join(line.casefold().split())


def read_pairs(path: str, columns: Sequence[str], seen: Collection[str] = ()) -> Pairs:
    """Read pairs of sentences with a score, without those that have a sentence in `seen`.

    Args:
        path: file of rows as the STS benchmark has them (tabs, no header, quotes are letters), or of a table (commas or
            tabs, quoted as csv has it) whose first row holds `columns`.
        columns: names of the columns of the first sentence, the second, and the score.
        seen: sentences to leave out, in lower case, blanks single.

    Raises:
        ConfigError: for a file that is neither, a score that is no number, and too few or equal scores.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "pairs.csv")
    >>> _ = path.write_text("a,b,score\\n" + "".join(f"one {i},two,{i}\\n" for i in range(12)))
    >>> len(read_pairs(str(path), ["a", "b", "score"]).rows)
    12
    """
    where = f"labels = {path!r}"
    try:
        text = Path(path).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{where}: {said}; wanted a UTF-8 file of sentence pairs with scores") from None
    first_line = text.partition("\n")[0]
    tabs, names = "\t" in first_line, {name.strip('"') for name in first_line.split("\t")}
    # In the benchmark's rows quotes are letters. A table that names its columns is quoted as csv has it.
    quoting = csv.QUOTE_NONE if tabs and not names >= set(columns) else csv.QUOTE_MINIMAL
    reader = csv.reader(io.StringIO(text), delimiter="\t" if tabs else ",", quoting=quoting, strict=True)
    wanted = f"wanted a first row with {', '.join(columns)}, or the STS benchmark's tab-separated rows"
    places, found, excluded = None, [], 0
    try:
        for row in reader:
            at = f"{where}, line {reader.line_num}"
            if places is None:
                named = set(columns) <= set(row)
                if not named and not (tabs and len(row) > max(STS)):
                    raise ConfigError(f"{where}: its first row is {row[:9]}; {wanted}, or other label_columns")
                places = [row.index(column) for column in columns] if named else STS
                if named:
                    continue
            if not row:
                continue
            if len(row) <= max(places):
                raise ConfigError(f"{at}: found {len(row)} columns; wanted {max(places) + 1} or more")
            first, second, score = (row[place] for place in places)
            if _number(score) is None:
                raise ConfigError(f"{at}: the score is {score!r}; wanted a number")
            if _plain(first) in seen or _plain(second) in seen:
                excluded += 1
            else:
                found.append((first, second, float(score)))
    except csv.Error as error:
        raise ConfigError(f"{where}, line {reader.line_num}: {error}; {wanted}") from None
    if len(found) < MIN_PAIRS or len({score for *_, score in found}) < 2:
        raise ConfigError(
            f"{where}: {len(found)} pairs are left on which no case calibrates or trains; wanted "
            f"{MIN_PAIRS} or more, and scores that differ"
        )
    return Pairs(Path(path).name, tuple(found), excluded)


def _number(text: str) -> float | None:
    try:
        return value if math.isfinite(value := float(text)) else None
    except ValueError:
        return None
