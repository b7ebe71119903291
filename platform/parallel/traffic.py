"""What a rank sends to those it shares a clip with, by what it is for: the maths that `Peers` is compared with.

Legend: R ranks, n_r latent frames on rank r, S tokens a frame, B clips, H heads of D channels, C = H D, and b branches
of attention (2 where the camera's rays are read). In one forward pass of a block, rank r sends, with e bytes a number:

    states     (R - 1) B H D (2 D b + D + 1) e               of GDN blocks: to every other rank a map, D x D and D x D
                                                             a branch, D x D and 1 x D of the normaliser; e is 4,
                                                             whatever else is computed in
    halo       B C S (b f_r(K - 1) + f_r(k // 2)) e          key convolutions of size K (of GDN blocks alone), the
                                                             feed-forward's of k; f_r(n): frames of r that lie within n
                                                             frames of another rank's, counted for each of these
    attention  b B S D (3 n_r (H - h_r) + (N - n_r) h_r) e   of softmax blocks, by heads: h_r heads are r's; of its
                                                             frames the rest of q, k, v, of N - n_r others the result
               b B S C 2 (N - n_{r+1}) e                     in a ring: keys and values of all ranks but the next

Of a chunk-causal clip, of which a rank holds whole chunks, the past alone is sent: states to the R - 1 - r ranks after
it, of the halo what lies before another rank's frames.

Gradients go back over the same ways; in a ring, keys and values go round once more, and their gradients in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from longtake.model.config import WorldModelConfig
from longtake.model.dit.chunk_causal import chunk_sizes
from longtake.platform.parallel.context import AttentionExchange, even, shares


class Shared(NamedTuple):
    """`clips` clips of `frames` latent frames of `tokens` each, on `ranks` ranks, in numbers of `itemsize` bytes."""

    frames: int
    ranks: int
    attention: AttentionExchange
    clips: int
    tokens: int
    itemsize: int = 4


class Traffic(NamedTuple):
    """Bytes that `rank` sends for `what` in the forward pass of a block, counted and by the maths."""

    kind: Literal["gdn", "softmax"]
    what: str
    rank: int
    counted: int
    expected: int


def account(
    config: WorldModelConfig, shared: Shared, rank: int, sent: Sequence[Mapping[str, int]]
) -> Iterator[Traffic]:
    """What `rank` has `sent` in each block, beside the maths."""
    pieces = chunk_sizes(shared.frames, config.chunk_size) if config.chunk_causal else [1] * shared.frames
    counts = [sum(held) for held in shares(pieces, shared.ranks)]
    heads = even(config.num_heads, shared.ranks) if shared.attention == "heads" else None
    for block, counted in enumerate(sent, start=1):
        softmax = config.softmax_every > 0 and block % config.softmax_every == 0
        amounts = shared.clips, shared.tokens, softmax, shared.itemsize
        expected = sent_in_a_block(config, counts, heads, rank, *amounts)
        for what in {**expected, **counted}:
            yield Traffic("softmax" if softmax else "gdn", what, rank, counted.get(what, 0), expected.get(what, 0))


def sent_in_a_block(
    config: WorldModelConfig,
    counts: Sequence[int],
    heads: Sequence[int] | None,
    rank: int,
    clips: int,
    tokens: int,
    softmax: bool,
    itemsize: int = 4,
) -> dict[str, int]:
    """The formulas above: `counts` latent frames on each rank, `tokens` a frame, `itemsize` bytes a number.

    heads: how many are each rank's, None for a ring.
    """
    one, causal = itemsize * clips * tokens, config.chunk_causal
    d, size, branches = config.head_dim, config.hidden_size, 1 + config.reads_rays
    halo = _reached(counts, rank, config.temporal_kernel_size // 2, causal)
    if not softmax:
        asking = len(counts) - 1 - (rank if causal else 0)
        states = asking * clips * size * (2 * d * branches + d + 1)
        halo += branches * _reached(counts, rank, config.conv_kernel_size - 1, causal)
        return {"states": 4 * states, "halo": one * size * halo}
    held, elsewhere = counts[rank], sum(counts) - counts[rank]
    if heads is None:
        attention = 2 * size * (sum(counts) - counts[(rank + 1) % len(counts)])
    else:
        attention = d * (3 * held * (config.num_heads - heads[rank]) + elsewhere * heads[rank])
    return {"halo": one * size * halo, "attention": one * branches * attention}


def _reached(counts: Sequence[int], rank: int, reach: int, causal: bool) -> int:
    owners = [owner for owner, count in enumerate(counts) for _ in range(count)]
    return sum(
        len({owner for owner in owners[frame if causal else max(0, frame - reach) : frame + reach + 1]} - {rank})
        for frame, owner in enumerate(owners)
        if owner == rank
    )
