"""Rotary positions over time, rows and columns (SANA-WM section 1.5)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class RotaryTable:
    """Cosines and sines by latent position, Wan's three-axis split; kept float32, whatever the model's dtype.

    Of D / 2 channel pairs, D // 6 belong to rows, as many to columns, the rest to time. The camera branch turns half a
    head and takes the first entries of each axis' table.
    """

    def __init__(self, head_dim: int, max_positions: int, theta: float = 10000.0):
        self.head_dim, self.max_positions = head_dim, max_positions
        self._of_time = _frequency(2 * _split(head_dim)[0], theta)
        # The frequencies of an axis depend on its own width: (time, rows, columns).
        self._tables = [_table(2 * count, max_positions, theta) for count in _split(head_dim)]
        self._made: dict[tuple, tuple[Tensor, Tensor]] = {}
        self._turns: dict[tuple, tuple[Tensor, Tensor]] = {}

    def __call__(
        self, grid: tuple[int, ...], device: torch.device, first: int = 0, clip: int = 0
    ) -> tuple[Tensor, Tensor]:
        """For a (T, height, width) grid whose first frame has position `first`: (N, D / 2, 2) for the main branch and
        (N, D / 4, 2) for the camera branch. ValueError when the grid, or the `clip`'s frames, are more than there are.
        """
        if max(clip, first + grid[0], *grid[1:]) > self.max_positions:
            at = f" from frame {first}" if first else ""
            raise ValueError(
                f"a latent grid of {tuple(grid)}{at} exceeds the {self.max_positions} positions of this model"
            )
        key = (first, *grid, str(device))
        if key not in self._made:
            if len(self._made) > 8:
                self._made.clear()
            whole = self._on_grid(grid, _split(self.head_dim), first)
            half = self._on_grid(grid, _split(self.head_dim // 2), first)
            self._made[key] = whole.to(device), half.to(device)
        return self._made[key]

    def turn(self, frames: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """By so many frames, and no rows or columns: (D / 2, 2) and (D / 4, 2) for the two branches."""
        key = (frames, str(device))
        if key not in self._turns:
            if len(self._turns) > 64:
                self._turns.clear()
            whole, half = (self._turned(frames, _split(dim)).to(device) for dim in (self.head_dim, self.head_dim // 2))
            self._turns[key] = whole, half
        return self._turns[key]

    def _turned(self, frames: int, counts: tuple[int, int, int]) -> Tensor:
        angle = F.pad(frames * self._of_time[: counts[0]].double(), (0, counts[1] + counts[2]))
        return torch.stack([angle.cos(), angle.sin()], dim=-1).float()

    def _on_grid(self, grid: tuple[int, ...], counts: tuple[int, int, int], first: int) -> Tensor:
        parts, starts = [], (first, 0, 0)
        for axis, (table, count) in enumerate(zip(self._tables, counts, strict=True)):
            shape = [1, 1, 1, count, 2]
            shape[axis] = grid[axis]
            parts.append(table[starts[axis] :][: grid[axis], :count].view(shape).expand(*grid, count, 2))
        return torch.cat(parts, dim=3).flatten(0, 2)


def _split(dim: int) -> tuple[int, int, int]:
    """Channel pairs for time, rows, columns."""
    spatial = dim // 6
    return dim // 2 - 2 * spatial, spatial, spatial


def _frequency(dim: int, theta: float) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32)[: dim // 2] / dim)


def _table(dim: int, positions: int, theta: float) -> Tensor:
    angle = torch.outer(torch.arange(positions, dtype=torch.float32), _frequency(dim, theta))
    return torch.stack([angle.cos(), angle.sin()], dim=-1)
