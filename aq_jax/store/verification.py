"""Whether a table is what was written, and if not, what of it still is."""

from __future__ import annotations

import os
from dataclasses import dataclass

from aq_jax.store.survey import survey


@dataclass(frozen=True, slots=True)
class Damage:
    """A row that is not what was written, or a tensor that is not there.

    Args:
        file: that holds it, or should.
        row: its number in that file, from 0; None for a tensor of a file that is not there, or is another table's.
        name: of its tensor; None where even that is lost.
        problem: what was found.
    """

    file: str
    row: int | None
    name: str | None
    problem: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a table is what was written.

    Args:
        path: the file or folder.
        rows: how many rows are whole.
        unchecked: how many of them have no digest (files of other writers).
        errors: what is wrong, one text each.
        good: tensors that are whole.
        bad: rows that are not.
    """

    path: str
    rows: int
    unchecked: int
    errors: tuple[str, ...]
    good: tuple[str, ...] = ()
    bad: tuple[Damage, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.errors

    @property
    def damaged(self) -> tuple[str, ...]:
        """Names of the tensors that are not whole, as far as they are known."""
        good = set(self.good)
        return tuple(dict.fromkeys(row.name for row in self.bad if row.name is not None and row.name not in good))


def verify_table(path: str | os.PathLike[str]) -> Verdict:
    """Read every row, compare it with its digest, and the rows with the table's; say what is wrong and what is good.

    Each file of a folder is judged, whatever the others are.

    Args:
        path: a table, or a folder of them.

    Raises:
        FileNotFoundError: if there is no such file.

    >>> import numpy as np, tempfile
    >>> import aq_jax as aq
    >>> path = tempfile.mkdtemp() + "/m.arrow"
    >>> aq.save(path, {"w": np.ones(3)})
    >>> verdict = verify_table(path)
    >>> verdict.ok, verdict.good
    (True, ('w',))
    """
    found = survey(path)
    bad = tuple(Damage(p.file, p.row, p.name, p.text) for p in found.problems if not p.row is p.name is None)
    errors = tuple(dict.fromkeys(problem.text for problem in found.problems))
    return Verdict(str(path), found.rows, found.unchecked, errors, found.good, bad)
