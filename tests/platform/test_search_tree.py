"""Trees of candidates: what shares a beginning is what it is alone, and is made once."""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from longtake.jobs import search_refine
from longtake.model.camera import Steering, parse_actions, split_actions
from longtake.model.config import SamplerConfig, WorldModelConfig
from longtake.model.pipeline import WorldPipeline
from longtake.platform.observe import measurements
from longtake.platform.search.actors import Generator, ModelSpec
from longtake.platform.search.plan import Candidate, StartImage, make_plan, make_tree, subtrees
from longtake.platform.search.pool import Shares
from longtake.platform.search.tree import Tree

pytestmark = [pytest.mark.cpu, pytest.mark.ray]

BRANCHES = ("w-24", "aw-24", "d-10,w-38")
SPLIT = ["--actions", "w-24", "--actions", "dw-24"]
RUNS = int(os.environ.get("LONGTAKE_TEST_KILLED_RUNS", "1"))  # each of which two kills end
# A driver that, as it is about to put a file in its place, kills its actors, and later them and itself.
KILL = """
import contextlib, os, signal, sys
import psutil, ray
from longtake.jobs import search_refine
moments, writes, replace = [int(word) for word in sys.argv[1:3]], 0, os.replace
def kill_actors():
    session = ray._private.worker._global_node.get_session_dir_path()
    found = psutil.process_iter(["cmdline"])
    raylets = [process for process in found if "raylet/raylet" in str(process.info["cmdline"])]
    for raylet in raylets:
        for process in raylet.children() if session in str(raylet.info["cmdline"]) else ():
            with contextlib.suppress(psutil.NoSuchProcess):  # it may end meanwhile
                if process.name().startswith(("ray::Generat", "ray::RefineW")):
                    process.kill()
def counted(source, target):
    global writes
    writes += 1
    if writes in moments:
        kill_actors()
    if writes == moments[1]:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = counted
search_refine.main(sys.argv[3:])
"""


@pytest.fixture(scope="module")
def streaming(small_config: WorldModelConfig) -> WorldModelConfig:
    sampler = SamplerConfig(2, 4.0, 1.0, timesteps=(1000, 800, 0), chunk_interval=1, fresh_noise=True)
    refiner = dataclasses.replace(small_config.refiner, sigmas=(0.5, 0.0))
    return dataclasses.replace(
        small_config,
        name="tiny-streaming",
        softmax_dtype="float32",
        chunk_causal=True,
        chunk_window=1,
        sampler=sampler,
        refiner=refiner,
    )


@pytest.fixture(scope="module")
def pipeline(streaming: WorldModelConfig) -> WorldPipeline:
    made = WorldPipeline.from_config(streaming)
    for parameter in made.modules["dit"].parameters():  # what starts at zero would hide its inputs
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return made


@pytest.fixture(scope="module")
def weights(pipeline: WorldPipeline, small_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streaming_weights")
    pipeline.save_pretrained(folder)
    (folder / "images").mkdir()
    (folder / "images" / "hall.png").write_bytes((small_weights / "images" / "hall.png").read_bytes())
    return folder


def leaves_of(config: WorldModelConfig, depth: int = 2, branches: tuple[str, ...] = BRANCHES) -> list[Candidate]:
    pixels = np.random.default_rng(0).integers(0, 256, (*config.image_size, 3), dtype=np.uint8)
    walk = partial(parse_actions, fps=config.fps, image_size=config.image_size)
    return make_tree([StartImage("hall", pixels, "a hall")], branches, depth, walk, [3], "model")


def test_a_leaf_keeps_the_key_that_it_has_alone(streaming):
    leaves = leaves_of(streaming)
    walks = {
        leaf.trajectory_name: parse_actions(",".join(leaf.branches), fps=16, image_size=(64, 96)) for leaf in leaves
    }
    alone = make_plan([leaves[0].image], walks, [3], "model")
    assert [leaf.key for leaf in leaves] == [candidate.key for candidate in alone]
    assert [leaf.branches for leaf in leaves] == list(itertools.product(BRANCHES, repeat=2))


@pytest.mark.parametrize("batch_size", [1, 3, 9])
def test_a_leaf_is_what_it_is_alone_and_prefixes_are_made_once(streaming, pipeline, batch_size):
    leaves = leaves_of(streaming)
    tree = Tree(pipeline, Steering(fps=streaming.fps), fov_deg=75)
    found = {}
    for batch in itertools.chain(*subtrees(leaves, batch_size)):
        found |= dict(zip((leaf.key for leaf in batch), tree.leaves(batch), strict=True))
    assert tree.num_segments == 3 + 9
    for leaf in leaves:
        true = pipeline.generate([leaf.image.pixels], [leaf.image.caption], [leaf.trajectory], [leaf.seed])
        torch.testing.assert_close(found[leaf.key].latents, true, rtol=1e-5, atol=1e-5)
        frames = np.concatenate(found[leaf.key].frames).astype(int)
        assert frames.shape[0] == leaf.trajectory.num_frames and abs(frames - pipeline.decode(true)).max() <= 1


def test_a_leaf_made_again_alone_is_the_same_to_the_bit(streaming, pipeline):
    leaves = leaves_of(streaming)
    steering = Steering(fps=streaming.fps)
    for batch_size in (1, 3):
        batches = list(itertools.chain(*subtrees(leaves, batch_size)))
        tree = Tree(pipeline, steering, 75)
        whole = [tree.leaves(batch) for batch in batches][-1]
        again = Tree(pipeline, steering, 75).leaves(batches[-1])
        for one, other in zip(whole, again, strict=True):
            assert torch.equal(one.latents, other.latents)
            assert all(map(np.array_equal, one.frames, other.frames))


@pytest.mark.parametrize(("depth", "batch_size", "sizes"), [
    (1, 2, [[2, 1]]),
    (2, 1, [[1, 1, 1]] * 3),
    (3, 2, [[2, 1, 2, 1, 2, 1]] * 3),
    (3, 8, [[3, 3, 3]] * 3),
    (3, 9, [[9]] * 3),
])  # fmt: skip
def test_a_tree_is_cut_into_subtrees_of_batches_behind_one_node(streaming, depth, batch_size, sizes):
    found = subtrees(leaves_of(streaming, depth), batch_size)
    assert [[len(batch) for batch in batches] for batches in found] == sizes
    if depth > 1:
        assert all(len({leaf.branches[0] for batch in batches for leaf in batch}) == 1 for batches in found)


def test_an_actor_keeps_to_its_subtree_and_takes_half_of_anothers_when_it_has_none(streaming):
    leaves = leaves_of(streaming, depth=3, branches=("w-24", "d-24"))
    shares = Shares(subtrees(leaves, 1))
    assert [shares.next("a"), shares.next("b"), shares.next("a")] == [[leaves[0]], [leaves[4]], [leaves[1]]]
    rest = [shares.next("b") for _ in range(4)]
    assert rest == [[leaves[5]], [leaves[6]], [leaves[7]], [leaves[3]]] and len(shares) == 1
    assert [shares.next("b"), shares.next("a"), shares.next("c")] == [[leaves[2]], None, None]


def test_actions_are_cut_into_chunks_of_the_same_keys():
    assert split_actions("w-30, dw-18", 24) == ["w-24", "w-6,dw-18"]
    with pytest.raises(ValueError, match="last 25 frames: give a multiple of 24, such as 24"):
        split_actions("w-25", 24)


@pytest.mark.timeout(900)
def test_a_search_of_a_tree_lists_every_path_and_several_generators_share_it(ray_cluster, weights, tmp_path):
    command = ["--preset", "tiny-streaming", "--weights", str(weights), *SPLIT, "--tree", "2", "--long", "0"]
    tables = []
    for generators in ("1", "2"):
        out = tmp_path / generators
        search_refine.main([*command, "--generators", generators, "--out", str(out)])
        tables.append(pq.read_table(out / "results.parquet"))
    rows = tables[0].to_pylist()
    assert {row["trajectory"] for row in rows} == {f"{a},{b}" for a in SPLIT[1::2] for b in SPLIT[1::2]}
    assert tables[0].equals(tables[1])


def made(out: Path) -> dict[str, bytes]:
    """All that holds no times."""
    names = ("results.parquet", "selection.json", "index.html")
    kept = [*(out / name for name in names), *out.glob("dataset/*"), *out.glob("refined/*.mp4")]
    return {str(path.relative_to(out)): path.read_bytes() for path in kept}


@pytest.mark.timeout(900 * RUNS)  # three searches at least, each with a cluster or a process of its own
def test_killed_at_random_moments_a_tree_ends_the_same_to_the_byte(ray_cluster, weights, root, tmp_path):
    depth, chosen = (2, 2) if RUNS == 1 else (3, 4)
    command = ["--preset", "tiny-streaming", "--weights", str(weights), *SPLIT, "--tree", str(depth), "--long", "0"]
    command += ["--dataset", "webdataset", "--top-k", str(chosen), "--score", "follow=1", "--score", "novelty=1"]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    dice = random.Random(0)
    killed = [*command, "--generators", "2", "--out", str(tmp_path / "killed")]
    for _ in range(RUNS):
        # Two files a leaf and four for each that is refined are written; what is there is not written again.
        moments = sorted(dice.sample(range(1, 8), 2))
        arguments = [sys.executable, "-c", KILL, *map(str, moments), *killed]
        child = subprocess.run(arguments, env=environment, capture_output=True, text=True)
        assert child.returncode == -signal.SIGKILL, child.stderr
    search_refine.main(killed)
    search_refine.main([*command, "--out", str(tmp_path / "calm")])
    assert made(tmp_path / "killed") == made(tmp_path / "calm")
    assert len(list((tmp_path / "killed" / "records").iterdir())) == 2**depth
    assert len(list((tmp_path / "killed" / "clips").glob("*.parquet"))) == chosen


def test_a_generator_makes_of_a_leaf_the_latents_of_a_generator_without_trees(streaming, weights):
    leaf = leaves_of(streaming)[5]
    generator = Generator(ModelSpec("tiny-streaming", str(weights), steering=Steering(fps=streaming.fps)))
    (made,) = generator.make([leaf], [None])
    (alone,) = generator.make([dataclasses.replace(leaf, branches=())], [None])
    np.testing.assert_allclose(made.latents, alone.latents, rtol=2e-3, atol=2e-3)  # float16
    assert made.scores.keys() == alone.scores.keys()  # of videos that are noise they may differ


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--actions", "w-25"], "a multiple of 8"),
        (["--actions", "w-32"], "last 32 frames: give a multiple of 24, such as 24"),
        (["--actions", "w-24", "--actions", "w-24,w-24"], "two candidates are the same"),
        ([], "--tree needs its branches"),
        (["--actions", "w-24", "--num-steps", "2"], "leave out"),
        (["--actions", "w-24", "--preset", "tiny", "--weights", "WHOLE"], "see the whole clip at once"),
    ],
)
def test_a_tree_that_cannot_be_is_refused_before_weights_are_loaded(weights, small_weights, arguments, says):
    given = [str(small_weights) if argument == "WHOLE" else argument for argument in arguments]
    command = ["--preset", "tiny-streaming", "--weights", str(weights), "--tree", "2", *given]
    with pytest.raises(ValueError, match=says):
        search_refine.main([*command, "--dry-run"])


def test_a_tree_is_timed_beside_its_leaves_alone(weights, monkeypatch, capsys):
    written = {}
    monkeypatch.setattr(measurements, "write", lambda name, figures: written.update({name: figures}))
    command = ["--preset", "tiny-streaming", "--weights", str(weights), *SPLIT, "--tree", "2"]
    search_refine.main([*command, "--measure-tree"])
    figures = written["search_tree"]
    assert (figures["candidates"], figures["segments_tree"], figures["segments_alone"]) == (4, 6, 8)
    assert figures["time_ratio"] == figures["seconds_alone"] / figures["seconds_tree"]
