"""What the stages are told of a video."""

from __future__ import annotations

from dataclasses import dataclass

ENDLESS = 1 << 60


@dataclass(frozen=True)
class Task:
    """The rest lies in the video's `Results`. run: which attempt to make it this is; a later one takes over. frames: of
    the video. live: where the camera goes is asked of `Videos`, chunk by chunk, in keys of `key_map`.
    draft: other videos go on from its latents, which are kept.
    """

    id: str
    run: str
    seed: int
    frames: int
    refine: bool
    live: bool = False
    key_map: str | None = None
    draft: bool = False
