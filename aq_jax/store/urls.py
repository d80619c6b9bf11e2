"""Tell URLs from paths, and quote them as filesystems want them."""

from __future__ import annotations

import os
import re
import urllib.parse


def quoted(url: str) -> str:
    """Quote the special characters of a URL's path, as the standard requires.

    >>> quoted("file:///my models/100%#1"), quoted("s3://bucket/a%20b?region=eu")
    ('file:///my%20models/100%25%231', 's3://bucket/a%20b?region=eu')
    """
    scheme, _, rest = url.partition("://")
    if is_fsspec(scheme):
        return url
    host, slash, path = rest.partition("/")
    path = re.sub("%(?![0-9A-Fa-f]{2})", "%25", path)
    kept = "%/:@&=+,;!$'()*~" + ("" if scheme == "file" else "?")  # which begins options, and a file has none
    return f"{scheme}://{host}{slash}{urllib.parse.quote(path, safe=kept)}"


def is_fsspec(scheme: str) -> bool:
    """Tell whether a filesystem is one of fsspec, which take URLs unquoted."""
    return scheme == "hf" or scheme.startswith("fsspec+")


def is_url(location: str | os.PathLike[str]) -> bool:
    """Tell whether a location is a URL rather than a path.

    >>> is_url("s3://bucket/m"), is_url("build/m")
    (True, False)
    """
    scheme, found, _ = os.fspath(location).partition("://")
    return bool(found) and scheme.replace("+", "").isalnum()
