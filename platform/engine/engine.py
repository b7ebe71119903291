"""Many sessions on one model: admitted by the memory that one was measured to take, and stepped together."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from longtake.model.pipeline import ImageInput, WorldPipeline
from longtake.platform.engine.session import Actions, Chunk, Session, Step, step_together

_SHARE = 0.9  # of the memory that is free, by default


class EngineFull(Exception):
    """No memory is left for another session: one has to be closed first."""


class Engine:
    """Live sessions of one pipeline, which stays on its device. Their steps may be asked for from any thread.

    Steps that wait while others are made are made next, as one batch where sessions are equally far from their
    beginnings, as all are after their first few chunks. memory: bytes that sessions may take; by default 0.9 of what is
    free, less what a batch was measured to take on a GPU. A session counts as `session_bytes`, what one was measured to
    take when nothing of it grows any more. most_together: sessions a batch. decode: whether their chunks have frames.

    The constructor makes the first chunks of a black picture, several times where `most_together` allows it: whatever
    is compiled or tuned is so before a session is admitted. ValueError as of `Session`, and for a model whose sessions
    grow without end.
    """

    def __init__(self, pipeline: WorldPipeline, memory: int | None = None, most_together: int = 8, decode: bool = True):
        if most_together < 1:
            raise ValueError(f"most_together is {most_together}: it must be at least 1")
        if pipeline.config.most_latent_frames is not None:
            raise ValueError(
                "these weights keep all of the past: set chunk_window, so that a session's memory is bounded"
            )
        self.pipeline, self.most_together, self._decode = pipeline, most_together, decode
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self.session_bytes, workspace = self._warm_up()
        self.memory = int(_SHARE * _free(pipeline.device)) - workspace if memory is None else memory
        self._waiting: deque[tuple[Step, Future[Chunk]]] = deque()
        self._changed, self._closed = threading.Condition(), False
        self._worker = threading.Thread(target=self._run, name="longtake-engine", daemon=True)
        self._worker.start()

    def _warm_up(self) -> tuple[int, int]:
        """Bytes of a session that has all that it will ever keep, and of a GPU's memory that a batch takes beside."""
        gpu = self.pipeline.device if self.pipeline.device.type == "cuda" else None
        config, text = self.pipeline.config, None
        if "text" not in self.pipeline.modules:  # somebody else reads it
            text = torch.zeros(1, config.text.length, config.text_dim), torch.ones(1, config.text.length)
            text = text[0].to(self.pipeline.device), text[1].to(self.pipeline.device)
        black = np.zeros((*config.image_size, 3), np.uint8)
        alone = Session(self.pipeline, black, text=text, decode=self._decode)
        held = 0
        for _ in range(2 + (config.chunk_window or 0)):
            alone.step()
            if gpu is not None:
                torch.cuda.reset_peak_memory_stats(gpu)
                held = torch.cuda.memory_allocated(gpu)
            if self.most_together > 1:
                step_together([Step(alone.clone()) for _ in range(self.most_together)])
        return alone.nbytes, 0 if gpu is None else torch.cuda.max_memory_allocated(gpu) - held

    @property
    def capacity(self) -> int:
        """How many sessions may be open at once."""
        return self.memory // self.session_bytes

    @property
    def open_sessions(self) -> int:
        """Sessions that were opened, and that somebody still holds and has not closed."""
        return len(self._sessions)

    def open(self, image: ImageInput, caption: str = "", seed: int = 0, **options: Any) -> Session:
        """A new session; arguments as of `Session`. EngineFull where there is no room for it."""
        return self._admit(lambda: Session(self.pipeline, image, caption, seed, decode=self._decode, **options))

    def restore(self, snapshot: bytes) -> Session:
        """The session of a snapshot; errors as of `Session.restore`, and EngineFull."""
        return self._admit(lambda: Session.restore(self.pipeline, snapshot))

    def clone(self, session: Session) -> Session:
        """Another that goes on from here by itself. EngineFull where there is no room for it."""
        return self._admit(session.clone)

    def _admit(self, make: Callable[[], Session]) -> Session:
        with self._changed:
            if self._closed:
                raise EngineFull("this engine is closed")
            if len(self._sessions) >= self.capacity:
                raise EngineFull(
                    f"{len(self._sessions)} sessions of {self.session_bytes / 1e6:.1f} MB are open, and "
                    f"{self.memory / 1e6:.1f} MB hold no more: close one"
                )
            session = make()
            self._sessions.add(session)
            return session

    def close_session(self, session: Session) -> None:
        """Make room; a step that it waits for is made all the same."""
        with self._changed:
            self._sessions.discard(session)

    def submit(
        self,
        session: Session,
        actions: Actions = "",
        stop: Callable[[], bool] | None = None,
        known: Tensor | None = None,
    ) -> Future[Chunk]:
        """Ask for the session's next chunk, as `Session.step`; a session's chunks are made in the order of asking.
        ValueError for a session that was not opened here.
        """
        with self._changed:
            if self._closed or session not in self._sessions:
                raise ValueError("this session is not one of the engine's open ones: `open` one")
            promise: Future[Chunk] = Future()
            self._waiting.append((Step(session, actions, stop, known), promise))
            self._changed.notify()
            return promise

    def step(self, session: Session, actions: Actions = "", stop: Callable[[], bool] | None = None) -> Chunk:
        """The session's next chunk, when it is there; raises what `Session.step` would."""
        return self.submit(session, actions, stop).result()

    def close(self) -> None:
        """Make what is waited for, and no more."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._worker.join()

    def _run(self) -> None:
        while batch := self._next():
            try:
                made = step_together([step for step, _ in batch])
            except Exception as error:  # of the device or the model: all are as they were
                made = [error] * len(batch)
            for (_, promise), result in zip(batch, made, strict=True):
                if isinstance(result, Exception):
                    promise.set_exception(result)
                else:
                    promise.set_result(result)

    def _next(self) -> list[tuple[Step, Future[Chunk]]]:
        """The oldest step that waits, and later ones that can be made with it; none once the engine is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            batch: list[tuple[Step, Future[Chunk]]] = []
            others: deque[tuple[Step, Future[Chunk]]] = deque()
            met: set[int] = set()
            for each in self._waiting:
                session = each[0].session
                fits = not batch or (len(batch) < self.most_together and session.place() == batch[0][0].session.place())
                if fits and id(session) not in met and each[1].set_running_or_notify_cancel():
                    batch.append(each)
                elif not each[1].cancelled():
                    others.append(each)
                met.add(id(session))
            self._waiting = others
            return batch


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
