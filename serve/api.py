"""The HTTP API: OpenAI's video endpoints with a camera, a stream that plays while it is made, what operators ask."""

# Annotations are values here: Ray Serve pickles these handlers by value, without the names that only annotations use.
import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Header, Path, Query, Request, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

import longtake
from longtake.model.camera import KEY_MAPS
from longtake.serve.answers import (
    Candidate,
    Deleted,
    Error,
    Failure,
    Model,
    ModelList,
    SearchAnswer,
    SearchDeleted,
    SearchList,
    Video,
    VideoList,
)
from longtake.serve.guard import BodyLimit, Guard, SameOrigin
from longtake.serve.ledger import COMPLETED, UNFINISHED, Record, Search
from longtake.serve.live import Live
from longtake.serve.metrics import exposition
from longtake.serve.pages import StartImageList, page_router, start_image
from longtake.serve.requests import Refused, SearchRequest, VideoRequest, candidates, checked, parsed
from longtake.serve.results import Results
from longtake.serve.settings import Settings
from longtake.serve.videos import WATCH_SECONDS, Busy

_TYPES = {"video": ("content.mp4", "video/mp4"), "thumbnail": ("thumbnail.jpg", "image/jpeg")}
_TYPES["poses"] = "path.npz", "application/octet-stream"
_log = logging.getLogger("longtake.serve")


_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": Error} for status in (400, 401, 403, 404, 405, 409, 413, 422, 429, 503)
}


def _body_of(kind: type[VideoRequest]) -> dict[str, Any]:
    schema = kind.model_json_schema()
    properties = schema["properties"] | {"input_reference": {"type": "string", "format": "binary"}}
    content = {
        "application/json": {"schema": schema},
        "multipart/form-data": {"schema": {"type": "object", "properties": properties}},
    }
    return {"requestBody": {"required": True, "content": content}}


app = FastAPI(title="Longtake", version=longtake.__version__, docs_url=None, redoc_url=None, responses=_ERRORS)
app.add_middleware(BodyLimit)
app.add_middleware(SameOrigin)
app.include_router(page_router)


@app.exception_handler(Refused)
async def _refused(_: Request, error: Refused) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers)


@app.exception_handler(HTTPException)
async def _http(_: Request, error: HTTPException) -> JSONResponse:
    headers = dict(error.headers) if error.headers else None
    return JSONResponse(Refused(error.status_code, str(error.detail)).body(), error.status_code, headers)


@app.exception_handler(RequestValidationError)
async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    name = str(first["loc"][-1])
    return JSONResponse(Refused(400, f"{name}: {first['msg']}", name).body(), 400)


@app.exception_handler(RayError)
@app.exception_handler(BackPressureError)
@app.exception_handler(TimeoutError)
async def _unavailable(_: Request, error: Exception) -> JSONResponse:
    _log.warning("answered 503: %s", error)
    refused = Refused(503, "the server is busy or starts again: ask again", headers={"Retry-After": "2"})
    return JSONResponse(refused.body(), 503, refused.headers)


Authorization = Annotated[str | None, Header(include_in_schema=False)]
Once = Annotated[str | None, Header(alias="Idempotency-Key", max_length=255)]
Limit = Annotated[int, Query(ge=1, le=100)]
After = Annotated[str | None, Query(max_length=64)]
Order = Literal["asc", "desc"]
Id = Annotated[str, Path(pattern=r"^video_[0-9a-f]{32}$")]
SearchId = Annotated[str, Path(pattern=r"^search_[0-9a-f]{32}$")]


async def _body(request: Request) -> tuple[dict[str, Any], bytes | None]:
    """Fields, and the image's file. Refused for what is neither JSON nor a form."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        try:
            given = await request.json()
        except (ValueError, RecursionError):
            raise Refused(400, "the body is no JSON") from None
        if not isinstance(given, dict):
            raise Refused(400, "the body must be a JSON object")
        return given, None
    if kind not in ("multipart/form-data", "application/x-www-form-urlencoded"):
        raise Refused(400, "send application/json or multipart/form-data")
    fields: dict[str, Any] = {}
    upload = None
    async with request.form(max_files=1, max_fields=32, max_part_size=4 << 20) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if name not in ("input_reference", "image"):
                    raise Refused(400, f"{name[:64]}: only input_reference is a file", name[:64])
                upload = await value.read()
            elif name in fields:
                raise Refused(400, f"{name[:64]}: it is there twice", name[:64])
            else:
                fields[name] = value
    return fields, upload


@serve.deployment
@serve.ingress(app)
class Api:
    """Checks what comes in, and knows nothing of its own but the keys."""

    def __init__(self, settings: Settings, videos: DeploymentHandle) -> None:
        self.settings, self.videos, self.config = settings, videos, settings.config
        self.results, self.guard, self.limits = Results(settings.store), Guard(settings.keys), settings.limits
        BodyLimit.most = settings.max_upload

    async def _ask(self, method: str, *arguments: Any) -> Any:
        """Of `Videos`. Refused when it is busy."""
        try:
            return await asyncio.wait_for(getattr(self.videos, method).remote(*arguments), 2 * WATCH_SECONDS)
        except Busy as busy:
            raise Refused(429, busy.message, headers={"Retry-After": str(busy.seconds)}) from None

    @app.post("/v1/videos", response_model=Video, openapi_extra=_body_of(VideoRequest))
    async def create(
        self,
        request: Request,
        authorization: Authorization = None,
        idempotency_key: Once = None,
    ) -> Video:
        """Ask for a video. The same Idempotency-Key asks for the same one, however often it is sent."""
        key = self.guard.check(authorization)
        given, upload = await _body(request)
        wanted = await asyncio.to_thread(checked, parsed(given, VideoRequest), upload, self.limits)
        return self._video(await self._ask("submit", key.name, wanted, key.videos, idempotency_key))

    @app.get("/v1/videos", response_model=VideoList)
    async def page(
        self, limit: Limit = 20, after: After = None, order: Order = "desc", authorization: Authorization = None
    ) -> VideoList:
        """Your videos, the newest first."""
        listed = limit, after, order, authorization
        return VideoList(**await self._page("video", "page", self._video, *listed))

    @app.get("/v1/videos/{id}", response_model=Video)
    async def retrieve(self, id: Id, authorization: Authorization = None) -> Video:
        """How far it is."""
        return self._video(await self._record(id, authorization))

    @app.delete("/v1/videos/{id}", response_model=Deleted)
    async def delete(self, id: Id, authorization: Authorization = None) -> Deleted:
        """Stop it, if it is being made, and forget it."""
        key = self.guard.check(authorization)
        if not await self._ask("delete", key.name, id):
            raise Refused(404, "there is no such video", "id")
        return Deleted(id=id)

    @app.get("/v1/videos/{id}/content", response_class=Response)
    async def content(
        self,
        id: Id,
        variant: Literal["video", "thumbnail", "poses"] = "video",
        authorization: Authorization = None,
    ) -> Response:
        """The video as MP4, once it is completed; its first frame as JPEG; its poses as NumPy's .npz."""
        record = await self._record(id, authorization)
        if record.status != COMPLETED:
            raise Refused(409, f"the video is {record.status}: wait until it is completed, or ask for its stream")
        name, kind = _TYPES[variant]
        name = f"{id}/{name}"
        try:
            if not self.results.local:
                return Response(await asyncio.to_thread(self.results.get, name), media_type=kind)
            about = await asyncio.to_thread(os.stat, self.results.path(name))
        except FileNotFoundError:
            raise Refused(404, "there are no frames: the session ended before the first, or it was deleted") from None
        return FileResponse(self.results.path(name), media_type=kind, stat_result=about)

    @app.get("/v1/videos/{id}/stream", response_class=StreamingResponse)
    async def stream(self, id: Id, authorization: Authorization = None) -> StreamingResponse:
        """The video as fragmented MP4, from its beginning, as it is made."""
        record = await self._record(id, authorization)
        parts = self._fragments(record)
        first = await anext(parts, b"")  # before the header has gone out
        if not first:
            raise Refused(409, "the video was not made")

        async def whole() -> AsyncIterator[bytes]:
            yield first
            async for part in parts:
                yield part

        return StreamingResponse(whole(), media_type="video/mp4", headers={"Cache-Control": "no-store"})

    async def _fragments(self, record: Record) -> AsyncIterator[bytes]:
        sent = 0
        while True:
            found = await self._ask("watch", record.owner, record.id, sent, WATCH_SECONDS)
            if found is None:
                return
            record, there = found
            try:
                for number in range(sent, there):
                    if number == 0:
                        yield await asyncio.to_thread(self.results.get, f"{record.id}/video/begin.mp4")
                    yield await asyncio.to_thread(self.results.get, f"{record.id}/video/{number:05}.m4s")
            except FileNotFoundError:  # it was deleted meanwhile
                return
            sent = there
            if record.status not in UNFINISHED:
                return

    @app.post("/v1/searches", response_model=SearchAnswer, openapi_extra=_body_of(SearchRequest))
    async def search(
        self, request: Request, authorization: Authorization = None, idempotency_key: Once = None
    ) -> SearchAnswer:
        """Ask for many videos of one image, of which the best are kept, and refined where the server does."""
        key = self.guard.check(authorization)
        given, upload = await _body(request)
        asked = parsed(given, SearchRequest)
        kept, wanted = await asyncio.to_thread(candidates, asked, upload, self.limits)
        return self._search(await self._ask("search", key.name, kept, wanted, key.videos, idempotency_key))

    @app.get("/v1/searches", response_model=SearchList)
    async def searches(
        self, limit: Limit = 20, after: After = None, order: Order = "desc", authorization: Authorization = None
    ) -> SearchList:
        """Your searches, the newest first."""
        return SearchList(
            **await self._page("search", "page_searches", self._search, limit, after, order, authorization)
        )

    @app.get("/v1/searches/{id}", response_model=SearchAnswer)
    async def retrieve_search(self, id: SearchId, authorization: Authorization = None) -> SearchAnswer:
        """Its candidates, with their scores as soon as they are whole."""
        found = await self._ask("get_search", self.guard.check(authorization).name, id)
        if found is None:
            raise Refused(404, "there is no such search", "id")
        return self._search(found)

    @app.delete("/v1/searches/{id}", response_model=SearchDeleted)
    async def delete_search(self, id: SearchId, authorization: Authorization = None) -> SearchDeleted:
        """Stop it, and forget it with all its videos."""
        if not await self._ask("delete_search", self.guard.check(authorization).name, id):
            raise Refused(404, "there is no such search", "id")
        return SearchDeleted(id=id)

    @app.websocket("/v1/sessions")
    async def session(self, socket: WebSocket) -> None:
        await Live(socket, self.settings, self.results, self.guard, self._ask).run()

    @app.get("/v1/models", response_model=ModelList)
    async def models(self, authorization: Authorization = None) -> ModelList:
        """What videos are made by."""
        self.guard.check(authorization)
        return ModelList(data=[self._model()])

    @app.get("/v1/models/{model}", response_model=Model)
    async def model(self, model: str, authorization: Authorization = None) -> Model:
        self.guard.check(authorization)
        if model != self.config.name:
            raise Refused(404, f"there is no such model, but {self.config.name!r}", "model")
        return self._model()

    @app.get("/v1/images", response_model=StartImageList)
    async def images(self, authorization: Authorization = None) -> StartImageList:
        """Images that came with the weights, for videos to begin at."""
        self.guard.check(authorization)
        return StartImageList.of(self.settings.folder)

    @app.get("/v1/images/{image}", response_class=FileResponse)
    async def image(self, image: str, authorization: Authorization = None) -> FileResponse:
        """One of these, as PNG."""
        self.guard.check(authorization)
        return FileResponse(start_image(self.settings.folder, image), media_type="image/png")

    @app.get("/healthz", response_class=PlainTextResponse)
    async def health(self) -> str:
        """Whether this process answers."""
        return "ok"

    @app.get("/readyz", response_class=PlainTextResponse)
    async def ready(self) -> str:
        """Whether videos are taken, and all that makes them runs; 503 when not."""
        await self._ask("figures")
        mine = await self._deployments()
        if late := [name for name, each in mine.items() if each.status not in ("HEALTHY", "UPSCALING", "DOWNSCALING")]:
            raise Refused(503, f"not ready: {', '.join(sorted(late))}", headers={"Retry-After": "2"})
        return "ok"

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics(self) -> str:
        """For Prometheus."""
        figures = await self._ask("figures")
        for name, each in (await self._deployments()).items():
            figures[f'longtake_replicas{{deployment="{name}"}}'] = each.replica_states.get("RUNNING", 0)
        return exposition(figures)

    async def _deployments(self) -> dict[str, Any]:
        known = await asyncio.to_thread(serve.status)
        return known.applications[serve.get_replica_context().app_name].deployments

    async def _page(
        self,
        what: str,
        method: str,
        shown: Callable[[Any], Any],
        limit: int,
        after: str | None,
        order: str,
        authorization: str | None,
    ) -> dict[str, Any]:
        """Fields of a page of what this method of `Videos` finds."""
        key = self.guard.check(authorization)
        found = await self._ask(method, key.name, limit + 1, after, order == "desc")
        if found is None:
            raise Refused(404, f"after: there is no such {what}", "after")
        data = [shown(each) for each in found[:limit]]
        ids = [each.id for each in data] or [None]
        return dict(data=data, first_id=ids[0], last_id=ids[-1], has_more=len(found) > limit)

    async def _record(self, id: str, authorization: str | None) -> Record:
        record = await self._ask("get", self.guard.check(authorization).name, id)
        if record is None:
            raise Refused(404, "there is no such video", "id")
        return record

    def _video(self, record: Record) -> Video:
        request, frames = record.request, record.total or record.parts
        height, width = self.config.image_size
        return Video(
            id=record.id,
            model=request["model"],
            status=record.status,  # type: ignore[arg-type]
            progress=record.progress,
            created_at=int(record.created_at),
            completed_at=None if record.completed_at is None else int(record.completed_at),
            seconds=f"{max(0, frames - 1) / self.config.fps:g}",
            size=f"{width}x{height}",
            prompt=request["prompt"],
            seed=request["seed"],
            actions=request.get("actions"),
            refine=request["refine"],
            frames=frames,
            error=None if record.error is None else Failure(code="failed", message=record.error),
        )

    def _search(self, found: tuple[Search, dict[str, Record]]) -> SearchAnswer:
        search, records = found
        height, width = self.config.image_size
        made = []
        for each in search.candidates:
            record, refined = records.get(each["video"]), records.get(each.get("refined", ""))
            made.append(
                Candidate(
                    video=each["video"],
                    actions=each["actions"],
                    seed=each["seed"],
                    status="deleted" if record is None else record.status,  # type: ignore[arg-type]
                    progress=0 if record is None else record.progress,
                    scores=each.get("scores", {}),
                    score=each.get("total"),
                    kept=each.get("kept", False),
                    refined=None if refined is None else refined.id,
                )
            )
        todo = [record.progress for record in records.values()]
        missing = search.request["keep"] * search.request["refine"] - (len(records) - len(search.candidates))
        whole = search.status == COMPLETED
        return SearchAnswer(
            id=search.id,
            model=search.request["model"],
            status=search.status,  # type: ignore[arg-type]
            progress=100 if whole else min(99, sum(todo) // max(1, len(todo) + max(0, missing))),
            created_at=int(search.created_at),
            completed_at=None if search.completed_at is None else int(search.completed_at),
            seconds=f"{search.request['seconds']:g}",
            size=f"{width}x{height}",
            prompt=search.request["prompt"],
            keep=search.request["keep"],
            refine=search.request["refine"],
            candidates=made,
            error=None if search.error is None else Failure(code="failed", message=search.error),
        )

    def _model(self) -> Model:
        config = self.config
        height, width = config.image_size
        return Model(
            id=config.name,
            size=f"{width}x{height}",
            fps=config.fps,
            chunk=config.frames_per_chunk,
            max_seconds=self.settings.max_seconds,
            refines=self.settings.refines,
            key_map=config.key_map,
            steering=KEY_MAPS[config.key_map],
        )
