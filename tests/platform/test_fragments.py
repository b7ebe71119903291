"""A video whose chunks were encoded apart plays as one."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest

from longtake.platform.store.fragments import encode_fragment, remux
from longtake.platform.store.video import read_video

pytestmark = pytest.mark.cpu


@pytest.fixture
def frames() -> np.ndarray:
    """(73, 64, 96, 3), each of a grey of its own."""
    return np.broadcast_to(np.linspace(0, 255, 73).astype(np.uint8)[:, None, None, None], (73, 64, 96, 3))


@pytest.fixture
def fragments(frames) -> tuple[bytes, list[bytes]]:
    cuts = [0, 25, 49, 73]
    encoded = [
        encode_fragment(frames[first:last], 16, first, number)
        for number, (first, last) in enumerate(zip(cuts[:-1], cuts[1:], strict=True))
    ]
    assert len({begin for begin, _ in encoded}) == 1
    return encoded[0][0], [fragment for _, fragment in encoded]


def test_glued_fragments_hold_all_frames_at_their_times(frames, fragments, tmp_path):
    begin, parts = fragments
    (tmp_path / "video.mp4").write_bytes(begin + b"".join(parts))
    assert np.abs(read_video(tmp_path / "video.mp4").astype(int) - frames).max() <= 3
    with av.open(io.BytesIO(begin + b"".join(parts)), "r") as container:
        times = [frame.time for frame in container.decode(video=0)]
    assert times == [number / 16 for number in range(73)]


def test_what_is_there_so_far_plays(frames, fragments):
    begin, parts = fragments
    with av.open(io.BytesIO(begin + parts[0] + parts[1]), "r") as container:
        assert sum(1 for _ in container.decode(video=0)) == 49


def test_a_plain_file_is_made_of_them_without_encoding(frames, fragments, tmp_path):
    begin, parts = fragments
    glued = begin + b"".join(parts)
    remux(glued, tmp_path / "plain.mp4")
    data = (tmp_path / "plain.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat") and b"moof" not in data
    (tmp_path / "glued.mp4").write_bytes(glued)
    assert np.array_equal(read_video(tmp_path / "plain.mp4"), read_video(tmp_path / "glued.mp4"))


def test_odd_sizes_are_refused(frames):
    with pytest.raises(ValueError, match="both must be even"):
        encode_fragment(frames[:2, :63], 16, 0, 0)
