"""Live videos: sessions that are steered chunk by chunk, alone or many on one model."""

from longtake.platform.engine.engine import Engine, EngineFull
from longtake.platform.engine.session import Chunk, Session, SessionStopped, step_together

__all__ = ["Chunk", "Engine", "EngineFull", "Session", "SessionStopped", "step_together"]
