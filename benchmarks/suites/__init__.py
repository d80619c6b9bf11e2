"""The table of suites. A suite is a function of `full` that yields results; one whose name ends in "@2" has two cores.

A suite imports what it measures when it runs, in a process of its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping

from benchmarks.timing import Line

Suite = Callable[[bool], Iterator[Line]]

# By name: "module:function", and the question that the suite answers.
SUITES: Mapping[str, tuple[str, str]] = {
    "memory": ("memory:memory", "How much memory does quantizing a model add to a process?"),
    "quantize": ("quantize:quantize", "How long does a matrix take to codes and back?"),
    "pack": ("pack:pack", "How long do codes take into packed bytes and back?"),
    "road": ("road:road", "How long does a model take from safetensors to a table?"),
    "load": ("load:load", "How soon are the weights of a table in JAX?"),
    "qdot": ("qdot:qdot", "How fast is a product with quantized weights?"),
    "weights": ("weights:weights", "How fast are few rows times large packed weights?"),
    "encode": ("encode:encode", "How fast does a quantized MiniLM embed sentences on one core?"),
    "encode@2": ("encode:encode", "How fast does it on two cores?"),
    "decode": ("decode:decode", "How fast does a quantized language model write, on one core?"),
    "generation": ("generation:generation", "How fast do real language models read and write, on one core?"),
    "generation@2": ("generation:generation", "How fast do they on two cores?"),
    "accuracy@2": (
        "accuracy:accuracy",
        "How near do a quantized model's embeddings stay to the float32 model's, at equal bits?",
    ),
    "quality": ("quality:quality", "What do rounded activations change, and what does a model take once it runs?"),
    "size": ("size:size", "How small are the files, and how well do their weights fit?"),
    "gaussian": ("size:gaussian", "How well does `mse` fit normally distributed weights at two bits?"),
    "schemes": ("schemes:schemes", "How large are tables beside the quantized checkpoints of other programs?"),
    "start": ("start:start", "How soon does a new process embed its first sentences?"),
    "stories": ("stories:stories", "What does each width cost a language model?"),
    "language@2": ("language:language", "How near do real language models stay to themselves at few bits?"),
    "train@2": ("training:train", "How long does a step of training take, and what takes it?"),
    "scale": ("scale:scale", "Do the time for a byte and the memory stay the same as models grow?"),
}
QUICK = ("quantize", "pack", "road", "load", "qdot", "encode", "accuracy@2", "size", "gaussian")


def load_suite(name: str) -> Suite:
    """Import the function of a suite."""
    module, _, function = SUITES[name][0].partition(":")
    return getattr(importlib.import_module(f"benchmarks.suites.{module}"), function)
