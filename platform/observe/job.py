"""The outermost frame of every job: a user's mistake ends in one line on stderr, a bug in its traceback."""

from __future__ import annotations

import builtins
import os
import re
import sys
from collections.abc import Callable, Iterator

CREDENTIALS = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL"
_DENIED = {"403", "AccessDenied", "AllAccessDisabled", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch"}

# Ray Data's UserCodeException loses its __cause__ between processes; the worker's traceback still holds it, as the last
# of the exceptions before.
_CAUSE_IN_TEXT = re.compile(
    r"^(?P<name>\w+): (?P<message>.+?)\n\nThe above exception was the direct cause", re.MULTILINE | re.DOTALL
)


def debugging() -> bool:
    """Whether LONGTAKE_DEBUG asks for tracebacks and for Ray's own logs."""
    return os.environ.get("LONGTAKE_DEBUG", "") not in ("", "0")


def run_job(main: Callable[[list[str] | None], None], argv: list[str] | None = None) -> None:
    """Call `main(argv)`; end the process with status 2 after a user's mistake, with 130 after Ctrl-C.

    A user's mistake is a ValueError, an OSError or an object store's refusal, also when it was raised in a Ray worker.
    Any other exception passes through unchanged, as does every one when LONGTAKE_DEBUG=1.
    """
    try:
        main(argv)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        line = user_message(error)
        if line is None or debugging():
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)


def user_message(error: BaseException) -> str | None:
    """One line that tells a user what to change, or None when `error` is not a user's mistake."""
    for cause in _causes(error):
        if line := _describe(cause):
            return " ".join(line.split())
    before, data, _ = str(error).partition("UserCodeException")
    if data and (lost := list(_CAUSE_IN_TEXT.finditer(before))):
        kind = getattr(builtins, lost[-1]["name"], object)
        if issubclass(kind, (ValueError, OSError)):
            return " ".join(lost[-1]["message"].split())
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """What may hold the message, the best first.

    Ray wraps what a worker raised, in tasks, in Data pipelines and in Train alike: there the innermost counts. The
    wrappers are told by their attributes, so that a job without Ray need not import it. What was raised `from` another
    error says more than that one, unless it only repeats a part of it, as s3fs does.
    """
    inner = [getattr(error, name, None) for name in ("cause", "_base_exc", "controller_failure")]
    inner += getattr(error, "worker_failures", {}).values()
    for cause in inner:
        if isinstance(cause, BaseException) and cause is not error:
            yield from _causes(cause)
    reason = error.__cause__
    repeats = (getattr(error, "strerror", None) or str(error)) in str(reason)
    if reason is not None and repeats:
        yield from _causes(reason)
    # A RayTaskError also inherits from the class of its cause, but its text is the worker's traceback.
    if getattr(error, "cause", None) is None:
        yield error
    if reason is not None and not repeats:
        yield from _causes(reason)


def _describe(error: BaseException) -> str | None:
    if type(error).__module__.partition(".")[0] in ("botocore", "aiobotocore"):
        return _describe_store(error)
    if isinstance(error, OSError):
        if error.filename is not None and error.strerror:
            return f"{error.filename}: {error.strerror}"
        text = str(error) or type(error).__name__
        refused = isinstance(error, PermissionError) or "ACCESS_DENIED" in text or "403" in text
        return f"{text} ({CREDENTIALS})" if refused and "AWS_" not in text else text
    if isinstance(error, ValueError):
        return str(error) or "ValueError"
    return None


def _describe_store(error: BaseException) -> str:
    """botocore's ClientError carries a `response`; its other errors (no credentials, no connection) only a text."""
    details = getattr(error, "response", {}).get("Error", {})
    name = type(error).__name__
    if details.get("Code") in _DENIED or "Credentials" in name:
        return f"object store: {error} ({CREDENTIALS})"
    if "Connect" in name or "Timeout" in name:
        return f"object store: {error} (is it running? check AWS_ENDPOINT_URL)"
    return f"object store: {error}"
