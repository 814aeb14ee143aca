"""Matryoshka representation learning (Kusupati et al. 2022, arXiv 2205.13147): one embedding whose prefixes are
embeddings too.

    L = Σ_d c_d · L_inner( a[:d] / ‖a[:d]‖, b[:d] / ‖b[:d]‖ ) / Σ_d c_d

The weights c_d are 1, as in the paper; dividing by their sum keeps the value comparable with the plain loss, to which
the full width alone is equal. Memory: that of the loss inside, once for each width.
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import normalize

from dualenc.errors import ConfigError
from dualenc.losses.loss import Extras, LossOutput, losses
from dualenc.losses.wrapper import Wrapper, WrapperConfig


@losses.register("matryoshka")
class Matryoshka(Wrapper):
    """Prefixes of the embedding that are embeddings themselves.

    Formula: mean over widths d of L(a[:d], b[:d]), L another loss
    Paper: Matryoshka, Kusupati et al. 2022, arXiv 2205.13147
    Needs: nothing; it stands around another loss
    """

    class Config(WrapperConfig):
        """Settings."""

        dims: list[Annotated[int, Field(gt=0)]] = Field(min_length=1, description="widths; the full one too if wanted")
        weights: list[Annotated[float, Field(gt=0)]] | None = Field(default=None, description="one a width; default: 1")

        @model_validator(mode="after")
        def _one_weight_each(self) -> Self:
            if len(set(self.dims)) < len(self.dims):
                raise ValueError(f"dims: {self.dims} lists a width twice")
            if self.weights is not None and len(self.weights) != len(self.dims):
                raise ValueError(f"weights: {len(self.weights)} for {len(self.dims)} dims; give one each")
            return self

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.dims, self.weights = config.dims, config.weights or [1.0] * len(config.dims)

    def forward(
        self,
        a: Tensor,
        b: Tensor,
        ids: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        extras: Extras | None = None,
    ) -> LossOutput:
        """See the module. Metrics are those of the widest prefix, and the loss of each (``width_D``)."""
        if max(self.dims) > a.shape[1]:
            raise ConfigError(
                f"loss.dims: {max(self.dims)} is wider than the features ({a.shape[1]}, embed_dim); leave it out"
            )
        value, metrics = a.new_zeros(()), dict[str, Tensor]()
        for d, weight in sorted(zip(self.dims, self.weights, strict=True)):
            whole = d == a.shape[1]
            x, y = (a, b) if whole else (normalize(a[:, :d], dim=1), normalize(b[:, :d], dim=1))
            out = self.inside(x, y, ids, logit_scale, logit_bias, extras)
            value = value + weight / sum(self.weights) * out.value
            metrics |= {f"width_{d}": out.value.detach(), **out.metrics}
        return LossOutput(value, metrics)
