"""What the API answers: OpenAI's shapes, and those that follow them."""

# Annotations are values here, as in api.py.
from typing import Generic, Literal, TypeVar

from pydantic import BaseModel

from longtake.model.camera import KeyMap

Item = TypeVar("Item")


class Page(BaseModel, Generic[Item]):
    object: Literal["list"] = "list"
    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Failure(BaseModel):
    code: str
    message: str


class Video(BaseModel):
    """As OpenAI's, and what was asked for. progress: percent."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int
    created_at: int
    completed_at: int | None = None
    expires_at: int | None = None
    seconds: str
    size: str
    prompt: str
    seed: int
    actions: str | None = None
    refine: bool
    frames: int
    remixed_from_video_id: str | None = None
    error: Failure | None = None


class VideoList(Page[Video]):
    pass


class Deleted(BaseModel):
    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


class Candidate(BaseModel):
    """A video of a search. score: the weighted sum of `scores`, once all videos are whole. refined: the video that was
    refined from it.
    """

    video: str
    actions: str
    seed: int
    status: Literal["queued", "in_progress", "completed", "failed", "deleted"]
    progress: int
    scores: dict[str, float]
    score: float | None
    kept: bool
    refined: str | None


class SearchAnswer(BaseModel):
    """progress: percent, of all its videos."""

    id: str
    object: Literal["search"] = "search"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int
    created_at: int
    completed_at: int | None
    seconds: str
    size: str
    prompt: str
    keep: int
    refine: bool
    candidates: list[Candidate]
    error: Failure | None


class SearchList(Page[SearchAnswer]):
    pass


class SearchDeleted(BaseModel):
    id: str
    object: Literal["search.deleted"] = "search.deleted"
    deleted: Literal[True] = True


class Model(BaseModel):
    """size: WIDTHxHEIGHT; chunk: frames that are made at a time; steering: what the keys of key_map do, letter to
    (forward, right, yaw to the right, pitch up), in metres and degrees a second.
    """

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "longtake"
    size: str
    fps: float
    chunk: int
    max_seconds: float
    refines: bool
    key_map: str
    steering: KeyMap


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    error: ErrorBody
