"""Which width each tensor has, so that a model's error is least under a budget of bits, or its bits under one of error.

The multiple-choice knapsack problem (H. Kellerer, U. Pferschy, D. Pisinger, "Knapsack Problems", ch. 11): one option of
each tensor, bits and errors added up. Solved exactly: tensor after tensor, the plans that no other plan beats in both
bits and error are kept, with whole numbers of bits (Nemhauser and Ullmann's dynamic program). Both questions are read
off the frontier that is left; a plan that gives all tensors one width is one of those that were compared, and so never
better. Matrices of a model have few sizes, and plans few sums of bits: thousands, where there are 4^40 plans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True)
class Frontier:
    """The plans that no other beats, from the fewest bits and the largest error to the most bits and the least.

    Args:
        bits: of each plan.
        errors: of each plan.
        steps: (the plan without its last tensor, the last tensor's option) of each plan, tensor after tensor.
    """

    bits: Int[np.ndarray, "plans"]
    errors: Float[np.ndarray, "plans"]
    steps: tuple[tuple[Int[np.ndarray, "plans"], Int[np.ndarray, "plans"]], ...]

    def options(self, plan: int) -> list[int]:
        """Which option of each tensor a plan takes."""
        found = []
        for before, option in reversed(self.steps):
            found.append(int(option[plan]))
            plan = int(before[plan])
        return found[::-1]

    def within(self, *, bits: int | None = None, error: float | None = None) -> int | None:
        """The plan of the least error with so many bits at most, or of the fewest bits with so much error at most.

        Returns:
            Its number, or None if there is none.
        """
        if bits is not None:
            return int(np.searchsorted(self.bits, bits, side="right")) - 1 if self.bits[0] <= bits else None
        good = np.flatnonzero(self.errors <= error)
        return int(good[0]) if len(good) else None


def frontier(tensors: Sequence[Sequence[tuple[int, float]]]) -> Frontier:
    """All plans worth taking.

    Args:
        tensors: of each, its options: (bits, error).

    >>> plans = frontier([[(2, 0.5), (4, 0.1)], [(2, 0.3), (4, 0.2)]])
    >>> plans.bits.tolist(), [plans.options(i) for i in range(3)]
    ([4, 6, 8], [[0, 0], [1, 0], [1, 1]])
    >>> plans.within(bits=7), plans.within(error=0.35)
    (1, 2)
    """
    bits, errors = np.zeros(1, np.int64), np.zeros(1)
    steps = []
    for options in tensors:
        sizes, costs = np.array([b for b, _ in options], np.int64), np.array([e for _, e in options], np.float64)
        wide = (bits + sizes[:, None]).ravel(), (errors + costs[:, None]).ravel()
        order = np.lexsort(wide[::-1])  # by bits, then by error
        least = np.minimum.accumulate(wide[1][order])
        kept = order[np.concatenate([[True], least[1:] < least[:-1]])]
        steps.append((kept % len(bits), kept // len(bits)))
        bits, errors = wide[0][kept], wide[1][kept]
    return Frontier(bits, errors, tuple(steps))
