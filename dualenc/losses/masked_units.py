"""Hidden stretches of a clip are told from its other stretches by quantised units, which also become classes to predict
(w2v-BERT, Chung et al. 2021, arXiv 2108.06209; the contrast is that of wav2vec 2.0, arXiv 2006.11477).

The tower hides K places of each clip. At place t it gives y_t of its convolutions (which see the clip whole), c_t after
half of its blocks and h_t after all of them (which do not see what is hidden). With V codes e_v

    u_t = argmax_v (W y_t + g_t)_v,   q_t = e_{u_t}   (straight through softmax((W y_t + g_t)/τ_g), g Gumbel noise)
    L_c = −log e^{cos(c_t, q_t)/κ} / Σ_{j ∈ J_t} e^{cos(c_t, q_j)/κ},   J_t = {t} ∪ {j of the clip: u_j ≠ u_t}
    L_d = (V − exp H(p̄)) / V,   p̄ the mean of softmax(W y_t) over all places of the global batch
    L_m = −log softmax(W' h_t)_{u_t}
    L   = β (L_c + α L_d) + γ L_m,   L_c and L_m means over all places of the global batch

w2v-BERT draws distractors; here they are all other hidden places of the clip. It has V = 1,024, κ = 0.1, α = 0.1 and
β = γ = 1. Distractors of other clips would be told apart by their loudness or microphone, so none are gathered; what
ranks share is p̄ and the number of places. g is a hash of id, place, code, seed and step: the same on any number of
ranks.

Memory: [B, K, V] and [B, K, K] of local rows, and a row of V · D for each clip.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import log_softmax, normalize

from dualenc.config import Section
from dualenc.distributed.gather import total
from dualenc.distributed.world import world_size
from dualenc.encoders.dual_encoder import GroupHead
from dualenc.losses.hardest import uniform
from dualenc.losses.hidden_places import OnHiddenPlaces
from dualenc.losses.loss import Extras, LossOutput, losses

_NonNegative = Annotated[float, Field(ge=0)]
_Above = Annotated[float, Field(gt=0)]


class Codebook(nn.Module):
    """Features [n, D] → the codes [n, V · D], the same for each row."""

    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(codes, dim) / dim**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.weight.float().flatten().expand(len(x), -1) + 0 * x[:, :1].float()  # a row of its own for each row


def chosen(logits: Tensor, noise: Tensor, tau: float) -> Tensor:
    """[n, K, V] logits → one-hot choices of the largest noisy logit, with the gradient of their softmax."""
    noisy = (logits + noise) / tau
    soft = noisy.softmax(2)
    codes = torch.arange(logits.shape[2], device=logits.device)  # one_hot would ask the device for the largest
    hard = (noisy.argmax(2, keepdim=True) == codes).to(soft.dtype)
    return hard + (soft - soft.detach())


def told_apart(context: Tensor, units: Tensor, code: Tensor, there: Tensor, kappa: float) -> tuple[Tensor, Tensor]:
    """L_c of each place [n, K], 0 where ``there`` [n, K] is false, and whether its own unit is the nearest.

    Args:
        context, units: [n, K, D]; code: [n, K], the code of each unit.
    """
    logits = normalize(context, dim=2) @ normalize(units, dim=2).mT / kappa
    own = torch.eye(logits.shape[1], dtype=torch.bool, device=logits.device)
    out = (~there[:, None, :] | (code[:, :, None] == code[:, None, :])) & ~own
    logits = logits.masked_fill(out, -1e4)
    each = logits.logsumexp(2) - logits.diagonal(dim1=1, dim2=2)
    return torch.where(there, each, 0.0), (
        logits.argmax(2) == torch.arange(logits.shape[1], device=code.device)
    ) & there


@losses.register("masked_units")
class MaskedUnits(OnHiddenPlaces):
    """Pretraining of one audio tower: hidden places of a clip against its own other places, on quantised units.

    Formula: β (−log softmax_j(cos(c_t, q_j)/κ)_t + α (V − e^{H(p̄)})/V) + γ CE(W'h_t, code of q_t), j in the same clip
    Paper: w2v-BERT, Chung et al. 2021, arXiv 2108.06209
    Needs: own/audio_transformer with masked: true, and input.augment.hide; it trains a codebook
    """

    called = "masked_units"

    class Config(Section):
        """Settings."""

        modality: str = Field(default="audio", description="the modality whose tower hides places")
        codes: Annotated[int, Field(ge=2)] = Field(default=64, description="V, vectors of the codebook")
        kappa: _Above = Field(default=0.1, description="κ, temperature of the contrast within a clip")
        gumbel: _Above = Field(default=1.0, description="τ_g, temperature of the choice of a code")
        noise: bool = Field(default=True, description="add Gumbel noise to the choice")
        diversity: _NonNegative = Field(default=0.1, description="α, weight of the use of all codes")
        contrast: _NonNegative = Field(default=1.0, description="β, weight of the contrast and of the diversity")
        predict: _NonNegative = Field(default=1.0, description="γ, weight of the prediction of codes")
        seed: int = Field(default=0, description="of the noise")

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def heads(self, dim: int, modalities: Sequence[str]) -> Mapping[str, Mapping[str, nn.Module]]:
        """The maps W and W' on the tower's groups, and the codebook."""
        c, m = self.config, self.named(modalities)
        return {
            "unit_logits": {m: GroupHead("masked_target", dim, c.codes)},
            "unit_guesses": {m: GroupHead("masked_last", dim, c.codes)},
            "unit_codebook": {m: Codebook(c.codes, dim)},
        }

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
        assert extras is not None, "places refuses that"
        logits, last = (torch.where(there[..., None], side[name], 0.0) for name in ("unit_logits", "unit_guesses"))
        context = torch.where(there[..., None], side["masked_context"], 0.0)
        places = count.to(a.dtype)
        share = places / world_size()
        choice = chosen(logits, self._noise(ids, extras.step, logits), c.gumbel)
        code = choice.detach().argmax(2)
        book = torch.where((ids >= 0)[:, None], side["unit_codebook"], 0.0)
        units = choice @ book.view(len(a), c.codes, -1)
        each, nearest = told_apart(context, units, code, there, c.kappa)
        predicted = torch.where(there, -log_softmax(last, 2).gather(2, code[..., None])[..., 0], 0.0)
        used = total(torch.where(there[..., None], logits.softmax(2), 0.0).sum((0, 1))) / places
        perplexity = (-(used * used.clamp(min=1e-9).log()).sum()).exp()
        contrast, masked = each.sum() / share, predicted.sum() / share
        value = c.contrast * (contrast + c.diversity * (c.codes - perplexity) / c.codes) + c.predict * masked
        metrics = {
            "units_contrast": contrast.detach(),
            "units_masked": masked.detach(),
            "units_accuracy": nearest.sum().to(a.dtype) / share,
            "units_perplexity": perplexity.detach(),
        }
        return LossOutput(value, metrics)

    def _noise(self, ids: Tensor, step: int, logits: Tensor) -> Tensor:
        """Gumbel noise like the logits [n, K, V]."""
        if not self.config.noise:
            return torch.zeros_like(logits)
        salt = torch.tensor(step + (self.config.seed << 32), device=ids.device)
        u = uniform(ids, salt, logits.shape[1] * logits.shape[2]).clamp(1e-9, 1 - 1e-9)
        return -(-u.log()).log().view_as(logits).to(logits.dtype)
