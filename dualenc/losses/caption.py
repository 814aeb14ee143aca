"""Captioning beside the contrast (CoCa, Yu et al. 2022, arXiv 2205.01917; COSMO, Wang et al. 2024, arXiv 2401.00849).

    L = −Σ_samples Σ_t log p(token_{t+1} | tokens ≤ t, item) / number of predicted tokens

The text tower, which has to be causal, is the lower half of a captioner and does not see the item; a head of
``layers`` blocks is the upper half: causal attention over the text tower's last states, and attention to the other
tower's last states. Both sums are over the global batch, so a long caption counts more than a short one, as in CoCa; a
sample without an item or a caption counts nothing. CoCa's head sees the image through 256 trained queries, here it sees
all places of the last block; CoCa's weights are 2 for captions and 1 for the contrast, COSMO's are equal.

Memory: the head gives two numbers for each sample; of its logits [places, vocabulary] it holds 2²⁵ at once.
"""

from __future__ import annotations

from types import MappingProxyType

from pydantic import Field, model_validator
from torch import Tensor, where

from dualenc.config import Positive, Section
from dualenc.distributed.gather import gather_ids
from dualenc.distributed.world import world_size
from dualenc.encoders.caption_head import Captioning
from dualenc.losses.loss import Extras, Loss, LossOutput, losses

GROUP = "caption"


@losses.register("caption")
class Caption(Loss):
    """A causal text tower as the lower half of a captioner: the next token from those before it and the image.

    Formula: −Σ log p(token_{t+1} | tokens ≤ t, image) / tokens; p by decoder blocks on the last states of both towers
    Paper: CoCa, Yu et al. 2022, arXiv 2205.01917; COSMO, Wang et al. 2024, arXiv 2401.00849
    Needs: a causal text tower (own/transformer, CLIP's) and an image tower of repeated blocks; it trains the decoder
    """

    takes_extras = True

    class Config(Section):
        """Settings."""

        of: str = Field(default="image", description="the modality that is described")
        captions: str = Field(default="text", description="the modality of the captions")
        layers: Positive = Field(default=1, description="decoder blocks of the head")
        heads: Positive = Field(default=4, description="attention heads of a block")

        @model_validator(mode="after")
        def _two(self) -> Caption.Config:
            if self.of == self.captions:
                raise ValueError(f"of and captions are both {self.of!r}; name two modalities")
            return self

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.only_pair = (config.of, config.captions)
        self.names_pairs = (self.only_pair,)
        asked = Captioning(config.of, config.captions, config.layers, config.heads)
        self.captioning = MappingProxyType({GROUP: asked})

    def forward(
        self,
        a: Tensor,
        b: Tensor,
        ids: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        extras: Extras | None = None,
    ) -> LossOutput:
        """See the module; a and b, the features, are not used."""
        self.check_pairs([extras.pair if extras else ("a", "b")])
        assert extras is not None
        rows = (extras.a if extras.pair[0] == self.config.captions else extras.b)[GROUP]
        rows = where((ids >= 0)[:, None], rows, 0.0)
        count = gather_ids(rows[:, 1].detach().long()).sum().clamp(min=1)
        return LossOutput(rows[:, 0].sum() / (count.to(rows.dtype) / world_size()))
