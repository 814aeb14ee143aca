"""Parameters that no output depends on are found before the first step."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "losses"))
sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
import _term_jobs

from dualenc.config import LogitScale
from dualenc.encoders import DualEncoder, unused_parameters


class Pooling(_term_jobs.SpeakingTower):
    """With a pooler that nobody asks, and dropout and statistics of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.pooler = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def outputs(self, x: Any) -> dict[str, Tensor]:
        self.calls += 1
        out = super().outputs(x)
        return {**out, "features": nn.functional.dropout(out["features"], 0.5, self.training)}


def test_unused_parameters_are_named_and_nothing_is_changed() -> None:
    towers = {"image": Pooling(), "audio": _term_jobs.SpeakingTower()}
    model = DualEncoder(towers, [_term_jobs.PAIR], LogitScale(init=7.0)).eval()
    inputs, state = _term_jobs.make_batch(0).inputs, torch.get_rng_state()
    assert unused_parameters(model, inputs) == ["towers.image.pooler.weight", "towers.image.pooler.bias"]
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert towers["image"].calls == 0
    towers["image"].pooler.requires_grad_(False)
    assert unused_parameters(model, inputs) == []
    alone = DualEncoder(towers, [_term_jobs.PAIR], LogitScale(init=7.0))
    assert any(n.startswith("towers.audio") for n in unused_parameters(alone, {"image": inputs["image"]}))
