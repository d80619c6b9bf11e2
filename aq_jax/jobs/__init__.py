"""What a config or a command asks for, done. Nothing is printed here, and jax is imported by the jobs that compute."""

from aq_jax.jobs.conversion import Planned, allocate, convert, plan, planned
from aq_jax.jobs.inspection import Inspection, Layer, inspect_table
from aq_jax.jobs.models import Embedded, embed, generate
from aq_jax.jobs.tables import dequantize_file, quantize_file
from aq_jax.jobs.validation import validate
from aq_jax.jobs.verification import Damage, Verdict, verify_table

__all__ = [
    "Damage",
    "Embedded",
    "Inspection",
    "Layer",
    "Planned",
    "Verdict",
    "allocate",
    "convert",
    "dequantize_file",
    "embed",
    "generate",
    "inspect_table",
    "plan",
    "planned",
    "quantize_file",
    "validate",
    "verify_table",
]
