"""LoRA on the refiner: what is trained, its two file formats, and its base."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from longtake.jobs import export_weights, merge_adapters
from longtake.model import weights
from longtake.model.objectives.refiner import RefinerObjective
from longtake.model.pipeline import WorldPipeline, check_folder
from longtake.model.refiner import Refiner, adapters
from longtake.model.refiner.parity import diffusers_transformer

pytestmark = pytest.mark.cpu

RANK = 4


@pytest.fixture
def adapted(config):
    return dataclasses.replace(config, name="tiny", refiner=dataclasses.replace(config.refiner, lora_rank=RANK))


@pytest.fixture
def base(adapted, tmp_path) -> Path:
    """A weights folder with a refiner."""
    torch.manual_seed(0)
    weights.save_part(Refiner(adapted), tmp_path / "base", "refiner", torch.float32)
    weights.save_config(adapted, tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def trained(adapted, base, tmp_path) -> tuple[RefinerObjective, Path]:
    """Adapters that change something, and the weights folder of a run with them."""
    objective = RefinerObjective(adapted, pairs=True)
    objective.start({"refiner": base})
    shake(objective.exported)
    run = tmp_path / "run" / "weights"
    objective.export(run, torch.float32)
    weights.save_part(load(Refiner(adapted), base), run, "refiner", torch.float32)
    weights.save_config(adapted, run)
    return objective, run


def shake(module: torch.nn.Module) -> None:
    torch.manual_seed(1)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)


def load(refiner: Refiner, folder: Path) -> Refiner:
    weights.load_part(refiner, folder, "refiner")
    return refiner


def velocity(refiner, config, theirs=False):
    torch.manual_seed(2)
    latents, text = torch.randn(1, config.latent_channels, 3, 2, 3), torch.randn(1, 12, 32)
    mask, timestep = torch.ones(1, 12, dtype=torch.bool), torch.tensor([[0.0, 400.0, 400.0]])
    if not theirs:
        return refiner(latents, timestep, text, mask).detach()
    turned = refiner.build_rotary_emb_for_absolute_positions(1, [0, 1, 2], 2, 3, latents.device, config.fps)
    tokens = latents.flatten(2).transpose(1, 2), text, timestep.repeat_interleave(6, 1), turned, mask
    return refiner(*tokens, return_dict=False)[0].transpose(1, 2).unflatten(2, (3, 2, 3)).detach()


def test_adapters_are_on_both_attentions_and_the_feed_forward_and_change_nothing_at_first(adapted, base):
    plain, objective = load(Refiner(adapted), base), RefinerObjective(adapted, pairs=True)
    objective.start({"refiner": base})
    assert torch.equal(velocity(objective.refiner, adapted), velocity(plain, adapted))
    trained = {name for name, p in objective.named_parameters() if p.requires_grad}
    layers = {name.split("transformer_blocks.0.")[1].split(".lora_")[0] for name in trained}
    attentions = {f"{attn}.{which}" for attn in ("attn1", "attn2") for which in ("to_q", "to_k", "to_v", "to_out.0")}
    assert layers == attentions | {"ff.net.0.proj", "ff.net.2"} and len(trained) == 2 * len(layers)
    assert len(list(objective.exported.parameters())) == len(trained)


def test_a_base_of_16_bits_is_under_adapters_of_32(adapted):
    refiner = RefinerObjective(adapted, pairs=True, base_dtype="bfloat16").refiner
    assert all(p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16) for p in refiner.parameters())
    assert torch.get_default_dtype() == torch.float32


def test_both_formats_hold_the_same_adapters(trained):
    _, run = trained
    ours, peft_s = adapters.read(run), run / weights.ADAPTERS / "adapter_model.safetensors"
    peft_s.unlink()
    theirs = adapters.read(run / weights.ADAPTERS)
    assert ours.matrices.keys() == theirs.matrices.keys() and (ours.scale, ours.base) == (theirs.scale, theirs.base)
    pairs = (pair for name in ours.matrices for pair in zip(ours.matrices[name], theirs.matrices[name], strict=True))
    assert all(torch.equal(*pair) for pair in pairs)


def test_peft_itself_loads_what_was_exported(trained, adapted, base):
    objective, run = trained
    refiner = load(Refiner(adapted), base)
    model = peft.PeftModel.from_pretrained(refiner.transformer, str(run / weights.ADAPTERS))  # type: ignore[arg-type]
    refiner.transformer = model.get_base_model()  # type: ignore[assignment]
    torch.testing.assert_close(velocity(refiner, adapted), velocity(objective.refiner, adapted))


def test_diffusers_loads_what_was_exported(trained, adapted, base):
    objective, run = trained
    network = diffusers_transformer(adapted)
    network.load_state_dict(load_file(base / "refiner" / "model.safetensors"), strict=False)
    network.load_lora_adapter(str(run / weights.ADAPTERS), weight_name="pytorch_lora_weights.safetensors")
    found = velocity(network, adapted, theirs=True)
    torch.testing.assert_close(found, velocity(objective.refiner, adapted), rtol=1e-4, atol=1e-4)


def test_a_pipeline_merges_the_adapters_beside_its_refiner(trained, adapted):
    objective, run = trained
    assert check_folder(adapted, run) == {"refiner": len(load(Refiner(adapted), run).state_dict())}
    refiner = WorldPipeline.from_pretrained("tiny", run, parts=["refiner"]).part("refiner")
    torch.testing.assert_close(velocity(refiner, adapted), velocity(objective.refiner, adapted))
    export_weights.main(["--init", str(run.parent), "--out", str(run.parent / "one"), "--dtype", "float32"])
    refiner = load(Refiner(adapted), run.parent / "one")
    torch.testing.assert_close(velocity(refiner, adapted), velocity(objective.refiner, adapted))


def test_training_goes_on_from_adapters(trained, adapted):
    objective, run = trained
    again = RefinerObjective(adapted, pairs=True)
    again.start({"refiner": run})
    assert torch.equal(velocity(again.refiner, adapted), velocity(objective.refiner, adapted))
    other = dataclasses.replace(adapted, refiner=dataclasses.replace(adapted.refiner, lora_rank=2))
    with pytest.raises(ValueError, match="adapters of rank 4 are not of the rank 2"):
        RefinerObjective(other, pairs=True).start({"refiner": run})


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-5), ("bfloat16", 5e-2)])
def test_merged_weights_are_base_and_adapters(dtype, most, trained, adapted, tmp_path, capsys):
    objective, run = trained
    out = tmp_path / "merged"
    command = ["--preset", "tiny", "--adapters", str(run.parent), "--out", str(out), "--dtype", dtype]
    merge_adapters.main([*command, "--dry-run"])
    assert not out.exists()
    merge_adapters.main(command)
    assert "10 layers merged" in capsys.readouterr().out
    made, expected = velocity(load(Refiner(adapted), out), adapted), velocity(objective.refiner, adapted)
    assert (made - expected).norm() < most * expected.norm()
    assert not torch.allclose(made, velocity(load(Refiner(adapted), run), adapted), atol=0.05)
    with pytest.raises(ValueError, match="has a refiner already"):
        merge_adapters.main(command)


def test_another_base_is_merged_into_only_where_that_is_asked_for(trained, adapted, tmp_path):
    _, run = trained
    torch.manual_seed(5)
    few, out = tmp_path / "few", tmp_path / "merged"
    weights.save_part(Refiner(adapted), few, "refiner", torch.float32)
    weights.save_config(adapted, few)
    command = ["--preset", "tiny", "--adapters", str(run), "--onto", str(few), "--out", str(out)]
    with pytest.raises(ValueError, match="trained on the base [0-9a-f]{16}, .* is [0-9a-f]{16}: give their own base"):
        merge_adapters.main(command)
    assert not out.exists()
    merge_adapters.main([*command, "--other-base", "--dtype", "float32"])
    name = "transformer_blocks.0.ff.net.2"
    down, up = adapters.read(run).matrices[name]
    made, there = (load_file(at / "refiner" / "model.safetensors")[f"{name}.weight"] for at in (out, few))
    torch.testing.assert_close(made, there + up @ down)
    weights.save_part(Refiner(adapted), run, "refiner", torch.float32)
    with pytest.raises(ValueError, match="trained on the base"):
        WorldPipeline.from_pretrained("tiny", run, parts=["refiner"])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (None, "holds no adapters"),
        ({"transformer.proj_in.lora_A.weight": (2, 16)}, "is no half of a LoRA's two matrices"),
        ({"transformer.proj_in.alpha": (1,)}, "is no half"),
        ({"transformer.proj_in.lora_A.weight": (2, 9), "transformer.proj_in.lora_B.weight": (48, 2)}, "shape \\(48, 9"),
        ({"transformer.other.lora_A.weight": (2, 9), "transformer.other.lora_B.weight": (48, 2)}, "refiner's is None"),
    ],
)
def test_what_is_no_adapter_of_this_refiner_is_named(tensors, message, base):
    if tensors:
        (base / weights.ADAPTERS).mkdir()
        made = {name: torch.zeros(shape) for name, shape in tensors.items()}
        save_file(made, base / weights.ADAPTERS / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match=message):
        merge_adapters.main(
            ["--preset", "tiny", "--adapters", str(base), "--other-base", "--out", str(base.parent / "out")]
        )
