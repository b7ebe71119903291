import math

import numpy as np
import pytest
import torch
from diffusers.pipelines.sana_wm.cam_utils import action_string_to_c2w, prepare_camera

from longtake.model.camera import KEY_MAPS, Trajectory, intrinsics_from_fov, parse_actions, random_actions, ray_matrices

pytestmark = pytest.mark.cpu
SIZE, STRIDE = (192, 320), (8, 32, 32)


def some_trajectory(frames=17):
    return parse_actions(random_actions(frames - 1, seed=3), fov_deg=70, image_size=SIZE)


@pytest.mark.parametrize("frames", [1, 9, 41])
def test_features_equal_the_released_pipelines(frames):
    trajectory = some_trajectory(41).window(0, frames)
    ours = trajectory.features(SIZE, STRIDE)
    theirs = prepare_camera(trajectory.c2w.numpy(), trajectory.intrinsics.numpy(), target_size=SIZE, vae_stride=STRIDE)
    torch.testing.assert_close(ours.conditions[0], theirs["raymap"])
    torch.testing.assert_close(ours.plucker[0], theirs["chunk_plucker"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("text", ["w-20", "ws-3,dj-9,none-2,kl-12", "i-30,wal-8", "k-90"])
def test_the_first_releases_key_map_gives_its_poses(text):
    ours = parse_actions(text, key_map="diffusers", fps=16).c2w.numpy()
    np.testing.assert_allclose(ours, action_string_to_c2w(text), atol=2e-5)


def test_the_newest_key_map_turns_with_d_and_strafes_with_l():
    turned, strafed = parse_actions("d-64").c2w[-1], parse_actions("l-64").c2w[-1]
    assert turned[0, 2] > 0.3 and turned[:3, 3].abs().max() < 1e-6  # looks to the right, where it stood
    assert strafed[0, 3] > 0.8 and torch.equal(strafed[:3, :3], torch.eye(3))


def test_speeds_are_metres_and_degrees_a_second_at_any_frame_rate():
    for fps in (8, 16, 30):
        walked = parse_actions(f"w-{fps}", "diffusers", fps, translation_speed=1.5).c2w[-1]
        turned = parse_actions(f"l-{fps}", "diffusers", fps, rotation_speed=30).c2w[-1]
        assert walked[2, 3] == pytest.approx(1.5, rel=1e-5)
        assert math.degrees(math.atan2(turned[0, 2], turned[2, 2])) == pytest.approx(30, rel=1e-4)


def test_velocity_builds_up_while_a_key_is_held_and_coasts_after_it():
    z = parse_actions("w-48,none-48").c2w[:, 2, 3].diff() * 16
    speed = KEY_MAPS["official"].translation_speed
    assert z[0] < 0.2 * speed and z[47] == pytest.approx(speed, rel=0.01)
    assert 0.25 * speed < z[64] < 0.5 * speed  # a second after letting go


def test_ray_matrices_have_the_ray_as_their_z_axis():
    trajectory = some_trajectory()
    conditions = trajectory.features(SIZE, STRIDE).conditions
    ray_from_world, world_from_ray = ray_matrices(conditions, 6, 10)
    torch.testing.assert_close(
        ray_from_world @ world_from_ray, torch.eye(4).expand_as(ray_from_world), rtol=0, atol=1e-5
    )
    c2w, (fx, fy, cx, cy) = conditions[0, 2, :16].view(4, 4), conditions[0, 2, 16:]
    point = c2w[:3, :3] @ torch.tensor([(7 - cx) / fx, (4 - cy) / fy, 1]) * 3 + c2w[:3, 3]
    seen = ray_from_world[0, 2, 4, 7] @ torch.cat([point, torch.ones(1)])
    torch.testing.assert_close(seen[:2], torch.zeros(2), rtol=0, atol=1e-5)
    assert seen[2] > 2.9


@pytest.mark.parametrize("text", ["", "w", "w-0", "w-1.5", "-5", "w-5,", "q-4", "w--4", "w-²"])
def test_a_malformed_action_is_refused(text):
    with pytest.raises(ValueError, match="action"):
        parse_actions(text)


def test_an_unknown_key_map_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="did you mean 'official'"):
        parse_actions("w-8", key_map="offical")


def break_pose(trajectory, change):
    c2w = trajectory.c2w.clone()
    change(c2w[3])
    return Trajectory(c2w, trajectory.intrinsics, SIZE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pose: pose[0, 3].fill_(torch.nan), "frame 3 has values that are not finite"),
        (lambda pose: pose[:3, :3].mul_(1.1), "frame 3 is not a rotation"),
        (lambda pose: pose[:3, 0].neg_(), "frame 3 mirrors"),
        (lambda pose: pose[3].copy_(torch.tensor([0.0, 0.0, 1.0, 0.0])), "frame 3 does not end"),
    ],
)
def test_a_pose_that_is_no_rigid_motion_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        break_pose(some_trajectory(), change)


@pytest.mark.parametrize("fov", [20, 121])
def test_a_field_of_view_outside_the_trained_range_is_refused(fov):
    with pytest.raises(ValueError, match="field of view"):
        intrinsics_from_fov(fov, SIZE)
    focal = 160 / math.tan(math.radians(fov / 2))
    with pytest.raises(ValueError, match="field of view"):
        Trajectory(torch.eye(4)[None], torch.tensor([focal, focal, 160, 96]), SIZE)


def test_a_length_that_leaves_a_latent_frame_half_full_says_which_would_do():
    with pytest.raises(ValueError, match="give 9 or 17"):
        some_trajectory(17).window(0, 12).features(SIZE, STRIDE)


def test_intrinsics_follow_resizing_and_cropping():
    trajectory = Trajectory(torch.eye(4)[None], intrinsics_from_fov(80, (480, 640)), (480, 640))
    resized = trajectory.resized((192, 320))  # scaled by 1/2, 24 rows cut above and below
    torch.testing.assert_close(resized.intrinsics[0, 2:], torch.tensor([160.0, 96.0]))
    torch.testing.assert_close(resized.intrinsics[0, 0], trajectory.intrinsics[0, 0] / 2)


def test_a_trajectory_survives_saving_and_comes_from_npy(tmp_path):
    trajectory = some_trajectory()
    trajectory.save(tmp_path / "way.npz")
    loaded = Trajectory.load(tmp_path / "way.npz")
    assert (
        torch.equal(loaded.c2w, trajectory.c2w) and loaded.image_size == SIZE and loaded.actions == trajectory.actions
    )
    np.save(tmp_path / "way.npy", trajectory.c2w.numpy())
    from_npy = Trajectory.from_npy(tmp_path / "way.npy", trajectory.intrinsics[0], SIZE)
    assert torch.equal(from_npy.c2w, trajectory.c2w)


@pytest.mark.parametrize("content", [b"", b"junk", b"\x93NUMPY broken"])
def test_a_file_that_holds_no_poses_is_refused_by_name(tmp_path, content):
    (tmp_path / "bad.npy").write_bytes(content)
    with pytest.raises(ValueError, match="bad.npy"):
        Trajectory.from_npy(tmp_path / "bad.npy", intrinsics_from_fov(70, SIZE))


def test_random_actions_fill_exactly_the_frames():
    texts = {random_actions(80, seed) for seed in range(8)}
    assert len(texts) > 4 and all(parse_actions(text).num_frames == 81 for text in texts)


def test_a_plot_is_written(tmp_path):
    some_trajectory(33).plot(tmp_path / "way.png")
    assert (tmp_path / "way.png").stat().st_size > 5000
