"""Time a live session through HTTP beside the same parts without a server, with random weights.

A session's actions are all told at its beginning, so it waits for nobody; it is measured once the windows of both
stages are full, after another that was alike. Without a server each stage runs alone. On two GPUs the refiner has one,
and stage 1 and the decoder share the other: nothing can be faster than the slower of both. On one GPU, or none, nothing
can be faster than their sum. Figures go to docs/measurements/serve_DEVICE.
"""

from __future__ import annotations

import argparse
import base64
import gc
import json
import time
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from websockets.sync.client import connect

from longtake.model import presets
from longtake.model.config import WorldModelConfig
from longtake.model.parts import parts_of
from longtake.model.random_weights import random_pipeline
from longtake.model.refiner.refiner import SINK
from longtake.platform.engine import Engine
from longtake.platform.observe import measurements
from longtake.platform.observe.job import run_job
from longtake.platform.observe.served import Server, picture
from longtake.platform.observe.timing import now

_UNTIL_STEADY = 8  # chunks, until all windows are full
_PATIENCE = 600.0  # seconds, for what compiles
_ONE_CARD = ("stage1.num_gpus=0.3", "refiner.num_gpus=0.5", "decoder.num_gpus=0.1", "text.num_gpus=0.1")
_TWO_CARDS = ("stage1.num_gpus=0.5", "refiner.num_gpus=1", "decoder.num_gpus=0.25", "text.num_gpus=0.25")


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    if args.chunks <= _UNTIL_STEADY:
        raise ValueError(f"--chunks must be more than {_UNTIL_STEADY}, which fill the windows")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here, choose --device cpu")
    if args.name:
        measurements.check_name(args.name)
    config = presets.get(args.preset)
    if not config.chunk_causal:
        raise ValueError(
            f"--preset {args.preset} makes no endless video: choose another, such as {args.preset}-streaming"
        )
    cards = min(2, torch.cuda.device_count()) if args.device == "cuda" else 0
    refines = config.refiner.block_size is not None
    settings = ["random_weights=true", f"look_ahead={args.chunks}", "max_running=1", "max_sessions=1"]
    settings += [f"{stage}.{most}" for stage in ("stage1", "refiner", "decoder") for most in ("together=2", "most=1")]
    settings += ((), _ONE_CARD, _TWO_CARDS)[cards]
    if args.dry_run:
        print(json.dumps(vars(args) | {"settings": settings}, indent=2))
        return
    step, refiner = measure_alone(config, torch.device(args.device), args.chunks)
    figures = {"bare_chunk_s": step} | ({"bare_refiner_chunk_s": refiner} if refines else {})
    with TemporaryDirectory() as store:
        words = ["--store", store, *(word for setting in settings for word in ("--set", setting))]
        with Server(["--preset", args.preset, *words]) as server:
            for refine in (False, True)[: 1 + refines]:
                session(server.url, args.chunks, refine)
                first, chunk = session(server.url, args.chunks, refine)
                least = max(step, refiner) if cards == 2 else step + refiner
                name = "" if refine else "unrefined_"
                figures |= {
                    f"{name}first_frame_s": first,
                    f"{name}fps": config.frames_per_chunk / chunk,
                    f"{name}overhead": chunk / (least if refine else step) - 1,
                }
    for name, figure in figures.items():
        print(f"{name:32} {figure:.4g}")
    if args.write:
        print(f"figures: {measurements.write(args.name or f'serve_{args.device}', figures)}")


def measure_alone(config: WorldModelConfig, device: torch.device, chunks: int) -> tuple[float, float]:
    """Seconds a chunk, in this process: of stage 1 with the decoder, and of the refiner or 0."""
    found = []
    for measure in (_stage1, _refiner)[: 1 + (config.refiner.block_size is not None)]:
        found.append(measure(config, device, chunks))
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found[0], sum(found[1:])


def _stage1(config: WorldModelConfig, device: torch.device, chunks: int) -> float:
    engine = Engine(random_pipeline(config, ("text", "vae", "dit"), device), most_together=1)
    session = engine.open(np.zeros((*config.image_size, 3), np.uint8))
    seconds = _steady(lambda: engine.step(session, f"w-{config.frames_per_chunk}"), device, chunks)
    engine.close()
    return seconds


def _refiner(config: WorldModelConfig, device: torch.device, chunks: int) -> float:
    pipeline = random_pipeline(config, [part for part in parts_of(config) if part not in ("vae", "dit")], device)
    stream = pipeline.refining(*pipeline.encode_refiner_text([""]), seeds=[0])

    def latents(frames: int) -> Tensor:
        return torch.randn(1, config.latent_channels, frames, *config.latent_size, device=device)

    list(stream.take(latents(SINK)))
    return _steady(lambda: list(stream.take(latents(config.refiner.block_size or 1))), device, chunks)


def _steady(work: Callable[[], Any], device: torch.device, chunks: int) -> float:
    begin = 0.0
    for number in range(chunks):
        if number == _UNTIL_STEADY:
            begin = now(device)
        work()
    return (now(device) - begin) / (chunks - _UNTIL_STEADY)


def session(url: str, chunks: int, refine: bool, key: str | None = None) -> tuple[float, float]:
    """Seconds from its beginning to its first frame, and a chunk once it is steady. RuntimeError for one that ends
    early.
    """
    image = base64.b64encode(picture()).decode()
    start = {"type": "start", "image": image, "refine": refine, "wait": True, "key": key}
    arrived: dict[int, float] = {}  # when a chunk's last frames did
    with connect(url.replace("http", "ws", 1) + "/v1/sessions", max_size=None) as socket:

        def hear() -> dict[str, Any]:
            said = json.loads(socket.recv(_PATIENCE))
            if said["type"] == "error" or said["type"] == "closed" and there < frames * chunks:
                raise RuntimeError(f"the session ended in chunk {len(arrived)}: {said}")
            return said

        first, frames, there = 0.0, 1, 0
        begin = time.perf_counter()
        socket.send(json.dumps(start))
        frames = hear()["chunk"]
        for _ in range(chunks):
            socket.send(json.dumps({"type": "actions", "actions": f"w-{frames}"}))
        while there < 1 + chunks * frames:
            if (said := hear())["type"] == "frames":
                socket.recv(_PATIENCE)
                arrived[said["chunk"]] = time.perf_counter() - begin
                first = first or arrived[said["chunk"]]
                there = said["first"] + said["frames"]
        socket.send(json.dumps({"type": "end"}))
        while hear()["type"] != "closed":
            pass
    return first, (arrived[chunks - 1] - arrived[_UNTIL_STEADY - 1]) / (chunks - _UNTIL_STEADY)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench-serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", default="sana-wm-streaming", help="of a model that streams (default: %(default)s)")
    add("--chunks", type=int, default=32, help="of a session (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    add("--name", help="of the file in docs/measurements (default: serve_DEVICE)")
    add("--no-write", dest="write", action="store_false", help="do not write docs/measurements")
    add("--dry-run", action="store_true", help="print the resolved arguments")
    return parser


if __name__ == "__main__":
    run_job(main)
