"""The example training set of SANA-WM, on files made to its format."""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from longtake.jobs import import_latents
from longtake.model import presets
from longtake.platform.data.latents import LatentStore
from longtake.platform.data.official import CAPTIONS, OfficialZip
from longtake.platform.train import stages
from longtake.platform.train.feed import open_source

pytestmark = pytest.mark.cpu

CONFIG = presets.get("tiny")  # images of 192 x 320 pixels, latents of 6 x 10
FRAMES = 9


def pose(degrees: float, *position: float) -> np.ndarray:
    """Turned around y."""
    turned, angle = np.eye(4, dtype=np.float32), np.radians(degrees)
    turned[:3, :3] = [[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]]
    turned[:3, 3] = position
    return turned


def write_zip(folder: Path, name: str, clips: dict[str, np.ndarray]) -> None:
    for part in ("raw", "vae"):
        (folder / part).mkdir(exist_ok=True)
    with (
        zipfile.ZipFile(folder / f"raw/{name}.zip", "w") as raw,
        zipfile.ZipFile(folder / f"vae/{name}.zip", "w") as vae,
    ):
        for key, z in clips.items():
            raw.writestr(f"{key}.json", json.dumps({"prompt": f"prompt of {key}", "width": 640, "height": 192}))
            buffer = io.BytesIO()
            np.savez(buffer, z=z)
            vae.writestr(f"{key}.npz", buffer.getvalue())


def latents(seed: int, frames: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(128, frames, 6, 10)).astype(np.float32)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Zip `a`: "seen" with a camera, "blind" without one, "short" of 1 latent frame. Zip `b` has no sidecars."""
    write_zip(tmp_path, "a", {"seen": latents(0), "blind": latents(1), "short": latents(2, frames=1)})
    write_zip(tmp_path, "b", {"other": latents(3)})
    others = np.full((2, 4, 4), 7, np.float32)
    poses = np.stack([pose(90, 5, 0, 0.5 * n) for n in range(8)])  # one too few: frame 8 has that of frame 7
    np.savez(
        tmp_path / "raw" / "a_camera.npz",
        ids=np.array(["short", "seen"]),
        ranges=np.array([[0, 2], [2, 8]]),
        pose=np.concatenate([others, poses]),
        intrinsics=np.tile(np.array([500, 250, 320, 96], np.float32), (10, 1)),
    )
    (tmp_path / "raw" / "a_metric_scale_stats.json").write_text(json.dumps({"seen": {"median": 2.0}}))
    lines = [{"key": "seen", "prompt": "a still street"}, {"key": "short", "prompt": "nothing"}]
    (tmp_path / "raw" / f"a{CAPTIONS}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def source(folder: Path, name: str = "a", min_bytes: int = 0) -> OfficialZip:
    paths = folder / "raw" / f"{name}.zip", folder / "vae" / f"{name}.zip"
    return OfficialZip(*paths, CONFIG, FRAMES, min_bytes=min_bytes)


def test_poses_begin_at_the_identity_and_are_in_metres(folder):
    clip = source(folder).clip("seen")
    assert clip and clip.key == "a/seen" and clip.caption == "a still street"
    np.testing.assert_array_equal(clip.latents, latents(0)[:, :2].astype(np.float16))
    # For a camera turned by 90 degrees, along the world's z is to the left.
    expected = np.stack([pose(0, -2.0 * 0.5 * min(n, 7), 0, 0) for n in range(FRAMES)])
    np.testing.assert_allclose(clip.c2w, expected, atol=1e-6)
    # The video was of 640 x 192 pixels, the preset's are of 320 x 192.
    np.testing.assert_allclose(clip.intrinsics, np.tile([250, 250, 160, 96], (FRAMES, 1)))


def test_a_clip_without_a_camera_stands_still(folder):
    for name, key in (("a", "blind"), ("b", "other")):
        clip = source(folder, name).clip(key)
        assert clip and clip.caption == f"prompt of {key}"
        np.testing.assert_array_equal(clip.c2w, np.tile(np.eye(4), (FRAMES, 1, 1)))
        np.testing.assert_array_equal(clip.intrinsics, np.tile([320, 192, 160, 96], (FRAMES, 1)))


def test_small_entries_and_short_clips_are_left_out(folder):
    assert source(folder).keys == ["blind", "seen", "short"] and source(folder).clip("short") is None
    assert source(folder, min_bytes=50_000).keys == ["blind", "seen"]


def test_latents_of_another_size_are_refused(folder):
    write_zip(folder, "c", {"wide": np.zeros((128, 3, 6, 12), np.float32)})
    with pytest.raises(ValueError, match=r"wide is \(128, 3, 6, 12\), preset 'tiny' trains on \(128, 2, 6, 10\)"):
        source(folder, "c").clip("wide")


def test_imported_clips_are_trained_on_and_damage_is_passed_over(folder, capsys):
    write_zip(folder, "cut", {"lost": latents(4)})
    cut, spoilt = folder / "raw" / "cut.zip", folder / "vae" / "b.zip"
    cut.write_bytes(cut.read_bytes()[:60])
    write_zip(folder, "b", {"other": latents(3), "spoilt": latents(5)})
    data = bytearray(spoilt.read_bytes())
    data[data.index(latents(5).tobytes()) + 1000] ^= 1
    spoilt.write_bytes(data)
    store = str(folder / "latents")
    words = ["--preset", "tiny", "--data", str(folder / "raw"), "--cache", str(folder / "vae"), "--latents", store]
    words += ["--min-bytes", "0", "--shard", "2", "--frames"]
    import_latents.main([*words, str(FRAMES)])
    assert LatentStore(store).shards() == ["a-000000", "b-000000"]
    said = capsys.readouterr().err
    assert "cut.zip is not a whole zip" in said and "spoilt.npz is damaged" in said
    written = {path: path.stat().st_mtime_ns for path in Path(store).iterdir()}
    import_latents.main([*words, str(FRAMES)])
    assert written == {path: path.stat().st_mtime_ns for path in Path(store).iterdir()}
    stage = dataclasses.replace(stages.get("stage1_gdn", "tiny"), frames=FRAMES, window=9)
    batch = open_source(stage, CONFIG, store).batch(0, 3)
    found = {float(clip[0, 0, 0, 0]) for clip in batch["latents"]}
    assert found == {float(latents(seed)[0, 0, 0, 0].astype(np.float16)) for seed in (0, 1, 3)}
    with pytest.raises(ValueError, match="choose another --latents"):
        import_latents.main([*words, "17"])


def test_folders_that_do_not_belong_together_are_refused(folder):
    with pytest.raises(ValueError, match="has its namesake in .*: give the folder of latents with --cache"):
        import_latents.main(["--data", str(folder / "raw"), "--cache", str(folder), "--latents", str(folder / "new")])
