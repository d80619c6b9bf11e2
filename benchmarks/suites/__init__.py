"""The table of suites: name -> function of `full` that yields results. A name that ends in "@2" runs on two cores.

A suite imports what it measures when it runs, in a process of its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping

from benchmarks.timing import Line

Suite = Callable[[bool], Iterator[Line]]

TARGETS: Mapping[str, str] = {
    "memory": "memory:memory",
    "quantize": "quantize:quantize",
    "pack": "pack:pack",
    "road": "road:road",
    "load": "load:load",
    "qdot": "qdot:qdot",
    "weights": "weights:weights",
    "encode": "encode:encode",
    "encode@2": "encode:encode",
    "decode": "decode:decode",
    "generation": "generation:generation",
    "generation@2": "generation:generation",
    "accuracy@2": "accuracy:accuracy",
    "quality": "quality:quality",
    "size": "size:size",
    "gaussian": "size:gaussian",
    "schemes": "schemes:schemes",
    "start": "start:start",
    "stories": "stories:stories",
    "language@2": "language:language",
    "train@2": "training:train",
    "scale": "scale:scale",
}
QUESTIONS: Mapping[str, str] = {
    "memory": "How much memory does quantizing a model add to a process?",
    "quantize": "How long does a matrix take to codes and back?",
    "pack": "How long do codes take into packed bytes and back?",
    "road": "How long does a model take from safetensors to a table?",
    "load": "How soon are the weights of a table in JAX?",
    "qdot": "How fast is a product with quantized weights?",
    "weights": "How fast are few rows times large packed weights?",
    "encode": "How fast does a quantized MiniLM embed sentences on one core?",
    "encode@2": "How fast does it on two cores?",
    "decode": "How fast does a quantized language model write, on one core?",
    "generation": "How fast do real language models read and write, on one core?",
    "generation@2": "How fast do they on two cores?",
    "accuracy@2": "How near do a quantized model's embeddings stay to the float32 model's, at equal bits?",
    "quality": "What do rounded activations change, and what does a model take once it runs?",
    "size": "How small are the files, and how well do their weights fit?",
    "gaussian": "How well does `mse` fit normally distributed weights at two bits?",
    "schemes": "How large are tables beside the quantized checkpoints of other programs?",
    "start": "How soon does a new process embed its first sentences?",
    "stories": "What does each width cost a language model?",
    "language@2": "How near do real language models stay to themselves at few bits?",
    "train@2": "How long does a step of training take, and what takes it?",
    "scale": "Do the time for a byte and the memory stay the same as models grow?",
}
QUICK = ("quantize", "pack", "road", "load", "qdot", "encode", "accuracy@2", "size", "gaussian")


def load_suite(target: str) -> Suite:
    """Import the function that a target, "module:function", names."""
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(f"benchmarks.suites.{module}"), function)


def _lazy(target: str) -> Suite:
    return lambda full: load_suite(target)(full)


SUITES: Mapping[str, Suite] = {name: _lazy(target) for name, target in TARGETS.items()}
