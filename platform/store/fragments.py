"""A video in fragments (H.264 in fragmented MP4): each chunk of frames is encoded by itself, anywhere, at any time, and
what is glued together after the beginning can be played.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from longtake.platform.store.files import whole
from longtake.platform.store.video import add_h264, yuv420p

_TICKS = 1000  # of the clock, a frame


def encode_fragment(frames: np.ndarray, fps: float, first: int, number: int, crf: int = 18) -> tuple[bytes, bytes]:
    """The beginning of a file, the same for all fragments of a video, and the fragment of frames uint8 (f, H, W, 3), of
    which the first is frame `first` of the video. number: of the fragment, from 0. ValueError as of `write_video`.
    """
    buffer, rate = io.BytesIO(), Fraction(fps).limit_denominator(1001)
    flags = "empty_moov+default_base_moof+frag_custom+skip_trailer"  # one fragment, when the file is closed
    clock = rate.numerator * _TICKS
    options = {"movflags": flags, "use_editlist": "0", "fragment_index": str(number + 1)}
    with av.open(buffer, "w", format="mp4", options=options | {"video_track_timescale": str(clock)}) as container:
        stream = add_h264(container, rate, frames.shape[1:3], crf)
        stream.options |= {"preset": "veryfast", "bf": "0", "tune": "zerolatency", "g": "100000"}
        for image in frames:
            container.mux(stream.encode(yuv420p(image)))
        container.mux(stream.encode())
    begin, fragment = b"", bytearray()
    for kind, box in _boxes(buffer.getvalue()):
        if kind in ("ftyp", "moov"):
            begin += box
        else:
            fragment += box
    # Each file's clock begins at 0: box tfdt, version 1, says when the fragment does.
    struct.pack_into(">Q", fragment, fragment.index(b"tfdt") + 8, first * rate.denominator * _TICKS)
    return begin, bytes(fragment)


def remux(fragments: bytes, path: Path) -> None:
    """Write the glued fragments as one plain MP4 with its index in front; nothing is encoded again."""
    with (
        whole(path) as part,
        av.open(io.BytesIO(fragments), "r") as source,
        av.open(str(part), "w", format="mp4", options={"movflags": "+faststart"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)


def _boxes(data: bytes) -> Iterator[tuple[str, bytes]]:
    at = 0
    while at < len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        yield kind.decode("ascii"), data[at : at + size]
        at += size
