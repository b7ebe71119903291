"""The web page: the files of serve/web, and the images that the weights bring along to begin at."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fastapi import APIRouter
from fastapi.responses import FileResponse
from pydantic import BaseModel
from starlette.responses import Response

from longtake.serve.requests import Refused

_FOLDER = Path(__file__).parent / "web"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "img-src": "'self' blob:",
    "media-src": "'self' blob:",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
}
_HEADERS = {
    "Content-Security-Policy": "; ".join(" ".join(each) for each in _POLICY.items()),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

page_router = APIRouter(include_in_schema=False)


@page_router.get("/")
async def page() -> Response:
    return _file("index.html")


@page_router.get("/docs")
async def docs() -> Response:
    return _file("docs.html")


@page_router.get("/web/{name}")
async def file(name: str) -> Response:
    return _file(name)


def _file(name: str) -> Response:
    """Refused for what does not lie in the folder itself."""
    for path in _FOLDER.iterdir():
        if path.name == name and path.suffix in _TYPES:
            return FileResponse(path, media_type=_TYPES[path.suffix], headers=_HEADERS)
    raise Refused(404, "there is no such page")


class StartImage(BaseModel):
    """prompt: what is to be seen."""

    id: str
    object: Literal["image"] = "image"
    prompt: str
    licence: str


class StartImageList(BaseModel):
    object: Literal["list"] = "list"
    data: list[StartImage]

    @classmethod
    def of(cls, folder: Path | None) -> StartImageList:
        """Those in a folder of weights."""
        if folder is None:
            return cls(data=[])
        licence = _text(folder / "images" / "licence.txt").partition("\n")[0]
        found = [(path.stem, _text(path.with_suffix(".txt"))) for path in _images(folder)]
        return cls(data=[StartImage(id=id, prompt=prompt, licence=licence) for id, prompt in found])


def start_image(folder: Path | None, id: str) -> Path:
    """Its file. Refused for what is not in the list."""
    for path in _images(folder) if folder is not None else ():
        if path.stem == id:
            return path
    raise Refused(404, "there is no such image", "image")


def _images(folder: Path) -> list[Path]:
    return sorted((folder / "images").glob("*.png"))


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""
