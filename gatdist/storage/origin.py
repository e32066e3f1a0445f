"""Origins: which server, bucket or file system a URL leads to.

Credentials go to the origin that they were given for, and to no other. A URL that is read from
outside (a manifest, a list, another user's run) never decides where a request goes: it is opened
only where its origin is one that the user has named, and then as the user's own URL with another
path. So no difference between two parsers of URLs can lead anywhere else.

========================  ====================================================================
URL                       origin
========================  ====================================================================
``http``, ``https``       scheme, host and port
``s3``, ``gs``, ``az`` …  protocol and bucket (container and account); the endpoint is an option
local paths, ``file``     this machine
========================  ====================================================================
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, RootModel

from gatdist.config import REFERENCE, expand_env, redact_url
from gatdist.storage.urls import LOCAL_PROTOCOLS

LOCAL = "this machine"

_ON_THIS_MACHINE = ("", *LOCAL_PROTOCOLS)
_SAME = {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az"}
_PORTS = {"http": "80", "https": "443"}


class OutsideUrl(RootModel[str]):
    """A URL that others wrote. No ``str``, so that nothing opens it by mistake.

    See :meth:`gatdist.storage.Store.reach`.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    def require_plain(self) -> None:
        """Raise ValueError, with the rule, if it asks for more than a place on a server."""
        if REFERENCE.search(self.root):
            raise ValueError("${env:…} is replaced in your own configuration only")
        if "::" in self.root:
            raise ValueError("must not chain URLs with '::'")
        if not self.root.isprintable():
            raise ValueError("holds a control character")
        protocol, netloc, path = _parts(self.root)
        if protocol in _PORTS and ("@" in netloc or "\\" in netloc + path):
            raise ValueError("must not hold a user, a password or a backslash")

    @property
    def origin(self) -> str:
        """See :func:`origin`."""
        return origin(self.root)

    @property
    def shown(self) -> str:
        """Without secrets."""
        return redact_url(self.root)

    def on(self, own: str) -> str:
        """The user's own URL of the same origin, with this one's path, and its query if any."""
        protocol, netloc, path = _parts(self.root)
        if self.origin == LOCAL:
            return path
        if "://" not in own:  # all of it is a reference
            own = expand_env(own)
        own_protocol, own_netloc, own_path = _parts(own)
        path = path if not path or path.startswith(("/", "?")) else f"/{path}"
        if protocol in _PORTS and "?" not in path:
            path += "".join(own_path.partition("?")[1:])
        if protocol == "memory":  # which has no buckets
            own_netloc = netloc
        return f"{own_protocol}://{own_netloc}{path}"


def origin(url: str) -> str:
    """The origin of a URL, as text that can be shown: ``https://host:8080``, ``s3://bucket``.

    References in it are taken literally.
    """
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
    """Storage options for a URL of the user's own: those given for another one of its origin.

    Args:
        url: to be opened.
        given_for: the URL that the options were given for, or its origin.
        options: of storage.

    Raises:
        ConfigError: an environment variable is not set.
    """
    same = origin(expand_env(url)) == origin(expand_env(given_for))
    return dict(options) if same else {}


def without_credentials(url: str) -> str:
    """A URL of the user's own without user, password and query, to be written to a file."""
    protocol, netloc, path = _parts(url)
    if protocol not in _PORTS:
        return redact_url(url)
    return f"{protocol}://{netloc.rpartition('@')[2]}{path.partition('?')[0]}"


def _parts(url: str) -> tuple[str, str, str]:
    """Protocol in lower case ("" of a path), host or bucket, and the rest."""
    protocol, separator, rest = url.partition("://")
    protocol = protocol.lower()
    if not separator:
        return "", "", url
    if protocol in _ON_THIS_MACHINE:
        return protocol, "", rest
    ends = r"[/?#\\]" if protocol in _PORTS else "/"
    netloc = re.split(ends, rest, maxsplit=1)[0]
    return protocol, netloc, rest[len(netloc) :]
