"""Pictures of what was rendered: a sheet of frames and a figure of trajectories, in a folder inside the store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq

from longtake.model.camera import relative_to_first
from longtake.platform.data.clip import Clip
from longtake.platform.data.render.shards import Shard
from longtake.platform.data.store import ClipStore, decode_clip
from longtake.platform.evaluate.sheets import contact_sheet
from longtake.platform.store.files import whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST = 12
_VIEWS = (("from above", 0, 2, "right (m)", "forward (m)"), ("from the side", 2, 1, "forward (m)", "down (m)"))


def preview_folder(store: ClipStore) -> Path:
    """Where the pictures of a store go; readers of clips pass over it. ValueError unless it is a local folder."""
    path = store.uri.removeprefix("file://")
    if "://" in path:
        raise ValueError(f"--preview draws into a local folder, not into {store.uri}: leave it out, or change --store")
    return Path(path).expanduser() / "preview"


def write_preview(store: ClipStore, shards: Sequence[Shard]) -> list[Path]:
    """Draw up to 12 clips, spread over those of `shards` that are stored: frames.png has a row of frames for each,
    trajectories.png their ways from above and from the side. Returns both paths.

    ValueError unless the store is a local folder with some of the shards.
    """
    folder = preview_folder(store)
    clips = _some_clips(folder.parent, store, shards)
    sheet, figure = folder / "frames.png", folder / "trajectories.png"
    contact_sheet(sheet, {f"{clip.key}: {clip.caption}": clip.frames for clip in clips})
    with whole(figure) as part:
        _plot(clips, part)
    return [sheet, figure]


def _some_clips(folder: Path, store: ClipStore, shards: Sequence[Shard]) -> list[Clip]:
    present = set(store.shards())
    # By place: in the order of rendering, twelve neighbours would be the first clips of twelve maps.
    names = sorted(shard.name for shard in shards if shard.name in present)
    rows = [(name, row) for name in names for row in range(pq.read_metadata(folder / f"{name}.parquet").num_row_groups)]
    if not rows:
        raise ValueError(f"{store.uri} holds none of these clips yet: render them first")
    chosen = np.linspace(0, len(rows) - 1, min(_MOST, len(rows))).round().astype(int)
    clips = []
    for name, row in (rows[at] for at in chosen):
        with pq.ParquetFile(folder / f"{name}.parquet") as file:
            clips += [decode_clip(found) for found in file.read_row_group(row).to_pylist()]
    return clips


def _plot(clips: Sequence[Clip], path: Path) -> None:
    """Every clip in its first camera's frame, with an arrow along its view every second."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, clip in enumerate(clips):
        for axes, (_, across, up, *_) in zip((left, right), _VIEWS, strict=True):
            # That map has each strong colour followed by its pale one: take the strong ones first.
            _draw(axes, clip, across, up, colormaps["tab20"](2 * number % 20 + number // 10))
    for axes, (title, _, up, label_x, label_y) in zip((left, right), _VIEWS, strict=True):
        axes.set(title=title, xlabel=label_x, ylabel=label_y)
        # Room for the arrows, and for a still camera, whose way is a point; with equal scales, margins may vanish.
        axes.update_datalim(axes.dataLim.padded(0.3).get_points())
        axes.set_aspect("equal", adjustable="datalim")
        axes.grid(alpha=0.3)
        if up == 1:
            axes.invert_yaxis()
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=110)


def _draw(axes: Axes, clip: Clip, across: int, up: int, color: tuple[float, ...]) -> None:
    poses = relative_to_first(clip.trajectory().c2w).numpy()
    kind = clip.provenance.get("kind", "path")
    axes.plot(poses[:, across, 3], poses[:, up, 3], color=color, linewidth=1.5, label=f"{clip.key} ({kind})")
    marks = poses[:: max(1, round(clip.fps))]
    axes.quiver(
        marks[:, across, 3], marks[:, up, 3], marks[:, across, 2], marks[:, up, 2],
        color=color, angles="xy", width=0.004, scale=25,
    )  # fmt: skip
