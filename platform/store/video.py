"""H.264 files of uint8 frames."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import OutputContainer
from av.container.core import Flags
from av.video import VideoStream
from av.video.reformatter import Colorspace

from longtake.platform.store.files import whole

_BT709 = 1  # the number of ITU-R BT.709 in H.264's tables of primaries, transfers and matrices


def write_video(
    path: Path,
    chunks: Iterable[np.ndarray],
    fps: float,
    crf: int = 18,
    playable: Callable[[Path], None] | None = None,
) -> int:
    """Write chunks of frames, uint8 (f, H, W, 3), as MP4 (H.264, yuv420p, BT.709); returns the number of frames.

    Chunks are encoded as they come, so memory does not grow with the length. The file appears when it is whole.
    playable: is told of a file beside it that can be watched while it grows, a second at a time; the whole one is then
    in fragments too. ValueError for no frames and for odd heights or widths, which yuv420p cannot hold.
    """
    frames = 0
    flags = "+faststart" if playable is None else "frag_keyframe+empty_moov+default_base_moof"
    with whole(path) as part, av.open(str(part), "w", format="mp4", options={"movflags": flags}) as container:
        if playable is not None:
            container.flags |= Flags.flush_packets.value
            playable(part)
        stream = None
        for image in (image for chunk in chunks for image in chunk):
            if stream is None:
                stream = add_h264(container, Fraction(fps).limit_denominator(1001), image.shape[:2], crf)
                if playable is not None:
                    stream.options |= {"g": str(max(1, round(fps))), "tune": "zerolatency"}
            container.mux(stream.encode(yuv420p(image)))
            frames += 1
        if stream is None:
            raise ValueError(f"{path}: a video needs at least one frame")
        container.mux(stream.encode())
    return frames


def add_h264(container: OutputContainer, rate: Fraction, size: tuple[int, ...], crf: int) -> VideoStream:
    """A stream of frames of `size` (height, width). ValueError for odd ones, which yuv420p cannot hold."""
    height, width = size
    if height % 2 or width % 2:
        raise ValueError(f"video of {width} x {height} pixels: both must be even")
    stream = container.add_stream("libx264", rate=rate)
    stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
    stream.options = {"crf": str(crf), "preset": "medium"}
    context = stream.codec_context
    context.color_primaries = context.color_trc = context.colorspace = _BT709
    return stream


def yuv420p(image: np.ndarray) -> av.VideoFrame:
    """Of uint8 (H, W, 3)."""
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), "rgb24")
    return frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)


def encode_video(chunks: Iterable[np.ndarray], fps: float, crf: int = 18) -> bytes:
    """The content of the file that `write_video` would write."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        write_video(path, chunks, fps, crf)
        return path.read_bytes()


def frames_of(path: Path) -> Iterator[np.ndarray]:
    """One frame after another, uint8 (H, W, 3)."""
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            yield frame.reformat(format="rgb24", src_colorspace=Colorspace.ITU709).to_ndarray()


def read_video(path: Path) -> np.ndarray:
    """All frames, uint8 (F, H, W, 3)."""
    return np.stack(list(frames_of(path)))
