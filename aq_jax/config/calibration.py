"""The configs of calibration, of the allocation of widths, and of training, all of which run the model."""

from __future__ import annotations

from dataclasses import dataclass

from aq_jax.config.quantization import check_choice, check_range, widths
from aq_jax.errors import ConfigError


def check_path(key: str, path: str, kind: str = "file") -> None:
    """Refuse what no system or only a shell takes for a path.

    Raises:
        ConfigError: naming the key.
    """
    if "\0" in path:
        raise ConfigError(f"{key} = {path!r}: wanted the name of a {kind}")
    if path == "~" or path.startswith("~/"):
        raise ConfigError(f"{key} = {path!r}: only a shell knows what ~ stands for; wanted the whole path")


@dataclass(frozen=True, slots=True)
class CalibrationConfig:
    """The text on which a model runs to record the inputs of its weights, and the use that is made of them.

    Args:
        text: The path of a file of UTF-8 text, a sentence or a paragraph a line. Default: English prose of Python's own
            documentation, which is always there, and narrow: text like that which the model will see is better.
        sentences: The largest number of lines that are drawn.
        max_tokens: The largest number of tokens of a line; the rest is cut.
        seed: The random seed of the draw.
        correction: How far weights move, before they are rounded, towards those that give the float model's outputs
            from the quantized model's inputs: 0 not at all, 1 all the way.
        damping: The part of the Hessian's mean diagonal that is added to its diagonal.
        joined: Whether lines that follow each other are joined to pieces that fill windows of `max_tokens` tokens, of
            which `sentences` are drawn: language models see long texts, encoders sentences.

    Raises:
        ConfigError: for numbers out of their range, and for a text that is no valid name.

    >>> CalibrationConfig(sentences=256).max_tokens
    128
    """

    text: str = ""
    sentences: int = 1024
    max_tokens: int = 128
    seed: int = 0
    correction: float = 0.5
    damping: float = 0.01
    joined: bool = False

    def __post_init__(self) -> None:
        check_path("text", self.text)
        check_range(self, sentences=(1, 2**24), max_tokens=(3, 2**20), seed=(0, 2**32 - 1))
        check_range(self, correction=(0, 1), damping=(1e-6, 1))


@dataclass(frozen=True, slots=True)
class AllocationConfig:
    """The goal for which each tensor's width is chosen: either `target_bpw` or `min_cosine`.

    Args:
        target_bpw: The most bits a weight that the file may hold, as `inspect` counts them: compressed scales and zero
            points too. Every tensor counts that the model uses and that could be quantized, also one whose type the
            config fixes.
        min_cosine: The least predicted cosine between the float model's outputs and the quantized one's, for which the
            fewest bits are taken.
        widths: The types to choose from: codes, and fp16. Default: all codes that a quantizer chooses on the running
            model and, before a training, that can be trained.
        sentences: The number of lines of `calibration.text`, beside those of the calibration, on which each tensor's
            error is measured. The Hessians take four times as many of the calibration's, and the final judgement twice
            as many others.
        save: The path of a file for the plan, which a config's `plan` takes.

    Raises:
        ConfigError: for numbers out of their range, and for both goals or none.

    >>> AllocationConfig(target_bpw=2.75, widths=("int2", "int4")).sentences
    64
    """

    target_bpw: float | None = None
    min_cosine: float | None = None
    widths: tuple[str, ...] = ()
    sentences: int = 64
    save: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(dict.fromkeys(self.widths)))
        if (self.target_bpw is None) == (self.min_cosine is None):
            found = "neither" if self.target_bpw is None else "both"
            raise ConfigError(f"found {found} of target_bpw and min_cosine; wanted one of them, such as 2.75 or 0.95")
        if self.target_bpw is not None and not 0 < self.target_bpw <= 64:
            raise ConfigError(f"target_bpw = {self.target_bpw!r}: wanted bits a weight, above 0 and at most 64")
        if self.min_cosine is not None and not 0 < self.min_cosine < 1:
            raise ConfigError(f"min_cosine = {self.min_cosine!r}: wanted a number between 0 and 1")
        for width in self.widths:
            check_choice("widths", width, (*widths(), "fp16"))
        check_range(self, sentences=(1, 2**20))
        check_path("save", self.save)


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """The length and the speed of the training that moves an encoder's outputs towards the float model's.

    Args:
        steps: The largest number of steps, over which the learning rate falls.
        minutes: The most minutes after calibration, 0 for no limit; if they end first, the learning rate falls over
            them instead, and the result depends on how fast the machine is.
        sentences: The largest number of lines of `calibration.text`, those of the calibration among them.
        held_out: The number of other lines by which the best weights of the run are chosen; a tenth of all, if there
            are few.
        patience: The number of the run's 20 evaluations on those lines that may pass without an improvement; then the
            run skips to its last fifth, in which the learning rate is low.
        batch_tokens: The number of tokens in a step, with padding; a step has one text at least.
        learning_rate: How far a code may move in a step, in units of the distance between two codes.

    Raises:
        ConfigError: for numbers out of their range.

    >>> TrainingConfig(steps=500, minutes=0).learning_rate
    0.005
    """

    steps: int = 3000
    minutes: float = 50
    sentences: int = 2**17
    held_out: int = 256
    patience: int = 10
    batch_tokens: int = 2048
    learning_rate: float = 0.005

    def __post_init__(self) -> None:
        check_range(self, steps=(1, 2**24), minutes=(0, 2**20), sentences=(2, 2**24), held_out=(1, 2**20))
        check_range(self, patience=(1, 20), batch_tokens=(16, 2**20), learning_rate=(1e-6, 1))
