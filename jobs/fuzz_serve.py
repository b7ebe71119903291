"""Send the server what no honest client would: nothing of it may end in a 5xx, or end a process.

Damaged JSON, forms, images, paths, HTTP and WebSocket messages, all drawn from a seed; and, by schemathesis (of the
`dev` extra), what the server's own schema allows and forbids. On this machine, with the weights of check-serve.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from urllib.parse import quote

import httpx
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from longtake.platform.observe import measurements
from longtake.platform.observe.hostile import KINDS, Case, Victims, case
from longtake.platform.observe.job import run_job
from longtake.platform.observe.progress import Progress
from longtake.platform.observe.served import picture, replicas, small_server

KEY = "secret"
QUIET = 1.0  # seconds without a word after which a server is taken to say no more over a WebSocket, or to bad HTTP
SETTINGS = ["max_running=1", "max_queued=2", "max_sessions=7", "session_idle=600", "max_upload=1048576"]
SETTINGS += [f"{kind}.{each}" for kind in ("stage1", "refiner", "decoder") for each in ("most=1", "together=8")]


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    if args.cases < 1:
        raise ValueError(f"--cases {args.cases} must be at least 1")
    if args.dry_run:
        print(json.dumps(vars(args) | {"settings": SETTINGS}, indent=2))
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        small_server(args.preset, SETTINGS, "--keys", _keys(Path(folder, "keys.json"))) as server,
    ):
        before = set(replicas())
        found = asyncio.run(fuzzed(server.url, args.seed, range(args.cases), KEY))
        found["schema_cases"], failures = schema_driven(server.url, args.examples, KEY)
        crashes = len(before - set(replicas())) + sum(not server.answers(at) for at in ("/healthz", "/readyz"))
        asyncio.run(_victims(server.url, KEY))  # it still does what it is for
    names = ("cases", "accepted", "status_5xx", "unanswered", "shapeless")
    figures = {name: found[name] for name in names} | {"crashes": crashes}
    figures |= {"schema_cases": found["schema_cases"], "schema_failures": failures}
    figures |= {f"{name}_{kind}": found[f"{name}_{kind}"] for kind in KINDS for name in ("cases", "status_5xx")}
    for name, figure in figures.items():
        print(f"{name:30} {figure}")
    if wrong := {name: figures[name] for name in (*names[2:], "crashes", "schema_failures") if figures[name]}:
        raise ValueError("; ".join(f"{name}: {count}" for name, count in wrong.items()))
    if args.write:
        print(f"figures: {measurements.write('serve_fuzz', figures)}")


def _keys(file: Path) -> str:
    """Of one person, who may ask as often as they like."""
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    limits = {"videos": 1 << 20, "requests_per_minute": 1e9}
    file.write_text(json.dumps({"keys": [{"name": "eve", "sha256": digest, **limits}]}))
    return str(file)


async def fuzzed(url: str, seed: int, numbers: range, key: str | None = None, at_once: int = 16) -> Counter[str]:
    """How many cases there were, and of those how many of each outcome, altogether and by kind."""
    victims = await _victims(url, key)
    found, waiting = Counter[str](), iter(numbers)
    limits = httpx.Limits(max_connections=2 * at_once, max_keepalive_connections=at_once)
    async with httpx.AsyncClient(base_url=url, headers=_authorized(key), timeout=60, limits=limits) as http:
        with Progress(len(numbers), "cases", "fuzz") as progress:

            async def worker() -> None:
                for number in waiting:
                    made = case(seed, number, victims)
                    outcome = await {"raw": _bytes, "socket": _spoken}.get(made.kind, _request)(http, made, victims)
                    for name in ("cases", *outcome):
                        found[name] += 1
                        found[f"{name}_{made.kind}"] += 1
                    if outcome & {"status_5xx", "unanswered", "shapeless"}:
                        print(f"case {number}: {', '.join(outcome)}: {made.summary()}", file=sys.stderr)
                    progress.update(1, status_5xx=found["status_5xx"])

            await asyncio.gather(*(worker() for _ in range(at_once)))
        await http.delete(f"/v1/videos/{victims.live}")
    return found


async def _victims(url: str, key: str | None) -> Victims:
    """Made anew; RuntimeError when the server makes no videos."""
    async with httpx.AsyncClient(base_url=url, headers=_authorized(key), timeout=60) as http:
        files = {"input_reference": ("a.png", picture())}
        while (answer := await http.post("/v1/videos", data={"actions": "w-24"}, files=files)).status_code == 429:
            await asyncio.sleep(1)
        video, empty = answer.raise_for_status().json()["id"], await _opened(url, key, end=True)
        for id in (video, empty):
            while (found := (await http.get(f"/v1/videos/{id}")).json())["status"] in ("queued", "in_progress"):
                await asyncio.sleep(0.2)
            if found["status"] != "completed":
                raise RuntimeError(f"the server makes no videos: {found['error']}")
    return Victims(video, empty, await _opened(url, key, end=False), key)


async def _opened(url: str, key: str | None, end: bool) -> str:
    """A session that nobody said anything in."""
    start = {"type": "start", "image": base64.b64encode(picture()).decode(), **({} if key is None else {"key": key})}
    async with connect(url.replace("http", "ws", 1) + "/v1/sessions") as socket:
        await socket.send(json.dumps(start))
        id = json.loads(await socket.recv())["session"]
        if end:
            await socket.send(json.dumps({"type": "end"}))
            while json.loads(await socket.recv())["type"] != "closed":
                pass
    return id


def _authorized(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}


async def _request(http: httpx.AsyncClient, made: Case, victims: Victims) -> set[str]:
    """What came of a request over HTTP. A video that was accepted in spite of all is deleted."""
    target = quote(made.path, safe="/?&=%:,;*'()!@$+~", errors="replace").encode()
    url = http.base_url.copy_with(raw_path=target)
    try:
        answer = await http.request(made.method, url, headers=made.headers, content=made.content)
    except httpx.TransportError:
        return {"unanswered"}
    if answer.status_code >= 500:
        return {"status_5xx"}
    ranged = answer.status_code in (400, 416) and "Range" in made.headers  # a bad one is answered by Starlette
    if answer.status_code >= 400 and made.method != "HEAD" and not ranged:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return set() if isinstance(answer.json()["error"]["message"], str) else {"shapeless"}
        return {"shapeless"}
    if made.method == "POST" and answer.status_code == 200:
        deleted = await http.delete(f"/v1/videos/{answer.json()['id']}")
        return {"accepted"} if deleted.status_code == 200 else {"accepted", "status_5xx"}
    return set()


async def _bytes(http: httpx.AsyncClient, made: Case, victims: Victims) -> set[str]:
    """What came of bytes that may be no HTTP: whether there is an answer is the server's choice."""
    reader, writer = await asyncio.open_connection(http.base_url.host, http.base_url.port)
    answer = b""
    with contextlib.suppress(OSError, TimeoutError):
        writer.write(made.content)
        while part := await asyncio.wait_for(reader.read(1 << 16), QUIET):
            answer += part
    writer.transport.abort()
    return {"status_5xx"} if re.search(rb"^HTTP/1.[01] 5", answer, re.MULTILINE) else set()


async def _spoken(http: httpx.AsyncClient, made: Case, victims: Victims) -> set[str]:
    """What came of a WebSocket. A session that was begun in spite of all is deleted."""
    outcome: set[str] = set()
    url = str(http.base_url.copy_with(scheme="ws", path="/v1/sessions"))
    try:
        async with connect(url, max_size=None, open_timeout=60) as socket:
            try:
                for message in made.messages:
                    await socket.send(message)
                while True:
                    heard = await asyncio.wait_for(socket.recv(), QUIET)
                    said: dict = json.loads(heard) if isinstance(heard, str) else {"type": "fragment"}
                    if said["type"] == "started" and said["session"] not in (victims.live, victims.empty):
                        outcome.add("accepted")
                        await http.delete(f"/v1/videos/{said['session']}")
                    if said["type"] == "error" and said["error"]["type"] == "server_error":
                        outcome.add("status_5xx")
            except ConnectionClosed as closed:
                if closed.rcvd is None or closed.rcvd.code in (1011, 1012, 1013):
                    outcome.add("status_5xx" if closed.rcvd else "unanswered")
            except TimeoutError:
                pass
    except (OSError, TimeoutError, WebSocketException):
        outcome.add("unanswered")
    return outcome


def schema_driven(url: str, examples: int, key: str | None = None) -> tuple[int, int]:
    """How many requests schemathesis made of the server's schema, and how many failures it found: a 5xx, or an answer
    that the schema does not know.
    """
    with tempfile.TemporaryDirectory() as folder:
        program = "from schemathesis.cli import schemathesis; schemathesis()"
        words = ["run", f"{url}/openapi.json", "--max-examples", str(examples), "--seed", "0", "--no-shrink"]
        words += ["--generation-database", "none", "--phases", "examples,coverage,fuzzing", "--continue-on-failure"]
        words += ["--checks", "not_a_server_error,status_code_conformance", "--report", "ndjson"]
        words += ["--report-ndjson-path", f"{folder}/events", "--warnings", "off", "--request-timeout", "60"]
        words += [word for name, value in _authorized(key).items() for word in ("--header", f"{name}: {value}")]
        command = [sys.executable, "-c", program, *words]
        ended = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        found = {name: int(count) for count, name in re.findall(r"(\d+) (generated|unique failures?)", ended.stdout)}
        if ended.returncode:
            print(ended.stdout, ended.stderr, file=sys.stderr)
        if not found.get("generated"):
            raise RuntimeError("schemathesis, of the dev extra, sent nothing")
        return found["generated"], sum(count for name, count in found.items() if name != "generated")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fuzz-serve", description=__doc__)
    add = parser.add_argument
    add("--preset", default="tiny-streaming", help="whose weights are shipped (default: %(default)s)")
    add("--cases", type=int, default=10_000, help="drawn from the seed (default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--examples", type=int, default=100, help="of each operation, by schemathesis (default: %(default)s)")
    add("--no-write", dest="write", action="store_false", help="do not write docs/measurements")
    add("--dry-run", action="store_true", help="print the resolved arguments")
    return parser


if __name__ == "__main__":
    run_job(main)
