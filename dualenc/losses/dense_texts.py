"""Cells of images against the names of what is in them: DenseCLIP's pixel–text scores (Rao et al. 2022, arXiv
2112.01518).

A sample is an image with a class for each cell of a grid, and the texts of its classes: the text modality's
``input.negatives`` (t_k, k < K), encoded with its caption. With v_c the feature of the place under the centre of cell c
(:mod:`dualenc.encoders.places`)

    L = 1/C Σ_c −log e^{v_c · t_{y_c} / τ} / Σ_k e^{v_c · t_k / τ}   over the C labelled cells of the global batch

A number that is no text's labels nothing.

DenseCLIP has τ = 0.07 and learned tokens in the texts (``modalities.NAME.prompts``). With ``context`` its post-model
prompting comes in between, t_k ← t_k + γ Dec(t_k; [x; v_1 … v_P]): a decoder over what the image says, x and its
places, with γ for each channel from 1e-4 (:mod:`dualenc.encoders.context_head`); it serves the loss only, so a saved
model scores v · t. Its text tower is frozen and its images learn at a tenth of the rate (``lock``, ``optim.lr_scale``).
No sample sees another's cells or texts. In a list beside InfoNCE, that loss would take the texts of classes as hard
negatives, although an image may show them: use ``dense`` alone, or in a phase of its own.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import log_softmax

from dualenc.config import Positive, Section
from dualenc.data.batch import ABSENT
from dualenc.distributed.gather import gather_ids
from dualenc.distributed.world import world_size
from dualenc.encoders.context_head import InContext
from dualenc.encoders.places import at_centres
from dualenc.errors import ConfigError
from dualenc.losses.loss import Extras, Loss, LossOutput, losses

GROUP = "in_context"


@losses.register("dense")
class DenseLoss(Loss):
    """Cells of an image against the texts of the sample's classes: which is it of?

    Formula: −log softmax_k(v_c · t_k / τ)_{y_c}, mean over the labelled cells of the global batch
    Paper: DenseCLIP, Rao et al. 2022, arXiv 2112.01518
    Needs: an image tower with places, texts of classes (input.negatives), a value of numbers, one a cell
    """

    takes_extras = True

    class Config(Section):
        """Settings."""

        modality: str = Field(default="image", description="the modality whose places are classified")
        cells: str = Field(
            default="cells",
            description="value (data.sources.N.values) of type ints: a cell's place in the list of texts",
        )
        texts: str = Field(default="text", description="the modality whose samples list the texts of the classes")
        tau: Annotated[float, Field(gt=0)] = Field(default=0.07, description="τ; it is not trained")
        context: Annotated[int, Field(ge=0)] = Field(
            default=0, description="blocks of the decoder that changes the texts by what the image says; DenseCLIP: 3"
        )
        width: Positive = Field(default=256, description="of that decoder")
        heads: Positive = Field(default=4, description="attention heads of its blocks")

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.needs, self.places_of = (config.cells,), (config.modality,)
        self.only_pair = (config.modality, config.texts)
        self.names_pairs = (self.only_pair,)
        asked = InContext(config.modality, config.texts, config.context, config.width, config.heads)
        self.in_context = MappingProxyType({GROUP: asked} if config.context else {})

    def forward(
        self,
        a: Tensor,
        b: Tensor,
        ids: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        extras: Extras | None = None,
    ) -> LossOutput:
        """See the module; a and b, the features of whole items, are not used."""
        c = self.config
        self.check_pairs([extras.pair if extras else ("a", "b")])
        assert extras is not None
        images, texts = (extras.a, extras.b) if extras.pair[0] == c.modality else (extras.b, extras.a)
        if "negatives" not in texts:
            raise ConfigError(
                f"loss: dense needs the texts of a sample's classes: set modalities.{c.texts}.input.negatives to the "
                "member that has them, such as json:classes"
            )
        cells = extras.both[c.cells]
        exact = torch.promote_types(a.dtype, torch.float32)
        v, t = images["places"].to(exact), texts[GROUP if c.context else "negatives"].to(exact)
        there = texts["negatives_there"] > 0
        at = at_centres(v.shape[1], self._grid(cells)).to(v.device)
        known = (ids >= 0)[:, None] & (cells != ABSENT) & (cells < t.shape[1])
        wanted = torch.where(known, cells, 0)
        known = known & there.gather(1, wanted)
        v = torch.where(known[:, :, None], v[:, at], 0.0)
        scores = (v @ t.mT / c.tau).masked_fill(~there[:, None, :], -1e4)
        each = torch.where(known, -log_softmax(scores, 2).gather(2, wanted[:, :, None])[:, :, 0], 0.0)
        share = gather_ids(known.sum(1)).sum().clamp(min=1).to(exact) / world_size()
        right = (scores.argmax(2) == wanted) & known
        return LossOutput(each.sum() / share, {"cells_right": right.sum().to(exact) / share})

    def _grid(self, cells: Tensor) -> int:
        """How many cells an image has: the value's width."""
        if cells.ndim != 2:
            raise ConfigError(
                f"data.sources.N.values.{self.config.cells}: write {{member: …, type: ints, width: G²}}, the class of "
                "each cell of a G × G grid"
            )
        return cells.shape[1]
