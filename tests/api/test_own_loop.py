"""The losses in a loop of somebody's own: values against plain torch, gradients of two ranks against one process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from _loop_jobs import LOSSES, ROWS, all_gradients
from _shared import ROOT
from torch.nn.functional import cross_entropy, logsigmoid, normalize

import dualenc
from dualenc.distributed.world import World
from dualenc.errors import ConfigError

sys.path.insert(0, str(ROOT / "tests" / "distributed"))
from _spawn import spawn

JOBS = Path(__file__).parent / "_loop_jobs.py"


def two(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, 8, generator=g).to(dtype), torch.randn(ROWS, 8, generator=g).to(dtype)


def test_values_against_plain_torch() -> None:
    a, b = two()
    x, y = normalize(a, dim=1), normalize(b, dim=1)
    logits, labels = 20 * x @ y.T, torch.arange(ROWS)
    clip = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
    siglip = -logsigmoid((2 * torch.eye(ROWS) - 1) * (logits - 10)).sum() / ROWS
    torch.testing.assert_close(dualenc.losses.info_nce(a, b, 20.0), clip)
    torch.testing.assert_close(dualenc.losses.info_nce(x, y, torch.tensor([20.0]), normalize=False), clip)
    torch.testing.assert_close(dualenc.losses.info_nce(a, b, 20.0, impl="tiled"), clip)
    torch.testing.assert_close(dualenc.losses.sigmoid(a, b, 20.0, -10.0), siglip)
    torch.testing.assert_close(dualenc.losses.mse(a, b), (x - y).square().sum(1).mean())


def test_under_autocast_the_logits_are_fp32() -> None:
    a, b = two(torch.bfloat16)
    want = dualenc.losses.info_nce(a.float(), b.float(), 100.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dualenc.losses.info_nce(a, b, 100.0), want)


def test_wrong_arguments_are_named() -> None:
    a, b = two()
    with pytest.raises(ConfigError, match=r"two sets of features \[B, D\], got \[12, 8\] and \[11, 8\]"):
        dualenc.losses.info_nce(a, b[1:], 1.0)
    with pytest.raises(ConfigError, match="one id per row"):
        dualenc.losses.info_nce(a, b, 1.0, torch.arange(3))
    with pytest.raises(ConfigError, match="neither tower of this pair is locked"):
        dualenc.losses.cwcl(a, b, 1.0)


@pytest.mark.dist
@pytest.mark.parametrize("wrapper", ["ddp", "accelerate"])
def test_the_gradient_of_two_ranks_is_that_of_one_process(wrapper: str) -> None:
    want = all_gradients(World(), "ddp")
    ranks = spawn(JOBS, "all_gradients", 2, {"wrapper": wrapper})
    for name in LOSSES:
        for k, g in want[name].items():
            assert g.abs().max() > 1e-4 or "scale" in k or "bias" in k, (name, k)
            for got in ranks:
                torch.testing.assert_close(
                    got[name][k], g, rtol=1e-4, atol=1e-6, msg=lambda m, n=name, k=k: f"{n} {k}: {m}"
                )
