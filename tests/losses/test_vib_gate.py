"""The bottleneck's second view; ranks and micro-batches are in ``_term_jobs``."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from dualenc.config import Component
from dualenc.losses import Extras, build_loss
from dualenc.losses.info_nce import info_nce
from dualenc.losses.vib_gate import BottleneckGate, standard_normal

torch.set_num_threads(1)


def test_noise_is_normal_by_id_and_step() -> None:
    ids = torch.arange(4000) * 7919
    x = standard_normal(ids, torch.tensor(3), 6)
    assert float(x.mean()) == pytest.approx(0, abs=0.02)
    assert float(x.std()) == pytest.approx(1, abs=0.02)
    assert float((x.abs() > 2).float().mean()) == pytest.approx(0.0455, abs=0.005)
    assert float(torch.corrcoef(x.T).fill_diagonal_(0).abs().max()) < 0.06
    assert torch.equal(standard_normal(ids.flip(0), torch.tensor(3), 6).flip(0), x)
    assert not torch.equal(standard_normal(ids, torch.tensor(4), 6), x)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_it_is_the_formula_and_without_noise_and_cost_the_loss_inside(beta: float) -> None:
    torch.manual_seed(0)
    a, b = (normalize(torch.randn(9, 5), dim=1) for _ in range(2))
    ids, scale = torch.arange(9), torch.tensor([6.0])
    loss = build_loss(Component.model_validate({"name": "vib_gate", "share": 0.5, "beta": beta}))
    gates = loss.heads(5, ("image", "text"))["bottleneck"]
    plain = info_nce(a, b, ids, scale).value

    def value() -> torch.Tensor:
        extras = Extras(("image", "text"), {"bottleneck": gates["image"](a)}, {"bottleneck": gates["text"](b)}, step=2)
        return loss(a, b, ids, scale, None, extras).value

    for gate in gates.values():
        assert isinstance(gate, BottleneckGate)
        torch.nn.init.constant_(gate.log_variance, -60.0)
    if beta == 0:
        torch.testing.assert_close(value(), 1.5 * plain)
    want, cost = plain.clone(), torch.zeros(())
    for k, (gate, x, y) in enumerate(((gates["image"], a, b), (gates["text"], b, a))):
        assert isinstance(gate, BottleneckGate)
        torch.nn.init.normal_(gate.mean)
        torch.nn.init.normal_(gate.log_variance)
        mu, var = gate.mean.detach(), gate.log_variance.detach().exp()
        view = normalize(x * (mu + var.sqrt() * standard_normal(ids, torch.tensor(4 + k), 5).float()), dim=1)
        want = want + 0.25 * info_nce(view, y, ids, scale).value
        cost = cost + 0.5 * (0.5 * (1 + mu**2 / var).log()).mean()
    torch.testing.assert_close(value(), want + beta * cost)
