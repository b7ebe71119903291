"""Live videos: sessions that are steered chunk by chunk, alone or many on one model."""

from longtake.platform.engine.engine import Engine, EngineFull
from longtake.platform.engine.session import Actions, Chunk, Session, SessionStopped, Step, step_together

__all__ = ["Actions", "Chunk", "Engine", "EngineFull", "Session", "SessionStopped", "Step", "step_together"]
