"""Halves of transformers' dual encoders that have no class of their own with the projection in it."""

from __future__ import annotations

from typing import Any

from torch import nn

WHOLE = "dualenc_whole"
"""Key of a kept config: the half of a VisionTextDualEncoderModel, which takes any vision and text model."""
VISION_TEXT = "vision-text-dual-encoder"

PROJECTED: dict[str, tuple[str, str, str | None]] = {
    "altclip_text_model": ("AltCLIPTextModel", "text_model", "text_projection"),
    "altclip_vision_model": ("AltCLIPVisionModel", "vision_model", "visual_projection"),
    "metaclip_2_text_model": ("MetaClip2TextModel", "text_model", "text_projection"),
    "metaclip_2_vision_model": ("MetaClip2VisionModel", "vision_model", "visual_projection"),
    "aimv2_text_model": ("Aimv2TextModel", "text_model", "text_projection"),
    "aimv2_vision_model": ("Aimv2VisionModel", "vision_model", "visual_projection"),
    "align_text_model": ("AlignTextModel", "text_model", "text_projection"),
    "align_vision_model": ("AlignVisionModel", "vision_model", None),
    "tipsv2_text_model": ("Tipsv2TextModel", "text_model", None),
    "tipsv2_vision_model": ("Tipsv2VisionModel", "vision_model", None),
    "chinese_clip_text_model": ("ChineseCLIPTextModel", "text_model", "text_projection"),
    "chinese_clip_vision_model": ("ChineseCLIPVisionModel", "vision_model", "visual_projection"),
}
"""model_type of a half → its class, and what the whole model calls it and its projection (None: it has none)."""
_FIRST_TOKEN = ("align_text_model", "chinese_clip_text_model")
"""BERTs of which the first token is projected, without the pooler that the whole model carries along."""


class ProjectedHalf(nn.Module):
    """A transformers model and the projection of its pooled output, under the names they have in the whole model.

    Most pool by themselves; Chinese CLIP and ALIGN take the first token of their BERT.
    """

    def __init__(self, arch: Any) -> None:
        super().__init__()
        self._first = arch.model_type in _FIRST_TOKEN
        net, self._part, self._projection = _half(arch, self._first)
        # AltCLIP's text half projects from its hidden size to the image half's by itself.
        said = arch.to_dict()
        width = int(said.get("project_dim") or said.get("hidden_size") or 0)
        self.config = arch
        self.add_module(self._part, net)
        if self._projection is not None:
            bias = arch.model_type == "align_text_model"
            self.add_module(self._projection, nn.Linear(width, int(arch.projection_dim), bias=bias))

    def forward(self, **inputs: Any) -> Any:
        """As the model's own forward; ``pooler_output`` is projected."""
        out = self.get_submodule(self._part)(**inputs)
        pooled = out.last_hidden_state[:, 0] if self._first else out.pooler_output
        out.pooler_output = pooled if self._projection is None else self.get_submodule(self._projection)(pooled)
        return out

    def gradient_checkpointing_enable(self, **settings: Any) -> None:
        """transformers' own switch."""
        self.get_submodule(self._part).gradient_checkpointing_enable(**settings)  # type: ignore[operator]

    def gradient_checkpointing_disable(self) -> None:
        """transformers' own switch."""
        self.get_submodule(self._part).gradient_checkpointing_disable()  # type: ignore[operator]


def is_half(arch: Any) -> bool:
    """Whether a :class:`ProjectedHalf` is built for it."""
    return arch.model_type in PROJECTED or WHOLE in arch.to_dict()


def _half(arch: Any, first_token: bool) -> tuple[nn.Module, str, str | None]:
    """The model, and what the whole calls it and its projection."""
    import transformers

    side = arch.to_dict().get(WHOLE)
    if side is None:
        cls, part, projection = PROJECTED[arch.model_type]
        extra = {"add_pooling_layer": False} if first_token else {}
        return getattr(transformers, cls)(arch, **extra), part, projection
    build: Any = transformers.CLIPVisionModel if arch.model_type == "clip_vision_model" else None
    build = build or transformers.AutoModel.from_config
    net = build(arch)
    return net, f"{side}_model", {"vision": "visual_projection", "text": "text_projection"}[side]
