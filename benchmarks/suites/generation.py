"""Measure how fast a GGUF becomes a table, and language models read a prompt and write: ours, torch's, llama.cpp's.

All read ids and write the likeliest token; llama.cpp's calls leave the choice of the token out.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks import language_models, peers
from benchmarks.language_models import Subject
from benchmarks.machine import cores
from benchmarks.peers.torch_threads import load_torch
from benchmarks.suites.contenders import start_children
from benchmarks.suites.decode import a_token, extend, words_of
from benchmarks.timing import Line, Result, Timing, compare, race, ratio

PREFILL, PROMPT, TOKENS = 512, 16, 64
READ, FIRST, WRITE = "a prompt", "the first token", "tokens"  # what a contender is timed at
PACKED, INTEGER, FLOAT = "in its GGUF's codes", "W8A8", "float32"
TORCH, LLAMA = "torch float32", "llama.cpp"
Calls = dict[str, Callable[[], object]]


def prompt(count: int) -> list[int]:
    """Draw ids of a prompt."""
    return np.random.default_rng(0).integers(100, 40000, count).tolist()


def calls(extend: Callable[[list[int], int], object]) -> Calls:
    """Return what is timed.

    Args:
        extend: Reads a prompt, and writes as many tokens.
    """
    return {
        READ: partial(extend, prompt(PREFILL), 1),
        FIRST: partial(extend, prompt(PROMPT), 1),
        WRITE: partial(extend, prompt(PROMPT), 1 + TOKENS),
    }


def torch_model(folder: str) -> Calls:
    """Return, in a child, the calls of transformers' model of float weights."""
    torch = load_torch()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def extend(ids: list[int], tokens: int) -> None:
        with torch.inference_mode():
            given, cache = torch.tensor([ids]), None
            for _ in range(tokens):
                found = model(given, past_key_values=cache, use_cache=True, logits_to_keep=1)
                given, cache = found.logits.argmax(-1), found.past_key_values

    return calls(extend)


def llama_cpp(gguf: str) -> Calls:
    """Return, in a child, the calls of llama.cpp."""
    llama = peers.library("llama_cpp")
    threads = {"n_threads": cores(), "n_threads_batch": cores()}
    model = llama.Llama(gguf, n_ctx=1024, n_batch=PREFILL, verbose=False, **threads)

    def extend(ids: list[int], tokens: int) -> None:
        model.reset()
        model.eval(ids)
        for _ in range(tokens - 1):
            model.eval(ids[-1:])

    return calls(extend)


def ours(subject: Subject, folder: Path) -> tuple[dict[str, Calls], list[np.ndarray]]:
    """Return the calls of ours by model, and the arrays of the model that has the GGUF's codes.

    Args:
        subject: The model.
        folder: The folder of its float weights, beside which tables are written.
    """
    import aq_jax as aq
    from aq_jax.config import ConversionConfig
    from aq_jax.nn import Generator
    from aq_jax.nn.decoding import Decoding

    configs = {
        PACKED: ConversionConfig(str(subject.path), "packed.arrow"),
        INTEGER: ConversionConfig(str(folder), "int8.arrow", aq.QuantizationConfig("int8", solver="absmax")),
        FLOAT: ConversionConfig(str(folder), "float32.arrow"),
    }
    found, arrays = {}, []
    for name, config in configs.items():
        table = folder.parent / name / config.output
        table.parent.mkdir()
        aq.convert(replace(config, output=str(table)))
        generator = aq.load_model(table)
        assert isinstance(generator, Generator)
        found[name] = calls(partial(extend, Decoding(generator.model, ())))
        arrays = arrays or words_of(generator.model)
    return found, arrays


def generation(full: bool) -> Iterator[Line]:
    """Yield how long a prompt and a token take, ours beside the others."""
    for subject in language_models.present():
        if isinstance(subject, Subject):
            yield from _timed(subject, 7 if full else 3)
        else:
            yield subject


def _timed(subject: Subject, rounds: int) -> Iterator[Line]:
    import aq_jax as aq

    with tempfile.TemporaryDirectory() as scratch:
        yield from conversion(subject, Path(scratch, "packed.parquet"), rounds)
        folder = Path(scratch, "floats")
        aq.dequantize_file(subject.path, folder)
        contenders, arrays = ours(subject, folder)
        targets = {
            TORCH: ("benchmarks.suites.generation:torch_model", str(folder)),
            LLAMA: ("benchmarks.suites.generation:llama_cpp", str(subject.path)),
        }
        with start_children(targets) as (children, skipped):
            yield from (replace(line, case=f"{subject.name} by {line.case}") for line in skipped)
            for name, child in children.items():
                contenders[name] = {what: child.remote(what) for what in child.names}
            yield from prompts(subject, race({name: each[READ] for name, each in contenders.items()}, rounds))
            several = {f"{name}|{what}": each[what] for name, each in contenders.items() for what in (FIRST, WRITE)}
            times = race({"reading": lambda: [a.max() for a in arrays], **several}, rounds)
        reading = times.pop("reading")
        written = {name: a_token(times[f"{name}|{WRITE}"], times[f"{name}|{FIRST}"], TOKENS) for name in contenders}
        yield from tokens(subject, written, reading, sum(a.nbytes for a in arrays))


def conversion(subject: Subject, output: Path, rounds: int) -> Iterator[Line]:
    """Yield how fast the file's tensors become a table, digests included, by processor seconds: disks differ."""
    from aq_jax.conversion.write import write_model
    from aq_jax.converters import open_source

    speeds: list[float] = []
    for _ in range(rounds):
        started = time.process_time()  # of all threads
        with open_source(subject.path, packed=True) as source:
            write_model(source, output, None)
        speeds.append(subject.path.stat().st_size / (time.process_time() - started) / 1e9)
    low, value, high = np.quantile(speeds, (0.25, 0.5, 0.75))
    case = f"{subject.name}, {cores()} cores: GGUF to a table"
    yield Result(case, float(value), "GB of file/s of a core", "0.15", low=float(low), high=float(high))


def prompts(subject: Subject, times: Mapping[str, Timing]) -> Iterator[Line]:
    """Yield how fast a prompt is read."""
    for mine in (INTEGER, PACKED, FLOAT):
        for other, limits in ((TORCH, ("1.5", "3") if mine == INTEGER else ("", "")), (LLAMA, ("", ""))):
            if other in times:
                figures = {"tokens/s": PREFILL / times[mine].median, "theirs": PREFILL / times[other].median}
                case = f"{subject.name} {mine}, {cores()} cores: a prompt of {PREFILL} tokens"
                yield compare(case, other, times[other], times[mine], *limits, figures=figures)


def tokens(subject: Subject, times: Mapping[str, Timing], reading: Timing, size: int) -> Iterator[Line]:
    """Yield how fast tokens are written, beside one pass over the packed weights' bytes, and beside the others."""
    found = ratio(times[PACKED], reading)
    yield Result(
        f"{subject.name} {PACKED}, {cores()} cores: a token", found.value, "x reading its weights", "<= 2.5", "<= 1.4",
        low=found.low, high=found.high,
        figures={"ms a token": 1e3 * times[PACKED].median, "reading, GB/s": size / reading.median / 1e9},
    )  # fmt: skip
    for mine in (PACKED, INTEGER, FLOAT):
        for other, goal in ((TORCH, ""), (LLAMA, "1.0" if mine == PACKED else "")):
            if other in times:
                figures = {"tokens/s": 1 / times[mine].median, "theirs": 1 / times[other].median}
                case = f"{subject.name} {mine}, {cores()} cores: tokens after the first"
                yield compare(case, other, times[other], times[mine], goal=goal, figures=figures)
