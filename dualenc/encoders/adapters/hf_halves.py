"""Halves of transformers' dual encoders that have no class of their own with the projection in it."""

from __future__ import annotations

from typing import Any

from torch import nn

PROJECTED = {
    "altclip_text_model": ("AltCLIPTextModel", "text_model", "text_projection"),
    "altclip_vision_model": ("AltCLIPVisionModel", "vision_model", "visual_projection"),
    "chinese_clip_text_model": ("ChineseCLIPTextModel", "text_model", "text_projection"),
    "chinese_clip_vision_model": ("ChineseCLIPVisionModel", "vision_model", "visual_projection"),
}
"""model_type of a half → its class, and what the whole model calls it and its projection."""


class ProjectedHalf(nn.Module):
    """A transformers model and the projection of its pooled output, under the names they have in the whole model.

    AltCLIP pools by itself; Chinese CLIP takes the first token of its BERT.
    """

    def __init__(self, arch: Any) -> None:
        super().__init__()
        import transformers

        cls, self._part, self._projection = PROJECTED[arch.model_type]
        extra = {"add_pooling_layer": False} if arch.model_type == "chinese_clip_text_model" else {}
        net = getattr(transformers, cls)(arch, **extra)
        # AltCLIP's text half projects from its hidden size to the image half's by itself.
        width = int(arch.to_dict().get("project_dim") or arch.hidden_size)
        self.config = arch
        self.add_module(self._part, net)
        self.add_module(self._projection, nn.Linear(width, int(arch.projection_dim), bias=False))

    def forward(self, **inputs: Any) -> Any:
        """As the model's own forward; ``pooler_output`` is projected."""
        out = self.get_submodule(self._part)(**inputs)
        pooled = out.pooler_output if out.pooler_output is not None else out.last_hidden_state[:, 0]
        out.pooler_output = self.get_submodule(self._projection)(pooled)
        return out

    def gradient_checkpointing_enable(self, **settings: Any) -> None:
        """transformers' own switch."""
        self.get_submodule(self._part).gradient_checkpointing_enable(**settings)  # type: ignore[operator]

    def gradient_checkpointing_disable(self) -> None:
        """transformers' own switch."""
        self.get_submodule(self._part).gradient_checkpointing_disable()  # type: ignore[operator]
