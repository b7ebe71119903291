"""What all tests share: the rule of one tier a test, one Ray cluster a run, one object store a process."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # every process that a test starts would compile all modules again
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded; platform/observe/ray_cluster.py says why

import numpy as np  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is loaded, whose own functions ask as well

from PIL import Image  # noqa: E402

from longtake.model.config import RefinerConfig, SamplerConfig, TextConfig, WorldModelConfig  # noqa: E402

_DEVICES_NEEDED = {"cpu": 0, "gpu": 1, "multigpu": 2}

torch.set_num_threads(2)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuse tests without exactly one tier, and modules on Ray that do not say so; leave out tests whose devices this
    machine lacks. Modules on Ray come first: they take the longest.
    """
    tiers = {item: [mark.name for mark in item.iter_markers() if mark.name in _DEVICES_NEEDED] for item in items}
    if wrong := [item.nodeid for item, names in tiers.items() if len(names) != 1]:
        raise pytest.UsageError("give each test exactly one of the markers cpu, gpu, multigpu:\n" + "\n".join(wrong))
    on_ray = {item.path for item in items if "ray_cluster" in getattr(item, "fixturenames", ())}
    if wrong := sorted(str(path) for path in on_ray if not _on_ray(path)):
        raise pytest.UsageError("give these modules pytestmark with pytest.mark.ray:\n" + "\n".join(wrong))
    present = torch.cuda.device_count()
    runnable = [item for item in items if _DEVICES_NEEDED[tiers[item][0]] <= present]
    if len(runnable) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in set(runnable)])
    items[:] = sorted(runnable, key=lambda item: not _on_ray(item.path))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Under pytest -n: a module stays in one process, and all on Ray in the same, for there is one cluster a run."""
    from xdist.scheduler import LoadFileScheduling

    class ByModule(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module = super()._split_scope(nodeid)
            return "on Ray" if _on_ray(config.rootpath / module) else module

    config.option.loadscopereorder = False  # the order of the tests
    return ByModule(config, log)


@functools.cache
def _on_ray(module: Path) -> bool:
    return "pytest.mark.ray" in module.read_text()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A test's random numbers are its own, whichever tests ran before it in the process."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def small_config() -> WorldModelConfig:
    """A world model small enough to build in every test: all parts."""
    return WorldModelConfig(
        name="small",
        depth=4,
        hidden_size=64,
        num_heads=2,
        head_dim=32,
        latent_channels=16,
        text_dim=32,
        mlp_ratio=1.0,
        image_size=(64, 96),
        sampler=SamplerConfig(num_steps=2, shift=3.0, guidance_scale=1.0),
        text=TextConfig(kind="bytes", length=12, dim=32, depth=1),
        refiner=RefinerConfig(num_layers=1, num_heads=2, head_dim=24, text_dim=32, lora_rank=0, sigmas=(0.5, 0.2, 0.0)),
        vae=dict(
            block_out_channels=(16, 32, 32, 32),
            layers_per_block=(0, 0, 0, 0, 1),
            decoder_block_out_channels=(16, 16, 32),
            decoder_layers_per_block=(1, 0, 0, 0),
            upsample_factor=(1, 1, 2),
            decoder_spatial_padding_mode="zeros",
        ),
    )


@pytest.fixture(scope="session")
def small_weights(small_config: WorldModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights that answer to --preset tiny and take one step in each stage, with two start images."""
    from longtake.model.pipeline import WorldPipeline

    config = dataclasses.replace(
        small_config,
        name="tiny",
        sampler=dataclasses.replace(small_config.sampler, num_steps=1),
        refiner=dataclasses.replace(small_config.refiner, sigmas=(0.5, 0.0)),
    )
    folder = tmp_path_factory.mktemp("small_weights")
    WorldPipeline.from_config(config).save_pretrained(folder)
    (folder / "images").mkdir()
    for name, seed in (("hall", 0), ("yard", 1)):
        pixels = np.random.default_rng(seed).integers(0, 256, (64, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{name}.png")
    (folder / "images" / "hall.txt").write_text("a hall <with> columns\n")
    (folder / "images" / "licence.txt").write_text("CC0-1.0\n")
    return folder


@pytest.fixture(scope="session")
def sana_video_of() -> Callable:
    """diffusers' SANA-Video, random, of a configuration's sizes and on its latents but for keyword arguments."""
    from diffusers import SanaVideoTransformer3DModel

    def build(config: WorldModelConfig, **changes: Any) -> SanaVideoTransformer3DModel:
        sizes: dict[str, Any] = dict(
            in_channels=config.latent_channels,
            out_channels=config.latent_channels,
            patch_size=(1, 1, 1),
            num_attention_heads=config.num_heads,
            attention_head_dim=config.head_dim,
            num_layers=config.depth,
            num_cross_attention_heads=config.num_heads,
            cross_attention_head_dim=config.head_dim,
            cross_attention_dim=config.hidden_size,
            caption_channels=config.text_dim,
            mlp_ratio=config.mlp_ratio,
        )
        return SanaVideoTransformer3DModel(**(sizes | changes))

    return build


@pytest.fixture(scope="session")
def few_words() -> Any:
    """A tokenizer that knows eight words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<unk>", "a", "hall", "of", "stone", "yard"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    named: dict[str, Any] = dict(pad_token="<pad>", bos_token="<bos>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


@pytest.fixture(scope="session")
def small_refiner_text(few_words: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Gemma-3 and LTX-2's connectors, random weights that know a few words and make 32 numbers of each."""
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    folder = tmp_path_factory.mktemp("refiner_text")
    torch.manual_seed(0)
    few_words.save_pretrained(folder / "tokenizer")
    text: dict[str, Any] = dict(
        vocab_size=8, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    vision: dict[str, Any] = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, image_size=28, patch_size=14
    )
    config = Gemma3Config(text_config=text, vision_config=vision)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder / "text_encoder")
    LTX2TextConnectors(
        caption_channels=32,
        text_proj_in_factor=3,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=16,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=8,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=16,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=8,
        rope_type="split",
    ).save_pretrained(folder / "connectors")
    return folder


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The endpoint of an S3 server on this machine, which the AWS_* variables point to meanwhile."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as environment:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
            environment.delenv(name, raising=False)
        environment.setenv("AWS_ENDPOINT_URL", endpoint)
        environment.setenv("AWS_ACCESS_KEY_ID", "test")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "test")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield endpoint
    server.stop()


@pytest.fixture(scope="session")
def ray_cluster(s3_server: str) -> Iterator[str]:
    """The address of the run's one Ray cluster, of 8 logical CPUs; jobs in child processes join it by RAY_ADDRESS.

    It starts after the object store, so that its workers inherit the AWS_* variables.
    """
    import ray

    from longtake.platform.observe import ray_cluster

    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("RAY_ADDRESS", raising=False)
        # How often Ray Train looks at its workers: else every run of a test waits for seconds at its end.
        environment.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        environment.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a process more, of no use here
        ray_cluster.connect(num_cpus=8)
        address = ray.get_runtime_context().gcs_address
        environment.setenv("RAY_ADDRESS", address)
        yield address
    ray.shutdown()
