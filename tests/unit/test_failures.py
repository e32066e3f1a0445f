"""Classification of servers' answers: retry, or an error message."""

from __future__ import annotations

from email.utils import formatdate
from typing import Any

import pytest
from azure.core.exceptions import HttpResponseError
from botocore.exceptions import ClientError
from hypothesis import given
from hypothesis import strategies as st

from gatdist.common.errors import StorageError
from gatdist.storage import failures
from gatdist.storage.failures import RefusalError


def of_s3(code: str, status: int, message: str = "", **headers: str) -> ClientError:
    facts: Any = {
        "Error": {"Code": code, "Message": message},
        "ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": headers},
    }
    return ClientError(facts, "PutObject")


def of_azure(code: str, status: int) -> HttpResponseError:
    error = HttpResponseError(message=code)
    error.status_code = status
    error.error_code = code  # type: ignore[attr-defined]
    return error


TRANSIENT = [
    *(of_s3(code, 400) for code in ("RequestTimeout", "BadDigest", "IncompleteBody")),
    *(of_s3(code, 400) for code in ("XAmzContentSHA256Mismatch", "ThrottlingException")),
    *(of_s3(code, 409) for code in ("OperationAborted", "ConditionalRequestConflict")),
    *(of_s3(code, 503) for code in ("SlowDown", "ServiceUnavailable", "503")),
    of_s3("RequestTimeTooSkewed", 403),
    of_s3("403", 403, date=formatdate(0)),  # answer to HEAD, without a body
    of_s3("InternalError", 500),
    of_s3("NoSuchUpload", 404),
    of_s3("AccessDenied", 403, **{"retry-after": "1"}),
    *(of_azure(code, 400) for code in ("Md5Mismatch", "Crc64Mismatch", "InvalidBlockList")),
    *(of_azure(code, 409) for code in ("SystemInUse", "AccountBeingCreated")),
    of_azure("ServerBusy", 503),
    *(RefusalError(status, {}, "") for status in (408, 421, 425, 429, 500, 502, 503, 504, 520)),
    RefusalError(403, {}, "quota", "rateLimitExceeded"),
    RefusalError(403, {}, "quota", "userRateLimitExceeded"),
]
LASTING = [
    *(of_s3(code, 403) for code in ("SignatureDoesNotMatch", "AccessDenied", "InvalidAccessKeyId")),
    of_s3("InvalidDigest", 400),
    of_s3("NoSuchKey", 404),
    of_s3("NoSuchKey", 404, **{"retry-after": "1"}),
    of_s3("PreconditionFailed", 412),
    of_s3("NotImplemented", 501),
    of_azure("InvalidMd5", 400),
    of_azure("AuthorizationFailure", 403),
    *(RefusalError(status, {}, "") for status in (400, 401, 403, 404, 405, 410, 412, 501, 505)),
]


@pytest.mark.parametrize("error", TRANSIENT, ids=lambda e: str(failures.answer(e).code or e))
def test_transient_errors_are_retried(error: Exception) -> None:
    assert failures.is_transient(error)


@pytest.mark.parametrize("error", LASTING, ids=lambda e: str(failures.answer(e).code or e))
def test_lasting_errors_are_not_retried(error: Exception) -> None:
    assert not failures.is_transient(error)
    assert failures.meaning(error)


def test_denial_with_the_correct_time_is_lasting() -> None:
    assert not failures.is_transient(of_s3("403", 403, date=formatdate()))


@pytest.mark.parametrize(
    "error", [of_s3("RequestTimeTooSkewed", 403), of_s3("403", 403, date=formatdate(0))]
)
def test_skewed_clock_is_named(error: Exception) -> None:
    assert "clock" in failures.hint(error)


@pytest.mark.parametrize(
    "error",
    [
        of_s3("InvalidRequest", 400, "Unsupported header x-amz-checksum-crc32"),
        of_s3("NotImplemented", 501, "A header you provided implies functionality that is not …"),
        of_s3("MissingContentLength", 411),
        of_s3("XAmzContentSHA256Mismatch", 400),
        of_s3("BadDigest", 400, "The CRC32 you specified did not match"),
    ],
)
def test_rejected_checksums_name_their_setting(error: Exception) -> None:
    assert "AWS_REQUEST_CHECKSUM_CALCULATION" in failures.hint(error)


@given(st.text(max_size=30), st.sampled_from(["date", "retry-after"]), st.integers(400, 599))
def test_malformed_server_headers_are_ignored(text: str, name: str, status: int) -> None:
    error = of_s3("X", status, **{name: text})
    assert failures.is_transient(error) in (True, False)
    assert failures.retry_after_s(error) >= 0
    assert isinstance(failures.hint(error), str)


def _raise_while_handling() -> None:
    try:
        raise StorageError("x", "not permitted") from of_s3("AccessDenied", 403)
    except StorageError:
        raise FileNotFoundError("y")  # noqa: B904


def test_error_is_not_classified_by_the_one_being_handled() -> None:
    with pytest.raises(FileNotFoundError) as raised:
        _raise_while_handling()
    assert failures.is_absent(raised.value)
