"""A client of Longtake's server. It needs neither torch nor anything else of Longtake: httpx, and websockets for live
sessions. Installed alone (`pip install ./serve/client`) the same files are `longtake_client`: hence relative imports.

    client = Client("http://127.0.0.1:8000")
    video = client.create("hall.png", "a hall of stone", actions="w-48,dw-24", seconds=6)
    client.wait(video.id, print)
    client.save(video.id, "hall.mp4", poses="hall.npz")
"""

from .asynchronous import AsyncClient
from .session import Chunk, LiveSession
from .synchronous import Client
from .wire import ApiError, Video, VideoFailed

__all__ = ["ApiError", "AsyncClient", "Chunk", "Client", "LiveSession", "Video", "VideoFailed"]
