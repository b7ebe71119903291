"""Both stages with factors of their large products in float8."""

import copy
import dataclasses
from typing import Any

import pytest
import torch

from longtake.model import float8, parts, presets
from longtake.model.dit.world_model import WorldModel
from longtake.model.float8 import Float8Linear, quantize
from longtake.model.pipeline import WorldPipeline
from longtake.model.refiner import Refiner, RefinerStream, adapters, replay

TINY = presets.get("tiny-streaming")


@pytest.fixture(scope="module")
def exact():
    return WorldPipeline.from_pretrained("tiny-streaming", parts=["text", "dit", "refiner"])


@pytest.fixture(scope="module")
def rounded():
    return WorldPipeline.from_pretrained("tiny-streaming", parts=["text", "dit", "refiner"], quantization="fp8")


def error(found, true):
    return float((found - true).norm() / true.norm())


@pytest.mark.cpu
def test_the_products_of_all_tokens_are_rounded(rounded):
    layers = {part: [name for name, layer in module.named_modules() if isinstance(layer, Float8Linear)]
              for part, module in rounded.modules.items()}  # fmt: skip
    assert layers["text"] == []
    assert len(layers["dit"]) == 7 * rounded.config.depth
    assert len(layers["refiner"]) == 6 * rounded.config.refiner.num_layers
    assert not any(name.endswith(("beta_proj", "kv_linear", "to_k")) and "attn2" in name for name in layers["refiner"])


@pytest.mark.cpu
@torch.no_grad()
def test_velocities_of_both_stages_are_near(exact, rounded):
    """Of trained weights: random inputs, unlike anything in training, show more than what is generated."""
    config, text = exact.config, exact.encode_text(["a hall"])
    torch.manual_seed(0)
    latents = torch.randn(1, config.latent_channels, 4, *config.latent_size)
    timestep = torch.tensor([[0.0, 500.0, 500.0, 500.0]])
    stage_1 = [pipeline.part("dit")(latents, timestep, *text) for pipeline in (exact, rounded)]
    assert 1e-3 < error(stage_1[1], stage_1[0]) < 0.2
    stage_2 = [
        pipeline.refine(0.3 * latents, *exact.encode_refiner_text(["a hall"]), [0]) for pipeline in (exact, rounded)
    ]
    assert 1e-3 < error(stage_2[1], stage_2[0]) < 0.1


@pytest.mark.cpu
def test_what_is_rounded_is_not_saved(rounded, tmp_path):
    with pytest.raises(ValueError, match="without quantization"):
        rounded.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.cpu
def test_what_is_rounded_keeps_its_numbers_in_another_dtype_and_in_a_copy(rounded):
    dit = copy.deepcopy(rounded.modules["dit"]).to(torch.float16)
    layer, before = (module.get_submodule("blocks.0.attn.joint") for module in (dit, rounded.modules["dit"]))
    assert layer.weight.dtype == torch.float8_e4m3fn and layer.scale.dtype == torch.float32
    assert torch.equal(layer.weight.float(), before.weight.float())


@pytest.mark.cpu
def test_adapters_are_merged_before(exact):
    refiner = copy.deepcopy(exact.modules["refiner"])
    adapters.attach(refiner.transformer, 4)
    with pytest.raises(ValueError, match="merge adapters before"):
        quantize(refiner)


@pytest.mark.cpu
def test_layers_of_other_widths_stay_exact():
    widths = dict(hidden_size=24, num_heads=3, head_dim=8, mlp_ratio=2.0)
    network = WorldModel(dataclasses.replace(TINY, depth=1, **widths))
    quantize(network)
    names = [name for name, layer in network.named_modules() if isinstance(layer, Float8Linear)]
    assert names == []


@pytest.mark.cpu
def test_a_device_that_does_not_multiply_float8_is_refused_before_weights_load(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="finds no GPU" if not torch.cuda.is_available() else "no weights"):
        WorldPipeline.from_pretrained("tiny", device="cuda", quantization="fp8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    with pytest.raises(ValueError, match="compute capability 8.9"):
        WorldPipeline.from_pretrained("tiny", device="cuda", quantization="fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    float8.check("fp8", "cuda")
    with pytest.raises(ValueError, match="'int8' must be one of fp8"):
        WorldPipeline.from_pretrained("tiny", quantization="int8")  # type: ignore[arg-type]


@pytest.mark.cpu
def test_a_refiner_whose_blocks_pass_by_may_be_rounded(rounded):
    latents = torch.randn(1, TINY.latent_channels, 4, *TINY.latent_size)
    text, mask = rounded.encode_refiner_text(["a hall"])
    passing = WorldPipeline.from_pretrained(
        "tiny-streaming", parts=["text", "refiner"], residency="blocks", quantization="fp8"
    )
    torch.testing.assert_close(passing.refine(latents, text, mask, [0]), rounded.refine(latents, text, mask, [0]))
    assert dataclasses.asdict(passing.config) == dataclasses.asdict(rounded.config)


class ComputedAgain:
    """A graph of what must run again to be replayed."""

    def __init__(self, compute):
        self.compute, self.output = compute, compute()

    def replay(self):
        self.output.copy_(self.compute())


@torch.no_grad()
@pytest.mark.parametrize("device", [pytest.param(each, marks=getattr(pytest.mark, each)) for each in ("cpu", "gpu")])
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_of_a_refiner_are_replayed(device, masked, monkeypatch):
    """Of two videos that take turns, and one that goes on from a past of before."""
    spec = dataclasses.replace(TINY.refiner, block_size=3, window=5, num_layers=2)
    config, device = dataclasses.replace(TINY, refiner=spec), torch.device("cuda" if device == "gpu" else "cpu")
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    refiner: Any = parts.ready(Refiner(config), dtype, "fp8").to(device).eval()
    text, mask = torch.randn(2, 1, 16, spec.text_dim, device=device), torch.ones(2, 1, 16, device=device)
    mask[:, :, 9:] = 0 if masked else 1
    latents = torch.randn(2, 16, 1, config.latent_channels, 3, *config.latent_size, device=device)

    def videos():
        streams = [RefinerStream(refiner, text[n], mask[n], lambda number, x: torch.ones_like(x)) for n in range(2)]
        refined = [[], [], []]
        for number in range(8):
            for which, stream in enumerate(streams):
                refined[which] += list(stream.take(latents[which, number]))
            if number == 5:
                fork = RefinerStream(refiner, text[0], mask[0], past=streams[0].past)
        for number in range(2):
            refined[2].append(fork.refine(latents[1, number], latents[0, number]))
        return [torch.cat(each, 2) for each in refined]

    expected = videos()
    refiner.replay_rounded()
    if device.type == "cpu":
        assert refiner.replay is None
        again = lambda compute, pool: (made := ComputedAgain(compute), made.output)  # noqa: E731
        monkeypatch.setattr(replay, "captured", again)
        refiner.replay = replay.Replay()
    found = videos()
    assert len(refiner.replay._passes.graphs) == 3  # beside the first frame alone, three more, and a full window
    for ours, true in zip(found, expected, strict=True):
        assert torch.equal(ours, true)
