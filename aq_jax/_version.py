"""The version, for those who write it into files; `aq_jax.__version__` is the same."""

__version__ = "0.1.0"
