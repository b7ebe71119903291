"""`longtake serve` whose stages fail at random: what a part of a chunk costs when it is lost again and again.

python infra/faulty_server.py SHARE [arguments of `longtake serve`]         SHARE of what a stage does fails
"""

from __future__ import annotations

import random
import sys
from collections.abc import AsyncIterator
from typing import Any
from unittest import mock

from ray import serve

from longtake.serve import app, stages
from longtake.serve.__main__ import main


class Fault(Exception):
    """Of nobody's making."""


def faulty(stage: Any, share: float) -> Any:
    """The deployment, of whose answers so many fail before they are given."""

    def fail() -> None:
        if random.random() < share:
            raise Fault("a fault that was asked for")

    def single(method: Any) -> Any:
        async def call(self: Any, *arguments: Any) -> Any:
            fail()
            return await method(self, *arguments)

        return call

    def stream(method: Any) -> Any:
        async def call(self: Any, *arguments: Any) -> AsyncIterator[Any]:
            async for each in method(self, *arguments):
                fail()
                yield each

        return call

    kind = stage.func_or_class
    methods = {name: single(getattr(kind, name)) for name in ("read", "finish", "judge") if hasattr(kind, name)}
    methods |= {name: stream(getattr(kind, name)) for name in ("latents", "fragments") if hasattr(kind, name)}
    return serve.deployment(type(kind.__name__, (kind,), methods), name=stage.name)


if __name__ == "__main__":
    share, rest = float(sys.argv[1]), sys.argv[2:]
    names = ("Text", "Stage1", "Refine", "Decode")
    with mock.patch.multiple(app, **{name: faulty(getattr(stages, name), share) for name in names}):
        main(rest)
