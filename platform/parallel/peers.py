"""The ranks that share a clip, and what passes between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn


class Peers:
    """This rank and the others of `group`, in order of time.

    sent: bytes that this rank gave to others, by what they were for.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.rank, self.count = group, dist.get_rank(group), dist.get_world_size(group)
        self.sent: Counter[str] = Counter()

    def start(self, what: str, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor]) -> list[dist.Work]:
        """Begin to send to and receive from other ranks, into the tensors given; wait for what is returned, and keep
        the tensors until then. Every rank calls it in the same order; empty tensors are not sent.
        """
        self.sent[what] += sum(tensor.nbytes for tensor in sends.values())
        transfers = [
            dist.P2POp(operation, tensor, group=self.group, group_peer=peer)
            for operation, tensors in ((dist.isend, sends), (dist.irecv, receives))
            for peer, tensor in tensors.items()
            if tensor.numel()
        ]
        return dist.batch_isend_irecv(transfers) if transfers else []

    def swap(self, what: str, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
        """Give parts[r] to rank r, and get from it a tensor of shapes[r]; one's own part is copied."""
        received = [parts[0].new_empty(shape) for shape in shapes]
        received[self.rank] = parts[self.rank].clone()
        others = [peer for peer in range(self.count) if peer != self.rank]
        sends = {peer: parts[peer].contiguous() for peer in others}
        for work in self.start(what, sends, {peer: received[peer] for peer in others}):
            work.wait()
        return tuple(received)

    def noting(self, blocks: Sequence[nn.Module]) -> list[dict[str, int]]:
        """A list that will hold what each of the blocks sent in its first forward pass, `sent` anew for each."""
        found: list[dict[str, int]] = []

        def note(*_: Any) -> None:
            found.append(dict(self.sent))
            self.sent.clear()
            if len(found) == len(hooks):
                for hook in hooks:
                    hook.remove()

        hooks = [block.register_forward_hook(note) for block in blocks]
        return found
