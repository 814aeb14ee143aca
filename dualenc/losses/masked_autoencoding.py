"""The log-mel of hidden stretches of a clip is reconstructed from what is left of it (the audio half of the masked
autoencoding of HiCMAE, Sun et al. 2024, arXiv 2401.05698; He et al. 2022, arXiv 2111.06377).

The tower hides K places of each clip and gives h_t after all of its blocks, which do not see what is hidden. x_t is the
piece of log-mel under place t (P numbers), standardised by itself as in MAE.

    L = mean_t 1/P ‖W h_t + b − x_t‖²,   over all places of the global batch

HiCMAE's encoder sees the visible places alone and a decoder of its own fills in the others; here the tower sees a
learned vector at the hidden places and the decoder is a linear map (as in SimMIM, Xie et al. 2022, arXiv 2111.09886).
Its contrast at several depths is ``layers``; a list of both is its objective: recipes/audio_text/hicmae.yaml.

Memory: [B, K, P].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from dualenc.config import Positive, Section
from dualenc.distributed.world import world_size
from dualenc.encoders.dual_encoder import GroupHead
from dualenc.errors import ConfigError
from dualenc.losses.hidden_places import OnHiddenPlaces
from dualenc.losses.loss import Extras, LossOutput, losses

_TINY = 1e-4


@losses.register("masked_autoencoding")
class MaskedAutoencoding(OnHiddenPlaces):
    """Pretraining of one audio tower: the log-mel of hidden places of a clip from what the tower says of them.

    Formula: mean over hidden places of ‖W h_t + b − x_t‖²/P, x_t the standardised log-mel there
    Paper: HiCMAE, Sun et al. 2024, arXiv 2401.05698
    Needs: own/audio_transformer with masked: true, and input.augment.hide; it trains a linear decoder
    """

    called = "masked_autoencoding"

    class Config(Section):
        """Settings."""

        modality: str = Field(default="audio", description="the modality whose tower hides places")
        patch: Positive = Field(
            default=256, description="P, numbers of log-mel a place: mel bins times the tower's frames a token"
        )

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def heads(self, dim: int, modalities: Sequence[str]) -> Mapping[str, Mapping[str, nn.Module]]:
        """The decoder."""
        c, m = self.config, self.named(modalities)
        return {"reconstructed": {m: GroupHead("masked_last", dim, c.patch)}}

    def forward(
        self,
        a: Tensor,
        b: Tensor,
        ids: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        extras: Extras | None = None,
    ) -> LossOutput:
        """See the module; a and b, the features of whole clips, are not used."""
        c, (side, there, count) = self.config, self.places(ids, extras)
        patch, made = side["masked_patch"], side["reconstructed"]
        if patch.shape[2] != c.patch:
            raise ConfigError(
                f"loss.patch: the tower gives {patch.shape[2]} numbers a place, not {c.patch}; "
                f"use patch: {patch.shape[2]}"
            )
        share = count.to(a.dtype) / world_size()
        patch, made = (torch.where(there[..., None], x, 0.0) for x in (patch.detach(), made))
        patch = patch - patch.mean(2, keepdim=True)
        patch = patch / (patch.square().mean(2, keepdim=True) + _TINY).sqrt()
        return LossOutput((made - patch).square().mean(2).sum() / share)
