"""Bridges to and from other formats. Import them as `aq_jax.converters`."""

from aq_jax.converters.formats import FORMATS, Format, open_source

__all__ = ["FORMATS", "Format", "open_source"]
