"""What no honest client of a server of ours would send, each case drawn from a seed and its number."""

from __future__ import annotations

import base64
import io
import json
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from urllib.parse import quote, urlencode

import numpy as np
from PIL import Image

KINDS = ("json", "form", "image", "path", "raw", "socket")
_SHARES = (5, 3, 5, 3, 1, 3)


def _words(text: str) -> list[str]:
    return text.split()


_NUMBERS = [0, -1, 1, 0.5, 1e308, -1e308, 1e-320, 2**31, 2**63, 2**64, -(2**63), 10**300]
_NUMBERS += map(float, ("nan", "inf", "-inf"))
_TEXTS = ["", " ", "\0", "\ud800", "\u202e", "😀" * 99, "a" * 5000, "[" * 9000, "{" * 9000, "\r\nX: y", "video 1"]
_TEXTS += _words("../../etc/passwd %s%n '; NaN -0 1e999 ٣ true null [[[[ file:///etc/passwd")
_ACTIONS = ["w-1," * 4000, "w-24" * 99, "w -24", "w-24\0", *_words("w-0 w--1 ,,,, w-٣ w-1e3 none - w wwwww-24")]
_ACTIONS += _words("asdfghjkl-24 w-24, W-24 w-2147483648 w-99999999999999999999 none-1,none-1")


@dataclass(frozen=True)
class Victims:
    """What is there to be asked for: a video, a session that ended before it had begun, and one that goes on. key: with
    which one may.
    """

    video: str
    empty: str
    live: str
    key: str | None = None


@dataclass(frozen=True)
class Case:
    """One request over HTTP, or bytes in its place (`raw`), or what is said over a WebSocket (`messages`)."""

    kind: str
    method: str = "POST"
    path: str = "/v1/videos"
    headers: dict[str, str] = field(default_factory=dict)
    content: bytes = b""
    messages: tuple[str | bytes, ...] = ()

    def summary(self) -> str:
        said = [str(each[:200]) for each in self.messages]
        return f"{self.kind} {self.method} {self.path[:200]} {self.headers} {self.content[:200]!r} {said}"


def case(seed: int, number: int, victims: Victims) -> Case:
    """Number `number` of a seed."""
    chance = random.Random(f"{seed}/{number}")
    (kind,) = chance.choices(KINDS, _SHARES)
    return _MAKERS[kind](chance, victims)


def _any(chance: random.Random) -> Any:
    """A value of no particular kind."""
    return chance.choice(
        [
            lambda: chance.choice(_NUMBERS),
            lambda: chance.choice(_TEXTS),
            lambda: chance.choice(_ACTIONS),
            lambda: chance.choice([None, True, False, [], {}, [[]], [None], {"": {}}]),
            lambda: [chance.choice(_NUMBERS)] * chance.choice([1, 3, 4, 5, 5000]),
            lambda: [[[chance.choice(_NUMBERS)] * 4] * 4] * chance.choice([1, 2, 25, 600]),
            lambda: {chance.choice(_TEXTS): chance.choice(_NUMBERS)},
            lambda: "".join(chr(chance.randrange(1, 0xD7FF)) for _ in range(chance.randrange(60))),
        ]
    )()


def _fields(chance: random.Random) -> dict[str, Any]:
    """Of a request, with up to three of them wrong."""
    given: dict[str, Any] = {"prompt": "a hall", "actions": "w-24", "seconds": 1.5, "seed": 1, "image": _encoded()}
    names = [*given, "poses", "intrinsics", "fov_deg", "key_map", "size", "model", "refine"]
    for _ in range(chance.randrange(1, 4)):
        change = chance.randrange(8)
        if change == 0:
            given.pop(chance.choice(names), None)
        elif change == 1:
            given[str(_any(chance))[:99]] = _any(chance)
        elif change == 2:
            given.pop("actions", None)
            given["poses"] = _poses(chance)
        elif change == 3:
            given["actions"] = chance.choice(_ACTIONS)
        else:
            given[chance.choice(names)] = _any(chance)
    return given


def _poses(chance: random.Random) -> Any:
    poses = np.eye(4)[None].repeat(chance.choice([0, 1, 2, 25, 600]), 0).tolist()
    for _ in range(chance.randrange(4)):
        if poses:
            pose = chance.choice(poses)
            pose[chance.randrange(len(pose))] = chance.choice([[], [1.0] * 3, [chance.choice(_NUMBERS)] * 4, ["a"] * 4])
    return chance.choice([poses, json.dumps(poses), poses * 30, [poses], [[each[0][:] for each in poses]]])


def _damaged(chance: random.Random, data: bytes, times: int = 20) -> bytes:
    """With bytes changed, left out, repeated, or the end cut off."""
    found = bytearray(data)
    for _ in range(chance.randrange(1, times)):
        at, change = chance.randrange(len(found) + 1), chance.randrange(4)
        if change == 0 and at < len(found):
            found[at] = chance.randrange(256)
        elif change == 1:
            del found[at : at + chance.choice([1, 2, 40])]
        elif change == 2:
            found[at:at] = found[at : at + chance.choice([1, 9, 300])]
        else:
            found[at:at] = chance.choice(
                [b"\0", b"\xff\xfe", b'"', b"[", b"{", b"\r\n", b"\xf0\x9f", chance.randbytes(8)]
            )
    return bytes(found[: chance.randrange(len(found) + 1)] if chance.random() < 0.3 else found)


def _json(chance: random.Random, victims: Victims) -> Case:
    headers = {"Content-Type": "application/json"}
    text = json.dumps(_fields(chance), ensure_ascii=chance.random() < 0.9).encode("utf-8", "surrogatepass")
    change = chance.randrange(12)
    if change < 4:
        text = _damaged(chance, text)
    elif change == 4:
        depth = chance.choice([10, 1000, 100_000])
        text = chance.choice([b"[" * depth, b'{"a":' * depth, b"[" * depth + b"]" * depth, b'{"poses":' + b"[" * depth])
    elif change == 5:
        text = chance.choice(
            [b"", b"null", b"0", b'"', b"[]", b"\xef\xbb\xbf{}", b"{}", b'{"seed":' + b"9" * 9000 + b"}"]
        )
    elif change == 6:
        text = text.decode("utf-8", "replace").encode(chance.choice(["utf-16", "utf-32", "utf-7", "cp037"]), "replace")
    elif change == 7:
        text += b" " * chance.choice([1 << 16, 1 << 20, 2 << 20])
    if chance.random() < 0.1:
        kinds = [
            "",
            "text/plain",
            "application/json; charset=none",
            "application/JSON",
            "a" * 3000,
            "multipart/form-data",
        ]
        headers["Content-Type"] = chance.choice([*kinds, "multipart/form-data; boundary=" + "b" * 300, "/", ";;;="])
    return Case("json", headers=headers | _odd_headers(chance), content=text)


def _odd_headers(chance: random.Random) -> dict[str, str]:
    """Now and then."""
    if chance.random() < 0.8:
        return {}
    key = chance.choice(["", "once", "k" * 255, "k" * 256, "k" * 9000, "%00", "a,b", "'\""])
    name = chance.choice(
        ["Idempotency-Key", "Authorization", "Range", "Expect", "Accept", "Content-Encoding", "Cookie"]
    )
    return {name: key, chance.choice(["X-Request-Id", "Origin", "If-None-Match", "Forwarded", "Host"]): key}


def _form(chance: random.Random, victims: Victims) -> Case:
    fields = [(name, value) for name, value in _fields(chance).items() if name != "image"]
    if chance.random() < 0.2:
        text = urlencode(
            [(name.encode("utf-8", "replace"), str(value).encode("utf-8", "replace")) for name, value in fields]
        )
        content = (
            _damaged(chance, text.encode())
            if chance.random() < 0.5
            else text.encode() + chance.choice([b"%", b"&=&", b"%zz"])
        )
        return Case("form", headers={"Content-Type": "application/x-www-form-urlencoded"}, content=content)
    edge = chance.choice(["x", "x", "x", "-" * 70, "a b", "'", "\\"])
    parts = [_part(chance, name, str(value).encode("utf-8", "replace")) for name, value in fields]
    parts += [_part(chance, chance.choice(["input_reference", "image", "video", ""]), _pictures()["PNG"], "a.png")]
    parts *= chance.choice([1, 1, 1, 1, 2, 40])
    content = b"".join(f"--{edge}\r\n".encode() + part + b"\r\n" for part in parts) + f"--{edge}--\r\n".encode()
    if chance.random() < 0.5:
        content = _damaged(chance, content)
    said = chance.choice([edge, edge, edge, edge, "y", "", edge + "; charset=utf-7", '"' + edge])
    return Case("form", headers={"Content-Type": f"multipart/form-data; boundary={said}"}, content=content)


def _part(chance: random.Random, name: str, value: bytes, file: str | None = None) -> bytes:
    shown = name.encode("utf-8", "replace").replace(b"\r", b"").replace(b"\n", b"")
    head = b'Content-Disposition: form-data; name="' + shown + b'"'
    if file or chance.random() < 0.05:
        file = chance.choice([file or "", "../../a.png", "a" * 5000, "\0", '"', "é"])
        head += b'; filename="' + file.encode() + b'"'
    if chance.random() < 0.1:
        odd = [
            b"Content-Type: " + b"a" * 5000,
            b"no colon",
            b": empty",
            b"Content-Transfer-Encoding: base64",
            b"\0: \0",
        ]
        head += b"\r\n" + chance.choice(
            [*odd, b"Content-Disposition: attachment", b"Content-Type: text/plain; charset=none"]
        )
    return head + b"\r\n\r\n" + value


@cache
def _pictures() -> dict[str, bytes]:
    """One picture in all formats, those that are taken and those that are not."""
    found = {}
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "ICO", "PPM", "PCX", "TGA"):
        pixels.save(buffer := io.BytesIO(), kind)
        found[kind] = buffer.getvalue()
    return found


def _encoded() -> str:
    return base64.b64encode(_pictures()["JPEG"]).decode()


@cache
def _bomb(width: int, height: int, bits: int, real: bool) -> bytes:
    """A PNG that says it is so large, and perhaps is."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    row = bytes(1 + width * bits // 8) if real else b"\0"
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(row) for _ in range(height if real else 1)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


_BOMBS = [(20_000, 20_000, 1, True), (1 << 30, 1 << 30, 8, False), (60_000, 1, 8, True), (1, 60_000, 8, True)]
_BOMBS += [(2**31 - 1, 1, 8, False), (0, 0, 8, False), (8000, 8000, 1, False), (5000, 5000, 1, True)]


def _image(chance: random.Random, victims: Victims) -> Case:
    data = chance.choice(list(_pictures().values()))
    change = chance.randrange(20)
    if change < 15:
        data = _damaged(chance, data, chance.choice([2, 5, 200]))
    elif change == 15:
        data = _bomb(*chance.choice(_BOMBS))
    elif change == 16:
        data = chance.choice(
            [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"RIFF\0\0\0\0WEBPVP8 ", b"<svg/>", b"%PDF-"]
        )
    elif change == 17:
        data = chance.randbytes(chance.randrange(5000))
    fields = {"actions": "w-24", "seconds": "1.5", "intrinsics": json.dumps([_any(chance)] * 4)}
    if chance.random() < 0.7:
        del fields["intrinsics"]
    if chance.random() < 0.5:
        text = base64.b64encode(data).decode()
        text = chance.choice(
            [text, "data:image/png;base64," + text, "data:," + text, text + "=", text[:-1] + "$", text + "é"]
        )
        return Case(
            "image",
            headers={"Content-Type": "application/json"},
            content=json.dumps({**fields, "image": text}).encode(),
        )
    parts = [f'--x\r\nContent-Disposition: form-data; name="{n}"\r\n\r\n{v}\r\n'.encode() for n, v in fields.items()]
    parts.append(
        b'--x\r\nContent-Disposition: form-data; name="input_reference"; filename="a"\r\n\r\n' + data + b"\r\n--x--\r\n"
    )
    return Case("image", headers={"Content-Type": "multipart/form-data; boundary=x"}, content=b"".join(parts))


_QUERIES = ["limit=" + "9" * 5000, "after=" + "a" * 65, "a" * 9000, "", "limit=1&limit=2", "order=asc&order=desc"]
_QUERIES += _words(
    "limit=0 limit=-1 limit=101 limit=1e9 limit= limit=%00 limit=٣ limit=1 after= after=video_0 after=%00"
)
_QUERIES += _words("order=up order=asc variant=all variant= variant=poses variant=thumbnail variant=video % &&& =")
_RANGES = ["", "bytes=0 - 1", "bytes=" + "0-0," * 2000, "bytes=" + ",".join(f"{2 * n}-{2 * n}" for n in range(900))]
_RANGES += _words("bytes=- bytes=9-1 bytes=0- bytes=-1 bytes=0-0,2-3 bytes=99999999999999999999- bytes=-99999999999")
_RANGES += _words("bytes=a-b seconds=0-1 bytes bytes=0-1;q=1 bytes=1-0,0-1 bytes=٣- bytes=0-99999999 bytes=--1")
_ENDS = ["", *_words("/ /content /content /content /stream /remix /.. // /content/ /%2e%2e")]
_PATHS = _words("/v1/videos /v1/models /metrics /healthz /readyz /openapi.json / // /v1/sessions")
_IDS = [
    "\0",
    "\n",
    "é" * 40,
    "a" * 9000,
    "video_" + "0" * 32,
    "video_" + "f" * 33,
    *_words("video_ VIDEO_1 .. ../.. %"),
]


def _path(chance: random.Random, victims: Victims) -> Case:
    known = [victims.video] * 4 + [victims.empty] * 4 + [victims.live] * 2
    chosen = chance.choice([*known, *_IDS, *_TEXTS])
    id = quote(chosen, safe=chance.choice(["", "/"]), errors="replace")
    after = chance.choice(_ENDS)
    if chosen == victims.live and after == "/stream":  # has no end
        after = ""
    path = f"/v1/videos/{id}{after}"
    if chance.random() < 0.3:
        path = chance.choice(_PATHS)
    if chance.random() < 0.7:
        path += "?" + "&".join(chance.choices(_QUERIES, k=chance.randrange(1, 3)))
    method = chance.choice(["GET"] * 9 + ["HEAD", "PUT", "PATCH", "OPTIONS", "TRACE", "DELETE", "POST", "PROPFIND"])
    if method == "DELETE" and chosen in known:
        method = "GET"
    headers = {"Range": chance.choice(_RANGES)} if chance.random() < 0.6 else _odd_headers(chance)
    if chance.random() < 0.1:
        headers["If-Range"] = chance.choice(['"x"', "", "Wed, 21 Oct 2015 07:28:00 GMT", "yesterday"])
    return Case(
        "path", method, path, {name: value.encode("ascii", "replace").decode() for name, value in headers.items()}
    )


_STARTS = rb"""GET /v1/videos HTTP/9.9
GET  HTTP/1.1
get /v1/videos
OPTIONS * HTTP/1.1
CONNECT a:1 HTTP/1.1
PRI * HTTP/2.0
GET http://a/v1/videos HTTP/1.1
GET /%ff%fe HTTP/1.1""".splitlines()
_STARTS += [b"GET /" + b"a" * 100_000 + b" HTTP/1.1", b"\0" * 99, b"\x16\x03\x01", b"GET /v1/\xff\xfe HTTP/1.1"]
_LINES = rb"""Content-Length: -1
Content-Length: +3
Content-Length: 4
Content-Length: 0x3
Content-Length: 99999999999999999999999999999999999999999
Transfer-Encoding: chunked
Transfer-Encoding: gzip
Transfer-Encoding: chunked, x
Expect: 100-continue
Connection: upgrade
Upgrade: websocket
Host: b
no colon
: a
 X: y""".splitlines()
_LINES += [b"X: " + b"a" * 70_000, b"X" * 70_000 + b": a", b"Connection: " + b"close," * 500, b"X: \0", b"Range: \xff"]
_LINES += [
    b"Idempotency-Key: \xff\xfe",
    b"Authorization: Bearer \xff",
    b"Content-Type: multipart/form-data; boundary=\xff",
]
_BODIES = b"|{}|abc|3\r\nabc\r\n0\r\n\r\n|zz\r\n|fffffffffffffffff\r\n|-1\r\n|0\r\n\r\n".split(b"|")


def _raw(chance: random.Random, victims: Victims) -> Case:
    start = chance.choice([b"POST /v1/videos HTTP/1.1", b"GET /v1/videos HTTP/1.1", b"GET /healthz HTTP/1.1"])
    if chance.random() < 0.3:
        start = chance.choice(_STARTS)
    lines = [start, b"Host: a", *chance.choices(_LINES, k=chance.randrange(1, 4)), b"", chance.choice(_BODIES)]
    content = chance.choice([b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r"]).join(lines)
    return Case("raw", content=_damaged(chance, content, 4) if chance.random() < 0.3 else content)


def _socket(chance: random.Random, victims: Victims) -> Case:
    opening: dict[str, Any] = {"type": "start", "image": _encoded(), "prompt": "a hall"}
    change = chance.randrange(8)
    if change < 4:
        opening = {"type": "resume", "session": victims.live, "fragments": chance.choice([0, *[10**6] * 9])}
    elif change == 4:
        id = chance.choice([victims.live, victims.video, victims.empty, "video_0", *_TEXTS])
        opening = {"type": chance.choice(["resume", "fork"]), "session": id}
        opening |= {chance.choice(["fragments", "chunks"]): chance.choice([0, 1, 2, 10**6, 2**63, 2**64, _any(chance)])}
    opening |= {} if victims.key is None else {"key": victims.key}
    if change in (5, 6):
        names = [*opening, "wait", "seed", "fov_deg", "key_map", "intrinsics", "actions", "key"]
        opening[chance.choice(names)] = _any(chance)
    messages: list[str | bytes] = [_said(opening)]
    if change == 7:
        messages = [_odd_message(chance)]
    for _ in range(chance.randrange(4)):
        if chance.random() < 0.3:
            messages.append(_odd_message(chance))
            continue
        act: dict[str, Any] = {"type": "actions", "actions": chance.choice([*_ACTIONS, *_TEXTS, "w-24"]), "sequence": 1}
        if chance.random() < 0.5:
            act[chance.choice(["type", "actions", "sequence", "more"])] = _any(chance)
        messages.append(_said(act))
    return Case("socket", method="", path="/v1/sessions", messages=tuple(messages))


def _said(what: Any) -> str:
    return json.dumps(what)


_MESSAGES: list[str | bytes] = ["", "{", "null", "[]", "0", '"', "NaN", "{}", b"", b"\xff\xfe", bytes(1 << 20)]
_MESSAGES += ["[" * 100_000, '{"type":' * 50_000, "9" * 9000, "a" * (1 << 20)]


def _odd_message(chance: random.Random) -> str | bytes:
    act = _said({"type": chance.choice(["actions", "end", "resume"]), "actions": "w-24", "sequence": 1}).encode()
    damaged = _damaged(chance, act)
    made = [_said(_any(chance)), _said({"type": _any(chance)}), damaged, damaged.decode("utf-8", "replace")]
    return chance.choice([*_MESSAGES, *made])


_MAKERS: dict[str, Callable[[random.Random, Victims], Case]] = {
    "json": _json, "form": _form, "image": _image, "path": _path, "raw": _raw, "socket": _socket
}  # fmt: skip
