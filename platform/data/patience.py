"""Reading from an object store that is in trouble for a while: one that restarts, is overloaded, or loses connections.

botocore and s3fs repeat a request a few times within seconds. This outlasts what takes minutes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from longtake.platform.observe.notices import say

T = TypeVar("T")

_FIRST_WAIT, _LONGEST_WAIT, _LIMIT = 1.0, 30.0, 300.0  # seconds


def patiently(url: str, read: Callable[[], T]) -> T:
    """`read()`, tried again with longer and longer waits while the object store of `url` cannot answer.

    A local path is tried once. What no waiting mends (a refusal, a missing or damaged object, a wrong certificate)
    passes through at once. ConnectionError when the trouble has lasted 5 minutes.
    """
    began, wait = time.monotonic(), _FIRST_WAIT
    while True:
        try:
            return read()
        except Exception as error:
            if "://" not in url or (trouble := _trouble(error)) is None:
                raise
            lasted = time.monotonic() - began
            if lasted + wait > _LIMIT:
                raise ConnectionError(
                    f"{url} could not be read for {lasted:.0f} s ({trouble}): is the object store running? check "
                    "AWS_ENDPOINT_URL, then run again"
                ) from error
        store = "/".join(url.split("/")[:3])
        say(f"{time.strftime('%H:%M')} {store} does not answer ({trouble}): trying for {_LIMIT / 60:.0f} minutes")
        time.sleep(wait)
        wait = min(2 * wait, _LONGEST_WAIT)


def _trouble(error: BaseException) -> str | None:
    """What is wrong for the moment, in a word or two, or None where trying again would not help."""
    from botocore import exceptions as botocore
    from s3fs.core import S3_RETRYABLE_ERRORS

    for cause in _causes(error):
        if isinstance(cause, botocore.ClientError):
            status = cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return f"status {status}" if status >= 500 or status in (408, 429) else None
        if isinstance(cause, botocore.SSLError):
            return None
        if isinstance(cause, (*S3_RETRYABLE_ERRORS, botocore.ConnectionError, ConnectionError, TimeoutError)):
            return type(cause).__name__
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from, the first cause first: s3fs gives answers the classes of OSError."""
    if error is not None:
        yield from _causes(error.__cause__)
        yield error
