"""CUDA graphs: launches that a CPU issues once, and a GPU repeats."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Made = TypeVar("Made")
_one_at_a_time = threading.Lock()  # to begin a capture waits for the whole device, which another capture does not allow


def captured(compute: Callable[[], Made], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Made]:
    """A graph of what `compute` launches on this thread, and what it returns, whose memory each replay fills anew.
    pool: of memory that several graphs take turns in.

    It runs once before: that compiles kernels and chooses among them, which nothing may do in a capture.
    """
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with _one_at_a_time:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            compute()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            made = compute()
    return graph, made
