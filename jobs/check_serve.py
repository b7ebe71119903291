"""Crowd the server while replicas of it are killed, and count what is lost, made twice or too much.

Customers ask for short videos, with a key of their own each, and ask again when they are turned away; some watch one
and leave. Visitors open live sessions and leave, most without a word. Meanwhile replicas of stage 1, refiner and
decoder are killed, and for a while customers want no refiner, so that it is scaled down alone. On this machine, with
the shipped weights at 64x96 pixels.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import random
import signal
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
from matplotlib.figure import Figure
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidHandshake, WebSocketException

from longtake.platform.observe import measurements
from longtake.platform.observe.job import run_job
from longtake.platform.observe.progress import Progress
from longtake.platform.observe.served import Replica, growth, picture, replicas, small_server

KINDS = ("Stage1", "Refine", "Decode")
RUNNING, QUEUED, SESSIONS, IDLE = 6, 24, 6, 5
SETTINGS = [f"max_running={RUNNING}", f"max_queued={QUEUED}", f"max_sessions={SESSIONS}"]
SETTINGS += [f"session_idle={IDLE}", "stalled=45"]
SETTINGS += [f"{kind}.{name}" for kind in ("stage1", "refiner", "decoder") for name in ("up_after=2", "down_after=10")]
ACTIONS = "w-16,dw-8"
PHASE = 150.0  # seconds until customers want refined videos again, or again none
UNFINISHED = ("queued", "in_progress")


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    if args.minutes <= 0 or args.calm < 0 or not 0 <= args.faults < 1:
        raise ValueError("--minutes must be more than 0, --calm at least 0, --faults in [0, 1)")
    if args.faults and not Path("infra/faulty_server.py").exists():
        raise ValueError("--faults needs infra/faulty_server.py: run it at the root of a clone of the repository")
    scaled = (f"most={args.most}", f"together={args.together}")
    settings = SETTINGS + [f"{kind}.{each}" for kind in ("stage1", "refiner", "decoder") for each in scaled]
    if args.dry_run:
        print(json.dumps(vars(args) | {"settings": settings}, indent=2))
        return
    program = dict(program=("infra/faulty_server.py", str(args.faults))) if args.faults else {}
    with small_server(args.preset, settings, **program) as server:
        load = Load(server.url, args)
        asyncio.run(load.run())
    figures = load.figures()
    for name, figure in figures.items():
        print(f"{name:40} {figure:.6g}")
    if args.write:
        name = "serve_load_faults" if args.faults else "serve_load"
        written = measurements.write(name, figures, series=load.series)
        plot(load.series, written.with_suffix(".png"))
        print(f"figures: {written}")
    if wrong := {name: count for name, count in load.wrong.items() if count}:
        raise ValueError("; ".join(f"{count} times: {name}" for name, count in wrong.items()))
    if not load.count["kills"]:
        raise ValueError("no replica was killed: give --minutes more, or --kill-every less")


@dataclasses.dataclass(frozen=True)
class Wish:
    """What a video is made of; the same wish is the same video."""

    seed: int
    chunks: int
    refine: bool

    def fields(self) -> dict[str, str]:
        return dict(
            prompt="a hall", actions=ACTIONS, seconds=str(1.5 * self.chunks), seed=str(self.seed),
            refine=str(self.refine).lower(),
        )  # fmt: skip


class Load:
    """Everybody who asks, and who kills. `wrong`: what must not happen, and how often it did; `series`: numbers of
    replicas over time.
    """

    def __init__(self, url: str, args: argparse.Namespace) -> None:
        self.url, self.args, self.image = url, args, picture()
        self.count, self.wrong = Counter[str](), Counter[str]()
        self.series: dict[str, list[float]] = {"seconds": [], **{kind: [] for kind in KINDS}}
        self.accepted: dict[str, str] = {}  # the video of each idempotency key
        self.lost: set[str] = set()
        self.seconds: list[float] = []  # from a video's acceptance until it was seen to be made
        self.contents: dict[Wish, dict[str, np.ndarray]] = defaultdict(dict)  # frames by the file's digest
        self.memory: dict[Replica, list[tuple[float, int]]] = defaultdict(list)  # bytes at a time
        self.begin = time.monotonic()

    def now(self) -> float:
        return time.monotonic() - self.begin

    def over(self) -> bool:
        return self.now() > 60 * (self.args.minutes + self.args.calm)

    def refines(self) -> bool:
        return int(self.now() / PHASE) % 2 == 0

    async def run(self) -> None:
        """All of it, until everything that was accepted has ended and the replicas are few again."""
        self.begin = time.monotonic()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=16)
        async with httpx.AsyncClient(base_url=self.url, timeout=60, limits=limits) as self.http:
            watching = [asyncio.create_task(self._watch()), asyncio.create_task(self._kill())]
            people = [asyncio.create_task(self._customer(number)) for number in range(self.args.customers)]
            people += [asyncio.create_task(self._visitor(number)) for number in range(self.args.sessions)]
            with Progress(None, "videos", "serve") as self.progress:
                done, late = await asyncio.wait(people, timeout=60 * (self.args.minutes + self.args.calm) + 600)
            self.wrong["a customer or visitor never came to an end"] += len(late)
            for task in (*late, *watching[1:]):
                task.cancel()
            for task in done:
                task.result()
            await self._settled()
            await self._compare_with_list()
            watching[0].cancel()
            await asyncio.gather(*watching, *late, return_exceptions=True)

    async def _sent(self, method: str, path: str, give_up: bool = False, **request: Any) -> httpx.Response | None:
        """The answer, once it is not "later"; None for one who gives up when turned away, once it is over."""
        while True:
            try:
                answer = await self.http.request(method, path, **request)
            except httpx.TransportError:
                self.count["connection_errors"] += 1
                await asyncio.sleep(1)
                continue
            if answer.status_code not in (429, 503):
                if answer.status_code >= 500:
                    self.wrong[f"{method} was answered {answer.status_code}"] += 1
                return answer
            self.count[f"rejected_{answer.status_code}"] += 1
            wait = answer.headers.get("retry-after", "")
            if not wait.isdigit():
                self.wrong[f"{answer.status_code} without Retry-After"] += 1
            if give_up and answer.status_code == 429 and self.over():
                return None
            await asyncio.sleep(float(wait or 1) * random.uniform(0.5, 1.5))

    async def _customer(self, number: int) -> None:
        chance = random.Random(f"{self.args.seed}/{number}")
        while not self.over():
            wish = Wish(chance.randrange(2), chance.choice((1, 1, 1, 1, 2, 2, 4)), self.refines())
            key, twice = uuid.uuid4().hex, chance.random() < 0.2
            asked = [self._asked(key, wish, not twice) for _ in range(1 + twice)]
            found = {id for id in await asyncio.gather(*asked) if id}
            if not found:
                continue
            if len(found) > 1:
                self.wrong["two videos for one key"] += 1
            self.accepted[key] = id = found.pop()
            begin = time.monotonic()
            if chance.random() < 0.2:
                await self._look_and_leave(id)
            video = await self._ended(id)
            self.seconds.append(time.monotonic() - begin)
            self.progress.update(1, kills=self.count["kills"])
            if video is None or not await self._whole(id, 24 * wish.chunks + 1, wish):
                self.lost.add(id)

    async def _asked(self, key: str, wish: Wish, give_up: bool) -> str | None:
        """The video's id, when it is accepted."""
        files = {"input_reference": ("a.png", self.image)}
        answer = await self._sent(
            "POST", "/v1/videos", give_up, data=wish.fields(), files=files, headers={"Idempotency-Key": key}
        )
        if answer is not None and answer.status_code != 200:
            self.wrong[f"a good request was answered {answer.status_code}"] += 1
        return answer.json()["id"] if answer is not None and answer.status_code == 200 else None

    async def _look_and_leave(self, id: str) -> None:
        with contextlib.suppress(httpx.TransportError):
            async with self.http.stream("GET", f"/v1/videos/{id}/stream", timeout=30) as stream:
                async for _ in stream.aiter_raw():
                    self.count["streams_left"] += 1
                    return

    async def _ended(self, id: str) -> dict[str, Any] | None:
        """The video when it is made; None when it is not to be."""
        while (answer := await self._sent("GET", f"/v1/videos/{id}")) is not None and answer.status_code == 200:
            if (video := answer.json())["status"] not in UNFINISHED:
                return video if video["status"] == "completed" else None
            await asyncio.sleep(3)
        return None

    async def _whole(self, id: str, frames: int, wish: Wish | None = None) -> bool:
        """Whether its content is there, and has so many frames."""
        answer = await self._sent("GET", f"/v1/videos/{id}/content")
        if answer is None or answer.status_code != 200:
            return False
        found = await asyncio.to_thread(_frames, answer.content)
        if wish:
            self.contents[wish].setdefault(hashlib.sha256(answer.content).hexdigest(), found)
        return len(found) == frames

    async def _visitor(self, number: int) -> None:
        """Begins a session at its turn, and does what its number says."""
        chance = random.Random(f"{self.args.seed}/visitor/{number}")
        await asyncio.sleep(60 * self.args.minutes * number / self.args.sessions)
        visit = Visit(
            self,
            {
                "image": base64.b64encode(self.image).decode(),
                "prompt": "a hall",
                "seed": number % 2,
                "refine": self.refines(),
            },
        )
        await visit.begin()
        self.count["sessions"] += 1
        kind = ("silent", "mid_chunk", "returns", "silent", "ends")[number % 5]
        self.count[f"sessions_{kind}"] += 1
        if kind == "mid_chunk":
            await visit.until(lambda: visit.received > 0, acts=1)
        if kind == "returns":
            await visit.until(lambda: visit.frames > 0, acts=1)
            await visit.leave()
            await asyncio.sleep(chance.uniform(0, 1))
        if kind in ("returns", "ends"):
            await visit.until(lambda: visit.frames >= 25, acts=1)
            await visit.until(lambda: visit.closed, acts=1, end=True)
        await visit.leave()
        video = await self._ended(visit.id)
        frames = video["frames"] if video else 0
        known = video is not None and (not visit.closed or frames == visit.frames)
        if not known or (frames and not await self._whole(visit.id, frames)):
            self.lost.add(visit.id)

    async def _kill(self) -> None:
        """One replica after another, at random."""
        chance = random.Random(f"{self.args.seed}/kill")
        while True:
            await asyncio.sleep(self.args.kill_every * chance.uniform(0.5, 1.5))
            if self.now() > 60 * self.args.minutes:
                return
            victims = [replica for replica in await asyncio.to_thread(replicas) if replica.deployment in KINDS]
            if victims:
                victim = chance.choice(victims)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim.pid, signal.SIGKILL)
                    self.count["kills"] += 1
                    self.count[f"kills_{victim.deployment.lower()}"] += 1

    async def _watch(self) -> None:
        """Replicas, their memory, and whether limits hold."""
        while True:
            there = await asyncio.to_thread(replicas)
            number = Counter(replica.deployment for replica in there)
            if any(not self.series[kind] or self.series[kind][-1] != number[kind] for kind in KINDS):
                self.series["seconds"].append(round(self.now(), 1))
                for kind in KINDS:
                    self.series[kind].append(number[kind])
            for replica in there:
                if (memory := replica.memory()) is not None:
                    self.memory[replica].append((self.now(), memory))
            answer = await self._sent("GET", "/metrics")
            if answer is not None and answer.status_code == 200:
                self._check_limits(dict(line.split() for line in answer.text.splitlines() if line[0] != "#"))
            await asyncio.sleep(2)

    def _check_limits(self, figures: dict[str, str]) -> None:
        queued, made = (round(float(figures[f"longtake_videos_{name}"])) for name in UNFINISHED)
        self.count["most_unfinished"] = max(self.count["most_unfinished"], queued + made)
        self.count["most_made_at_once"] = max(self.count["most_made_at_once"], made)
        if made > RUNNING + SESSIONS or queued + made > RUNNING + SESSIONS + QUEUED:
            self.wrong[f"{queued} waited and {made} were made: more than may be"] += 1

    async def _settled(self) -> None:
        """Wait, not for ever, until one replica of each kind is left."""
        end = self.now() + 180
        while self.now() < end and any(self.series[kind][-1:] != [1] for kind in KINDS):
            await asyncio.sleep(1)

    async def _compare_with_list(self) -> None:
        """What the server says that there is must be what was accepted, each once."""
        listed, after = [], {}
        while (page := await self._sent("GET", "/v1/videos", params={"limit": 100, **after})) is not None:
            listed += page.json()["data"]
            if not page.json()["has_more"]:
                break
            after = {"after": page.json()["last_id"]}
        videos = {video["id"]: video["status"] for video in listed if video["actions"] == ACTIONS}  # no session
        self.lost |= {id for id in self.accepted.values() if videos.get(id) != "completed"}
        self.count["twice"] = len(videos) - len(set(self.accepted.values()))
        self.wrong["an accepted video was lost"] = len(self.lost)
        self.wrong["a video was made twice"] = self.count["twice"]
        self.wrong["two keys got one video"] = len(self.accepted) - len(set(self.accepted.values()))

    def figures(self) -> dict[str, float]:
        names = ("kills", *(f"kills_{kind.lower()}" for kind in KINDS), "connection_errors", "rejected_429")
        names += (
            "rejected_503",
            "sessions",
            "sessions_rejected",
            "sessions_cut",
            "most_unfinished",
            "most_made_at_once",
        )
        found: dict[str, float] = {"requests": len(self.accepted), "lost": len(self.lost), "twice": self.count["twice"]}
        if self.seconds:
            found |= {f"p{share}_s": float(np.percentile(self.seconds, share)) for share in (50, 95)}
        found |= {name: self.count[name] for name in names}
        found |= dict(_differences(self.contents))
        for kind in KINDS:
            found |= {f"{kind.lower()}_most": max(self.series[kind]), f"{kind.lower()}_last": self.series[kind][-1]}
        return found | dict(growth(self.memory))


class Visit:
    """One person's live session, over as many connections as it takes."""

    def __init__(self, load: Load, start: dict[str, Any]) -> None:
        self.load, self.start = load, start
        self.id = ""
        self.fragments = self.frames = self.received = self.said = 0
        self.closed = False
        self.socket: ClientConnection | None = None

    async def begin(self) -> None:
        """Open the session, or resume it; returns when the server says that it began."""
        while self.socket is None:
            said = {"type": "resume", "session": self.id, "fragments": self.fragments} if self.id else self.start
            with contextlib.suppress(OSError, TimeoutError, WebSocketException, InvalidHandshake):
                socket = await connect(self.load.url.replace("http", "ws", 1) + "/v1/sessions", max_size=None)
                await socket.send(json.dumps({"type": "start", "wait": True, **said}))
                about = json.loads(await asyncio.wait_for(socket.recv(), 60))
                if about["type"] == "started":
                    self.socket, self.id, self.said = socket, about["session"], self.received
                    return
                self._refused(about["error"])
                await socket.close()
            await asyncio.sleep(random.uniform(2, 6) if not self.id else 0.5)

    async def until(self, enough: Callable[[], bool], acts: int, end: bool = False) -> None:
        """Say what is to be done in so many chunks, and perhaps that it ends; listen until it is enough, or closed."""
        ended = False
        while not enough() and not self.closed:
            await self.begin()
            assert self.socket is not None
            try:
                while self.said < acts:
                    await self.socket.send(json.dumps({"type": "actions", "actions": "w-24", "sequence": self.said}))
                    self.said += 1
                if end and not ended:
                    await self.socket.send(json.dumps({"type": "end"}))
                    ended = True
                await self._hear()
            except (OSError, TimeoutError, WebSocketException):
                self.load.count["sessions_cut"] += 1
                ended = False
                await self.leave()

    async def _hear(self) -> None:
        assert self.socket is not None
        said = json.loads(await asyncio.wait_for(self.socket.recv(), 120))
        if said["type"] == "frames":
            fragment = await asyncio.wait_for(self.socket.recv(), 60)
            if said["first"] != self.frames or not isinstance(fragment, bytes):
                self.load.wrong["a session's fragments do not follow each other"] += 1
            self.fragments, self.frames = self.fragments + 1, self.frames + said["frames"]
        self.received += said["type"] == "received"
        self.closed |= said["type"] == "closed"
        if said["type"] == "error":
            self._refused(said["error"])
            await self.leave()

    def _refused(self, error: dict[str, Any]) -> None:
        if error["type"] == "rate_limit_error":
            self.load.count["sessions_rejected"] += 1
        elif error["type"] == "server_error":
            self.load.count["sessions_cut"] += 1
        else:
            self.load.wrong[f"a session was refused: {error['message']}"] += 1

    async def leave(self) -> None:
        """Without a word."""
        if self.socket is not None:
            self.socket.transport.abort()
            self.socket = None


def _frames(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data), "r") as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def _differences(contents: dict[Wish, dict[str, np.ndarray]]) -> Iterator[tuple[str, float]]:
    """Of videos of one wish: how many files there are of the most, and how far their frames lie apart, of 255."""
    yield "files_of_one_wish_most", max((len(found) for found in contents.values()), default=0)
    first = {wish: next(iter(found.values())).astype(int) for wish, found in contents.items()}
    apart = [abs(each - first[wish]) for wish, found in contents.items() for each in found.values()]
    yield "frames_of_one_wish_mean_difference", max((float(each.mean()) for each in apart), default=0.0)


def plot(series: dict[str, list[float]], path: Path) -> None:
    """Replicas of each kind over time."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    for axes, kind in zip(figure.subplots(len(KINDS), 1, sharex=True), KINDS, strict=True):
        axes.step([at / 60 for at in series["seconds"]], series[kind], where="post")
        axes.set(ylabel=kind, ylim=(0, max(series[kind]) + 0.5))
        axes.grid(alpha=0.3)
    axes.set(xlabel="minutes")
    figure.savefig(path, dpi=110)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="check-serve", description=__doc__)
    add = parser.add_argument
    add("--preset", default="tiny-streaming", help="whose weights are shipped (default: %(default)s)")
    add("--minutes", type=float, default=10, help="in which replicas are killed (default: %(default)s)")
    add("--calm", type=float, default=3, help="minutes afterwards in which none is (default: %(default)s)")
    add("--customers", type=int, default=64, help="who ask at once (default: %(default)s)")
    add("--sessions", type=int, default=200, help="live ones, within --minutes (default: %(default)s)")
    add("--kill-every", type=float, default=40, metavar="SECONDS", help="about (default: %(default)s)")
    add("--most", type=int, default=3, help="replicas of a kind (default: %(default)s)")
    add("--together", type=int, default=4, help="videos that one works on at once (default: %(default)s)")
    add("--faults", type=float, default=0.0, help="share of a stage's steps that fail at random (default: %(default)s)")
    add("--seed", type=int, default=0, help="of what people do and who is killed (default: %(default)s)")
    add("--no-write", dest="write", action="store_false", help="do not write docs/measurements")
    add("--dry-run", action="store_true", help="print the resolved arguments")
    return parser


if __name__ == "__main__":
    run_job(main)
