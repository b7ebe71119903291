"""Rendered clips: pictures that agree with their poses, the same clip for the same numbers, a job that resumes."""

from __future__ import annotations

import ctypes.util
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from longtake.jobs import render_worlds
from longtake.model.camera import Trajectory, invert, parse_actions, plucker_rays
from longtake.platform.data.clip import Clip
from longtake.platform.data.render import mujoco_rooms, paths, preview, vizdoom_worlds
from longtake.platform.data.render.mujoco_rooms import MujocoRooms, Room
from longtake.platform.data.render.paths import ACTION_SPEEDS, FAN, FPS, KINDS, NoStart, Shot, random_path
from longtake.platform.data.render.shards import Shard, places, plan
from longtake.platform.data.render.vizdoom_worlds import VizdoomWorld
from longtake.platform.data.store import ClipStore
from longtake.platform.evaluate.identification import fans

pytestmark = pytest.mark.cpu

needs_egl = pytest.mark.skipif(
    ctypes.util.find_library("EGL") is None, reason="MuJoCo draws through EGL: apt install libegl1 libgl1-mesa-dri"
)
TEST_MAP, TEST_ROOMS = "freedoom1/E1M5", "rooms/test"
ENGINES = [pytest.param(TEST_MAP, id="vizdoom"), pytest.param(TEST_ROOMS, id="mujoco", marks=needs_egl)]


def open_world(place: str) -> VizdoomWorld | MujocoRooms:
    return MujocoRooms(place) if place in mujoco_rooms.PLACES else VizdoomWorld(place)


def only(kind: str, monkeypatch) -> None:
    """Every random path is of that kind."""
    for module in (paths, vizdoom_worlds):
        monkeypatch.setattr(module, "KINDS", {name: float(name == kind) for name in KINDS})


def found_at(depth: np.ndarray, trajectory: Trajectory, i: int, j: int) -> np.ndarray:
    """(H, W, 3): pixel coordinates in frame j, and depth there, of what the pixels of frame i with `depth` show."""
    height, width = depth.shape
    at_centres = trajectory.intrinsics - torch.tensor([0.0, 0.0, 0.5, 0.5])
    rays = plucker_rays(trajectory.c2w[None], at_centres[None], height, width)[0, i, ..., :3]
    pose, w2c = trajectory.c2w[i], invert(trajectory.c2w[j])
    points = pose[:3, 3] + rays * (torch.from_numpy(depth) / (rays @ pose[:3, 2]))[..., None]
    x, y, z = (points @ w2c[:3, :3].T + w2c[:3, 3]).unbind(-1)
    fx, fy, cx, cy = trajectory.intrinsics[j]
    return torch.stack([fx * x / z + cx, fy * y / z + cy, z], dim=-1).numpy()


def sampled(image: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The image at pixel coordinates (H, W, 2); OpenCV counts from the first pixel's centre."""
    x, y = np.moveaxis(at.astype(np.float32) - 0.5, -1, 0)
    return cv2.remap(image, x, y, cv2.INTER_LINEAR)


def track(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Corners of one frame, as (row, column) of their pixel, and how far (N, 2) each moved until the other frame."""
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (first, second)]
    corners = cv2.goodFeaturesToTrack(grey[0], 400, 0.01, 6)
    there, ok, _ = cv2.calcOpticalFlowPyrLK(grey[0], grey[1], corners, None, winSize=(15, 15), maxLevel=4)  # type: ignore[call-overload]
    back, ok_back, _ = cv2.calcOpticalFlowPyrLK(grey[1], grey[0], there, None, winSize=(15, 15), maxLevel=4)  # type: ignore[call-overload]
    kept = (ok.ravel() == 1) & (ok_back.ravel() == 1) & (np.abs(back - corners).max(axis=-1).ravel() < 0.3)
    return corners[kept, 0].round().astype(int)[:, ::-1], (there - corners)[kept, 0]


@dataclasses.dataclass
class Agreement:
    """Of frame i with frame j, medians: pixels between where corners went and where depth and poses put them, and
    relative difference of depth; means: grey levels between frame i and what was found of it in frame j, and between
    the same pixels of both."""

    pixels: float
    depth: float
    found: float
    unmoved: float

    @classmethod
    def of(cls, shot: Shot, trajectory: Trajectory, i: int, j: int) -> Agreement:
        assert shot.depth is not None
        at = found_at(shot.depth[i], trajectory, i, j)
        size = at.shape[1::-1]
        corners, moved = track(shot.frames[i], shot.frames[j])
        row, column = corners.T
        assert len(moved) > 30 and np.median(np.linalg.norm(moved, axis=1)) > 5
        predicted = at[row, column, :2] - np.stack([column, row], axis=1) - 0.5
        inside = (at[..., 2] > 0) & (at[..., :2] > 1).all(axis=-1) & (at[..., :2] < np.array(size) - 1).all(axis=-1)
        off = np.abs(sampled(shot.depth[j], at[..., :2]) / at[..., 2] - 1)
        seen = inside & (off < 0.1)  # not hidden in frame j
        if not seen.any():
            return cls(*[math.inf] * 4)
        frame, other = shot.frames[i].astype(np.float32), shot.frames[j].astype(np.float32)
        return cls(
            float(np.median(np.linalg.norm(predicted - moved, axis=1))),
            float(np.median(off[inside])),
            float(np.abs(sampled(other, at[..., :2]) - frame)[seen].mean()),
            float(np.abs(other - frame)[seen].mean()),
        )


WRONG_CONVENTIONS = {
    "OpenGL axes": lambda c2w: c2w @ np.diag([1.0, -1, -1, 1]),
    "world to camera": np.linalg.inv,
    "feet": lambda c2w: np.concatenate([c2w[..., :3], c2w[..., 3:] * [[3.28], [3.28], [3.28], [1]]], axis=-1),
}


def check_conventions(shot: Shot, intrinsics: np.ndarray, max_pixels: float, max_depth: float) -> None:
    def agreement(c2w: np.ndarray) -> Agreement:
        poses = torch.from_numpy(c2w.astype(np.float32))
        return Agreement.of(shot, Trajectory(poses, torch.from_numpy(intrinsics), shot.frames.shape[1:3]), *pair)

    for pair in ((4, 12), (12, 20)):
        right = agreement(shot.c2w)
        assert right.pixels < max_pixels and right.depth < max_depth, (pair, right)
        assert right.found < min(8, 0.4 * right.unmoved), (pair, right)
        for name, change in WRONG_CONVENTIONS.items():
            wrong = agreement(change(shot.c2w.astype(np.float64)))
            assert wrong.pixels > 10 * right.pixels and wrong.found > 2 * right.found, (pair, name, wrong, right)


@pytest.mark.parametrize("test_map, index", [("freedoom1/E1M5", 4), ("freedoom2/MAP10", 3)])
def test_a_map_is_seen_where_its_poses_and_depth_put_it(test_map, index):
    with VizdoomWorld(test_map, depth=True) as world:
        clip = world.clip(0, index, 25)  # a walk with pitch and roll
        shot = world.render(clip.c2w.astype(np.float64), float(clip.intrinsics[0, 0]))
    assert clip.split == "test" and np.abs(shot.c2w - clip.c2w).max() < 1e-3
    assert np.abs(shot.frames.astype(int) - clip.frames).mean() < 0.1
    check_conventions(shot, clip.intrinsics, max_pixels=1.0, max_depth=0.05)


@needs_egl
def test_a_room_is_seen_where_its_poses_and_depth_put_it():
    rng = np.random.default_rng(1)
    room = Room.random(rng)
    walk = next(path for path in placed_walks(room, rng) if room.clearance(path.position).min() > 0.8)
    ramp = np.linspace(-1, 1, 25)
    walk = dataclasses.replace(walk, pitch=0.15 * ramp, roll=0.1 * ramp, eye=1.5 + 0.3 * ramp)
    with MujocoRooms() as world:
        height, width = world.image_size
        shot = world.render(room, walk.c2w(walk.eye), 200.0, depth=True)
    intrinsics = np.tile(np.array([200, 200, width / 2, height / 2], np.float32), (25, 1))
    check_conventions(shot, intrinsics, max_pixels=0.6, max_depth=0.01)


def placed_walks(room: Room, rng: np.random.Generator) -> Iterator[paths.Path]:
    while True:
        yield random_path(25, rng, kind="walk").placed(rng.uniform(-room.half, room.half), rng.uniform(0, 2 * math.pi))


@pytest.mark.parametrize("place", ENGINES)
def test_a_clip_is_the_same_whatever_was_rendered_before_it(place):
    with open_world(place) as world:
        alone = world.clip(3, 1, 9)
    with open_world(place) as world:
        other, again = world.clip(3, 0, 9), world.clip(3, 1, 9)
    assert again.key == alone.key and again.caption == alone.caption and again.provenance == alone.provenance
    for name in ("frames", "c2w", "intrinsics"):
        np.testing.assert_array_equal(getattr(again, name), getattr(alone, name))
    assert other.key != alone.key and not np.array_equal(other.c2w, alone.c2w)


@pytest.mark.parametrize("place", ENGINES)
def test_an_actions_clip_follows_its_actions(place, monkeypatch):
    only("actions", monkeypatch)
    with open_world(place) as world:
        clip = world.clip(0, 0, 25)
    assert clip.actions is not None
    speed, turn = ACTION_SPEEDS["translation_speed"], ACTION_SPEEDS["rotation_speed"]
    expected = parse_actions(clip.actions, fps=FPS, translation_speed=speed, rotation_speed=turn).c2w
    found = clip.trajectory().relative().c2w
    assert (expected[-1] - expected[0]).abs().max() > 0.1
    along = [0, 1, 2] if place in mujoco_rooms.PLACES else [0, 2]  # in a map there may be steps
    torch.testing.assert_close(found[:, :3, :3], expected[:, :3, :3], atol=1e-4, rtol=0)
    torch.testing.assert_close(found[:, along, 3], expected[:, along, 3], atol=2e-3, rtol=0)


@pytest.mark.parametrize("place", ENGINES)
def test_a_still_clip_shows_one_picture_and_a_return_clip_ends_where_it_began(place, monkeypatch):
    for kind in ("still", "return"):
        only(kind, monkeypatch)
        with open_world(place) as world:
            clip = world.clip(0, 0, 9)
        # Drawn twice, a pose differs by the engine's rounding.
        assert np.abs(clip.c2w - clip.c2w[::-1]).max() < 1e-3
        assert np.abs(clip.frames[0].astype(int) - clip.frames[-1]).mean() < 0.5
        moved = np.abs(clip.c2w - clip.c2w[:1]).max()
        assert moved < 1e-3 if kind == "still" else moved > 0.02


@pytest.mark.parametrize("place", ENGINES)
def test_a_fan_is_eight_ways_from_one_pose(place):
    with open_world(place) as world:
        clips = world.fan(0, 0, 9)
    (start,) = fans([clip.key for clip in clips])
    assert [clip.key for clip in clips] == [f"{start}/{number}" for number in range(8)]
    assert [clip.provenance["kind"] for clip in clips] == list(FAN)
    assert all(clip.split == "test" and np.abs(clip.c2w[0] - clips[0].c2w[0]).max() < 1e-3 for clip in clips)
    ends = [np.linalg.inv(clip.c2w[0]) @ clip.c2w[-1] for clip in clips]
    apart = [np.abs(a - b).max() for n, a in enumerate(ends) for b in ends[:n]]
    assert min(apart) > 0.1
    forward, right = ends[0][:3, 3], ends[3][:3, 3]
    np.testing.assert_allclose([forward[2], right[0]], [0.8 * 8 / FPS] * 2, atol=5e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_path_keeps_to_the_speed_of_its_kind(kind):
    for seed in range(20):
        path = random_path(81, np.random.default_rng(seed), kind=kind)
        assert len(path) == 81 and path.kind == kind
        np.testing.assert_allclose([*path.position[0], path.yaw[0]], 0, atol=1e-9)
        speed = np.linalg.norm(np.diff(path.position, axis=0), axis=1) * FPS
        turn = np.abs(np.diff(path.yaw)) * FPS
        assert speed.max() <= paths.MAX_SPEED + 1e-6 and turn.max() <= paths.MAX_TURN + 1e-6
        assert np.abs(path.pitch).max() <= paths.MAX_PITCH and np.abs(path.roll).max() <= paths.MAX_ROLL
        assert (path.eye >= 1.3).all() and (path.eye <= 1.6).all()
        if kind == "return":
            np.testing.assert_allclose(path.position, path.position[::-1], atol=1e-9)
            np.testing.assert_allclose(path.yaw, path.yaw[::-1], atol=1e-9)
        assert (speed.max() + turn.max() == 0) == (kind == "still")


def test_an_unknown_kind_of_path_is_refused():
    with pytest.raises(ValueError, match="choose one of walk, strafe"):
        random_path(9, np.random.default_rng(0), kind="fly")


def test_no_place_is_in_both_splits():
    train, test = set(places("both", "train")), set(places("both", "test"))
    assert not train & test and train | test == set(places("both", "both")) == {
        *vizdoom_worlds.MAPS,
        *mujoco_rooms.PLACES,
    }
    assert test == {*vizdoom_worlds.TEST_MAPS, TEST_ROOMS}


@pytest.mark.parametrize(
    "source, clips, frames", [("vizdoom", 500, 81), ("both", 64, 961), ("both", 1, 9), ("mujoco", 101, 81)]
)
def test_a_plan_holds_each_clip_once(source, clips, frames):
    found = plan(places(source, "both"), clips, frames, seed=3)
    numbers = [(shard.place, index) for shard in found for index in range(shard.first, shard.first + shard.count)]
    assert len(numbers) == len(set(numbers)) == clips
    assert len({shard.name for shard in found}) == len(found)
    assert all(shard.count * frames <= 2000 or shard.count == 1 for shard in found)
    if source == "both" and clips > 1:
        assert sum(shard.count for shard in found if shard.place in mujoco_rooms.PLACES) == clips // 8


def test_a_plan_of_fans_counts_eight_clips_a_start():
    found = plan(places("vizdoom", "test"), 80, 9, seed=0, fan=True)
    assert sum(shard.num_clips for shard in found) == 80 and sum(shard.count for shard in found) == 10


def test_plans_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="unknown map 'MAP01'"):
        places("vizdoom", "both", ["MAP01"])
    with pytest.raises(ValueError, match="freedoom1/E1M5 belongs to the train split"):
        places("vizdoom", "train", ["freedoom1/E1M5"])
    for clips, frames, fan in ((0, 9, False), (4, 1, False), (7, 9, True)):
        with pytest.raises(ValueError, match="ask for at least"):
            plan(["freedoom1/E1M5"], clips, frames, 0, fan)
    with pytest.raises(ValueError, match="unknown map"):
        VizdoomWorld("freedoom1/E9M9")
    with pytest.raises(ValueError, match="unknown place"):
        MujocoRooms("rooms/attic")


def command(store: Path | str, *more: str) -> list[str]:
    asked = {"--store": store, "--clips": 3, "--frames": 9, "--workers": 1}
    words = [str(word) for pair in asked.items() for word in pair]
    return [*words, "--maps", "freedoom1/E1M5", "freedoom2/MAP01", *more]


def test_a_second_run_renders_nothing(tmp_path, monkeypatch, capsys):
    render_worlds.main(command(tmp_path / "clips"))
    clips = list(ClipStore(tmp_path / "clips").clips())
    assert len(clips) == 3 and {len(clip) for clip in clips} == {9}
    assert sorted(clip.split for clip in clips) == ["test", "train", "train"]
    monkeypatch.setattr(render_worlds, "render", lambda *_: pytest.fail("rendered again"))
    render_worlds.main(command(tmp_path / "clips"))
    assert capsys.readouterr().out.count("3 clips in ") == 2
    with pytest.raises(ValueError, match="of another number of clips"):
        render_worlds.main([*command(tmp_path / "clips"), "--clips", "8"])


def test_a_place_without_room_leaves_no_shard_and_the_others_their_clips(tmp_path, monkeypatch):
    clip, roomy = VizdoomWorld.clip, ["freedoom2/MAP01"]

    def cramped(world, seed, index, frames):
        if world.map_name not in roomy or index:
            raise NoStart("no room")
        return clip(world, seed, index, frames)

    monkeypatch.setattr(VizdoomWorld, "clip", cramped)
    render_worlds.main(command(tmp_path / "clips"))
    store = ClipStore(tmp_path / "clips")
    assert [clip.provenance["map"] for clip in store.clips()] == ["MAP01"] and len(store.shards()) == 1
    roomy.clear()
    with pytest.raises(ValueError, match="no place had room"):
        render_worlds.main(command(tmp_path / "none"))


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys):
    render_worlds.main(command(tmp_path / "clips", "--dry-run", "--preview"))
    planned = json.loads(capsys.readouterr().out)
    assert sum(shard["count"] for shard in planned["shards"]) == planned["clips"] == 3
    render_worlds.main(command(tmp_path / "clips", "--dry-run", "--fan", "--clips", "12"))
    assert json.loads(capsys.readouterr().out)["clips"] == 8
    assert not list(tmp_path.iterdir())


def test_a_preview_shows_rendered_clips_beside_their_shards(tmp_path, capsys):
    render_worlds.main(command(tmp_path / "clips", "--preview"))
    sheet, figure = (Path(line) for line in capsys.readouterr().out.splitlines()[1:])
    height, width = vizdoom_worlds.IMAGE_SIZE
    with Image.open(sheet) as image:
        assert image.width == 6 * width and image.height > 3 * height
        rows = np.asarray(image).reshape(3, -1, *np.asarray(image).shape[1:])[:, -height:, :width]
    store = ClipStore(tmp_path / "clips")
    for row, clip in zip(rows, store.clips(), strict=True):
        np.testing.assert_array_equal(row, clip.frames[0])
    with Image.open(figure) as image:
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 50
    assert len(store.shards()) == 2


def test_a_preview_takes_twelve_clips_spread_over_the_shards(tmp_path, monkeypatch):
    store = ClipStore(tmp_path / "clips")
    found = [Shard("freedoom2/MAP01", 0, 10 * number, 10, 2) for number in range(4)]
    for shard in found[:3]:
        black = np.zeros((2, 8, 8, 3), np.uint8)
        poses, pinholes = np.tile(np.eye(4), (2, 1, 1)), np.full((2, 4), 4.0)
        keys = [f"{shard.first}/{number}" for number in range(10)]
        store.write_shard(shard.name, [Clip(key, black, poses, pinholes, FPS, "", 1.0, "MIT") for key in keys])
    labels: list[str] = []
    monkeypatch.setattr(preview, "contact_sheet", lambda path, videos: labels.extend(videos))
    preview.write_preview(store, found)
    assert len(labels) == 12 and {label.partition("/")[0] for label in labels} == {"0", "10", "20"}


def test_a_preview_of_a_bucket_is_refused_before_rendering(monkeypatch):
    monkeypatch.setattr(render_worlds, "render", lambda *_: pytest.fail("rendered"))
    with pytest.raises(ValueError, match="local folder.* change --store"):
        render_worlds.main(command("s3://bucket/clips", "--preview"))
