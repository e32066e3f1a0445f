"""URLs of folders: their origins, and opening them without fsspec's URL parsing.

Credentials are sent only to the origin (server, bucket or this machine) they were given for. A URL
from outside (a manifest, a list, another user's run) is opened only if the user has named its
origin, as the user's own URL with another path: URL parsers may differ.

fsspec splits a URL at ``::`` into a chain of file systems, and reads a version from ``?versionId=``
or ``#``. Local paths are never parsed, and of other URLs only protocol and host are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from pydantic import ConfigDict, RootModel

from gatdist.common.errors import StorageError
from gatdist.config import REFERENCE, expand_env, redact_url

LOCAL = "this machine"

_LOCAL_PROTOCOLS = ("file", "local")
_ON_THIS_MACHINE = ("", *_LOCAL_PROTOCOLS)
_SAME = {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az"}
_PORTS = {"http": "80", "https": "443"}
# Names of these characters mean the same to every file system.
_PLAIN = re.compile(r"[\w./ -]*", re.ASCII)


class OutsideUrl(RootModel[str]):
    """A URL that others wrote. Not a ``str``, so that nothing opens it by mistake."""

    model_config = ConfigDict(frozen=True, strict=True)

    def require_plain(self) -> None:
        """Raise ValueError, with the rule, unless it is only a place on a server."""
        if REFERENCE.search(self.root):
            raise ValueError("${env:…} is replaced in your own configuration only")
        if "::" in self.root:
            raise ValueError("must not chain URLs with '::'")
        if not self.root.isprintable():
            raise ValueError("must not contain control characters")
        protocol, netloc, path = _parts(self.root)
        if protocol in _PORTS and ("@" in netloc or "\\" in netloc + path):
            raise ValueError("must not contain a user, a password or a backslash")

    @property
    def origin(self) -> str:
        return origin(self.root)

    @property
    def shown(self) -> str:
        return redact_url(self.root)

    def on(self, own: str) -> str:
        """Return the user's own URL of the same origin, with this one's path and query."""
        protocol, netloc, path = _parts(self.root)
        if self.origin == LOCAL:
            return path
        if "://" not in own:  # all of it is a reference
            own = expand_env(own)
        own_protocol, own_netloc, own_path = _parts(own)
        path = path if not path or path.startswith(("/", "?")) else f"/{path}"
        if protocol in _PORTS and "?" not in path:
            path += "".join(own_path.partition("?")[1:])
        if protocol == "memory":  # has no buckets
            own_netloc = netloc
        return f"{own_protocol}://{own_netloc}{path}"


def origin(url: str) -> str:
    """Return the origin of a URL, such as ``https://host:8080`` or ``s3://bucket``."""
    protocol, netloc, _ = _parts(url)
    if protocol in _ON_THIS_MACHINE:
        return LOCAL
    if protocol == "memory":
        return "memory://"
    protocol = _SAME.get(protocol, protocol)
    if protocol not in _PORTS:
        return f"{protocol}://{netloc}"
    place = netloc.rpartition("@")[2].lower()
    host, _, port = place.rpartition(":") if re.search(r":\d*$", place) else (place, "", "")
    port = f":{port}" if port not in ("", _PORTS[protocol]) else ""
    return f"{protocol}://{host.removesuffix('.')}{port}"


def options_for(url: str, given_for: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``options`` if given for the origin of ``url``, else none. Raises ConfigError."""
    same = origin(expand_env(url)) == origin(expand_env(given_for))
    return dict(options) if same else {}


def without_credentials(url: str) -> str:
    """Return a URL of the user without user, password and query, to write to a file."""
    protocol, netloc, path = _parts(url)
    if protocol not in _PORTS:
        return redact_url(url)
    return f"{protocol}://{netloc.rpartition('@')[2]}{path.partition('?')[0]}"


def _parts(url: str) -> tuple[str, str, str]:
    """Return protocol in lower case ("" of a path), host or bucket, and the rest."""
    protocol, separator, rest = url.partition("://")
    protocol = protocol.lower()
    if not separator:
        return "", "", url
    if protocol in _ON_THIS_MACHINE:
        return protocol, "", rest
    ends = r"[/?#\\]" if protocol in _PORTS else "/"
    netloc = re.split(ends, rest, maxsplit=1)[0]
    return protocol, netloc, rest[len(netloc) :]


def protocol_of(url: str) -> str:
    """Return the protocol of a URL; "" of a local path, which has no ``://``."""
    protocol, mark, _ = url.partition("://")
    return protocol if mark else ""


def absolute(url: str | os.PathLike[str]) -> str:
    """Return a local path as absolute, since workers may start elsewhere. Raises StorageError."""
    if isinstance(url, os.PathLike):
        url = os.fspath(url)
    if not isinstance(url, str):
        raise StorageError("path or URL", "must be text or a pathlib.Path", value=url)
    if not url:
        raise StorageError("path or URL", "must not be empty", value=url)
    if url.startswith("${env:"):  # a reference to a URL is kept: it may be secret
        expanded = expand_env(url)
        return url if protocol_of(expanded) else absolute(expanded)
    try:
        return url if protocol_of(url) else os.path.abspath(os.path.expanduser(url))
    except FileNotFoundError:
        rule = "is relative to the current folder, which does not exist any more"
        raise StorageError("path", rule, value=url, hint="Change to another folder") from None


def is_chain(url: str) -> bool:
    """Return whether fsspec would chain file systems: not local paths and IPv6 addresses."""
    protocol, _, rest = url.partition("://")
    if "://" not in url or protocol in _LOCAL_PROTOCOLS:
        return False
    host, _, path = rest.partition("/")
    return "::" in protocol or "::" in path or "::" in re.sub(r"\[[^\]]*\]", "", host)


def open_plain(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """Return the fsspec file system of a URL that is not a chain, and the path on it."""
    protocol = protocol_of(url)
    if not protocol or protocol in _LOCAL_PROTOCOLS:
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
    """Return whether a file system takes a path literally, not as that of a version."""
    if _PLAIN.fullmatch(path) or isinstance(file_system, LocalFileSystem):
        return True
    if str(file_system._strip_protocol(path)) != path.rstrip("/"):
        return False
    split = getattr(file_system, "split_path", None)
    return split is None or "/".join(filter(None, split(path)[:2])) == path
