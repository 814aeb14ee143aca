"""Parameter groups, Muon, the moving average, and single-process behaviour of the engine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from dualenc.checkpoint.ranges import InMemory
from dualenc.config import Component, EngineConfig, Optim
from dualenc.distributed.world import World
from dualenc.engine import build_engine
from dualenc.engine.accelerate_engine import AccelerateEngine
from dualenc.engine.deepspeed_engine import deepspeed_json
from dualenc.engine.ema import EMA, blend
from dualenc.engine.optim import build_optimizers, is_fused, parameters_by_role, set_lr_factor
from dualenc.engine.protocol import repeated
from dualenc.errors import CheckpointError, ConfigError
from dualenc.losses import build_loss
from dualenc.train.step import train_step

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
import _jobs
from _tiny import PAIRS, make_batch, tiny

torch.set_num_threads(1)


def test_who_has_weight_decay() -> None:
    model = tiny()
    names = {id(p): n for n, p in model.named_parameters()}
    roles = {role: {names[id(p)] for p in ps} for role, ps in parameters_by_role(model).items()}
    assert "towers.image.head.weight" in roles["matrix"]
    assert roles["decayed"] == {"towers.text.stem.weight"}
    assert {"towers.image.head.bias", "towers.text.blocks.0.norm.weight"} <= roles["plain"]
    assert roles["temperature"] == {f"logit_{k}.{p}" for k in ("scale", "bias") for p in ("image-text", "audio-text")}
    assert sum(map(len, roles.values())) == len(names)
    (adamw,) = build_optimizers(model, Optim(lr=1e-3, weight_decay=0.2, logit_scale_lr=1e-4))
    got = [(g["weight_decay"], g["lr"]) for g in adamw.param_groups]
    assert got == [(0.2, 1e-3), (0.0, 1e-3), (0.0, 1e-4)]
    set_lr_factor(adamw.param_groups, 0.5)
    set_lr_factor(adamw.param_groups, 0.25)
    assert [g["lr"] for g in adamw.param_groups] == [2.5e-4, 2.5e-4, 2.5e-5]


def test_muon_takes_the_matrices_and_adamw_the_rest() -> None:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    muon, adamw = build_optimizers(tiny(), Optim(name="muon", muon_lr=0.03))
    assert all(p.ndim == 2 for g in muon.param_groups for p in g["params"])
    assert {g["lr"] for g in muon.param_groups} == {0.03}
    assert any(p.shape == (20, 16) for g in adamw.param_groups for p in g["params"])  # the token table
    before = [r[0] for r in _jobs.train(World(), {}, 0, 12, {"name": "muon", "lr": 0.01})["results"]]
    assert before[-1] < before[0]


def test_muon_needs_a_new_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(ConfigError, match=r"optim\.name: muon needs torch 2\.9"):
        build_optimizers(tiny(), Optim(name="muon"))


def test_nothing_to_train_is_said() -> None:
    with pytest.raises(ConfigError, match="Nothing to train"):
        build_optimizers(tiny().requires_grad_(False), Optim())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "deepspeed", "zero_stage": 2, "offload_params": True}, r"offload_params needs zero_stage: 3, got 2"),
        ({"kind": "deepspeed", "zero_stage": 0, "offload_optimizer": True}, "zero_stage 1, 2 or 3, got 0"),
        ({"kind": "deepspeed", "parallel": "fsdp2"}, r"engine\.parallel: fsdp2 needs engine\.kind: accelerate"),
        ({"offload_optimizer": True}, r"need engine\.kind: deepspeed"),
        ({"grad_checkpointing": True}, r"engine\.grad_checkpointing: TinyDualEncoder does not support it"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_engine(EngineConfig.model_validate(settings), Optim(), tiny(), World())


def test_muon_under_deepspeed_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"muon needs whole matrices"):
        build_engine(EngineConfig(kind="deepspeed"), Optim(name="muon"), tiny(), World())


@pytest.mark.parametrize("kind", ["accelerate", "deepspeed"])
def test_a_0d_parameter_is_refused(kind: str) -> None:
    model = tiny()
    model.temperature = torch.nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ConfigError, match=r"temperature is 0-D, .*; register it with shape"):
        build_engine(EngineConfig(kind=kind), Optim(), model, World())


def test_deepspeed_json_says_what_the_recipe_says() -> None:
    config = EngineConfig(kind="deepspeed", zero_stage=3, offload_params=True, offload_optimizer=True, precision="bf16")
    got = deepspeed_json(config, Optim(clip_grad_norm=0.7), world_size=4)
    assert got["gradient_clipping"] == 0.7
    assert got["zero_optimization"]["offload_param"] == {"device": "cpu"}
    assert got["torch_autocast"]["dtype"] == "bfloat16"
    assert "bf16" not in got
    assert deepspeed_json(EngineConfig(kind="deepspeed", zero_stage=0), Optim(), 1)["gradient_clipping"] == 0.0


def test_blocks_are_the_repeated_layers() -> None:
    assert len(repeated(tiny())) == 6


# --- the moving average ------------------------------------------------------------------------------------------


def test_half_life() -> None:
    """After half_life samples at new weights the average stands half way."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 0.0)
    ema = EMA(model, half_life=64)
    torch.nn.init.constant_(model.weight, 1.0)
    for _ in range(4):
        ema.update(model, 16)
    assert float(ema.state_dict()["weight"]) == pytest.approx(0.5)


def test_the_average_copies_buffers_and_frozen_weights_and_comes_back() -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 2))
    model[1].weight.requires_grad_(False)
    ema = EMA(model, half_life=10)
    with torch.no_grad():
        model[0].running_mean.fill_(3.0)
        model[1].weight.fill_(5.0)
        model[1].bias.fill_(1.0)
    ema.update(model, 1)
    state = ema.state_dict()
    assert state["0.running_mean"].tolist() == [3.0, 3.0]
    assert state["1.weight"].unique().tolist() == [5.0]
    again = EMA(model, half_life=10)
    again.load_state_dict(InMemory(state))
    assert all(torch.equal(v, state[k]) for k, v in again.state_dict().items())
    with pytest.raises(CheckpointError, match=r"no tensor 1\.bias"):
        again.load_state_dict(InMemory({k: v for k, v in state.items() if k != "1.bias"}))


# --- the step ----------------------------------------------------------------------------------------------------


def test_a_non_finite_step_changes_nothing_and_is_counted() -> None:
    spoiled = _jobs.train(World(), {}, 0, 3, nan_at=1)
    assert [r[2] for r in spoiled["results"]] == [0.0, 1.0, 0.0]
    assert set(spoiled["info"]["scalars"]["towers.image.head.weight"].values()) == {2.0}
    assert all(torch.isfinite(x).all() for x in spoiled["model"].values())


def test_batch_norm_statistics_move_once_with_micro_batches() -> None:
    from dualenc.losses.grad_cache import kept_running_statistics

    norm = torch.nn.BatchNorm1d(3)
    with kept_running_statistics(norm):
        norm(torch.randn(8, 3) + 4)
    assert norm.running_mean is not None
    assert norm.running_mean.tolist() == [0.0, 0.0, 0.0]
    assert norm.num_batches_tracked == 0


def test_micro_batches_bound_what_is_encoded_at_once() -> None:
    seen: list[int] = []
    model = tiny()
    model.towers["text"].register_forward_hook(lambda m, i, o: seen.append(len(o)))
    engine = build_engine(EngineConfig(), Optim(), model, World())
    result = train_step(engine, make_batch(0), PAIRS, build_loss(Component(name="info_nce")), micro=5)
    assert max(seen) <= 5
    assert len(seen) == 2 * 4
    assert result.grad_norm > 0


def test_state_of_another_optimizer_or_model_is_refused() -> None:
    saved = _jobs.train(World(), {}, 0, 1)
    engine = build_engine(EngineConfig(), Optim(name="sgd"), tiny(), World())
    with pytest.raises(CheckpointError, match=r"is of 'adamw', but the recipe has optim\.name: 'sgd'"):
        engine.load_optimizer_state(InMemory(saved["tensors"]), saved["info"])
    locked = tiny()
    locked.towers["image"].requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"has towers\.image\..*, which is not trained here"):
        build_engine(EngineConfig(), Optim(), locked, World()).load_optimizer_state(
            InMemory(saved["tensors"]), saved["info"]
        )
    wide = build_engine(EngineConfig(), Optim(), tiny(width=24), World())
    with pytest.raises(CheckpointError, match=r"has shape \["):
        wide.load_optimizer_state(InMemory(saved["tensors"]), saved["info"])


@pytest.mark.parametrize(("name", "parallel"), [("adamw", "auto"), ("sgd", "auto"), ("adamw", "fsdp2")])
def test_fused_optimizers_leave_a_step_out_on_the_device(name: str, parallel: str) -> None:
    """As on CUDA, where the host does not read whether the gradient was finite: the same as asking for it."""
    optim = Optim(name=name, lr=1e-2, momentum=0.9, weight_decay=0.1)  # type: ignore[arg-type]
    asked, told = (build_engine(EngineConfig(parallel=parallel), optim, tiny(), World()) for _ in range(2))  # type: ignore[arg-type]
    assert isinstance(told, AccelerateEngine)
    told.optimizers = build_optimizers(told.module, optim, fused=True)
    for step in range(4):
        for engine in (asked, told):
            batch = make_batch(step)
            if step in (0, 2):
                batch.inputs["image"][0] = float("nan")
            before = engine.model_state()
            done = train_step(engine, batch, PAIRS, build_loss(Component(name="info_nce")))
            assert bool(done.skipped) is (step in (0, 2))
            after = engine.model_state()
            assert bool(done.skipped) is all(torch.equal(before[k], after[k]) for k in before)
    for k, x in asked.model_state().items():
        assert torch.allclose(told.model_state()[k], x, atol=1e-5), k
    assert told.optimizer_state()[0].keys() == asked.optimizer_state()[0].keys()


def test_a_fused_optimizer_on_the_cpu_is_the_plain_one_up_to_rounding() -> None:
    """And it leaves a step out where it is told to, without being asked for its value."""
    found = {}
    for fused in (False, True):
        done = _jobs.train(World(), {}, 0, 12, {"lr": 0.01, "weight_decay": 0.2, "fused": fused})
        found[fused] = torch.tensor([r[0] for r in done["results"]])
    assert (found[True] - found[False]).abs().max() < 1e-5
    assert found[True][-1] < found[True][0]
    engine = AccelerateEngine(EngineConfig(), Optim(fused=True), tiny(), World())
    assert all(g["fused"] for o in engine.optimizers for g in o.param_groups)
    before = {k: p.detach().clone() for k, p in engine.parameters.items()}
    for bad in (True, False):
        for p in engine.parameters.values():
            p.grad = torch.full_like(p, float("nan") if bad else 1.0)
        assert bool(engine.step().skipped) is bad
        changed = [not torch.equal(p, before[k]) for k, p in engine.parameters.items()]
        assert not any(changed) if bad else all(changed)
    with pytest.raises(ConfigError, match=r"optim\.fused: torch has no fused SGD"):
        is_fused(Optim(name="sgd", fused=True), torch.device("cpu"), sharded=True)


def test_the_average_moves_without_reading_whether_a_step_was_skipped() -> None:
    torch.manual_seed(0)
    old, now = [torch.randn(n) for n in (7, 1000)], [torch.randn(n) for n in (7, 1000)]
    for share in (0.3, 0.7, 1e-4):
        for skipped in (None, torch.tensor(False), torch.tensor(True)):
            moved = [x.clone() for x in old]
            blend(moved, now, share, skipped)
            stays = skipped is not None and bool(skipped)
            for x, a, b in zip(moved, old, now, strict=True):
                assert torch.equal(x, a if stays else a.lerp(b, share))
