"""Captions as what a frozen text encoder makes of them, stored beside the latents: training does not load it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from longtake.model.config import WorldModelConfig
from longtake.model.text import GemmaTextEncoder, build_text_encoder
from longtake.platform.data.latents import EncodedClip


class CaptionEncoder:
    """Puts features of their captions into clips, `batch` at once. ValueError when `folder` has no text encoder."""

    def __init__(self, config: WorldModelConfig, folder: Path, device: torch.device, batch: int = 8) -> None:
        encoder = build_text_encoder(config, str(folder)).to(device).eval().requires_grad_(False)
        assert isinstance(encoder, GemmaTextEncoder), "a small encoder is trained with its world model"
        self.encoder, self.batch = encoder, batch

    def __call__(self, clips: Iterable[EncodedClip]) -> Iterator[EncodedClip]:
        left = iter(clips)
        while some := list(islice(left, self.batch)):
            features, mask = self.encoder.encode([clip.caption for clip in some])
            for clip, feature, valid in zip(some, features, mask, strict=True):
                yield dataclasses.replace(clip, text=feature[valid].half().cpu().numpy())


def check_encoder(folder: Path) -> None:
    """ValueError when there is no Gemma in `folder`, as transformers writes it."""
    for name in ("text_encoder/config.json", "tokenizer/tokenizer_config.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}: this preset's captions are encoded by Gemma-2, give its folder")


def stored_features(clips: Sequence[EncodedClip], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Features (B, length, D) float16, zeros behind each clip's own, and their mask (B, length) bool.

    ValueError for a clip that has none.
    """
    texts = [clip.text for clip in clips if clip.text is not None]
    if len(texts) < len(clips):
        raise ValueError("a clip's caption has no features: encode it again with encode-latents")
    return _padded(texts, length)


def refiner_features(clips: Sequence[EncodedClip]) -> tuple[np.ndarray, np.ndarray]:
    """As `stored_features`, of the refiner's, whose length is that of the longest. ValueError for a clip without."""
    texts = [clip.refiner_text for clip in clips if clip.refiner_text is not None]
    if len(texts) < len(clips):
        raise ValueError("a clip's caption has no features for the refiner (refiner_text): encode its caption for it")
    return _padded(texts, max(map(len, texts)))


def _padded(texts: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    out = np.zeros((len(texts), length, texts[0].shape[1]), np.float16)
    mask = np.zeros((len(texts), length), bool)
    for row, text in enumerate(texts):
        out[row, : len(text)] = text
        mask[row, : len(text)] = True
    return out, mask
