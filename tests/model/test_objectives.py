import dataclasses

import pytest
import torch

from longtake.model.objectives import Draws, build_objective
from longtake.model.objectives.flow import FlowObjective
from longtake.model.objectives.refiner import RefinerObjective
from longtake.model.objectives.vae import VAEObjective
from longtake.model.samplers.chunk_flow import chunk_training_sigma
from longtake.model.samplers.flow_euler import training_sigma
from longtake.model.text import tokenize
from longtake.model.vae import decode_latents, encode_frames, to_pixels

pytestmark = pytest.mark.cpu


def draws(clips=2, seed=0):
    return Draws(seed, range(clips))


@pytest.fixture
def batch(config):
    torch.manual_seed(0)
    ids, mask = tokenize(["a hall", "outdoors"], config.text.length)
    return {
        "latents": torch.randn(2, config.latent_channels, 3, 2, 3),
        "c2w": torch.eye(4).expand(2, 17, 4, 4).clone(),
        "intrinsics": torch.tensor([60.0, 60.0, 48.0, 32.0]).expand(2, 17, 4).clone(),
        "tokens": ids,
        "tokens_mask": mask,
    }


@pytest.mark.parametrize("kind", ["flow", "refiner", "refiner by blocks", "chunks"])
def test_the_loss_is_finite_and_repeats_with_the_seed(kind, config, batch):
    torch.manual_seed(0)
    if kind == "refiner by blocks":
        kind, config = "refiner", dataclasses.replace(config, refiner=dataclasses.replace(config.refiner, block_size=1))
    config = dataclasses.replace(config, chunk_causal=kind == "chunks", chunk_size=1)
    objective = build_objective("flow" if kind == "chunks" else kind, config)
    loss, metrics = objective(batch, draws())
    again, _ = objective(batch, draws())
    other, _ = objective(batch, draws(seed=1))
    assert torch.isfinite(loss) and loss == again and loss != other
    assert all(torch.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize(
    ("kind", "options"),
    [("vae", {}), ("flow", {"camera_dropout": 0.5, "caption_dropout": 0.5}), ("refiner", {}), ("chunks", {})],
)
def test_a_clip_draws_the_same_in_every_batch(kind, options, config, batch):
    torch.manual_seed(0)
    if kind == "chunks":
        kind, config = "flow", dataclasses.replace(config, chunk_causal=True, chunk_size=1)
    if kind == "vae":
        batch = {"frames": torch.randint(0, 256, (2, 9, 64, 96, 3), dtype=torch.uint8)}
    objective = build_objective(kind, config, options)
    for parameter in objective.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)  # what starts at zero would hide its inputs
    for first in range(0, 8, 2):
        together, _ = objective(batch, Draws(5, [first, first + 1]))
        alone = [
            objective({name: x[n : n + 1] for name, x in batch.items()}, Draws(5, [first + n]))[0] for n in range(2)
        ]
        torch.testing.assert_close(together, torch.stack(alone).mean(), rtol=1e-4, atol=0)


def test_draws_of_neighbouring_clips_have_nothing_in_common():
    drawn = Draws(0, range(4000))
    uniform, normal = drawn.uniform(), drawn.normal(2)
    assert abs(uniform.mean() - 0.5) < 0.02 and abs(uniform.std() - 12**-0.5) < 0.01
    assert abs(normal.mean()) < 0.04 and abs(normal.std() - 1) < 0.03
    for x in (uniform, normal[:, 0], normal[:, 1]):
        assert abs(torch.corrcoef(torch.stack([x[1:], x[:-1]]))[0, 1]) < 0.06


def test_a_camera_left_out_of_a_batch_is_as_if_there_were_none(config, batch):
    torch.manual_seed(0)
    objective = FlowObjective(config)
    for parameter in objective.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    text, mask = objective.encode_text(batch)
    inputs = batch["latents"], torch.full((2, 3), 500.0), text, mask
    model, camera = objective.world_model, objective.camera(batch)
    seen, unseen, mixed = (
        model(*inputs, camera),
        model(*inputs),
        model(*inputs, camera, camera_seen=torch.tensor([True, False])),
    )
    assert not torch.allclose(seen, unseen, atol=1e-3)
    torch.testing.assert_close(mixed, torch.stack([seen[0], unseen[1]]))


def test_the_autoencoder_learns_one_window(config):
    torch.manual_seed(0)
    objective = VAEObjective(config)
    frames = torch.rand(1, 1, 4, 6, 3).repeat_interleave(16, 2).repeat_interleave(16, 3).repeat(1, 9, 1, 1, 1)
    batch = {"frames": (frames * 255).to(torch.uint8)}
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    losses = []
    for step in range(24):
        loss, _ = objective(batch, draws(1, step))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]


def test_half_of_the_windows_are_mirrored(config, monkeypatch):
    objective = VAEObjective(config)
    frames = torch.randint(0, 256, (8, 1, 64, 96, 3), dtype=torch.uint8)
    encode, seen = objective.vae.encode, []
    monkeypatch.setattr(objective.vae, "encode", lambda pixels, **how: seen.append(pixels) or encode(pixels, **how))
    objective({"frames": frames}, draws(8))
    true = to_pixels(frames)
    mirrored = [bool((seen[0][n] == true[n].flip(-1)).all()) for n in range(8)]
    assert 0 < sum(mirrored) < 8
    assert all(mirrored[n] or bool((seen[0][n] == true[n]).all()) for n in range(8))


def test_exported_latents_have_unit_scale(config, tmp_path):
    torch.manual_seed(0)
    objective = VAEObjective(config)
    frames = torch.randint(0, 256, (4, 9, 64, 96, 3), dtype=torch.uint8)
    objective({"frames": frames}, draws(4))
    objective.export(tmp_path, torch.float32)
    reloaded = build_objective("vae", config)
    reloaded.load(tmp_path)
    assert isinstance(reloaded, VAEObjective)
    latents = encode_frames(reloaded.vae, frames)
    assert abs(latents.mean()) < 0.1 and 0.8 < latents.std() < 1.2


def test_latents_that_are_not_finite_do_not_spoil_the_scale(config):
    objective = VAEObjective(config)
    objective._track(torch.ones(2, config.latent_channels, 1, 2, 3))
    before = objective.latent_moments.clone()
    objective._track(torch.full((2, config.latent_channels, 1, 2, 3), torch.inf))
    assert torch.equal(objective.latent_moments, before) and before.any()


def test_a_frozen_encoder_keeps_its_latents(config, tmp_path):
    torch.manual_seed(0)
    frames = torch.randint(0, 256, (1, 9, 64, 96, 3), dtype=torch.uint8)
    first = VAEObjective(config)
    first({"frames": frames}, draws(1))
    first.export(tmp_path / "first", torch.float32)
    second = VAEObjective(config, freeze_encoder=True)
    second.load(tmp_path / "first")
    optimizer = torch.optim.SGD(second.parameters(), lr=0.1)
    second({"frames": frames}, draws(1))[0].backward()
    optimizer.step()
    second.export(tmp_path / "second", torch.float32)
    first.load(tmp_path / "first")
    latents = encode_frames(first.vae, frames)
    decoded = next(decode_latents(first.vae, latents))
    first.load(tmp_path / "second")
    assert torch.equal(encode_frames(first.vae, frames), latents)
    assert not torch.equal(next(decode_latents(first.vae, latents)), decoded)


def test_the_image_frame_has_no_loss_when_it_is_the_condition(config, batch, monkeypatch):
    torch.manual_seed(0)
    objective = FlowObjective(config, image_condition=1.0, caption_dropout=0.0)
    seen = {}

    def spy(x, timestep, *rest, **axis):
        seen["timestep"], seen["x"] = timestep, x
        return torch.zeros_like(x)

    monkeypatch.setattr(objective.world_model, "forward", spy)
    objective(batch, draws())
    assert (seen["timestep"][:, 0] == 0).all() and (seen["timestep"][:, 1:] > 0).all()
    assert torch.equal(seen["x"][:, :, 0], batch["latents"][:, :, 0])


def test_every_weight_of_stage_one_gets_a_gradient(config, batch):
    torch.manual_seed(0)
    objective = FlowObjective(config, caption_dropout=0.5)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(
                torch.randn_like(parameter) * 0.05
            )  # zero-initialised outputs would hide what is behind them
    torch.stack([objective(batch, draws(seed=seed))[0] for seed in range(6)]).sum().backward()
    unused = ("recall_gate", "raymap_embedder")  # kept for the checkpoint only
    without = [
        name
        for name, parameter in objective.named_parameters()
        if (parameter.grad is None or not parameter.grad.any()) and not any(part in name for part in unused)
    ]
    softmax_gates = [f"blocks.{i}.attn." for i in range(config.depth) if (i + 1) % config.softmax_every == 0]
    assert not [name for name in without if not any(prefix in name for prefix in softmax_gates)]


def test_a_step_of_refiner_training_leaves_stage_one_alone(config, batch):
    torch.manual_seed(0)
    objective = RefinerObjective(dataclasses.replace(config))
    objective(batch, draws())[0].backward()
    assert objective.stage1 and all(parameter.grad is None for parameter in objective.stage1.parameters())
    assert any(parameter.grad is not None for parameter in objective.refiner.parameters())


@pytest.fixture
def pairs(batch):
    """With three versions of each clip, of a rising number: 1, 2, 3 and 4, 5, 6 below the clips' own."""
    versions = torch.arange(1.0, 7).view(2, 3, 1, 1, 1, 1)
    return batch | {"noisy": (batch["latents"][:, None] - versions).half()}


def test_a_refiner_of_pairs_draws_one_of_a_clip_s_versions(config, pairs):
    torch.manual_seed(0)
    objective = RefinerObjective(config, pairs=True)
    assert not [name for name, _ in objective.named_parameters() if "world_model" in name]
    seen = {1: set(), 4: set()}
    for seed in range(20):
        lost = (pairs["latents"] - objective.coarse(pairs, draws(seed=seed))).mean((1, 2, 3, 4)).round().tolist()
        for first, found in zip(seen, lost, strict=True):
            seen[first].add(found)
    assert seen == {1: {1, 2, 3}, 4: {4, 5, 6}}
    loss, metrics = objective(pairs, draws())
    assert torch.isfinite(loss) and loss == objective(pairs, draws())[0] and metrics["coarse_mse"] > 1
    assert objective.sample(pairs, draws()).shape == pairs["latents"].shape


def test_a_refiner_that_reads_captions_its_own_way_asks_for_them(config, pairs):
    config = dataclasses.replace(config, refiner=dataclasses.replace(config.refiner, text_dim=40))
    objective = RefinerObjective(config, pairs=True)
    with pytest.raises(ValueError, match="40 wide, and the batch has none .* encode its captions"):
        objective(pairs, draws())
    own = {"refiner_text": torch.randn(2, 5, 40).half(), "refiner_text_mask": torch.ones(2, 5, dtype=torch.bool)}
    assert torch.isfinite(objective(pairs | own, draws())[0])


def test_chunks_are_reconstructed_one_after_another(config, batch):
    torch.manual_seed(0)
    config = dataclasses.replace(config, chunk_causal=True, chunk_size=1)
    config = dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, chunk_interval=1))
    objective = FlowObjective(config)
    for parameter in objective.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    sigma = torch.tensor([0.9, 0.6])
    made = objective.reconstruct(batch, draws(), sigma, 2)
    assert torch.equal(made[:, :, 0], batch["latents"][:, :, 0])
    changed = dict(batch, latents=batch["latents"].clone())
    changed["latents"][:, :, 2] += 1
    again = objective.reconstruct(changed, draws(), sigma, 2)
    assert torch.equal(again[:, :, :2], made[:, :, :2]) and not torch.equal(again[:, :, 2], made[:, :, 2])
    # A clip's sigma is its own.
    one = {name: x[1:] for name, x in batch.items()}
    torch.testing.assert_close(objective.reconstruct(one, Draws(0, [1]), sigma[1:], 2), made[1:])


def test_sigmas_of_chunks_are_alike_or_do_not_fall_or_begin_clean():
    drawn, count = Draws(0, range(4000)), 5
    sigma = chunk_training_sigma(drawn.normal(), drawn.uniform(), drawn.uniform(), drawn.uniform(count), 1.0)
    assert (sigma[:, 1:] >= sigma[:, :-1]).all() and sigma.max() < 1
    alike, clean = (sigma == sigma[:, :1]).all(1), (sigma == 0).sum(1)
    assert 0.08 < alike.float().mean() < 0.12 and 0.08 < (clean > 0).float().mean() < 0.12
    assert clean.max() == count - 1 and torch.bincount(clean).min() > 50  # one to four clean chunks
    rising = sigma[~alike & (clean == 0)]
    # Half of them have a logit-normal sigma, of mean 1/2, at the last chunk; the others at a random one.
    assert 0.6 < rising[:, -1].mean() < 0.75 and rising[:, 0].mean() < 0.35
    one = chunk_training_sigma(drawn.normal(), drawn.uniform(), drawn.uniform(), drawn.uniform(1), 1.0)
    assert one.min() > 0  # a single chunk is never clean
    normal, way = torch.tensor([0.3]), torch.tensor([0.05])
    shifted = chunk_training_sigma(normal, way, torch.rand(1), torch.rand(1, 3), 4.0)
    torch.testing.assert_close(shifted, training_sigma(normal, 4.0).expand(1, 3))


def test_a_chunk_causal_model_samples_by_chunk(config, batch):
    config = dataclasses.replace(config, chunk_causal=True, chunk_size=1)
    objective = FlowObjective(config)
    for parameter in objective.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    sample = objective.sample(batch, draws(), num_steps=2)
    assert sample.shape == batch["latents"].shape and torch.equal(sample[:, :, 0], batch["latents"][:, :, 0])
    # Where the camera goes at the last frame, no chunk before it knows.
    changed = dict(batch, c2w=batch["c2w"].clone())
    changed["c2w"][:, 10:, 0, 3] += 1.0
    again = objective.sample(changed, draws(), num_steps=2)
    assert torch.equal(again[:, :, :2], sample[:, :, :2]) and not torch.equal(again[:, :, 2], sample[:, :, 2])
