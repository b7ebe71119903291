"""How long work takes on a device, and what the device can do at best, measured in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def milliseconds(work: Callable[[], Any], device: torch.device, least_seconds: float = 0.5) -> float:
    """Median time of one call, after one that warms up; at least three samples, and as many as fill `least_seconds`.

    A sample is as many calls in a row as take some 20 ms, so that a device has the next before it waits for it.
    """
    work()
    first = _sample(work, 1, device)
    calls = max(1, round(20 / max(first, 0.02)))
    times = [first] if calls == 1 else []
    while len(times) < 3 or sum(times) * calls < 1e3 * least_seconds:
        times.append(_sample(work, calls, device))
    return statistics.median(times)


def _sample(work: Callable[[], Any], calls: int, device: torch.device) -> float:
    begin = now(device)
    for _ in range(calls):
        work()
    return 1e3 * (now(device) - begin) / calls


def rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """TFLOP/s of a large product of square matrices and GB/s, read and written, of a copy that no cache holds."""
    size, elements = (8192, 1 << 28) if device.type == "cuda" else (1024, 1 << 24)
    a = torch.randn(size, size, device=device, dtype=dtype)
    source = torch.empty(elements, device=device, dtype=torch.float32)
    copy = torch.empty_like(source)
    return {
        "matmul_tflops": 2 * size**3 / milliseconds(lambda: a @ a, device) / 1e9,
        "copy_gb_per_s": 2 * 4 * elements / milliseconds(lambda: copy.copy_(source), device) / 1e6,
    }


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
