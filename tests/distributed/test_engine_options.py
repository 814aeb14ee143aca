"""Options of engines on real ranks: HSDP, FSDP2's reduced precision, fp16's loss scale, compilation by block."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import _option_jobs as jobs
from _spawn import spawn
from _tiny import tiny

from dualenc.checkpoint.ranges import InMemory
from dualenc.config import EngineConfig, Optim
from dualenc.distributed.world import World
from dualenc.engine import build_engine, set_tf32
from dualenc.engine.loss_scale import PATIENCE, START, LossScale
from dualenc.errors import ConfigError

torch.set_num_threads(1)


@pytest.mark.dist
@pytest.mark.slow
def test_hsdp_on_two_by_two_ranks_and_reduced_precision() -> None:
    for found in spawn(Path(jobs.__file__), "hybrid", 4):
        assert found["difference"] <= 1e-5
        assert found["written"] == [1.0]  # every element by one rank
        assert found["equal"]
        own, other = found["losses"]
        assert max(abs(a - b) for a, b in zip(own, other, strict=True)) < 1e-5
        low, plain = found["bf16"]
        assert 0 < max(abs(a - b) for a, b in zip(low, plain, strict=True)) < 0.05
        assert found["dtypes"] == ["torch.float32"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gather_dtype": "bf16"}, r"engine\.gather_dtype: bf16 needs engine\.parallel: fsdp2"),
        ({"shard_size": 2}, r"engine\.shard_size: 2 needs engine\.parallel: fsdp2"),
        ({"parallel": "fsdp2", "gather_dtype": "bf16"}, r"needs engine\.precision: bf16"),
        ({"parallel": "fsdp2", "shard_size": 3}, r"1 ranks cannot be parted into groups of 3"),
        ({"kind": "deepspeed", "precision": "fp16"}, r"engine\.precision: fp16 needs engine\.kind: accelerate"),
    ],
)
def test_options_that_do_not_go_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_engine(EngineConfig(**settings), Optim(), tiny(), World())


def test_fp16_scales_the_loss_and_resumes_with_its_scale() -> None:
    engine, _ = jobs.trained(World(), 0, precision="fp16")
    engine.load_optimizer_state(
        InMemory({}), {"name": "adamw", "scalars": {"loss_scale": {"scale": 512.0, "streak": 0.0}}}
    )
    losses = jobs.go_on(engine, 0, 6)
    _, plain = jobs.trained(World(), 6)
    assert 0 < max(abs(a - b) for a, b in zip(losses, plain, strict=True)) < 0.05
    tensors, info = engine.optimizer_state()
    assert info["scalars"]["loss_scale"] == {"scale": 512.0, "streak": 6.0}
    info["scalars"]["loss_scale"] = {"scale": 512.0, "streak": 3.0}
    other = build_engine(EngineConfig(precision="fp16"), jobs.ADAMW, tiny(), World())
    other.load_optimizer_state(InMemory(tensors), info)
    assert other.optimizer_state()[1]["scalars"]["loss_scale"] == {"scale": 512.0, "streak": 3.0}
    # A gradient that is not finite is left out and halves the scale; the next one counts again.
    before = {k: x.clone() for k, x in other.model_state().items()}
    for p in other.module.parameters():
        p.grad = torch.full_like(p, float("inf"))
    assert bool(other.step().skipped)
    assert all(torch.equal(x, before[k]) for k, x in other.model_state().items())
    assert other.optimizer_state()[1]["scalars"]["loss_scale"] == {"scale": 256.0, "streak": 0.0}


def test_the_scale_grows_after_a_long_finite_streak() -> None:
    scale = LossScale(torch.device("cpu"))
    for _ in range(PATIENCE):
        scale.update(torch.tensor(True))
    assert scale.state() == {"scale": 2 * START, "streak": 0.0}


def test_tf32_is_set_only_where_asked_for() -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        set_tf32(None)
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before
        for allowed, name in ((True, "high"), (False, "highest")):
            set_tf32(allowed)
            assert torch.get_float32_matmul_precision() == name
            assert torch.backends.cudnn.allow_tf32 is allowed
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
