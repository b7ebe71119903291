"""CUDA graphs: launches that a CPU issues once, and a GPU repeats."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from longtake.kernels.launch import gpu_alone

Made = TypeVar("Made")


class Turns:
    """What graphs share that are never replayed at once: memory, and the stream that they are captured on, to which
    cuBLAS gives its workspace. Graphs that share it must take turns: those of a workspace wait for counters in it.
    """

    def __init__(self) -> None:
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()


def captured(compute: Callable[[], Made], turns: Turns) -> tuple[torch.cuda.CUDAGraph, Made]:
    """A graph of what `compute` launches on this thread, and what it returns, whose memory each replay fills anew.

    It runs once before: that compiles kernels and chooses among them, which nothing may do in a capture.
    """
    stream, graph = turns.stream, torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        compute()
    torch.cuda.current_stream().wait_stream(stream)
    with gpu_alone, torch.cuda.graph(graph, pool=turns.pool, stream=stream, capture_error_mode="thread_local"):
        made = compute()
    return graph, made
