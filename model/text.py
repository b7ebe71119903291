"""Text encoders: Gemma-2 for the public model, and a small byte-level transformer that is trained with a small world
model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longtake.model.config import TextConfig, WorldModelConfig

PADDING = 0


def tokenize(captions: list[str], length: int) -> tuple[Tensor, Tensor]:
    """UTF-8 bytes plus one, right-padded with 0: ids int64 (B, length) and mask bool (B, length). Longer captions are
    cut.

    An empty caption keeps one valid token (a space), since attention over no key at all is undefined.
    """
    ids = torch.full((len(captions), length), PADDING, dtype=torch.int64)
    for row, caption in enumerate(captions):
        encoded = (caption or " ").encode()[:length]
        ids[row, : len(encoded)] = torch.tensor(list(encoded)) + 1
    return ids, ids != PADDING


class ByteTextEncoder(nn.Module):
    """A pre-norm transformer over bytes: ids (B, L), mask (B, L) -> features (B, L, dim), float32."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.length = config.length
        self.token = nn.Embedding(257, config.dim, padding_idx=PADDING)
        self.position = nn.Parameter(torch.randn(config.length, config.dim) * 0.02)
        layer = nn.TransformerEncoderLayer(
            config.dim, 4, 2 * config.dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, config.depth, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.token(ids) + self.position[: ids.shape[1]]
        return self.norm(self.layers(hidden, src_key_padding_mask=~mask))

    @torch.no_grad()
    def encode(self, captions: list[str], negative: bool = False) -> tuple[Tensor, Tensor]:
        """Features (B, L, dim) and mask (B, L) of captions, on the encoder's device."""
        ids, mask = (tensor.to(self.position.device) for tensor in tokenize(captions, self.length))
        return self(ids, mask), mask


class GemmaTextEncoder(nn.Module):
    """Gemma-2's last hidden state as SANA-WM reads it (section 1.4): the first token and the last `length - 1`.

    Positive prompts are prefixed with an instruction, negative ones are not. Weights: `<folder>/text_encoder`,
    tokenizer: `<folder>/tokenizer` (transformers layout).
    """

    def __init__(self, config: TextConfig, folder: str, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        from diffusers.pipelines.sana_wm.pipeline_sana_wm import DEFAULT_CHI_PROMPT
        from transformers import AutoModel, AutoTokenizer

        self.length = config.length
        self.prefix = "\n".join(DEFAULT_CHI_PROMPT)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, subfolder="tokenizer")
        self.tokenizer.padding_side = "right"
        self.model = AutoModel.from_pretrained(folder, subfolder="text_encoder", dtype=dtype)

    @torch.no_grad()
    def encode(self, captions: list[str], negative: bool = False) -> tuple[Tensor, Tensor]:
        """Features (B, L, dim) and mask (B, L), bool."""
        prefix = "" if negative else self.prefix
        length = self.length + (len(self.tokenizer.encode(prefix)) - 2 if prefix else 0)
        tokens = self.tokenizer(
            [prefix + caption for caption in captions],
            max_length=length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        ).to(self.model.device)
        hidden = self.model(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        keep = [0, *range(length - self.length + 1, length)]
        return hidden[:, keep], tokens.attention_mask[:, keep].bool()


def build_text_encoder(config: WorldModelConfig, folder: str | None = None) -> ByteTextEncoder | GemmaTextEncoder:
    """The preset's text encoder; Gemma needs the folder with its weights."""
    if config.text.kind == "bytes":
        return ByteTextEncoder(config.text)
    if folder is None:
        raise ValueError(
            f"preset {config.name!r} encodes text with Gemma: give a weights folder with text_encoder/ and tokenizer/"
        )
    return GemmaTextEncoder(config.text, folder)
