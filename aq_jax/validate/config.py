"""Describe a validation: conversions of a model, and what must come of each."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from aq_jax.config import ConversionConfig
from aq_jax.config.fields import build
from aq_jax.config.quantization import check_range
from aq_jax.config.schema import load_config, load_toml
from aq_jax.converters.huggingface import resolve_source
from aq_jax.core.dispatch import ACTIVATIONS
from aq_jax.errors import ConfigError
from aq_jax.quantizers.lookup import check_conversion

FLOAT = "float"  # the name of the table of float weights, which no case may have
MIN_TEXTS = 50  # texts that a model is judged by: of fewer, a first percentile says nothing


@dataclass(frozen=True, slots=True)
class Case:
    """A conversion, and what must come of it. A figure without a threshold is measured, and not judged.

    Args:
        name: name of the case and of its table; letters, digits, ".", "_" and "-".
        config: TOML file as `convert` takes it; its output is written into the validation's folder.
        set: assignments such as "quantization.group_size=64", which go before the file.
        activations: as in `load_model`, which chooses them by the table where this is left out.
        at_least: thresholds by the path of a figure in the case's report, such as "outputs.cosine.mean"; nested tables,
            as TOML makes them of dotted keys, mean the same.
        at_most: thresholds likewise.

    Raises:
        ConfigError: for a bad name, activations that do not exist, and thresholds that no number reaches or misses.

    >>> Case("int8", "configs/minilm_int8.toml", at_least={"outputs": {"cosine": {"mean": 0.9993}}}).at_least
    {'outputs.cosine.mean': 0.9993}
    """

    name: str
    config: str
    set: tuple[str, ...] = ()
    activations: str | None = None
    at_least: Mapping[str, Any] = field(default_factory=dict)
    at_most: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "set", tuple(self.set))
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.name) or self.name == FLOAT:
            raise ConfigError(f"name = {self.name!r}: wanted letters, digits, '.', '_' and '-', and not {FLOAT!r}")
        if self.activations not in (None, *ACTIVATIONS):
            raise ConfigError(f"activations = {self.activations!r}: wanted one of {', '.join(ACTIVATIONS)}")
        for table in ("at_least", "at_most"):
            object.__setattr__(self, table, _flat(getattr(self, table), table))


def _flat(thresholds: object, table: str) -> dict[str, float]:
    """Check the thresholds of a table, and key them by dotted paths."""
    if not isinstance(thresholds, Mapping):
        raise ConfigError(f"{table} = {thresholds!r}: wanted a table of figures, such as outputs.cosine.mean = 0.99")
    found: dict[str, float] = {}
    for key, value in thresholds.items():
        nested = isinstance(value, Mapping)
        for path, number in _flat(value, f"{table}.{key}").items() if nested else [("", value)]:
            if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) <= sys.float_info.max:
                raise ConfigError(f"{table}.{key} = {number!r}: wanted a finite number")
            whole = f"{key}.{path}" if nested else key
            if whole in found:
                raise ConfigError(f"{table}.{whole}: found it more than once")
            found[whole] = number
    return found


@dataclass(frozen=True, slots=True)
class Peer:
    """What another library is known to reach with the same model, to be drawn beside the cases. It is not measured.

    Args:
        name: name of the library and of how it quantized.
        bits_per_weight: bits of codes, scales and zero points, over the weights.
        accuracy: mean cosine of the outputs, of a language model the Kullback-Leibler divergence in nats a token.

    Raises:
        ConfigError: for numbers that cannot be drawn.

    >>> Peer("torchao 4 bits, groups of 128", 4.28, 0.9546).accuracy
    0.9546
    """

    name: str
    bits_per_weight: float
    accuracy: float

    def __post_init__(self) -> None:
        if not 0 < self.bits_per_weight <= 64:
            raise ConfigError(f"bits_per_weight = {self.bits_per_weight!r}: wanted more than 0, and 64 at most")
        if not abs(self.accuracy) < 1e6:
            raise ConfigError(f"accuracy = {self.accuracy!r}: wanted a mean cosine or a divergence")


@dataclass(frozen=True, slots=True)
class ValidationConfig:
    """Say what `aq-jax validate` does.

    Args:
        cases: at least one, all of them of the same model.
        folder: folder of tables and reports.
        text: file of UTF-8 text, a sentence a line, by which models are judged. Default: English prose of Python's own
            documentation. Lines that a case calibrates or trains on are left out.
        sentences: number of lines that are drawn from the others, at most.
        seed: random seed of the draw.
        joined: whether lines that follow each other are joined to windows of `max_tokens` tokens, of which `sentences`
            are drawn, as language models are judged (see `CalibrationConfig`).
        max_tokens: number of tokens of such a window.
        set: assignments such as "calibration.sentences=64" for the conversions of all cases; those of a case go before.
        labels: file of pairs of sentences with a score, for Spearman's correlation: the STS benchmark's tab-separated
            rows, or a table (commas or tabs, quoted as csv has it) whose first row names the columns.
        label_columns: names of the columns of the first sentence, the second, and the score.
        peers: what other libraries are known to reach.

    Raises:
        ConfigError: for numbers out of their range, and cases of one name.

    >>> ValidationConfig((Case("int8", "configs/minilm_int8.toml"),)).sentences
    400
    """

    cases: tuple[Case, ...]
    folder: str = "build/validation"
    text: str = ""
    sentences: int = 400
    seed: int = 0
    joined: bool = False
    max_tokens: int = 512
    set: tuple[str, ...] = ()
    labels: str = ""
    label_columns: tuple[str, ...] = ("sentence1", "sentence2", "score")
    peers: tuple[Peer, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "label_columns", tuple(self.label_columns))
        object.__setattr__(self, "set", tuple(self.set))
        check_range(self, sentences=(MIN_TEXTS, 2**20), seed=(0, 2**32 - 1), max_tokens=(16, 2**20))
        for key in ("folder", "text", "labels"):
            if "\0" in getattr(self, key) or (key == "folder" and not self.folder):
                raise ConfigError(
                    f"{key} = {getattr(self, key)!r}: wanted the name of a {'folder' if key == 'folder' else 'file'}"
                )
        if len(self.label_columns) != 3 or len(set(self.label_columns)) != 3:
            raise ConfigError(f"label_columns = {list(self.label_columns)}: wanted two sentences' and the score's")
        plain = {field.name: field.default for field in fields(self)}
        for key, needs in (("label_columns", "labels"), ("max_tokens", "joined")):
            if getattr(self, key) != plain[key] and not getattr(self, needs):
                raise ConfigError(f"{key} = {getattr(self, key)!r}: without effect, as there is no {needs}")
        names = [case.name.casefold() for case in self.cases]  # some file systems do not tell a from A
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"case {twice[0]!r}: found more than one of that name; wanted a table for each")
        if not names:
            raise ConfigError("found no [[case]]; wanted one or more, with name and config")


def load_validation(path: str | Path, sets: tuple[str, ...] = ()) -> ValidationConfig:
    """Read a TOML file that describes a validation.

    Args:
        path: the file.
        sets: assignments such as `sentences=100`, which go before the file.

    Raises:
        ConfigError: for a file that is no TOML, an unknown key (the known ones are listed), a wrong type.
        OSError: if the file cannot be read.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "v.toml")
    >>> _ = path.write_text('[[case]]\\nname = "int8"\\nconfig = "configs/minilm_int8.toml"')
    >>> load_validation(path, ("seed=1",)).cases[0].name
    'int8'
    """
    return load_toml(path, sets, _parse)


def _parse(tree: dict[str, Any], where: str) -> ValidationConfig:
    cases = tuple(_case(table, at) for table, at in _tables(tree, "case", where))
    peers = tuple(build(Peer, table, at) for table, at in _tables(tree, "peer", where))
    fields = (f.name for f in dataclasses.fields(ValidationConfig) if f.name not in ("cases", "peers"))
    known = (*fields, "case", "peer")
    return build(ValidationConfig, tree, where, known=known, cases=cases, peers=peers)


def _tables(tree: dict[str, Any], key: str, where: str) -> list[tuple[Any, str]]:
    """Take the [[key]] tables out of the tree, each with what errors begin with."""
    given = tree.pop(key, [])
    if not isinstance(given, list):
        raise ConfigError(f"{where}: {key} must be [[{key}]] tables, each with a name")
    return [(table, f"{where}: {key} {i + 1}") for i, table in enumerate(given)]


def _case(table: Any, where: str) -> Case:
    """Build a case; thresholds are checked by the case itself."""
    extra = {key: table.pop(key, {}) for key in ("at_least", "at_most")} if isinstance(table, dict) else {}
    return build(Case, table, where, known=tuple(f.name for f in dataclasses.fields(Case)), **extra)


def read_conversions(config: ValidationConfig) -> list[ConversionConfig]:
    """Read the conversion of each case, with the outputs in the validation's folder.

    Raises:
        ConfigError: for a config that cannot be read or quantizes nothing, and for cases of different models.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "int8.toml")
    >>> _ = path.write_text('source = "m"\\noutput = "m.arrow"\\n[quantization]\\nquant_type = "int8"')
    >>> Path(read_conversions(ValidationConfig((Case("a", str(path)),)))[0].output).name
    'a.arrow'
    """
    found: list[ConversionConfig] = []
    for case in config.cases:
        where = f"case {case.name!r}: config = {case.config!r}"
        try:
            conversion = load_config(case.config, config.set + case.set)
            check_conversion(conversion)
        except OSError as error:
            raise ConfigError(f"{where}: {error.strerror}; wanted a TOML file that `aq-jax convert` takes") from None
        except ValueError as error:  # a name that can be no file's, too
            raise ConfigError(f"{where}: {error}") from None
        if conversion.quantization is None:
            raise ConfigError(f"{where}: has no [quantization]: there is nothing to validate")
        output = Path(config.folder, case.name + Path(conversion.output).suffix)
        found.append(dataclasses.replace(conversion, output=str(output)))
        if resolve_source(conversion.source).resolve() != resolve_source(found[0].source).resolve():
            raise ConfigError(
                f"{where}: its source is {conversion.source!r}, that of case {config.cases[0].name!r} is "
                f"{found[0].source!r}; wanted one model: validate others by configs of their own"
            )
    return found
