"""CUDA graphs: launches that a CPU issues once, and a GPU repeats."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from longtake.kernels.launch import gpu_alone

Made = TypeVar("Made")


def captured(compute: Callable[[], Made], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Made]:
    """A graph of what `compute` launches on this thread, and what it returns, whose memory each replay fills anew.
    pool: of memory that several graphs take turns in.

    It runs once before: that compiles kernels and chooses among them, which nothing may do in a capture.
    """
    stream, graph = _stream(torch.cuda.current_device()), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        compute()
    torch.cuda.current_stream().wait_stream(stream)
    with gpu_alone, torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        made = compute()
    return graph, made


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
