"""The JSON files of a model's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from aq_jax.errors import FormatError

J = TypeVar("J", dict[str, Any], list[Any])
NAMES = {dict: "object", list: "array"}


def read_json(path: Path, kind: type[J]) -> J | None:
    """Read a JSON file that holds an object (dict) or an array (list); None if there is no such file.

    Raises:
        FormatError: if it is no JSON, or of another kind.
    """
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError, OSError) as error:
        raise FormatError(f"{path}: no JSON: {error}") from None
    if not isinstance(found, kind):
        raise FormatError(f"{path}: holds {type(found).__name__}; wanted a JSON {NAMES[kind]}")
    return found
