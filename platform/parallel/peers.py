"""The ranks that share a clip, and what passes between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Peers:
    """This rank and the others of `group`, in order of time.

    sent: bytes that this rank gave to others, by what they were for.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.rank, self.count = group, dist.get_rank(group), dist.get_world_size(group)
        self.sent: Counter[str] = Counter()

    def start(
        self, what: str, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> list[dist.Work]:
        """Begin to send tensors to ranks, and to receive into tensors from ranks; wait for what is returned, and keep
        the tensors until then. Every rank calls it in the same order; empty tensors are not sent.
        """
        self.sent[what] += sum(tensor.nbytes for _, tensor in sends)
        transfers = [
            dist.P2POp(operation, tensor, group=self.group, group_peer=peer)
            for operation, tensors in ((dist.isend, sends), (dist.irecv, receives))
            for peer, tensor in tensors
            if tensor.numel()
        ]
        return dist.batch_isend_irecv(transfers) if transfers else []

    def swap(self, what: str, gives: Sequence[Sequence[Tensor]], takes: Sequence[Sequence[Tensor]]) -> None:
        """Copy gives[r] to rank r, into those takes, of the same shapes, that it has for this rank."""
        others = [peer for peer in range(self.count) if peer != self.rank]
        # What travels is contiguous.
        sends = [(peer, copied(_room(tensor), tensor)) for peer in others for tensor in gives[peer]]
        landing = [(peer, tensor, _room(tensor)) for peer in others for tensor in takes[peer]]
        transfers = self.start(what, sends, [(peer, arriving) for peer, _, arriving in landing])
        for give, take in zip(gives[self.rank], takes[self.rank], strict=True):
            copied(take, give)
        for transfer in transfers:
            transfer.wait()
        for _, take, arriving in landing:
            copied(take, arriving)

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


def _room(tensor: Tensor) -> Tensor:
    """The tensor, or one like it, that is contiguous."""
    return tensor if tensor.is_contiguous() else torch.empty_like(tensor, memory_format=torch.contiguous_format)


def copied(into: Tensor, tensor: Tensor) -> Tensor:
    """`into` with the tensor's numbers, unless it is the tensor."""
    if into is not tensor:
        # Rows of 16-bit numbers are copied at less than half of the memory's speed, those of 64-bit words are not.
        words = all(_of_words(each) for each in (into, tensor))
        into.view(torch.int64).copy_(tensor.view(torch.int64)) if words else into.copy_(tensor)
    return into


def _of_words(tensor: Tensor) -> bool:
    numbers = 8 // tensor.element_size()
    steps = tensor.shape[-1], *tensor.stride()[:-1], tensor.storage_offset()
    return tensor.stride(-1) == 1 and all(step % numbers == 0 for step in steps)
