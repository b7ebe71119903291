"""What strangers send, checked: forms, images and numbers become a prompt, a picture and a path, or an error that names
the field.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from longtake.model.camera import (
    KEY_MAPS,
    Trajectory,
    actions_length,
    intrinsics_from_fov,
    parse_actions,
    relative_to_first,
    repeated_actions,
)
from longtake.model.config import WorldModelConfig
from longtake.platform.evaluate.scores import WEIGHTS
from longtake.platform.search.selection import NAMES

_MOST_PIXELS = 64 << 20
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_MOST_POSES = 1 << 16


class Refused(Exception):
    """An answer that is an error, in the shape of OpenAI's."""

    def __init__(
        self, status: int, message: str, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.headers = status, message, param, headers

    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        name = kind.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": name, "param": self.param, "code": None}}


class VideoRequest(BaseModel):
    """A video to make: an image, a prompt, and where the camera goes. In a form, lists are JSON text, and the image may
    be the file `input_reference`.
    """

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field("", max_length=4000, description="What is to be seen.")
    model: str | None = Field(None, description="One of /v1/models.")
    image: str | None = Field(None, description="PNG, JPEG, WebP or BMP, base64 or a data: URL.")
    seconds: float | None = Field(None, gt=0, allow_inf_nan=False, description="By default what the path lasts.")
    size: str | None = Field(None, description="WIDTHxHEIGHT, the model's own.")
    seed: int = Field(0, ge=0, lt=2**63)
    actions: str | None = Field(None, max_length=20000, description="Keys, such as w-80,dw-40, repeated to the end.")
    key_map: Literal[tuple(KEY_MAPS)] | None = Field(None, description="What keys mean.")  # type: ignore[valid-type]
    poses: list[list[list[float]]] | None = Field(
        None, max_length=_MOST_POSES, description="c2w (F, 4, 4), OpenCV axes, metres; in place of actions."
    )
    intrinsics: list[float] | None = Field(
        None, min_length=4, max_length=4, description="fx, fy, cx, cy in pixels of the image as it is sent."
    )
    fov_deg: float = Field(75.0, ge=25, le=120, description="Horizontal field of view, where no intrinsics are given.")
    refine: bool | None = Field(None, description="By default what the server can.")

    @field_validator("poses", "intrinsics", "candidates", "scores", mode="before", check_fields=False)
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError("is no JSON") from None


class SearchRequest(VideoRequest):
    """As a video, but for where the camera goes: of many ways each is tried with `seeds` seeds, the first being `seed`,
    and the `keep` best are refined where the server does.
    """

    actions: None = Field(None, exclude=True)
    poses: None = Field(None, exclude=True)
    candidates: list[Annotated[str, Field(max_length=20000)]] = Field(min_length=1, max_length=256)
    seeds: int = Field(1, ge=1, le=64)
    keep: int = Field(1, ge=1, le=64)
    scores: dict[str, Annotated[float, Field(allow_inf_nan=False)]] | None = Field(
        None, description=f"Weights of {', '.join(NAMES)}; by default {json.dumps(WEIGHTS)}."
    )

    @field_validator("scores")
    @classmethod
    def _known(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        if value is not None and (set(value) - set(NAMES) or not any(value.values())):
            raise ValueError(f"give some of {', '.join(NAMES)} weights, which are not all 0")
        return value


def named(error: ValidationError) -> Refused:
    """What a person is told of the first field that is wrong."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    name = str(first["loc"][0]) if first["loc"] else None
    return Refused(400, f"{name or 'body'}: {first['msg'].removeprefix('Value error, ')}", name)


@dataclass(frozen=True)
class Wanted:
    """A request, checked. frames: of the video; files: of its `Results`; request: what is kept of it."""

    frames: int
    files: dict[str, bytes]
    request: dict[str, Any]


Request = TypeVar("Request", bound=VideoRequest)


def parsed(given: dict[str, Any], kind: type[Request]) -> Request:
    """Refused, naming the field."""
    try:
        return kind(**given)
    except ValidationError as error:
        raise named(error) from None


@dataclass(frozen=True)
class Limits:
    """Of one server. most: candidates of a search."""

    config: WorldModelConfig
    max_seconds: float
    refines: bool
    most: int


def candidates(request: SearchRequest, upload: bytes | None, limits: Limits) -> tuple[dict[str, Any], list[Wanted]]:
    """What is kept of the search, and the videos of its candidates, unrefined. Refused, naming the field."""
    if (count := len(request.candidates) * request.seeds) > limits.most:
        raise Refused(400, f"candidates: {count} are too many, at most {limits.most} are made here", "candidates")
    if request.refine and not limits.refines:
        raise Refused(400, "refine: this server does not refine", "refine")
    if request.keep > count:
        raise Refused(400, f"keep: {request.keep} of {count} candidates cannot be kept", "keep")
    common = request.model_dump(include=set(VideoRequest.model_fields) - {"actions", "poses", "seed", "refine"})
    start, found = _start(request, upload, limits), []
    for actions in request.candidates:
        for seed in range(request.seed, request.seed + request.seeds):
            try:
                one = VideoRequest(**common, actions=actions, seed=seed, refine=False)
                found.append(_wanted(one, start, limits))
            except ValidationError as error:
                raise named(error) from None
            except Refused as refused:
                message = refused.message.removeprefix("actions: ")
                name = "candidates" if refused.param == "actions" else refused.param
                raise Refused(refused.status, f"{name}: {message}", name) from None
    kept = request.model_dump(include={"prompt", "keep", "scores"}, exclude_none=True)
    kept |= {"model": limits.config.name, "seconds": max(each.request["seconds"] for each in found)}
    return kept | {"refine": limits.refines if request.refine is None else request.refine}, found


def checked(request: VideoRequest, upload: bytes | None, limits: Limits, live: bool = False) -> Wanted:
    """live: the path is only where the camera begins. Refused, naming the field."""
    return _wanted(request, _start(request, upload, limits), limits, live)


def _start(request: VideoRequest, upload: bytes | None, limits: Limits) -> tuple[tuple[int, int], bytes]:
    """Height and width of the image as it was sent, and a PNG of it at the model's size."""
    image, png = _image(upload if upload is not None else _decoded(request.image)), io.BytesIO()
    height, width = limits.config.image_size
    ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS).save(png, "PNG")
    return (image.height, image.width), png.getvalue()


def _wanted(request: VideoRequest, start: tuple[tuple[int, int], bytes], limits: Limits, live: bool = False) -> Wanted:
    config = limits.config
    height, width = config.image_size
    if request.model not in (None, config.name):
        raise Refused(404, f"there is no model {request.model!r} here, but {config.name!r}", "model")
    if request.size not in (None, f"{width}x{height}"):
        raise Refused(400, f"size: this model makes {width}x{height}", "size")
    if request.refine and not limits.refines:
        raise Refused(400, "refine: this server does not refine", "refine")
    sent_size, png = start
    path = _path(request, config, sent_size, limits.max_seconds)
    kept = request.model_dump(exclude={"image", "poses"}, exclude_none=True) | {
        "model": config.name,
        "seconds": (path.num_frames - 1) / config.fps,
        "refine": limits.refines if request.refine is None else request.refine,
    }
    arrays = io.BytesIO()
    whole = path.c2w[:1] if live else _whole_chunks(path.c2w, config.frames_per_chunk)
    np.savez(arrays, c2w=whole.numpy(), intrinsics=path.intrinsics[0].numpy(), frames=path.num_frames)
    return Wanted(path.num_frames, {"image.png": png, "path.npz": arrays.getvalue()}, kept)


def _decoded(text: str | None) -> bytes:
    if text is None:
        raise Refused(400, "input_reference: a world begins with an image: send one", "input_reference")
    text = re.sub(r"^data:[\w/+.-]{0,64};base64,", "", text[:100]) + text[100:]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Refused(400, "image: this is not base64", "image") from None


def _image(data: bytes) -> Image.Image:
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as opened:
            if opened.width * opened.height > _MOST_PIXELS:
                raise Refused(
                    400, f"input_reference: {opened.width}x{opened.height} pixels are too many", "input_reference"
                )
            return ImageOps.exif_transpose(opened).convert("RGB")
    except Refused:
        raise
    except Image.DecompressionBombError:
        raise Refused(400, "input_reference: so many pixels are too many", "input_reference") from None
    except Exception:  # a decoder may raise anything at what it was not made for
        names = ", ".join(_FORMATS)
        raise Refused(400, f"input_reference: it cannot be read: send one of {names}", "input_reference") from None


def _path(
    request: VideoRequest, config: WorldModelConfig, image_size: tuple[int, int], max_seconds: float
) -> Trajectory:
    """The camera's way, one pose a frame of the video, from its first pose."""
    if (request.actions is None) == (request.poses is None):
        raise Refused(400, "actions: say where the camera goes, by actions or by poses", "actions")
    longest = math.floor(max_seconds * config.fps)
    if request.seconds is not None and request.seconds > max_seconds:
        raise Refused(400, f"seconds: at most {max_seconds:g} are made here", "seconds")
    wanted = None if request.seconds is None else max(1, round(request.seconds * config.fps))
    try:
        if request.actions is not None:
            name, key_map = "actions", request.key_map or config.key_map
            length = wanted or min(actions_length(request.actions), longest + 1)
            actions = repeated_actions(request.actions, length)
            given = parse_actions(actions, key_map, config.fps, fov_deg=request.fov_deg, image_size=config.image_size)
            c2w = given.c2w
        else:
            name = "poses"
            c2w = torch.as_tensor(_array(request.poses), dtype=torch.float32)
            c2w = Trajectory(c2w, intrinsics_from_fov(request.fov_deg, config.image_size), config.image_size).c2w
            c2w = relative_to_first(c2w)
        if wanted is not None and len(c2w) > wanted + 1:
            c2w = c2w[: wanted + 1]
        if not 2 <= len(c2w) <= longest + 1:
            raise ValueError(f"a video has 2 to {longest + 1} frames here, and these are {len(c2w)}")
        if request.poses is not None and wanted is not None and len(c2w) < wanted + 1:
            raise ValueError(f"{len(c2w)} poses are not the {wanted + 1} of so many seconds")
        intrinsics, size = intrinsics_from_fov(request.fov_deg, config.image_size), config.image_size
        if request.intrinsics is not None:
            name, intrinsics, size = "intrinsics", torch.tensor(request.intrinsics), image_size
        return Trajectory(c2w, intrinsics, size, config.fps).resized(config.image_size)
    except (ValueError, OverflowError) as error:
        raise Refused(400, f"{name}: {error}", name) from None


def _array(poses: Any) -> np.ndarray:
    try:
        return np.array(poses, np.float32)
    except ValueError:
        raise ValueError("poses must be (F, 4, 4)") from None


def _whole_chunks(c2w: torch.Tensor, chunk: int) -> torch.Tensor:
    """The camera stays at its last pose until the chunk is full."""
    rest = -(len(c2w) - 1) % chunk
    return torch.cat([c2w, c2w[-1:].expand(rest, 4, 4)])
