"""What ZeRO has cut up for some number of workers, loaded by another: through DeepSpeed's universal checkpoint."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_TAG = "whole"


def written_by(checkpoint: Path, tag: str) -> int:
    """How many workers a checkpoint of ZeRO is of."""
    return len(list((checkpoint / tag).glob("*_optim_states.pt")))


def load(engine: Any, checkpoint: Path, tag: str, *, rank: int, barrier: Callable[[], None]) -> dict[str, Any]:
    """Load `checkpoint` into an engine of any number of workers; returns the client state. To be called by all workers,
    who call `barrier` together.

    Meanwhile a folder beside it holds every parameter's state in files of its own. RuntimeError where DeepSpeed cannot
    make it.
    """
    folder = checkpoint.with_suffix(".universal")
    if rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        _convert(checkpoint / tag, folder / _TAG)
    barrier()
    engine._config.load_universal_checkpoint = True  # the configuration's, for this once
    # Frozen parameters may have been left out, and are loaded below where they were not.
    _, state = engine.load_checkpoint(str(folder), tag=_TAG, load_module_strict=False)
    engine._config.load_universal_checkpoint = False
    _load_untrained(engine.module, checkpoint / tag)
    barrier()
    if rank == 0:
        shutil.rmtree(folder)
    return state


def _convert(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    # A process of its own: it forks, which this one must not with a GPU's context.
    module = "deepspeed.checkpoint.ds_to_universal"
    arguments = ["--input_folder", str(source), "--output_folder", str(target), "--inject_missing_state"]
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{module} could not convert {source}: {done.stderr.strip()[-2000:]}")


@torch.no_grad()
def _load_untrained(module: torch.nn.Module, source: Path) -> None:
    """What a universal checkpoint leaves out: buffers, and frozen parameters but ZeRO 3's."""
    first = min(source.glob("*_model_states.pt"))
    saved = torch.load(first, map_location="cpu", weights_only=False, mmap=True)["module"]
    untrained = dict(module.named_buffers()) | {n: p for n, p in module.named_parameters() if not p.requires_grad}
    for name, tensor in untrained.items():
        if name in saved and saved[name].shape == tensor.shape:
            tensor.copy_(saved[name])
