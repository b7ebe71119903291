"""How the public refiner reads a caption: every layer of Gemma-3, joined by LTX-2's connector (SANA-WM section 3.4)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

REFINER_TOKENS = 1024  # of a prompt, with its padding
_FILES = ("text_encoder/config.json", "tokenizer/tokenizer_config.json", "connectors/config.json")


class RefinerTextEncoder(nn.Module):
    """Gemma-3 and the video's half of the connectors, from `folder`, as diffusers writes LTX-2's. length: of tokens,
    padded on the left.
    """

    def __init__(self, folder: Path, length: int = REFINER_TOKENS, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        check_refiner_text(folder)
        from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
        from transformers import AutoTokenizer, Gemma3ForConditionalGeneration

        self.length = length
        self.tokenizer = AutoTokenizer.from_pretrained(folder, subfolder="tokenizer")
        self.model = Gemma3ForConditionalGeneration.from_pretrained(folder, subfolder="text_encoder", dtype=dtype)
        self.connectors: Any = LTX2TextConnectors.from_pretrained(folder, subfolder="connectors", torch_dtype=dtype)
        self.connectors.audio_connector = _Nothing()

    @torch.no_grad()
    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Features (B, L, dim) and mask (B, L), bool. Where the connector has registers in the place of padding, no
        token is masked.
        """
        tokens = self.tokenizer(
            [caption.strip() for caption in captions],
            padding="max_length",
            padding_side="left",
            max_length=self.length,
            truncation=True,
            return_tensors="pt",
        ).to(self.model.device)
        out = self.model(
            tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True, logits_to_keep=1
        )
        layers = torch.stack(out.hidden_states, -1)
        features, _, mask = self.connectors(layers, tokens.attention_mask.to(layers.device))
        return features, mask.bool()


def check_refiner_text(folder: Path) -> None:
    """ValueError when the folder lacks one of the three that the encoder is loaded from."""
    for name in _FILES:
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder} has no {name}: the refiner of this preset reads captions through Gemma-3 and LTX-2's "
                "connectors, give their folders there"
            )


class _Nothing(nn.Module):
    """In the place of the connector for sound, whose result nobody reads."""

    def forward(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return hidden, mask
