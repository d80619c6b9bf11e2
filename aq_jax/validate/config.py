"""What a validation is asked for: models by their conversion configs, and what each of them must reach."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aq_jax.config import ConversionConfig
from aq_jax.config.schema import build, load_config, load_toml
from aq_jax.converters.huggingface import resolve_source
from aq_jax.core.dispatch import ACTIVATIONS
from aq_jax.errors import ConfigError
from aq_jax.quantizers.lookup import check_conversion

FLOAT = "float"  # the name of the table of float weights, which no case may have
FEWEST = 50  # texts that a model is judged by: of fewer, a first percentile says nothing


@dataclass(frozen=True, slots=True)
class Case:
    """A conversion, and what must come of it. Thresholds that are left out are measured, and not judged.

    Args:
        name: of the case, and of its table; letters, digits, ".", "_" and "-".
        config: a TOML file as `convert` takes it; its output is written into the validation's folder.
        set: assignments such as "quantization.group_size=64", which go before the file.
        activations: as in `load_model`, which chooses them by the table where this is left out.
        min_ratio_float32: how many times smaller than the weights in float32.
        min_ratio_float16: than the weights in float16.
        max_bits_per_weight: all bytes of the file, over all parameters.
        max_metadata_share: of the file: what is neither codes, floats, scales nor zero points.
        min_weight_cosine: mean over the quantized tensors.
        min_weight_cosine_worst: of the tensor that fits worst.
        max_weight_error: squared error over squared weights, mean over the quantized tensors by their parameters.
        max_weight_error_worst: of the tensor that fits worst.
        max_weight_error_embeddings: mean over the tensors of this kind, as all that follow, by their parameters.
        max_weight_error_attention: see above.
        max_weight_error_feed_forward: see above.
        max_weight_error_norms: see above.
        max_weight_error_other: see above.
        min_output_cosine: between embeddings, mean over the texts (encoders).
        min_output_cosine_p1: first percentile over the texts (encoders).
        min_output_cosine_worst: of the text that fits worst (encoders).
        max_output_cosine_std: standard deviation over the texts (encoders).
        max_spearman_loss: Spearman x 100 with the labels: the float model's less the quantized one's (encoders).
        max_perplexity_ratio: the quantized model's, over the float one's (language models).
        max_kl: Kullback-Leibler divergence of the float model's next token from the quantized one's, in nats a token.
        min_same_top: share of the tokens after which both models find the same one likeliest.
        max_convert_seconds: to convert, calibration and training with it; depends on the machine.
        max_load_seconds: to open, read, check and dequantize the table; depends on the machine.
        max_peak_memory_mb: of the process that converted, in 10^6 bytes; depends on the machine.

    Raises:
        ConfigError: for a name that is none, and for thresholds that no number reaches or misses.

    >>> Case("int8", "configs/minilm_int8.toml", min_output_cosine=0.9993).thresholds
    {'min_output_cosine': 0.9993}
    """

    name: str
    config: str
    set: tuple[str, ...] = ()
    activations: str | None = None
    min_ratio_float32: float | None = None
    min_ratio_float16: float | None = None
    max_bits_per_weight: float | None = None
    max_metadata_share: float | None = None
    min_weight_cosine: float | None = None
    min_weight_cosine_worst: float | None = None
    max_weight_error: float | None = None
    max_weight_error_worst: float | None = None
    max_weight_error_embeddings: float | None = None
    max_weight_error_attention: float | None = None
    max_weight_error_feed_forward: float | None = None
    max_weight_error_norms: float | None = None
    max_weight_error_other: float | None = None
    min_output_cosine: float | None = None
    min_output_cosine_p1: float | None = None
    min_output_cosine_worst: float | None = None
    max_output_cosine_std: float | None = None
    max_spearman_loss: float | None = None
    max_perplexity_ratio: float | None = None
    max_kl: float | None = None
    min_same_top: float | None = None
    max_convert_seconds: float | None = None
    max_load_seconds: float | None = None
    max_peak_memory_mb: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "set", tuple(self.set))
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.name) or self.name == FLOAT:
            raise ConfigError(f"name = {self.name!r}: wanted letters, digits, '.', '_' and '-', and not {FLOAT!r}")
        if self.activations not in (None, *ACTIVATIONS):
            raise ConfigError(f"activations = {self.activations!r}: wanted one of {', '.join(ACTIVATIONS)}")
        for key, value in self.thresholds.items():
            if not math.isfinite(value):
                raise ConfigError(f"{key} = {value!r}: wanted a finite number")

    @property
    def thresholds(self) -> dict[str, float]:
        """Those that are given."""
        names = [f.name for f in dataclasses.fields(self) if f.name.startswith(("min_", "max_"))]
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True, slots=True)
class ValidationConfig:
    """What `aq-jax validate` does.

    Args:
        cases: at least one, all of them of the same model.
        folder: where tables and reports are written.
        text: a file of UTF-8 text, a sentence a line, by which models are judged. Default: English prose of Python's
            own documentation. Lines that a case calibrates or trains on are left out.
        sentences: how many lines are drawn from the others, at most.
        seed: of the draw.
        labels: a file of pairs of sentences with a score, for Spearman's correlation: the STS benchmark's tab-separated
            rows, or a table (commas or tabs, quoted as csv has it) whose first row names the columns.
        label_columns: those of the first sentence, the second, and the score.

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
    labels: str = ""
    label_columns: tuple[str, ...] = ("sentence1", "sentence2", "score")

    def __post_init__(self) -> None:
        object.__setattr__(self, "label_columns", tuple(self.label_columns))
        for key, least, most in (("sentences", FEWEST, 2**20), ("seed", 0, 2**32 - 1)):
            if not least <= getattr(self, key) <= most:
                raise ConfigError(f"{key} = {getattr(self, key)!r}: wanted {least} to {most}")
        for key in ("folder", "text", "labels"):
            if "\0" in getattr(self, key) or (key == "folder" and not self.folder):
                raise ConfigError(f"{key} = {getattr(self, key)!r}: wanted the name of a {key == 'folder' or 'file'}")
        if len(self.label_columns) != 3 or len(set(self.label_columns)) != 3:
            raise ConfigError(f"label_columns = {list(self.label_columns)}: wanted two sentences' and the score's")
        names = [case.name.casefold() for case in self.cases]  # some file systems do not tell a from A
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"case {twice[0]!r}: found more than one of that name; wanted a table for each")
        if not names:
            raise ConfigError("found no [[case]]; wanted one or more, with name and config")


def load_validation(path: str | Path, sets: tuple[str, ...] = ()) -> ValidationConfig:
    """Read a TOML file that describes a validation.

    Args:
        path: of the file.
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
    given = tree.pop("case", [])
    if not isinstance(given, list):
        raise ConfigError(f"{where}: case must be [[case]] tables, one for each conversion")
    cases = tuple(build(Case, table, f"{where}: case {i + 1}") for i, table in enumerate(given))
    known = (*(f.name for f in dataclasses.fields(ValidationConfig) if f.name != "cases"), "case")
    return build(ValidationConfig, tree, where, known=known, cases=cases)


def conversions(config: ValidationConfig) -> list[ConversionConfig]:
    """What each case asks `convert` for, with the outputs in the validation's folder.

    Raises:
        ConfigError: for a config that is none or quantizes nothing, naming the case, and for cases of different models.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "int8.toml")
    >>> _ = path.write_text('source = "m"\\noutput = "m.arrow"\\n[quantization]\\nquant_type = "int8"')
    >>> Path(conversions(ValidationConfig((Case("a", str(path)),)))[0].output).name
    'a.arrow'
    """
    found: list[ConversionConfig] = []
    for case in config.cases:
        where = f"case {case.name!r}: config = {case.config!r}"
        try:
            conversion = load_config(case.config, case.set)
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
