"""How whoever waits is told: with a name, what was just done, and what there is in all."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
