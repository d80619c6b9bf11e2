"""`python -m aq_jax.cli` is `aq-jax`."""

from aq_jax.cli import run

run()
