"""A client of Longtake's server. It needs neither torch nor anything else of Longtake: httpx, and websockets for live
sessions.

    client = Client("http://127.0.0.1:8000")
    video = client.create("hall.png", "a hall of stone", actions="w-48,dw-24", seconds=6)
    client.wait(video.id, print)
    client.save(video.id, "hall.mp4", poses="hall.npz")
"""

from longtake.serve.client.asynchronous import AsyncClient
from longtake.serve.client.session import Chunk, LiveSession
from longtake.serve.client.synchronous import Client
from longtake.serve.client.wire import ApiError, Video, VideoFailed

__all__ = ["ApiError", "AsyncClient", "Chunk", "Client", "LiveSession", "Video", "VideoFailed"]
