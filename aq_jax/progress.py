"""The callback that tells whoever waits: a name, the size of what was just done, and the size of all."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
