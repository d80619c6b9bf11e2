"""Write any source of tensors as a table, one tensor at a time."""

from __future__ import annotations

import dataclasses
import itertools
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
from aq_jax.quantizers.candidates import fit_of
from aq_jax.quantizers.eligibility import Refused, to_float16
from aq_jax.quantizers.lookup import quantizer_of, with_fallback
from aq_jax.quantizers.tiles import quantize_pieces
from aq_jax.quantizers.treatment import Treatment, kept_notes, treat
from aq_jax.quantizers.trellis import encoder
from aq_jax.store import Row, TableWriter, pieces
from aq_jax.store.schema import dtype_name

if TYPE_CHECKING:
    from aq_jax.calibration.solve import SolvedWeights
    from aq_jax.conversion.source import Source
    from aq_jax.progress import Progress

T = TypeVar("T")


@dataclass(slots=True)
class ConversionResult:
    """The result of a conversion.

    Args:
        path: The path of the table.
        quantized: The cosine of each quantized tensor, by name.
        kept: The reason why a tensor that should have been quantized was not, by name.
        notes: Other notes, such as tensors that were quantized in another way than asked for.
        allocation: The record of the chosen widths, if any (`calibration.allocation.Allocation`).
        training: The record of the training, if any (`calibration.train.TrainingResult`).
        source_bytes: The bytes of all tensors in the source.
        bytes: The bytes of the table on disk.
        seconds: The time spent to read, quantize and write.
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
    solved: SolvedWeights | None = None,
    compression: Compression = "none",
    progress: Progress | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> ConversionResult:
    """Write every tensor of a source to a table, quantized by a config or, without one, as it is.

    Without a config, tensors of a table keep their fields (`Source.row_metadata`).

    Memory holds one tensor's codes and a tile of its values, whatever the model; of a rotated tensor all values.

    Args:
        source: The source of the tensors.
        path: The path of a .parquet or .arrow file; it appears whole, or not at all.
        config: The quantization, which writes schema V2; None writes V1, unless the source has rows of V2.
        solved: The weights that were solved on the running model.
        compression: "zstd" compresses the weights too.
        progress: A callback that gets each written tensor's name, its bytes, and the bytes of all.
        metadata: Further entries of the table's metadata.

    Raises:
        ConfigError: for an unknown solver; for one that runs the model, if nothing was solved.
        AqError: for a tensor that cannot be quantized (see `QuantizationConfig.on_nonfinite`).
        FormatError: for what the table cannot hold.
    """
    done = ConversionResult(str(path))
    clock = _Clock(done.seconds)
    record = dict(source.provenance) | ({"quantization": config.to_dict()} if config else {}) | dict(metadata or {})
    treatments = {name: treat(config, name, *found) for name, found in source.shapes.items()}
    if any(map(_by_matrices, treatments.values())):
        record["encoder"] = encoder()
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
    done.notes += kept_notes(treatments)
    sizes = {name: source.nbytes(name) for name in source.shapes}
    started, total = time.perf_counter(), sum(sizes.values())
    version = 2 if config or any("quant_type" in row for row in source.row_metadata.values()) else 1
    with TableWriter(path, version=version, config=record, compression=compression) as table:
        for name, size in sizes.items():
            value = clock.timed("read", source.read, name)
            if solved is not None and name in solved.replaced:
                value = solved.replaced[name]
            if config is None:
                rows = unchanged_rows(name, value, source.row_metadata.get(name, {}))
            elif isinstance(value, QTensor):
                raise FormatError(
                    f"{name}: is {value.spec.quant_type} already, and would be rounded twice; "
                    "leave the quantization out"
                )
            elif solved is not None and name in solved.weights:
                solver = "trained" if solved.training else quantizer_of(config.for_tensor(name, value.shape)).name
                rows = solved_rows(name, value, solved, solver, done)
            else:
                rows = quantized_rows(name, value, treatments[name], done, solved.fallbacks if solved else ())
            for row in clock.timed_items("quantize", rows):
                table.write(as_v2(row) if version == 2 else row)
            done.source_bytes += size
            if progress:
                progress(name, size, total)
        for alias, stored in source.aliases.items():
            table.alias(alias, stored)
        table.flush()
        source.release()  # unmapping a file takes about as long as the disk takes for the last rows
    done.bytes = os.stat(path).st_size
    done.seconds["write"] = time.perf_counter() - started - done.seconds["read"] - done.seconds["quantize"]
    return done


def _by_matrices(treatment: Treatment) -> bool:
    return treatment.spec is not None and treatment.spec.coding.matrices


def unchanged_rows(name: str, value: np.ndarray | QTensor, metadata: Mapping[str, Any]) -> Iterator[Row]:
    """Build the rows of a tensor as it is, with its fields (see `Source.row_metadata`)."""
    if not isinstance(value, QTensor):
        half = metadata.get("quant_type") == "fp16"
        yield from plain_rows(name, value, *((metadata["dtype"], "fp16") if half else ()))
        return
    fit = {key: metadata[key] for key in ("solver", "cosine", "rel_mse") if key in metadata}
    for row in packed_rows(name, value, metadata.get("dtype", "float32")):
        yield dataclasses.replace(row, **fit)


def quantized_rows(
    name: str, array: np.ndarray, treatment: Treatment, done: ConversionResult, unsolved: Collection[str] = ()
) -> Iterator[Row]:
    """Build the V2 rows of one tensor; those in `unsolved` by their quantizer's fallback."""
    policy, spec = treatment.policy, treatment.spec
    dtype = dtype_name(array.dtype)
    if treatment.half:
        half = to_float16(array)
        if half.dtype == np.float16:
            yield from plain_rows(name, half, dtype, "fp16")
            return
        done.kept[name] = f"{name}: float16 would change it by more than 2^-10 of its largest value, if that is finite"
    elif spec is not None:
        if name in unsolved:
            policy = with_fallback(policy)
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
    yield from plain_rows(name, array, quant_type="none")


def solved_rows(
    name: str, array: np.ndarray, solved: SolvedWeights, solver: str, done: ConversionResult
) -> Iterator[Row]:
    """Build the V2 rows of a tensor that `solver` solved before."""
    q = solved.weights[name]
    w = np.asarray(array, np.float32).reshape(-1)
    d = w - np.asarray(dequantize(q)).reshape(-1)
    cosine, rel_mse = fit_of(np.einsum("i,i", a, b, dtype=np.float64) for a, b in ((w, w), (w, d), (d, d)))
    done.quantized[name] = cosine
    for row in packed_rows(name, q, array.dtype.name):
        yield dataclasses.replace(row, solver=solver, cosine=cosine, rel_mse=rel_mse)


class _Clock:
    """A stopwatch that adds up seconds by activity."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds

    def timed_items(self, what: str, items: Iterator[T]) -> Iterator[T]:
        """Yield the items, and add up the seconds that it takes to make them."""
        while found := self.timed(what, list, itertools.islice(items, 1)):
            yield found[0]

    def timed(self, what: str, call: Callable[..., T], *args: Any) -> T:
        start = time.perf_counter()
        try:
            return call(*args)
        finally:
            self._seconds[what] += time.perf_counter() - start
