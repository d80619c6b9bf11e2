"""What a config or a command asks for, done. Nothing is printed here, and jax is imported by the jobs that compute."""

from aq_jax.jobs.conversion import allocate, convert, dequantize_file, plan, quantize_file
from aq_jax.jobs.inspection import Inspection, Layer, inspect_table
from aq_jax.jobs.models import Embedded, embed, generate
from aq_jax.jobs.validation import validate
from aq_jax.jobs.verification import Damage, Verdict, verify_table

__all__ = [
    "Damage",
    "Embedded",
    "Inspection",
    "Layer",
    "Verdict",
    "allocate",
    "convert",
    "dequantize_file",
    "embed",
    "generate",
    "inspect_table",
    "plan",
    "quantize_file",
    "validate",
    "verify_table",
]
