"""Opens the file system of a URL: time limits set, its library's own retries turned off.

If a library tried again by itself, a server that is down would be told minutes after the budget
that the user set, and no ``Retry-After`` would be kept. What each does, and what is done about it:

=======  =====================================  ================================================
s3fs     5 times, and botocore 5 times each     settings of both
gcsfs    6 times, with pauses of 1 to 32 s      its HTTP client raises what it does not try again
adlfs    4 times, with pauses of 15 s and more  the client's policy is set to none; but an answer
                                                that is cut off it asks for 3 times, a second apart
http     never                                  –
=======  =====================================  ================================================
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
_CONNECTIONS = 64  # botocore would keep ten, which all threads share
_MESSAGE_BYTES = 4096

_SHORTEST_SECRET = 4  # what is shorter would be struck out of much
Options = dict[str, Any]


class Backend(NamedTuple):
    """What is particular to a kind of storage.

    Attributes:
        extra: of gatdist's package that installs its library; "" where none is needed.
        credentials: where its library looks for them.
        configured: adds what gatdist needs to the user's options, given the URL, those options
            (both expanded), and a time limit.
        adjust: does to the file system what no option does, given the same.
        clash: what in a URL and in options, both expanded, excludes one another; "" for nothing.
        listing: the permission without which absent files are answered with 403; "" for none.
    """

    extra: str
    credentials: str
    configured: Callable[[str, Options, float], Options] = lambda url, options, stall_s: options
    adjust: Callable[[Any, float], None] = lambda file_system, stall_s: None
    clash: Callable[[str, Options], str] = lambda url, options: ""
    listing: str = ""


def backend_of(url: str) -> Backend:
    """The kind of storage that a URL is of."""
    return _BACKENDS.get(protocol_of(url), _OTHER)


def open_file_system(url: str, options: Mapping[str, Any], stall_s: float) -> tuple[Any, str]:
    """The fsspec file system for a URL, and the path on it.

    Args:
        url: with ``${env:NAME}`` for secrets.
        options: the user's, with the same.
        stall_s: a connection on which nothing comes for so long counts as lost.

    Raises:
        StorageError: the protocol is not known or its package not installed, an option is wrong, or
            the URL is a chain of file systems.
        ConfigError: an environment variable is not set.
    """
    if is_chain(expand_env(url)):
        rule = "must not contain '::' (no chain of file systems is opened)"
        raise StorageError(redact_url(url), rule, hint="Use another name, or a local path")
    backend = backend_of(url)
    expanded = expand_all(dict(options))
    for name, value in expanded.items():  # libraries fail late over these, and far away
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
        raise StorageError(
            redact_url(url), f"its package is not installed ({error})", hint=hint
        ) from error
    except (TypeError, ValueError) as error:
        message = without(secrets_of(url, options), str(error))
        hint = "Check the protocol and storage_options"
        raise StorageError(redact_url(url), f"can't be opened ({message})", hint=hint) from error
    return file_system, root


def expand_all(value: Any) -> Any:
    """``value`` with each ``${env:NAME}`` in its strings replaced."""
    if isinstance(value, str):
        return expand_env(value)
    if isinstance(value, Mapping):
        return {key: expand_all(item) for key, item in value.items()}
    return [expand_all(item) for item in value] if isinstance(value, list) else value


def secrets_of(url: str, options: Mapping[str, Any]) -> list[str]:
    """What of these must not be shown, the longest first."""
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
    return sorted((s for s in found if len(s) >= _SHORTEST_SECRET), key=len, reverse=True)


def without(secrets: Iterable[str], text: str) -> str:
    """A text with neither these words nor the secrets in URLs."""
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

    secretive = _Secretive(str(URL(url).origin()))
    ours = {"middlewares": (secretive, _raise_refusals), "timeout": _limits(stall_s)}
    return options | {"client_kwargs": ours | options.get("client_kwargs", {})}


_HARMLESS = {"host", "accept", "accept-encoding", "range"}


@dataclass(frozen=True)  # so that fsspec takes those of one origin for the same
class _Secretive:
    """Middleware of aiohttp: after a redirect to another origin, no header of the user's is sent.

    aiohttp itself takes ``Authorization`` and cookies away, but no other header, such as
    ``X-Api-Key``. Where a server redirects to is its own decision.
    """

    origin: str

    async def __call__(self, request: Any, handler: Any) -> Any:
        if str(request.url.origin()) != self.origin:
            for name in {name for name in request.headers if name.lower() not in _HARMLESS}:
                del request.headers[name]
            request.headers["User-Agent"] = "gatdist"
        return await handler(request)


def _http_clash(url: str, options: Options) -> str:
    """A user in the URL, and another in the options, which aiohttp refuses late."""
    client = options.get("client_kwargs", {})
    names = {name.lower() for message in (options, client) for name in message.get("headers", {})}
    if "@" in urlsplit(url).netloc and ("authorization" in names or "auth" in client):
        return "holds a password, and storage_options an Authorization header, which excludes it"
    return ""


def _limits(stall_s: float) -> Any:
    from aiohttp import ClientTimeout

    return ClientTimeout(total=None, sock_connect=min(_CONNECT_S, stall_s), sock_read=stall_s)


async def _raise_refusals(request: Any, handler: Any) -> Any:
    """Middleware of aiohttp: raises an answer that is an error, or is not the range asked for.

    A whole file that comes instead of a range is not read.
    """
    requested = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
    if requested:
        request.headers["Accept-Encoding"] = "identity"  # of a compressed file there are no ranges
    response = await handler(request)
    if response.status >= 400 and response.status != 404:  # which fsspec knows
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
    """Middleware of aiohttp for gcsfs, which retries what is an error of aiohttp, and only that."""
    from aiohttp import ClientError

    try:
        response = await _raise_refusals(request, handler)
        await response.read()
    except (ClientError, OSError) as error:
        raise LostError(str(error) or type(error).__name__) from error
    return response


async def _explanation(response: Any) -> tuple[str, str]:
    """Google's explanation of an error and its code, else the status in words and no code."""
    text = await response.content.read(_MESSAGE_BYTES)
    response.release()  # for the next request, if that was all
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        error = parse_json(text)["error"]
        reasons = [str(each.get("reason", "")) for each in error.get("errors", [])]
        return str(error["message"]), reasons[0] if reasons else ""
    return str(response.reason), ""


# Azure Blob Storage


def _azure_options(url: str, options: Options, stall_s: float) -> Options:
    return {"connection_timeout": min(_CONNECT_S, stall_s), "read_timeout": stall_s} | options


def _set_azure(file_system: Any, stall_s: float) -> None:
    # It would parse a name with ? or # as a URL, and put it together again in another order.
    strip = type(file_system)._strip_protocol
    file_system._strip_protocol = lambda path: (
        path.lstrip("/") if isinstance(path, str) and "://" not in path else strip(path)
    )
    file_system._parent = lambda path: path.rstrip("/").rpartition("/")[0]
    # adlfs uses those for content only, and has none for retries. Its client keeps them here; that
    # of another version may not.
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
