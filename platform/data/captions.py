"""Captions as what a frozen text encoder makes of them, stored beside the latents: training does not load it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from longtake.model.config import WorldModelConfig
from longtake.model.refiner.text import RefinerTextEncoder, check_refiner_text
from longtake.model.text import GemmaTextEncoder, build_text_encoder
from longtake.model.weights import REFINER_TEXT
from longtake.platform.data.latents import EncodedClip


class CaptionEncoder:
    """Puts features of their captions into clips, `batch` at once; the refiner's too, where `folder` has what it reads
    them through. ValueError when it has no text encoder.
    """

    def __init__(self, config: WorldModelConfig, folder: Path, device: torch.device, batch: int = 8) -> None:
        encoder = build_text_encoder(config, str(folder)).to(device).eval().requires_grad_(False)
        assert isinstance(encoder, GemmaTextEncoder), "a small encoder is trained with its world model"
        self.encoder, self.batch, self.refiner = encoder, batch, None
        if config.refiner_reads_own_text and (own := folder / REFINER_TEXT).is_dir():
            self.refiner = RefinerTextEncoder(own).to(device).eval().requires_grad_(False)

    def __call__(self, clips: Iterable[EncodedClip]) -> Iterator[EncodedClip]:
        left = iter(clips)
        while some := list(islice(left, self.batch)):
            captions = [clip.caption for clip in some]
            made = {"text": _stored(*self.encoder.encode(captions))}
            if self.refiner is not None:
                made["refiner_text"] = _stored(*self.refiner.encode(captions))
            for number, clip in enumerate(some):
                yield dataclasses.replace(clip, **{name: features[number] for name, features in made.items()})


def _stored(features: Tensor, mask: Tensor) -> list[np.ndarray]:
    return [feature[valid].half().cpu().numpy() for feature, valid in zip(features, mask, strict=True)]


def check_encoder(folder: Path) -> None:
    """ValueError when there is no Gemma in `folder`, as transformers writes it, or a part of what its refiner reads
    captions through is missing.
    """
    for name in ("text_encoder/config.json", "tokenizer/tokenizer_config.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}: this preset's captions are encoded by Gemma-2, give its folder")
    if (folder / REFINER_TEXT).is_dir():
        check_refiner_text(folder / REFINER_TEXT)


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
