"""Cross-encoders: one network sees an image and a caption together and scores how well they match."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dualenc.errors import CheckpointError, ConfigError


class ViltScorer(nn.Module):
    """ViLT fine-tuned for retrieval (Kim et al. 2021; transformers' ViltForImageAndTextRetrieval).

    Attributes:
        settings: modality → settings of its input.
    """

    modalities = ("image", "text")

    def __init__(self, net: nn.Module, folder: str) -> None:
        super().__init__()
        self.net = net.eval().requires_grad_(False)
        config: Any = net.config
        size, length = int(config.image_size), int(config.max_position_embeddings)
        self.length, self.pad_id = length, int(config.pad_token_id or 0)
        half = [0.5, 0.5, 0.5]
        self.settings: dict[str, dict[str, Any]] = {
            "image": {"size": size, "mean": half, "std": half, "resize": "squash"},
            "text": {"tokenizer": f"hf:{folder}", "context_length": length},
        }

    @torch.no_grad()
    def encode(self, modality: str, x: Any) -> Tensor:
        """The inputs of an item: pixels fp32 [n, 3, S, S], or ids int64 [n, L] padded to the context."""
        if modality == "image":
            pixels: Tensor = x.float() / 127.5 - 1
            return pixels
        ids = torch.where(x["mask"], x["ids"], self.pad_id)
        return nn.functional.pad(ids, (0, self.length - ids.shape[1]), value=self.pad_id)

    @torch.no_grad()
    def score(self, a: Tensor, b: Tensor) -> Tensor:
        """Logits [n] of n images with n captions, row by row."""
        longest = max(int((b != self.pad_id).sum(1).max()), 1)
        ids = b[:, :longest]
        out = self.net(input_ids=ids, attention_mask=(ids != self.pad_id).long(), pixel_values=a)
        logits: Tensor = out.logits.squeeze(-1).float()
        return logits


def load_scorer(spec: str) -> ViltScorer:
    """``vilt:FOLDER_OR_REPO`` in transformers' layout, safetensors only.

    Raises:
        ConfigError: for another form, or a model that is not there.
        CheckpointError: if weights are missing.
    """
    form, _, folder = spec.partition(":")
    if form != "vilt" or not folder:
        raise ConfigError(f"{spec!r} is not a known cross-encoder; use vilt:FOLDER_OR_REPO")
    from transformers import ViltForImageAndTextRetrieval

    net: Any
    info: Any
    load: Any = ViltForImageAndTextRetrieval.from_pretrained
    try:
        net, info = load(folder, use_safetensors=True, output_loading_info=True)
    except OSError as e:
        where = "" if Path(folder).is_dir() else "; there is no such folder"
        raise ConfigError(f"{spec} cannot be loaded ({str(e).splitlines()[0]}){where}") from e
    if info["missing_keys"]:
        raise CheckpointError(f"{spec}: tensor {sorted(info['missing_keys'])[0]} is missing")
    return ViltScorer(net, folder)
