"""Counted operations against sums by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from longtake.model import presets
from longtake.model.flops import forward_flops, peak_flops

pytestmark = pytest.mark.cpu


def test_a_minute_of_the_full_model_takes_what_its_sizes_say():
    config = presets.get("sana-wm")
    tokens, size, blocks = 121 * 22 * 40, config.hidden_size, config.depth
    inner = int(size * config.mlp_ratio)
    # qkv, gate, projection, camera's q, k, v and projection, Pluecker; cross attention's query and projection.
    projections = tokens * size * size * (3 + 1 + 1 + 4 + 1 + 2)
    # Both point-wise convolutions of the feed-forward, the depthwise one and the temporal one.
    feed_forward = tokens * (size * 2 * inner + inner * size + 9 * 2 * inner + 3 * size * size)
    softmax = (blocks // config.softmax_every) * 2 * 2 * tokens**2 * size
    by_hand = 2 * (blocks * (projections + feed_forward) + softmax)
    assert forward_flops(config, 121) == pytest.approx(by_hand, rel=0.01)


def test_softmax_blocks_are_counted():
    config = presets.get("tiny")
    gdn = forward_flops(dataclasses.replace(config, softmax_every=0), 11)
    tokens = 11 * 6 * 10
    attention = 2 * 2 * 2 * 2 * tokens**2 * config.hidden_size
    assert forward_flops(config, 11) - gdn == pytest.approx(attention, rel=0.2)  # less the scans of two blocks


def test_a_cpu_has_no_known_peak():
    assert peak_flops(torch.device("cpu")) is None
