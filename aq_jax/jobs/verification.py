"""Whether a table is what was written."""

from __future__ import annotations

import os
from dataclasses import dataclass

from aq_jax.errors import AqError
from aq_jax.store import open_table


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a table is what was written.

    Args:
        path: the file or folder.
        rows: how many rows are whole.
        unchecked: rows without a digest (files of other writers).
        errors: what is wrong, one text each.
    """

    path: str
    rows: int
    unchecked: int
    errors: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.errors


def verify_table(path: str | os.PathLike[str]) -> Verdict:
    """Read every row, compare it with its digest, and the rows with the table's; say which rows are wrong.

    Args:
        path: a table, or a folder of them.

    Raises:
        FormatError: if the file cannot be read as a table at all.
        IntegrityError: if its metadata and its rows do not belong together.

    >>> import numpy as np, tempfile
    >>> import aq_jax as aq
    >>> path = tempfile.mkdtemp() + "/m.arrow"
    >>> aq.save(path, {"w": np.ones(3)})
    >>> verify_table(path).ok
    True
    """
    good, unchecked, errors = 0, 0, []
    with open_table(path) as table:
        for info in table.infos:
            try:
                table.read(info.position, verify=True)
            except AqError as error:
                errors.append(str(error))
            else:
                good += 1
                unchecked += info.digest is None
    return Verdict(str(path), good, unchecked, tuple(errors))
