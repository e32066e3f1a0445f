"""Classification of file system errors, by names of classes: libraries need not be installed."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

from gatdist.common.errors import GatdistError

# Permanent errors. A full disk is not among them: it may be freed soon.
_PERMANENT = {
    *(errno.EACCES, errno.EEXIST, errno.EFBIG, errno.EINVAL, errno.EISDIR, errno.ELOOP),
    *(errno.EMSGSIZE, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOSYS, errno.ENOTDIR),
    *(errno.ENOTEMPTY, errno.EPERM, errno.EROFS),
}
_ABSENT = (FileNotFoundError, NotADirectoryError)
# Lost connections and truncated answers in aiohttp, botocore and Azure's library.
_LOST = {
    *("ClientConnectionError", "ClientPayloadError", "ConnectionError", "HTTPClientError"),
    *("IncompleteReadError", "JSONDecodeError", "ResponseParserError"),
    *("ServiceRequestError", "ServiceResponseError", "LostError", "RangeIgnoredError"),
}
# Redirects to nowhere do not mean that a file is absent.
_MISLED = {
    "TooManyRedirects": "redirects in a loop",
    "RedirectClientError": "redirects to a URL that is not HTTP",
    "InvalidURL": "is not a URL",
}
_LIBRARIES = {"AzureError", "BotoCoreError", "ClientError", "GoogleAuthError", "HttpError"}
_NOT_PERMITTED = {
    *("ClientAuthenticationError", "GoogleAuthError", "NoCredentialsError", "PermissionError"),
}
_TRANSIENT_STATUSES = {408, 421, 425, 429}
# Transient failures that object stores answer with another 4xx status. SignatureDoesNotMatch is not
# among them: the secret is wrong, since TLS protects a signature in transit. Nor is InvalidDigest
# (Azure: InvalidMd5), a malformed header.
_TRANSIENT_CODES = {
    # S3: the body was damaged or truncated in transit, or an upload's parts are gone
    *("BadDigest", "IncompleteBody", "NoSuchUpload", "XAmzContentChecksumMismatch"),
    *("XAmzContentSHA256Mismatch",),
    # S3: another client is writing, or the server is busy
    *("BandwidthLimitExceeded", "ClientTokenConflict", "ConditionalRequestConflict"),
    *("InternalError", "LimitExceededException", "OperationAborted", "PriorRequestNotComplete"),
    *("ProvisionedThroughputExceededException", "RequestLimitExceeded", "RequestThrottled"),
    *("RequestThrottledException", "RequestTimeout", "RequestTimeoutException"),
    *("ServiceUnavailable", "SlowDown", "ThrottledException", "Throttling"),
    *("ThrottlingException", "TooManyRequests", "TooManyRequestsException"),
    *("TransactionInProgressException",),
    # Google: quotas, which its JSON API answers with 403
    *("backendError", "internalError", "rateLimitExceeded", "userRateLimitExceeded"),
    # Azure
    *("AccountBeingCreated", "Crc64Mismatch", "InvalidBlockList", "Md5Mismatch"),
    *("OperationTimedOut", "ServerBusy", "SnapshotOperationRateExceeded", "SystemInUse"),
}
# Words in the answers of S3-compatible servers to unknown checksums.
_CHECKSUM_WORDS = (
    *("aws-chunked", "baddigest", "checksum", "content-md5", "contentmd5", "sha256mismatch"),
    *("implies functionality", "missingcontentlength", "streaming-", "trailer"),
)
_MAX_SKEW_S = 300.0  # servers refuse requests with a date further off
# "400" is an answer without a body, to HEAD with an expired token.
_EXPIRED_CODES = {
    *("400", "AuthenticationFailed", "ExpiredToken", "ExpiredTokenException"),
    *("RequestExpired", "TokenRefreshRequired"),
}


# Not OSErrors, which aiohttp would replace by errors of its own.


class RefusalError(Exception):
    """An HTTP error response, with Google's error code if it has one."""

    def __init__(
        self, status: int, headers: Mapping[str, str], message: str, code: str = ""
    ) -> None:
        super().__init__(f"{status} {message}")
        self.status, self.headers, self.error_code = status, headers, code


class RangeIgnoredError(Exception):
    """A server sent other bytes than those requested, usually the whole file."""


class LostError(Exception):
    """A connection or some of its data was lost."""


class Answer(NamedTuple):
    """Answer of a server."""

    status: int  # of HTTP
    code: str = ""  # error code of the service
    message: str = ""  # error message
    headers: Mapping[str, str] = {}  # by name in lower case


def answer(error: BaseException) -> Answer:
    """Return the answer that caused an error; status 0 if there was none."""
    for each in _chain(error):
        if found := _own_answer(each):
            return found
    return Answer(0)


def is_absent(error: Exception) -> bool:
    """Return whether there is no such file, folder or bucket."""
    status = answer(error).status
    if status:
        return status in (404, 410)
    if _misled(error):
        return False
    return isinstance(error, _ABSENT) and not is_transient(error)


def is_transient(error: Exception) -> bool:
    """Return whether a retry may help."""
    found = answer(error)
    if found.status:
        if found.status in _TRANSIENT_STATUSES or found.code in _TRANSIENT_CODES:
            return True
        if found.status >= 500:
            return found.status not in (501, 505)
        # Some servers and proxies limit rates with 403 or 409 and Retry-After.
        final = found.status in (404, 410, 412, 416)
        return ("retry-after" in found.headers and not final) or is_skewed(error)
    cause: BaseException | None = error
    while cause:
        if isinstance(cause, OSError):
            if cause.errno not in _PERMANENT and not isinstance(cause, (*_ABSENT, PermissionError)):
                return True
        elif _LOST & _class_names(cause):
            return True
        cause = cause.__cause__
    return False


def is_skewed(error: Exception) -> bool:
    """Return whether a request was refused for its date. S3 answers HEAD without a code."""
    found = answer(error)
    if found.code == "RequestTimeTooSkewed":
        return True
    if "reasonable timeframe" in str(error):  # Google, on a token's dates
        return True
    return found.status == 403 and abs(_ahead_s(found.headers.get("date", ""))) > _MAX_SKEW_S


def is_taken(error: Exception) -> bool:
    """Return whether a file was not created because it exists."""
    status, code, *_ = answer(error)
    return status == 412 or code == "BlobAlreadyExists" or isinstance(error, FileExistsError)


def is_unsupported(error: Exception) -> bool:
    """Return whether a server does not support an operation or one of its headers."""
    status, code, *_ = answer(error)
    return status in (405, 411, 501) or code in ("InvalidArgument", "NotImplemented")


def hint(error: Exception) -> str:
    """Return a hint, as an imperative sentence; "" if there is none."""
    found = answer(error)
    if is_skewed(error):
        ahead_s = _ahead_s(found.headers.get("date", ""))
        differs = f" (it differs from the server's by {abs(ahead_s):.0f} s)" if ahead_s else ""
        return f"Set this machine's clock{differs}: the server refuses the date of requests"
    message = f"{found.code} {found.message}".lower()
    if found.status and any(word in message for word in _CHECKSUM_WORDS):
        return (
            "If the server is not Amazon's, set AWS_REQUEST_CHECKSUM_CALCULATION=when_required: it "
            "may not support the checksums that newer clients send"
        )
    return ""


def _ahead_s(date: str) -> float:
    try:
        return parsedate_to_datetime(date).timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0.0


def is_expired(error: Exception) -> bool:
    """Return whether new credentials may help."""
    found = answer(error)
    return found.status == 401 or found.code in _EXPIRED_CODES


def retry_after_s(error: Exception) -> float:
    """Return the Retry-After of the server; 0 if absent."""
    requested = answer(error).headers.get("retry-after", "")
    return max(0.0, float(requested) if requested.isdecimal() else _ahead_s(requested))


def meaning(error: Exception) -> str:
    """Describe a permanent failure; "" if it is not one of storage."""
    if is_absent(error):
        return "does not exist"
    if misled := _misled(error):
        return misled
    status = answer(error).status
    names = _class_names(error)
    if status in (401, 403) or names & _NOT_PERMITTED:
        return "not permitted"
    if isinstance(error, NotImplementedError):
        return "can't be written"
    return "can't be used" if status or isinstance(error, OSError) or names & _LIBRARIES else ""


def _misled(error: BaseException) -> str:
    names = set().union(*map(_class_names, _chain(error)))
    return next((meaning for name, meaning in _MISLED.items() if name in names), "")


def _chain(error: BaseException) -> Iterator[BaseException]:
    each: BaseException | None = error
    while each and not isinstance(each, GatdistError):
        yield each
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)


def _own_answer(error: BaseException) -> Answer | None:
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):  # botocore's
        metadata, message = response.get("ResponseMetadata", {}), response.get("Error", {})
        code, message = str(message.get("Code", "")), str(message.get("Message", ""))
        headers = _lower(metadata.get("HTTPHeaders"))
        return Answer(metadata.get("HTTPStatusCode", 0), code, f"{code}: {message}", headers)
    for name in ("status", "status_code"):  # aiohttp's and gatdist's, Azure's
        status = getattr(error, name, None)
        if isinstance(status, int):
            headers = _lower(getattr(error, "headers", getattr(response, "headers", None)))
            azure_code = getattr(error, "error_code", None) or ""
            code = str(getattr(azure_code, "value", azure_code))
            return Answer(status, code, str(error), headers)
    return None


def _lower(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in (headers or {}).items()}


def _class_names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}
