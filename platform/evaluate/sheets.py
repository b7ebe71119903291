"""Contact sheets: videos as rows of frames, one PNG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from longtake.platform.store.files import whole

_LABEL = 14  # pixels


def contact_sheet(path: Path, videos: Mapping[str, np.ndarray], columns: int = 6) -> None:
    """Write evenly spaced frames of each video (F, H, W, 3) uint8 as a labelled row; all of one height and width."""
    rows = []
    for label, frames in videos.items():
        chosen = frames[np.linspace(0, len(frames) - 1, columns).round().astype(int)]
        strip = Image.fromarray(np.concatenate(list(chosen), axis=1))
        row = Image.new("RGB", (strip.width, strip.height + _LABEL), "white")
        row.paste(strip, (0, _LABEL))
        ImageDraw.Draw(row).text((4, 1), label, fill="black")
        rows.append(np.asarray(row))
    with whole(path) as part:
        Image.fromarray(np.concatenate(rows)).save(part)
