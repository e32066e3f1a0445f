"""What an error means that a file system raised: come back later, renew credentials, or give up.

Each library tells the same thing in its own way, and none of them need be installed; so errors are
known by their attributes and by the names of their classes.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

from gatdist.common.errors import GatdistError

# Trying again can't help against these. A full disk is not among them: it may be about to be freed.
_PERMANENT = {
    *(errno.EACCES, errno.EEXIST, errno.EFBIG, errno.EINVAL, errno.EISDIR, errno.ELOOP),
    *(errno.EMSGSIZE, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOSYS, errno.ENOTDIR),
    *(errno.ENOTEMPTY, errno.EPERM, errno.EROFS),
}
_ABSENT = (FileNotFoundError, NotADirectoryError)
# Connections lost, and answers cut short, as aiohttp, botocore and Azure's library name them.
_LOST = {
    *("ClientConnectionError", "ClientPayloadError", "ConnectionError", "HTTPClientError"),
    *("IncompleteReadError", "JSONDecodeError", "ResponseParserError"),
    *("ServiceRequestError", "ServiceResponseError", "LostError", "RangeIgnoredError"),
}
# A server that leads nowhere does not say that a file is absent.
_MISLED = {
    "TooManyRedirects": "redirects in a loop",
    "RedirectClientError": "redirects to what is no HTTP URL",
    "InvalidURL": "is no URL",
}
_LIBRARIES = {"AzureError", "BotoCoreError", "ClientError", "GoogleAuthError", "HttpError"}
# Statuses of HTTP that ask to try again. 421: on another connection.
_PASSING_STATUSES = {408, 421, 425, 429}
# Transient failures that object stores answer with another 4xx status. SignatureDoesNotMatch is not
# among them: nearly always the secret is wrong, and TLS lets nothing in transit change a signature.
# Nor is InvalidDigest (Azure: InvalidMd5), a header that is no digest at all.
_PASSING_CODES = {
    # S3: the body was damaged or cut short in transit, or an upload's parts have gone
    *("BadDigest", "IncompleteBody", "NoSuchUpload", "XAmzContentChecksumMismatch"),
    *("XAmzContentSHA256Mismatch",),
    # S3: somebody else is writing, or the server is busy
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
# In what copies of S3 answer to checksums that they do not know.
_OF_CHECKSUMS = (
    *("aws-chunked", "baddigest", "checksum", "content-md5", "contentmd5", "sha256mismatch"),
    *("implies functionality", "missingcontentlength", "streaming-", "trailer"),
)
# A server refuses requests whose date is further from its own than this.
_LARGEST_SKEW_S = 300.0
# Of keys that were right. "400" is an answer without a body, as an expired token gets from HEAD.
_EXPIRED_CODES = {
    *("400", "AuthenticationFailed", "ExpiredToken", "ExpiredTokenException"),
    *("RequestExpired", "TokenRefreshRequired"),
}


# aiohttp makes its own error of an OSError that its middleware raises; so these are none.


class RefusalError(Exception):
    """An HTTP answer that is an error, with Google's own code where it has one."""

    def __init__(
        self, status: int, headers: Mapping[str, str], message: str, code: str = ""
    ) -> None:
        super().__init__(f"{status} {message}")
        self.status, self.headers, self.error_code = status, headers, code


class RangeIgnoredError(Exception):
    """A server sent other bytes than those asked for: all of them, as a rule."""


class LostError(Exception):
    """A connection was lost, or some of what it carried."""


@dataclass(frozen=True)
class Answer:
    """What a server answered.

    Attributes:
        status: of HTTP.
        code: the protocol's own.
        message: in words.
        headers: their names in lower case.
    """

    status: int
    code: str = ""
    message: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)


def answer(error: BaseException) -> Answer:
    """The answer that an error was made of; its status is 0 where there was none."""
    for each in _chain(error):
        if found := _own_answer(each):
            return found
    return Answer(0)


def is_absent(error: Exception) -> bool:
    """Whether there is no such file, folder or bucket. A server that is down can't tell."""
    status = answer(error).status
    if status:
        return status in (404, 410)
    if _misled(error):
        return False
    return isinstance(error, _ABSENT) and not is_passing(error)


def is_passing(error: Exception) -> bool:
    """Whether trying again may help."""
    found = answer(error)
    if found.status:
        if found.status in _PASSING_STATUSES or found.code in _PASSING_CODES:
            return True
        if found.status >= 500:
            return found.status not in (501, 505)
        # Some servers and proxies limit rates with 403 or 409, and say when to come back.
        final = found.status in (404, 410, 412, 416)
        return ("retry-after" in found.headers and not final) or is_skewed(error)
    cause: BaseException | None = error
    while cause:
        if isinstance(cause, OSError):
            lasting = (*_ABSENT, PermissionError)
            if cause.errno not in _PERMANENT and not isinstance(cause, lasting):
                return True
        elif _LOST & _class_names(cause):
            return True
        cause = cause.__cause__
    return False


def is_skewed(error: Exception) -> bool:
    """Whether a request was refused for its date, as when it was late or a clock is wrong.

    S3 answers HEAD without a code: there the server's own date tells.
    """
    found = answer(error)
    if found.code == "RequestTimeTooSkewed":
        return True
    if "reasonable timeframe" in str(error):  # Google's word on a token's dates
        return True
    return found.status == 403 and abs(_server_ahead_s(found)) > _LARGEST_SKEW_S


def is_taken(error: Exception) -> bool:
    """Whether a file was not created because there is one already."""
    found = answer(error)
    taken = found.status == 412 or found.code == "BlobAlreadyExists"
    return taken or isinstance(error, FileExistsError)


def is_unsupported(error: Exception) -> bool:
    """Whether a server does not know the operation or a header of it, as copies of S3 answer."""
    found = answer(error)
    return found.status in (405, 411, 501) or found.code in ("InvalidArgument", "NotImplemented")


def hint(error: Exception) -> str:
    """What to do about some refusals, as an imperative sentence; "" about the others."""
    found = answer(error)
    if is_skewed(error):
        ahead_s = _server_ahead_s(found)
        differs = f" (it differs from the server's by {abs(ahead_s):.0f} s)" if ahead_s else ""
        return f"Set this machine's clock{differs}: the server refuses the date of requests"
    message = f"{found.code} {found.message}".lower()
    if found.status and any(word in message for word in _OF_CHECKSUMS):
        return (
            "If the server is not Amazon's, set AWS_REQUEST_CHECKSUM_CALCULATION=when_required: it "
            "may not know the checksums that newer clients send"
        )
    return ""


def _server_ahead_s(found: Answer) -> float:
    """By how much the server's clock is ahead of ours; 0 where it does not say."""
    try:
        return _ahead_s(found.headers["date"])
    except (KeyError, ValueError, OverflowError):
        return 0.0


def _ahead_s(date: str) -> float:
    return parsedate_to_datetime(date).timestamp() - time.time()


def is_expired(error: Exception) -> bool:
    """Whether new credentials may help."""
    found = answer(error)
    return found.status == 401 or found.code in _EXPIRED_CODES


def retry_after_s(error: Exception) -> float:
    """How long the server asks to wait; 0 where it does not say."""
    requested = answer(error).headers.get("retry-after", "")
    try:
        return max(0.0, float(requested) if requested.isdecimal() else _ahead_s(requested))
    except (ValueError, OverflowError):
        return 0.0


def meaning(error: Exception) -> str:
    """What a lasting failure means, in words; "" where it is no failure of storage."""
    if is_absent(error):
        return "does not exist"
    if misled := _misled(error):
        return misled
    status = answer(error).status
    if isinstance(error, PermissionError) or status in (401, 403):
        return "not permitted"
    names = _class_names(error)
    if names & {"ClientAuthenticationError", "GoogleAuthError", "NoCredentialsError"}:
        return "not permitted"
    if isinstance(error, NotImplementedError):
        return "can't be written"
    return "can't be used" if status or isinstance(error, OSError) or names & _LIBRARIES else ""


def _misled(error: BaseException) -> str:
    """Where a server leads that leads nowhere; "" if it does not."""
    names = set().union(*map(_class_names, _chain(error)))
    return next((meaning for name, meaning in _MISLED.items() if name in names), "")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, and those it was made of; not what was being handled when it was raised."""
    each: BaseException | None = error
    while each and not isinstance(each, GatdistError):
        yield each
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)


def _own_answer(error: BaseException) -> Answer | None:
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):  # botocore's
        facts, message = response.get("ResponseMetadata", {}), response.get("Error", {})
        code, message = str(message.get("Code", "")), str(message.get("Message", ""))
        headers = _lower(facts.get("HTTPHeaders"))
        return Answer(facts.get("HTTPStatusCode", 0), code, f"{code}: {message}", headers)
    for name in ("status", "status_code"):  # aiohttp's and ours, Azure's
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
