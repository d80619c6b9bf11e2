"""Choose a width for each tensor: the least error under a budget of bits, or the fewest bits under a limit of error.

This is the multiple-choice knapsack problem (H. Kellerer, U. Pferschy, D. Pisinger, "Knapsack Problems", ch. 11): take
one option of each tensor, and add up bits and errors. Nemhauser and Ullmann's dynamic program solves it exactly: tensor
after tensor it keeps the Pareto frontier, the allocations that no other beats in both bits and error. Both questions
are read off the last frontier. It compares the allocations of one width for all tensors too, so that none of them is
better. A model's matrices have few sizes, and allocations few sums of bits: thousands, where there are 4^40
allocations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True)
class Frontier:
    """The allocations that no other beats, from the fewest bits and the largest error to the most bits and the least.

    Args:
        bits: The sum of each allocation's bits.
        errors: The sum of each allocation's errors.
        backpointers: For each tensor, each allocation's index on the frontier before it, and the tensor's option.
    """

    bits: Int[np.ndarray, "points"]
    errors: Float[np.ndarray, "points"]
    backpointers: tuple[tuple[Int[np.ndarray, "points"], Int[np.ndarray, "points"]], ...]

    def options(self, point: int) -> list[int]:
        """List the option that an allocation takes of each tensor."""
        found = []
        for before, option in reversed(self.backpointers):
            found.append(int(option[point]))
            point = int(before[point])
        return found[::-1]

    def best_within(self, *, bits: int | None = None, error: float | None = None) -> int | None:
        """Find the allocation of the least error within a budget of bits, or of the fewest bits within one of error.

        Returns:
            Its index, or None if there is none.
        """
        if bits is not None:
            return int(np.searchsorted(self.bits, bits, side="right")) - 1 if self.bits[0] <= bits else None
        good = np.flatnonzero(self.errors <= error)
        return int(good[0]) if len(good) else None


def pareto_frontier(tensors: Sequence[Sequence[tuple[int, float]]]) -> Frontier:
    """Compute the Pareto frontier of bits and error.

    Args:
        tensors: Each tensor's options, as (bits, error).

    >>> front = pareto_frontier([[(2, 0.5), (4, 0.1)], [(2, 0.3), (4, 0.2)]])
    >>> front.bits.tolist(), [front.options(i) for i in range(3)]
    ([4, 6, 8], [[0, 0], [1, 0], [1, 1]])
    >>> front.best_within(bits=7), front.best_within(error=0.35)
    (1, 2)
    """
    bits, errors = np.zeros(1, np.int64), np.zeros(1)
    backpointers = []
    for options in tensors:
        sizes, costs = np.array([b for b, _ in options], np.int64), np.array([e for _, e in options], np.float64)
        sums = (bits + sizes[:, None]).ravel(), (errors + costs[:, None]).ravel()
        order = np.lexsort(sums[::-1])  # by bits, then by error
        least = np.minimum.accumulate(sums[1][order])
        kept = order[np.concatenate([[True], least[1:] < least[:-1]])]
        backpointers.append((kept % len(bits), kept // len(bits)))
        bits, errors = sums[0][kept], sums[1][kept]
    return Frontier(bits, errors, tuple(backpointers))
