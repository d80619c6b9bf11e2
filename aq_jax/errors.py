"""What goes wrong, in three families.

Each message names where it happened, what was found, what was wanted, and what to do next.
"""


class AqError(ValueError):
    """Base of every error raised on purpose by aq_jax; raised itself when tensor values are refused."""


class ConfigError(AqError):
    """A configuration asks for something unknown, contradictory or impossible."""


class FormatError(AqError):
    """A file or folder is not what the format says: wrong type, shape, length, column or version."""


class IntegrityError(AqError):
    """A file is well formed, but its bytes are not the bytes that were written."""
