"""Live videos: sessions that are steered chunk by chunk."""

from longtake.platform.engine.session import Chunk, Session, SessionStopped

__all__ = ["Chunk", "Session", "SessionStopped"]
