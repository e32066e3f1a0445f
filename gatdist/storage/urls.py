"""URLs of folders: local paths and remote URLs, opened without fsspec's URL parsing.

fsspec splits a URL at ``::`` into a chain of file systems, and reads a version from ``?versionId=``
or ``#`` at its end. A folder's name may hold any of these, so a local path is never parsed, and
of a URL only the protocol and the host are. Nothing here decides which requests carry credentials.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from gatdist.common.errors import StorageError
from gatdist.config import expand_env

LOCAL_PROTOCOLS = ("file", "local")
# Names of these characters only mean the same to every file system.
_PLAIN = re.compile(r"[\w./ -]*", re.ASCII)


def protocol_of(url: str) -> str:
    """The protocol of a URL; "" for a local path, which is whatever has no ``://``."""
    protocol, mark, _ = url.partition("://")
    return protocol if mark else ""


def absolute(url: str | os.PathLike[str]) -> str:
    """A local path made absolute, since workers may start in another folder; a URL as it is.

    Raises:
        StorageError: it is no text, or empty, which would be the current folder; or the current
            folder is gone.
    """
    if isinstance(url, os.PathLike):
        url = os.fspath(url)
    if not isinstance(url, str):
        raise StorageError("path or URL", "must be text or a pathlib.Path", value=url)
    if not url:
        raise StorageError("path or URL", "must not be empty", value=url)
    if url.startswith("${env:"):  # a value that is a URL stays a reference: it may be a secret
        expanded = expand_env(url)
        return url if protocol_of(expanded) else absolute(expanded)
    try:
        return url if protocol_of(url) else os.path.abspath(os.path.expanduser(url))
    except FileNotFoundError:
        rule = "is relative to the current folder, which does not exist any more"
        raise StorageError("path", rule, value=url, hint="Change to another folder") from None


def is_chain(url: str) -> bool:
    """Whether fsspec would take this for a chain of file systems.

    A local path is none, whatever is in it, nor is an IPv6 address.
    """
    protocol, _, rest = url.partition("://")
    if "://" not in url or protocol in LOCAL_PROTOCOLS:
        return False
    host, _, path = rest.partition("/")
    return "::" in protocol or "::" in path or "::" in re.sub(r"\[[^\]]*\]", "", host)


def open_plain(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path on it.

    Args:
        url: no chain; what follows the protocol of ``file://`` is a path as it is, unquoted.
        options: of the file system.
    """
    protocol = protocol_of(url)
    if not protocol or protocol in LOCAL_PROTOCOLS:
        path = url.partition("://")[2] if protocol else url
        return fsspec.filesystem("file", **options), absolute(path or "/")
    kind = fsspec.get_filesystem_class(protocol)
    given = kind._get_kwargs_from_urls(url)  # such as Azure's account
    given.pop("version_aware", None)  # of a name that looks like that of a version
    host, slash, path = url.partition("://")[2].partition("/")
    if slash and hasattr(kind, "split_path"):  # an object store: a key is not parsed
        root = f"{kind._strip_protocol(f'{protocol}://{host}')}/{path}".lstrip("/")
    else:
        root = kind._strip_protocol(url)
    return fsspec.filesystem(protocol, **(given | dict(options))), root


def is_exact(file_system: Any, path: str) -> bool:
    """Whether a file system takes a path for the name that it is, and not for that of a version.

    s3fs cuts off ``?versionId=…``, adlfs ``?versionid=…``, gcsfs ``#1234`` if it is told to know
    versions.
    """
    if _PLAIN.fullmatch(path) or isinstance(file_system, LocalFileSystem):
        return True
    if str(file_system._strip_protocol(path)) != path.rstrip("/"):
        return False
    split = getattr(file_system, "split_path", None)
    return split is None or "/".join(filter(None, split(path)[:2])) == path
