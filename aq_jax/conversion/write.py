"""From any source of tensors to a table, one tensor at a time: the road that every conversion takes."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from aq_jax.config import Compression, QuantizationConfig
from aq_jax.core.qtensor import QTensor
from aq_jax.errors import FormatError
from aq_jax.io.dense import as_v2, plain_rows
from aq_jax.io.qtensors import packed_rows
from aq_jax.ops import dequantize
from aq_jax.quantizers.lookup import fallback, quantizer_of
from aq_jax.quantizers.screen import Refused, to_half
from aq_jax.quantizers.tiles import quantize_pieces
from aq_jax.quantizers.treatment import treat, vectors_note
from aq_jax.store import Row, TableWriter, pieces

if TYPE_CHECKING:
    from aq_jax.calibration.solve import Solved
    from aq_jax.conversion.source import Source
    from aq_jax.progress import Progress

T = TypeVar("T")


@dataclass(slots=True)
class Written:
    """What became of a source.

    Args:
        path: the table.
        quantized: names of the tensors that were quantized, with their cosine.
        kept: why a tensor that should have been quantized was not, by name.
        notes: what else there is to know, such as tensors that were quantized in another way than asked for.
        allocation: how widths were chosen, if they were: the record of `calibration.plan.Allocation`.
        training: how weights were trained, if they were: the record of `calibration.train.Trained`.
        source_bytes: of all tensors as they were.
        bytes: of the table on disk.
        seconds: spent to read, quantize and write.
    """

    path: str
    quantized: dict[str, float] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    allocation: Mapping[str, Any] | None = None
    training: Mapping[str, Any] | None = None
    source_bytes: int = 0
    bytes: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("read", "quantize", "write"), 0.0))


def write_model(
    source: Source,
    path: str | os.PathLike[str],
    config: QuantizationConfig | None,
    *,
    solved: Solved | None = None,
    compression: Compression = "none",
    progress: Progress | None = None,
    more: Mapping[str, Any] | None = None,
) -> Written:
    """Write every tensor of a source to a table, quantized by a config or, without one, as it is.

    Without one, what a table knew of tensors that are taken from it (`Source.rows`) is kept with them.

    Memory holds one tensor's codes and a tile of its values, whatever the model; of a rotated tensor all values.

    Args:
        source: where tensors come from.
        path: .parquet or .arrow; appears whole, or not at all.
        config: None writes schema V1, unless the source has rows of V2; anything else V2.
        solved: what quantizers that need the running model made of their weights.
        compression: "zstd" compresses the weights too.
        progress: called with each tensor's name, its bytes, and the bytes of all, when it has been written.
        more: what else the table's metadata keeps of how it was made.

    Raises:
        ConfigError: for a solver that is none; for one that needs the running model, if nothing was solved.
        AqError: for a tensor that cannot be quantized (see `QuantizationConfig.on_nonfinite`).
        FormatError: for what the table cannot hold.
    """
    done = Written(str(path))
    clock = _Clock(done.seconds)
    record = dict(source.made) | ({"quantization": config.to_dict()} if config else {}) | dict(more or {})
    if solved is not None:
        done.notes += solved.notes
        done.notes += [f"{name}: {why}" for name, why in solved.fallbacks.items()]
        done.seconds["calibrate"] = solved.seconds
        record["calibration"] = dict(solved.record)
        if solved.allocation is not None:
            done.allocation = record["allocation"] = dict(solved.allocation)
        if solved.training is not None:
            done.training = record["training"] = dict(solved.training)
            done.seconds["train"] = solved.training["seconds"]
    if kept := [n for n, found in source.shapes.items() if treat(config, n, *found).vector]:
        done.notes.append(vectors_note(kept))
    sizes = {name: source.size(name) for name in source.shapes}
    started, total = time.perf_counter(), sum(sizes.values())
    version = 2 if config or any("quant_type" in row for row in source.rows.values()) else 1
    with TableWriter(path, version=version, config=record, compression=compression) as table:
        for name, size in sizes.items():
            value = clock.timed("read", source.read, name)
            if solved is not None and name in solved.replaced:
                value = solved.replaced[name]
            if config is None:
                rows = known_rows(name, value, source.rows.get(name, {}))
            elif isinstance(value, QTensor):
                raise FormatError(f"{name}: is {value.spec.quant_type} already, and would be rounded twice")
            elif solved is not None and name in solved.weights:
                solver = "trained" if solved.training else quantizer_of(config.for_tensor(name)).name
                rows = solved_rows(name, value, solved, solver, done)
            else:
                rows = quantized_rows(name, value, config, done, solved.fallbacks if solved else ())
            for row in clock.watched("quantize", rows):
                table.write(as_v2(row) if version == 2 else row)
            done.source_bytes += size
            if progress:
                progress(name, size, total)
        for alias, stored in source.aliases.items():
            table.alias(alias, stored)
    done.bytes = os.stat(path).st_size
    done.seconds["write"] = time.perf_counter() - started - done.seconds["read"] - done.seconds["quantize"]
    return done


def known_rows(name: str, value: np.ndarray | QTensor, known: Mapping[str, Any]) -> Iterator[Row]:
    """The rows of a tensor as it is, with what is known of it (see `Source.rows`)."""
    if not isinstance(value, QTensor):
        yield from plain_rows(name, value, *((known["dtype"], "fp16") if known.get("quant_type") == "fp16" else ()))
        return
    for row in packed_rows(name, value, known.get("dtype", "float32")):
        yield dataclasses.replace(row, **{key: known[key] for key in ("solver", "cosine", "rel_mse") if key in known})


def quantized_rows(
    name: str, array: np.ndarray, config: QuantizationConfig, done: Written, unsolved: Collection[str] = ()
) -> Iterator[Row]:
    """The V2 rows of one tensor under a model's config; those in `unsolved` by the fallback of their quantizer."""
    treatment = treat(config, name, array.shape, array.dtype)
    policy, spec = treatment.policy, treatment.spec
    dtype = array.dtype.name
    if treatment.half:
        half = to_half(array)
        if half.dtype == np.float16:
            yield from plain_rows(name, half, dtype, "fp16")
            return
        done.kept[name] = f"{name}: float16 would change it by more than 2^-10 of its largest value, if that is finite"
    elif spec is not None:
        if name in unsolved:
            policy = fallback(policy)
        cuts = pieces(array.shape, dtype, spec.quant_type, spec.quant_axis, spec.group_size)
        results = quantize_pieces(array, policy, name, cuts)
        if not isinstance(results, Refused):
            for (start, stop), q in zip(cuts, results, strict=True):
                done.quantized[name] = min(q.cosine, done.quantized.get(name, 1.0))
                yield Row(
                    name, array.shape, dtype, q.data, stop - start, spec.quant_type, q.scales, q.zero_points,
                    spec.quant_axis, spec.group_size, spec.rotation, quantizer_of(policy).name, q.cosine, q.rel_mse,
                )  # fmt: skip
            return
        done.kept[name] = results.why
    yield from map(as_v2, plain_rows(name, array))


def solved_rows(name: str, array: np.ndarray, solved: Solved, solver: str, done: Written) -> Iterator[Row]:
    """The V2 rows of a tensor that was solved before, by `solver`."""
    q = solved.weights[name]
    w = np.asarray(array, np.float32).reshape(-1)
    d = np.asarray(dequantize(q)).reshape(-1) - w
    ww, wd, dd = (float(np.einsum("i,i", a, b, dtype=np.float64)) for a, b in ((w, w), (w, d), (d, d)))
    cosine = (ww + wd) / math.sqrt(ww * (ww + 2 * wd + dd)) if ww and ww + 2 * wd + dd > 0 else float(dd == 0)
    done.quantized[name] = min(cosine, 1.0)
    for row in packed_rows(name, q, array.dtype.name):
        yield dataclasses.replace(row, solver=solver, cosine=min(cosine, 1.0), rel_mse=dd / ww if ww else 0.0)


class _Clock:
    """Seconds by what was done."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds

    def watched(self, what: str, items: Iterator[T]) -> Iterator[T]:
        """The items, with the seconds that it takes to make each."""
        while found := self.timed(what, list, itertools.islice(items, 1)):
            yield found[0]

    def timed(self, what: str, call: Callable[..., T], *args: Any) -> T:
        start = time.perf_counter()
        try:
            return call(*args)
        finally:
            self._seconds[what] += time.perf_counter() - start
