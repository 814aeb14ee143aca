"""By how many quarters was an image turned? (Gidaris et al. 2018, arXiv 1803.07728; beside a contrast in ScatSimCLR,
Kinakh et al. 2021, arXiv 2108.13939.)

With y_i of 0 … 3 the quarter turns of image i, drawn anew in every epoch, and x_i its unit feature [D],

    L = −mean_i log softmax(√D W x_i + b)_{y_i}

over the images of the global batch. The turned image is a view of its own, a modality that shares the image's tower
(``input.augment.quarter_turns``), so that the contrast with captions sees images upright. ScatSimCLR's other question,
in which order the tiles of a jigsaw are, is left out: it needs a table of permutations and feature maps that see one
tile at a time, where towers here see whole images.

Memory: [B, 4].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dualenc.config import Section
from dualenc.data.batch import present
from dualenc.distributed.gather import gather_ids
from dualenc.distributed.world import world_size
from dualenc.errors import ConfigError
from dualenc.losses.loss import Extras, Loss, LossOutput, losses


class TurnHead(nn.Linear):
    """Unit features [n, D] → logits [n, 4]. They are multiplied by √D, so that a coordinate is about 1 as of any layer:
    the logits of a linear map of numbers of 1/√D would hardly grow in a short training."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 4)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return super().forward(x * self.in_features**0.5)


@losses.register("rotation")
class Rotation(Loss):
    """A linear head on the features of turned images says by how many quarters each was turned.

    Formula: −mean_i log softmax(√D W x_i + b)_{y_i}, y_i the quarter turns of image i
    Paper: Gidaris et al. 2018, arXiv 1803.07728; ScatSimCLR, Kinakh et al. 2021, arXiv 2108.13939
    Needs: a view with input.augment.quarter_turns; it trains the head
    """

    takes_extras = True

    class Config(Section):
        """Settings."""

        modality: str = Field(default="image_turned", description="the view whose images are turned")

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.modality = config.modality

    def heads(self, dim: int, modalities: Sequence[str]) -> Mapping[str, Mapping[str, nn.Module]]:
        """The linear head."""
        if self.modality not in modalities:
            raise ConfigError(
                f"loss.modality: {self.modality!r} is in none of the loss's pairs; name the view whose input has "
                "augment.quarter_turns: true"
            )
        return {"turn_logits": {self.modality: TurnHead(dim)}}

    def forward(
        self,
        a: Tensor,
        b: Tensor,
        ids: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        extras: Extras | None = None,
    ) -> LossOutput:
        """See the module; the other modality of the pair, scale and bias are not used."""
        m = self.modality
        if extras is None or m not in extras.pair:
            raise ConfigError(f"loss: rotation is for pairs with {m!r}; name them in its pairs: [[image, {m}]]")
        side = extras.a if extras.pair[0] == m else extras.b
        if "turns" not in side:
            raise ConfigError(f"loss: rotation needs modalities.{m}.input.augment.quarter_turns: true")
        turns, logits = side["turns"], side["turn_logits"]
        there = (ids >= 0) & present(turns)
        share = gather_ids(there.long()).sum().clamp(min=1).to(logits.dtype) / world_size()
        logits = torch.where(there[:, None], logits, 0.0)
        each = torch.where(there, cross_entropy(logits, turns.clamp(min=0), reduction="none"), 0.0)
        right = ((logits.detach().argmax(1) == turns) & there).sum().to(logits.dtype)
        return LossOutput(each.sum() / share, {"turns_right": right / share})
