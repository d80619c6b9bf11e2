"""Bridges to and from other formats. Import them as `aq_jax.converters`."""
