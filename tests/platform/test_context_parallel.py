"""A clip on several processes equals the clip on one: velocity, loss and every parameter's gradient."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from longtake.jobs import check_parallel
from longtake.model import presets
from longtake.model.config import WorldModelConfig
from longtake.platform.parallel.compare import LIMIT, Comparison, Layout, compare, compare_all
from longtake.platform.parallel.context import AttentionExchange, ContextParallel
from longtake.platform.parallel.traffic import Traffic, sent_in_a_block

CONFIG = dataclasses.replace(presets.get("tiny"), depth=4, hidden_size=96, num_heads=3)


WHOLE = [
    (CONFIG, layout)
    for layout in (
        Layout(2, 7),
        Layout(3, 5),
        Layout(4, 5),
        Layout(2, 7, "ring"),
        Layout(4, 5, "ring"),
        Layout(2, 7, real=(3, 6)),  # a rank with nothing but padding of the first clip
        Layout(3, 5, real=(5, 1)),
    )
]
# Of three ranks the last two hold a frame each, and convolutions reach past their neighbours.
CAUSAL = [
    (dataclasses.replace(CONFIG, chunk_causal=True, chunk_window=window, chunk_size=4 - layout.ranks), layout)
    for window in (None, 1)
    for layout in (Layout(2, 8), Layout(3, 5))
]


@pytest.fixture(scope="module")
def found() -> Callable[[tuple[WorldModelConfig, Layout]], Comparison]:
    """What one of the cases above came to. They are computed together."""
    cases = [*WHOLE, *CAUSAL]
    compared = compare_all(cases)
    return lambda case: compared[cases.index(case)]


def name(case: tuple[WorldModelConfig, Layout]) -> str:
    config, layout = case
    return f"{layout.name}-{config.chunk_window}" if config.chunk_causal else layout.name


@pytest.mark.cpu
@pytest.mark.parametrize("case", WHOLE, ids=name)
def test_a_clip_cut_between_processes_gives_the_same_gradients(case, found):
    layout, found = case[1], found(case)
    assert max(found.errors.values()) < LIMIT
    assert all(sent.counted == sent.expected for sent in found.traffic)
    assert {(sent.rank, sent.kind, sent.what) for sent in found.traffic} == {
        (rank, *sent)
        for rank in range(layout.ranks)
        for sent in (("gdn", "states"), ("gdn", "halo"), ("softmax", "halo"), ("softmax", "attention"))
    }


@pytest.mark.cpu
@pytest.mark.parametrize("case", CAUSAL, ids=name)
def test_chunks_on_several_processes_give_the_same_gradients(case, found):
    layout, found = case[1], found(case)
    assert max(found.errors.values()) < LIMIT
    assert all(sent.counted == sent.expected for sent in found.traffic)
    states = {sent.rank: sent.counted for sent in found.traffic if sent.what == "states"}
    assert states[layout.ranks - 1] == 0 < states[0]  # nobody asks for the future


@pytest.mark.multigpu
@pytest.mark.parametrize("attention", ["heads", "ring"])
def test_a_clip_cut_between_gpus_gives_the_same_gradients(attention: AttentionExchange):
    torch.set_float32_matmul_precision("highest")
    assert max(compare(CONFIG, Layout(2, 7, attention), "cuda").errors.values()) < LIMIT


@pytest.mark.cpu
def test_what_cannot_be_shared_is_refused(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="0 latent frames cannot be cut into 1 stretches"):
            ContextParallel(0)
        qkv = [torch.zeros(1, 4, 1, 8)] * 3
        with pytest.raises(ValueError, match="reads padding as if it were real: exchange heads"):
            ContextParallel(2, attention="ring").attend(*qkv, scale=1, dtype=torch.float32, real=torch.tensor([2]))
    finally:
        dist.destroy_process_group()


@pytest.mark.cpu
def test_the_job_writes_errors_and_bytes_of_each_layout(monkeypatch):
    written: dict[str, float] = {}
    errors = {"velocity": 1e-7, "loss": 0.0, "gradient": 2e-6}
    traffic = [Traffic("gdn", "halo", 0, 10, 10), Traffic("gdn", "halo", 1, 12, 12)]
    monkeypatch.setattr(check_parallel, "compare", lambda config, layout, device: Comparison(errors, traffic))
    monkeypatch.setattr(check_parallel.measurements, "write", lambda name, figures: written.update(figures, name=name))
    command = ["--layouts", "2x7", "--attention", "heads"]
    check_parallel.main(command)
    assert written == {"name": "context_parallel_cpu", "most_gdn_halo_bytes_cp2_frames7": 12} | {
        f"worst_{what}_error_cp2_frames7": error for what, error in errors.items()
    }
    traffic.append(Traffic("gdn", "states", 0, 5, 4))
    with pytest.raises(ValueError, match="cp2_frames7: sends other bytes than"):
        check_parallel.main(command)
    errors["gradient"] = 2e-5
    with pytest.raises(ValueError, match="worst_gradient_error_cp2_frames7: more than 1e-05"):
        check_parallel.main(command)


@pytest.mark.cpu
def test_bytes_by_the_maths_equal_those_counted_by_hand():
    config = dataclasses.replace(CONFIG, head_dim=8, num_heads=3, hidden_size=24)
    # Two clips, 4 bytes a number. To two ranks, 3 heads: a map of 8 x 8 and 8 x 8 a branch, one of 8 x 8 and 1 x 8.
    # Halo, frames of 5 x 24 numbers: keys within 3 frames of the next rank, 3 a branch, and of the last, 2 a branch;
    # within 1 frame of the next rank, 1 for the feed-forward.
    assert sent_in_a_block(config, [4, 1, 2], [1, 1, 1], 0, 2, 5, softmax=False) == {
        "states": 2 * 2 * 4 * 3 * (2 * 128 + 72),
        "halo": 2 * 4 * 24 * 5 * (2 * (3 + 2) + 1),
    }
    assert sent_in_a_block(config, [4, 1, 2], [2, 1, 0], 0, 2, 5, softmax=True) == {
        "halo": 2 * 4 * 24 * 5,
        "attention": 2 * 4 * 2 * 8 * 5 * (3 * 4 * 1 + 3 * 2),  # one head of its own q, k and v; two of others' results
    }
    # Of a chunk-causal clip, what lies before frames of other ranks.
    causal = dataclasses.replace(config, chunk_causal=True)
    assert sent_in_a_block(causal, [4, 1, 2], [1, 1, 1], 0, 2, 5, softmax=False) == {
        "states": 2 * 2 * 4 * 3 * (2 * 128 + 72),
        "halo": 2 * 4 * 24 * 5 * (2 * (3 + 2) + 1),
    }
    assert sent_in_a_block(causal, [4, 1, 2], [1, 1, 1], 1, 2, 5, softmax=False) == {
        "states": 2 * 1 * 4 * 3 * (2 * 128 + 72),
        "halo": 2 * 4 * 24 * 5 * (2 * 1 + 1),  # not to the rank before
    }
    ring = sent_in_a_block(config, [4, 1, 2], None, 0, 2, 5, softmax=True)
    assert ring["attention"] == 2 * 4 * 2 * 24 * 5 * 2 * (4 + 2)  # its own keys and values, then those of the last rank


@pytest.mark.cpu
@pytest.mark.parametrize("layout", ["7", "2x", "4x3", "0x3"])
def test_a_layout_that_is_none_is_refused(layout: str):
    with pytest.raises(ValueError, match=f"--layouts {layout}: "):
        check_parallel.main(["--layouts", layout])


@pytest.mark.cpu
def test_chunk_causal_layouts_are_checked_before_a_process_starts():
    streaming = ["--preset", "sana-wm-streaming", "--layouts", "4x9"]
    with pytest.raises(ValueError, match="4x9: a rank needs a chunk of preset 'sana-wm-streaming', so at most 3"):
        check_parallel.main(streaming)
    with pytest.raises(ValueError, match="exchange heads"):
        check_parallel.main([*streaming, "--attention", "ring"])


@pytest.mark.cpu
def test_a_dry_run_prints_the_configuration(capsys):
    check_parallel.main(["--dry-run", "--depth", "2"])
    assert json.loads(capsys.readouterr().out)["config"]["depth"] == 2
