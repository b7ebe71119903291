"""What goes over the wire, and what comes back, for the clients that wait and those that do not."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

UNFINISHED = ("queued", "in_progress")
RETRIED = (429, 503)
MOST_TRIES = 6


class ApiError(Exception):
    """What the server refused. status: of HTTP; param: the field that is wrong, if it is one."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param


class VideoFailed(Exception):
    """The server could not make the video, and says why."""


@dataclass(frozen=True)
class Video:
    """As the server describes it; progress in percent, `raw` everything it said."""

    id: str
    status: str
    progress: int
    frames: int
    seconds: str
    size: str
    error: str | None
    raw: dict[str, Any] = field(repr=False)

    @classmethod
    def of(cls, said: dict[str, Any]) -> Video:
        named = {name: said[name] for name in ("id", "status", "progress", "frames", "seconds", "size")}
        error = said["error"]["message"] if said.get("error") else None
        return cls(**named, error=error, raw=said)

    @property
    def finished(self) -> bool:
        return self.status not in UNFINISHED

    def checked(self) -> Video:
        """Itself. VideoFailed when it was not made."""
        if self.status == "failed":
            raise VideoFailed(self.error)
        return self


def headers(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def creation(
    image: str | Path | bytes,
    prompt: str = "",
    *,
    actions: str | None = None,
    poses: Any = None,
    seconds: float | None = None,
    seed: int = 0,
    intrinsics: Any = None,
    fov_deg: float | None = None,
    key_map: str | None = None,
    refine: bool | None = None,
) -> dict[str, Any]:
    """Arguments of a request for a video, one however often it is sent. image: a file, or what is in one. poses,
    intrinsics: lists, or arrays that have `tolist`.
    """
    data = image if isinstance(image, bytes) else Path(image).read_bytes()
    given = dict(
        prompt=prompt,
        actions=actions,
        poses=_text(poses),
        seconds=seconds,
        seed=seed,
        intrinsics=_text(intrinsics),
        fov_deg=fov_deg,
        key_map=key_map,
        refine=refine,
    )
    return dict(
        method="POST",
        url="/v1/videos",
        data={name: str(value) for name, value in given.items() if value is not None},
        files={"input_reference": ("image", data)},
        headers={"Idempotency-Key": uuid.uuid4().hex},
    )


def refused(status: int, body: bytes) -> ApiError:
    """Of an answer that is an error."""
    try:
        error = json.loads(body)["error"]
        return ApiError(status, error["message"], error["param"])
    except (ValueError, KeyError, TypeError):
        return ApiError(status, body[:200].decode("utf-8", "replace") or f"status {status}")


def pause(retry_after: str | None, tried: int) -> float:
    """Seconds until it is worth asking again."""
    return float(retry_after) if retry_after and retry_after.isdigit() else min(8.0, 0.5 * 2**tried)


def _text(numbers: Any) -> str | None:
    return None if numbers is None else json.dumps(numbers.tolist() if hasattr(numbers, "tolist") else numbers)
