"""A clip on several processes equals the clip on one: velocity, loss and every parameter's gradient."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from longtake.jobs import check_parallel
from longtake.model import presets
from longtake.platform.parallel.compare import LIMIT, Layout, relative_errors
from longtake.platform.parallel.context import AttentionExchange, ContextParallel

CONFIG = dataclasses.replace(presets.get("tiny"), depth=4, hidden_size=96, num_heads=3)


@pytest.mark.cpu
@pytest.mark.parametrize(
    "layout",
    [Layout(2, 7), Layout(3, 5), Layout(4, 5), Layout(2, 7, "ring"), Layout(4, 5, "ring")],
    ids=lambda layout: layout.name,
)
def test_a_clip_cut_between_processes_gives_the_same_gradients(layout: Layout):
    assert max(relative_errors(CONFIG, layout).values()) < LIMIT


@pytest.mark.multigpu
@pytest.mark.parametrize("attention", ["heads", "ring"])
def test_a_clip_cut_between_gpus_gives_the_same_gradients(attention: AttentionExchange):
    torch.set_float32_matmul_precision("highest")
    assert max(relative_errors(CONFIG, Layout(2, 7, attention), "cuda").values()) < LIMIT


@pytest.mark.cpu
def test_a_clip_of_fewer_frames_than_ranks_is_refused(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="0 latent frames cannot be cut into 1 stretches"):
            ContextParallel(0)
    finally:
        dist.destroy_process_group()


@pytest.mark.cpu
def test_the_job_writes_the_errors_of_each_layout(monkeypatch):
    written: dict[str, float] = {}
    errors = {"velocity": 1e-7, "loss": 0.0, "gradient": 2e-6}
    monkeypatch.setattr(check_parallel, "relative_errors", lambda config, layout, device: errors)
    monkeypatch.setattr(check_parallel.measurements, "write", lambda name, figures: written.update(figures, name=name))
    check_parallel.main(["--layouts", "2x7", "--attention", "heads"])
    assert written == {"name": "context_parallel_cpu"} | {
        f"worst_{what}_error_cp2_frames7": error for what, error in errors.items()
    }
    errors["gradient"] = 2e-5
    with pytest.raises(ValueError, match="worst_gradient_error_cp2_frames7: more than 1e-05"):
        check_parallel.main(["--layouts", "2x7", "--attention", "heads", "--no-write"])


@pytest.mark.cpu
@pytest.mark.parametrize("layout", ["7", "2x", "4x3", "0x3"])
def test_a_layout_that_is_none_is_refused(layout: str):
    with pytest.raises(ValueError, match=f"--layouts {layout}: "):
        check_parallel.main(["--layouts", layout])


@pytest.mark.cpu
def test_a_dry_run_prints_the_configuration(capsys):
    check_parallel.main(["--dry-run", "--depth", "2"])
    assert json.loads(capsys.readouterr().out)["config"]["depth"] == 2
