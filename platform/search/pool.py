"""Actors and what they are yet to do."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import ray

from longtake.platform.search.plan import Candidate

Batch = list[Candidate]


class Pool:
    """Actors of one kind, each with at most one call under way."""

    def __init__(self, actors: Sequence[Any]) -> None:
        self.idle = list(actors)
        self.busy: dict[ray.ObjectRef, tuple[Any, Any]] = {}

    def call(self, method: str, work: Any, *arguments: Any) -> None:
        """Have the next idle actor do `work`."""
        actor = self.idle.pop()
        self.busy[getattr(actor, method).remote(*arguments)] = (actor, work)

    def take(self, done: ray.ObjectRef) -> tuple[Any, Any]:
        """The work of a finished call and its result; raises what the actor raised. The actor is called next."""
        actor, work = self.busy.pop(done)
        self.idle.append(actor)
        return work, ray.get(done)


class Shares:
    """Subtrees of batches, shared out: one after another each goes to the actor that asks first, batch after batch.

    An actor that finds none left takes over the later half of the longest one under way. It makes again what the two
    halves begin with, which costs less than waiting.
    """

    def __init__(self, subtrees: Sequence[Sequence[Batch]]) -> None:
        self._waiting = deque(deque(batches) for batches in subtrees if batches)
        self._under_way: dict[Any, deque[Batch]] = {}

    def __len__(self) -> int:
        """Candidates that nobody has asked for."""
        return sum(len(batch) for batches in (*self._waiting, *self._under_way.values()) for batch in batches)

    def next(self, actor: Any) -> Batch | None:
        """What `actor` is to make now; None when nothing is left for it."""
        own = self._under_way.get(actor)
        if not own:
            own = self._under_way[actor] = self._waiting.popleft() if self._waiting else self._half()
        return own.popleft() if own else None

    def clear(self) -> None:
        """Nothing more is to be made."""
        self._waiting.clear()
        self._under_way.clear()

    def _half(self) -> deque[Batch]:
        longest = max(self._under_way.values(), key=len, default=deque[Batch]())
        taken = [longest.pop() for _ in range((len(longest) + 1) // 2)]
        return deque(reversed(taken))
