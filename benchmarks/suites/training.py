"""Measure a training step and its parts: MiniLM at two bits, 2,048 tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

from benchmarks.timing import Line, Result, race

TOKENS, LENGTH, ROUNDS = 2048, 27, 7


def train(full: bool) -> Iterator[Line]:
    """Measure the step, and the programs of its parts, side by side."""
    import jax
    import jax.numpy as jnp

    import aq_jax as aq
    from aq_jax.calibration.distill import Distiller, take_rows, training_batch
    from aq_jax.calibration.layerwise import copy_vectors, get_weight
    from aq_jax.calibration.text import built_in_sentences, pad_batch, tokenize
    from aq_jax.core.dispatch import COMPILER_OPTIONS, backend
    from aq_jax.nn.sentences import SentenceSettings, read_sentence_tokenizer
    from benchmarks.models import encoder, table

    folder = table("float32").parent
    model = encoder("float32").model
    config = aq.QuantizationConfig("int2", group_size=128, symmetric=False, rotate=True)
    paths = [model.table] + [
        f"layers.{layer}.{name}.kernel"
        for layer in range(len(model.layers))
        for name in ("query", "key", "value", "out", "up", "down")
    ]
    solved = {path: cast(aq.QTensor, aq.quantize(get_weight(model, path), config)) for path in paths}
    rows = TOKENS // LENGTH
    ids, _ = tokenize(built_in_sentences()[:rows], read_sentence_tokenizer(folder), LENGTH, model.config.vocab_size)
    batch = pad_batch(ids, rows, LENGTH)
    distiller = Distiller(model, model, solved, (), SentenceSettings())
    state, texts = [distiller.start(model, copy_vectors(model))], training_batch(batch)

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        return jax.jit(function, compiler_options=dict(COMPILER_OPTIONS[backend()]))

    def step() -> None:
        state[0], loss = distiller.step(state[0], batch, 1e-3)
        loss.block_until_ready()

    teacher, student = distiller.leaves
    goal = compiled(distiller.teacher_hidden)(teacher, texts)
    taken = take_rows(jax.tree.map(jnp.copy, state[0].weights), model.table, texts.rows)
    programs = {
        "teacher": (compiled(distiller.teacher_hidden), (teacher, texts)),
        "forward": (compiled(distiller.loss), (taken, student, goal, texts)),
        "gradient": (compiled(jax.grad(distiller.loss)), (taken, student, goal, texts)),
    }
    calls = {name: lambda f=f, a=a: jax.block_until_ready(f(*a)) for name, (f, a) in programs.items()}
    times = race(calls | {"step": step}, ROUNDS)
    whole = times["step"].median
    yield Result("training step, 2,048 tokens", whole, "s", "reported", "", f"first call +{times['step'].first:.1f} s")
    parts = {
        "the float model": times["teacher"].median,
        "forwards": times["forward"].median,
        "backwards": times["gradient"].median - times["forward"].median,
    }
    parts["optimizer and the rest"] = whole - sum(parts.values())
    for name, seconds in parts.items():
        yield Result(f"training step: {name}", seconds / whole, "of it", "reported", "")
