"""What a scrape of /metrics finds, in Prometheus' text format. Seconds of the stages are at Ray's own ports instead, as
ray_longtake_chunk_seconds: each replica tells Ray.
"""

from __future__ import annotations

from collections.abc import Mapping

METRICS = {
    "longtake_videos_queued": ("gauge", "Videos that wait"),
    "longtake_videos_in_progress": ("gauge", "Videos that are made, sessions among them"),
    "longtake_videos_completed": ("gauge", "Videos that are made, and not deleted"),
    "longtake_videos_failed": ("gauge", "Videos that could not be made, and are not deleted"),
    "longtake_sessions": ("gauge", "Live sessions"),
    "longtake_room": ("gauge", "Videos, sessions and waiting videos that there may be at once"),
    "longtake_replicas": ("gauge", "Replicas that run"),
    "longtake_videos_ended_total": ("counter", "Videos that ended, sessions among them"),
    "longtake_busy_total": ("counter", "Requests answered 429 because too many videos or sessions were there"),
    "longtake_retries_total": ("counter", "Times that a video was begun again after a stage had stopped"),
    "longtake_frames_total": ("counter", "Frames made"),
    "longtake_video_seconds": ("summary", "From the first step of a video, no session, to its end"),
}
"""Kind and meaning of each; a test compares dashboards and alerts with these names."""

CHUNK_SECONDS = "longtake_chunk_seconds"
BOUNDARIES = [0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0]
"""Of its buckets; a chunk of 24 frames must take less than 1.5 s where people watch."""


def exposition(figures: Mapping[str, float]) -> str:
    """figures: by name, with labels in braces where there are some."""
    lines = []
    for name, (kind, meaning) in METRICS.items():
        named = (name, f"{name}_sum", f"{name}_count") if kind == "summary" else (name,)
        lines += [f"# HELP {name} {meaning}.", f"# TYPE {name} {kind}"]
        lines += [f"{key} {value}" for key, value in figures.items() if key.partition("{")[0] in named]
    return "\n".join(lines) + "\n"
