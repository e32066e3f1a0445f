"""File systems of URLs, with time limits and without their libraries' own retries.

Library retries would exceed the user's retry budget by minutes, and ignore ``Retry-After``. Those
of s3fs and botocore (5 times each) are turned off by settings, of gcsfs (6 times) by raising errors
that it does not retry, of adlfs (4 times) by the client's policy; but adlfs requests a truncated
answer 3 times, a second apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from gatdist.common.errors import StorageError
from gatdist.common.strict_json import parse_json
from gatdist.config import REFERENCE, expand_env, is_secret, redact_url
from gatdist.storage.failures import LostError, RangeIgnoredError, RefusalError
from gatdist.storage.urls import is_chain, open_plain, protocol_of

_CONNECT_S = 10.0
_CONNECTIONS = 64  # shared by all threads; botocore's default is ten
_MESSAGE_BYTES = 4096
_MIN_SECRET = 4  # shorter ones would be redacted too often

Options = dict[str, Any]


class Backend(NamedTuple):
    """Properties of a kind of storage."""

    extra: str  # extra of gatdist's package that installs its library, if any
    credentials: str  # where its library looks for credentials
    # Adds to the user's options, given the expanded URL, these options, and a time limit.
    configured: Callable[[str, Options, float], Options] = lambda url, options, stall_s: options
    # Changes the file system where there is no option, given a time limit.
    adjust: Callable[[Any, float], None] = lambda file_system, stall_s: None
    # Describes a conflict between expanded URL and options, if any.
    clash: Callable[[str, Options], str] = lambda url, options: ""
    listing: str = ""  # permission without which absent files are answered with 403, if any


def backend_of(url: str) -> Backend:
    """Return the kind of storage of a URL."""
    return _BACKENDS.get(protocol_of(url), _OTHER)


def open_file_system(url: str, options: Mapping[str, Any], stall_s: float) -> tuple[Any, str]:
    """Return the fsspec file system of a URL, and the path on it. Raises StorageError.

    A connection counts as lost after ``stall_s`` without data.
    """
    if is_chain(expand_env(url)):
        rule = "must not contain '::', which chains file systems"
        raise StorageError(redact_url(url), rule, hint="Use another name, or a local path")
    backend = backend_of(url)
    expanded = expand_all(dict(options))
    for name, value in expanded.items():  # libraries fail late on these
        if name.endswith("kwargs") and not isinstance(value, Mapping):
            hint = f"Write {name} = {{ … }}"
            raise StorageError(redact_url(url), f"option {name} must be a table", hint=hint)
    place = expand_env(url)
    try:
        if rule := backend.clash(place, expanded):
            raise StorageError(redact_url(url), rule, hint="Leave one of them out")
        # Listings are never cached: another process may have written since.
        requested = backend.configured(place, expanded, stall_s) | {"use_listings_cache": False}
        file_system, root = open_plain(place, requested)
        backend.adjust(file_system, stall_s)
    except ImportError as error:
        hint = f'pip install "gatdist[{backend.extra}]"' if backend.extra else "Install its package"
        rule = f"its package is not installed ({error})"
        raise StorageError(redact_url(url), rule, hint=hint) from error
    except (TypeError, ValueError) as error:
        message = redact_secrets(secrets_of(url, options), str(error))
        hint = "Check the protocol and storage_options"
        raise StorageError(redact_url(url), f"can't be opened ({message})", hint=hint) from error
    return file_system, root


def expand_all(value: Any) -> Any:
    """Return ``value`` with each ``${env:NAME}`` in its strings replaced."""
    if isinstance(value, str):
        return expand_env(value)
    if isinstance(value, Mapping):
        return {key: expand_all(item) for key, item in value.items()}
    return [expand_all(item) for item in value] if isinstance(value, list) else value


def secrets_of(url: str, options: Mapping[str, Any]) -> list[str]:
    """Return the secrets in a URL and options, the longest first."""
    found: set[str] = set()

    def collect(value: object, key: str) -> None:
        if isinstance(value, Mapping):
            for name, item in value.items():
                collect(item, str(name))
        elif isinstance(value, str):
            found.update(expand_env(reference[0]) for reference in REFERENCE.finditer(value))
            if is_secret(key):
                found.add(expand_env(value))

    collect({"": url} | dict(options), "")
    return sorted((s for s in found if len(s) >= _MIN_SECRET), key=len, reverse=True)


def redact_secrets(secrets: Iterable[str], text: str) -> str:
    """Return a text without these secrets, and without those in URLs."""
    for secret in secrets:
        text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", "***", text)
    return redact_url(text)


# S3


def _s3_options(url: str, options: Options, stall_s: float) -> Options:
    config = {
        "connect_timeout": min(_CONNECT_S, stall_s),
        "read_timeout": stall_s,
        "retries": {"max_attempts": 0},
        "max_pool_connections": _CONNECTIONS,
    }
    return options | {"config_kwargs": config | options.get("config_kwargs", {})}


def _set_s3(file_system: Any, stall_s: float) -> None:
    file_system.retries = 1


# Google Cloud Storage and plain HTTP, both with aiohttp


def _gcs_options(url: str, options: Options, stall_s: float) -> Options:
    session = {"middlewares": (_read_or_raise,)} | options.get("session_kwargs", {})
    return {"requests_timeout": _limits(stall_s)} | options | {"session_kwargs": session}


def _http_options(url: str, options: Options, stall_s: float) -> Options:
    from yarl import URL

    drop_headers = _DropHeaders(str(URL(url).origin()))
    defaults = {"middlewares": (drop_headers, _raise_refusals), "timeout": _limits(stall_s)}
    return options | {"client_kwargs": defaults | options.get("client_kwargs", {})}


_HARMLESS = {"host", "accept", "accept-encoding", "range"}


@dataclass(frozen=True)  # so that fsspec reuses file systems of one origin
class _DropHeaders:
    """Middleware that drops the user's headers after a redirect: aiohttp keeps ``X-Api-Key``."""

    origin: str

    async def __call__(self, request: Any, handler: Any) -> Any:
        if str(request.url.origin()) != self.origin:
            for name in {name for name in request.headers if name.lower() not in _HARMLESS}:
                del request.headers[name]
            request.headers["User-Agent"] = "gatdist"
        return await handler(request)


def _http_clash(url: str, options: Options) -> str:
    """Describe a user in the URL and another in the options, which aiohttp refuses late."""
    client = options.get("client_kwargs", {})
    names = {name.lower() for given in (options, client) for name in given.get("headers", {})}
    if "@" in urlsplit(url).netloc and ("authorization" in names or "auth" in client):
        return "must not have a password if storage_options have an Authorization header"
    return ""


def _limits(stall_s: float) -> Any:
    from aiohttp import ClientTimeout

    return ClientTimeout(total=None, sock_connect=min(_CONNECT_S, stall_s), sock_read=stall_s)


async def _raise_refusals(request: Any, handler: Any) -> Any:
    """Middleware of aiohttp that raises errors and ignored ranges, without reading the file."""
    requested = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
    if requested:
        request.headers["Accept-Encoding"] = "identity"  # compression would change offsets
    response = await handler(request)
    if response.status >= 400 and response.status != 404:  # fsspec handles 404
        message, code = await _explanation(response)
        raise RefusalError(response.status, response.headers, message, code)
    if requested and response.status == 200:
        first, last = (int(number) for number in requested.groups())
        length = response.content_length
        if first or length != last + 1:
            response.close()
            raise RangeIgnoredError(
                f"gave {'all' if length is None else length} bytes for the range {first} to "
                f"{last + 1}"
            )
    return response


async def _read_or_raise(request: Any, handler: Any) -> Any:
    """Middleware of aiohttp that raises other errors than aiohttp's, which gcsfs would retry."""
    from aiohttp import ClientError

    try:
        response = await _raise_refusals(request, handler)
        await response.read()
    except (ClientError, OSError) as error:
        raise LostError(str(error) or type(error).__name__) from error
    return response


async def _explanation(response: Any) -> tuple[str, str]:
    """Return Google's error message and code, else the HTTP reason and no code."""
    text = await response.content.read(_MESSAGE_BYTES)
    response.release()  # for reuse, if complete
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        error = parse_json(text)["error"]
        reasons = [str(each.get("reason", "")) for each in error.get("errors", [])]
        return str(error["message"]), reasons[0] if reasons else ""
    return str(response.reason), ""


# Azure Blob Storage


def _azure_options(url: str, options: Options, stall_s: float) -> Options:
    return {"connection_timeout": min(_CONNECT_S, stall_s), "read_timeout": stall_s} | options


def _set_azure(file_system: Any, stall_s: float) -> None:
    # adlfs would parse a name with ? or # as a URL, and join its parts in another order.
    strip = type(file_system)._strip_protocol
    file_system._strip_protocol = lambda path: (
        path.lstrip("/") if isinstance(path, str) and "://" not in path else strip(path)
    )
    file_system._parent = lambda path: path.rstrip("/").rpartition("/")[0]
    # adlfs applies the time limits to content only, and has no option for retries. These attributes
    # of its client may not exist in other versions.
    with suppress(AttributeError):
        client = file_system.service_client
        client._config.retry_policy.total_retries = 0
        limits = client._pipeline._transport.connection_config
        limits.timeout, limits.read_timeout = min(_CONNECT_S, stall_s), stall_s


_S3 = Backend("s3", "AWS_ACCESS_KEY_ID and so on", _s3_options, _set_s3, listing="s3:ListBucket")
_GCS = Backend(
    "gcs", "GOOGLE_APPLICATION_CREDENTIALS", _gcs_options, listing="storage.objects.list"
)
_AZURE = Backend("azure", "AZURE_STORAGE_CONNECTION_STRING and so on", _azure_options, _set_azure)
_HTTP = Backend("http", "", _http_options, clash=_http_clash)
_OTHER = Backend("", "")
_BACKENDS = {
    **dict.fromkeys(("s3", "s3a"), _S3),
    **dict.fromkeys(("gs", "gcs"), _GCS),
    **dict.fromkeys(("az", "abfs", "abfss"), _AZURE),
    **dict.fromkeys(("http", "https"), _HTTP),
}
