import pytest
import torch

from longtake.model.samplers.flow_euler import clip_noise, euler, schedule, shift_sigma, training_sigma

pytestmark = pytest.mark.cpu


def test_the_shifted_schedule_has_the_published_four_step_list():
    assert (schedule(4, 8.0) * 1000).long().tolist() == [1000, 960, 888, 727, 0]


def test_a_schedule_without_steps_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        schedule(0, 8.0)


def test_shift_keeps_the_ends_and_moves_the_middle_up():
    sigma = shift_sigma(torch.tensor([0.0, 0.5, 1.0]), 9.8)
    assert sigma[0] == 0 and sigma[2] == 1 and sigma[1] == pytest.approx(9.8 * 0.5 / (1 + 8.8 * 0.5))


def test_euler_recovers_the_clip_from_its_exact_velocity():
    clip, noise = torch.randn(2, 4, 3, 2, 2), torch.randn(2, 4, 3, 2, 2)
    out = euler(lambda x, t: noise - clip, noise, schedule(3, 5.0))
    torch.testing.assert_close(out, clip)


def test_fresh_noise_takes_the_place_of_what_is_left():
    clip, noise = torch.randn(2, 4, 3, 2, 2), torch.randn(3, 2, 4, 3, 2, 2)
    sigmas, seen = schedule(3, 5.0), []

    def velocity(x, timestep):  # exact for any noise
        seen.append(x)
        return (x - clip) / (timestep[0, -1] / 1000)

    out = euler(velocity, noise[0], sigmas, fresh=lambda step: noise[step])
    torch.testing.assert_close(out, clip)
    for x, sigma, fresh in zip(seen, sigmas[:-1], noise, strict=True):
        torch.testing.assert_close(x, (1 - sigma) * clip + sigma * fresh)


def test_frozen_frames_keep_their_value_and_have_timestep_zero():
    x, seen = torch.randn(1, 2, 4, 1, 1), []

    def velocity(state, timestep):
        seen.append(timestep)
        return torch.ones_like(state)

    out = euler(velocity, x, schedule(2, 1.0), frozen_frames=1)
    assert torch.equal(out[:, :, :1], x[:, :, :1])
    torch.testing.assert_close(out[:, :, 1:], x[:, :, 1:] - 1)
    assert [t[0].tolist() for t in seen] == [[0, 1000, 1000, 1000], [0, 500, 500, 500]]


def test_noise_depends_on_the_clips_seed_alone():
    both, alone = clip_noise((2, 3), [7, 8], "cpu"), clip_noise((2, 3), [8], "cpu")
    assert torch.equal(both[1], alone[0]) and not torch.equal(both[0], both[1])


def test_training_sigmas_are_logit_normal_after_the_shift():
    sigma = training_sigma(torch.randn(20_000, generator=torch.Generator().manual_seed(0)), 4.0)
    unshifted = sigma / (4 - 3 * sigma)
    logit = torch.logit(unshifted)
    assert abs(logit.mean()) < 0.03 and abs(logit.std() - 1) < 0.03
