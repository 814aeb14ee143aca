"""Which parameter gets which learning rate and weight decay, and the torch optimizers for that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dualenc.config import Optim
from dualenc.encoders.decay import decay_groups
from dualenc.encoders.tower import Tower
from dualenc.errors import ConfigError

BASE_LR = "base_lr"
"""Key of a parameter group: its learning rate at the schedule's peak."""


ROLES = ("matrix", "decayed", "plain", "temperature")


def parameters_by_role(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Trainable parameters in four roles.

    ``matrix`` (2-D) and ``decayed`` (token embeddings, convolutions) have weight decay; ``plain`` (gains, biases,
    positions) and ``temperature`` (scales and biases of the logits) have none.
    """
    named = dict(model.named_parameters())
    return {role: [named[n] for n in names] for role, names in _names_by_role(model).items() if names}


def _names_by_role(model: nn.Module) -> dict[str, list[str]]:
    decay, no_decay, temperature = decay_groups(model)
    tables = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    named = dict(model.named_parameters())
    matrices = [n for n in decay if named[n].ndim == 2 and n not in tables]
    others = [n for n in decay if n not in set(matrices)]
    return dict(zip(ROLES, (matrices, others, no_decay, temperature), strict=True))


def lr_factors(model: nn.Module, optim: Optim) -> dict[str, float]:
    """Name of each trained parameter → factor on its learning rate: ``lr_scale`` of its tower times
    ``layer_decay`` ^ (blocks between it and the head). Temperature and heads of a loss: 1.

    Raises:
        ConfigError: if a tower has no blocks to count.
    """
    out = {name: 1.0 for name, p in model.named_parameters() if p.requires_grad}
    towers = dict(model.named_children()).get("towers")
    for m, tower in towers.named_children() if towers is not None else ():
        levels: dict[str, int] = {}
        if optim.layer_decay is not None and isinstance(tower, Tower):
            if not tower.blocks():
                raise ConfigError(f"optim.layer_decay: {tower.component.name} ({m}) has no blocks; leave it out")
            levels = tower.levels()
        top, decay = max(levels.values(), default=0), optim.layer_decay or 1.0
        for name, p in tower.named_parameters():
            if p.requires_grad:
                out[f"towers.{m}.{name}"] = optim.lr_scale.get(m, 1.0) * decay ** (top - levels.get(name, top))
    return out


def build_optimizers(model: nn.Module, optim: Optim, fused: bool = False) -> list[torch.optim.Optimizer]:
    """The optimizers of a model: one, or with Muon two (Muon for 2-D matrices, AdamW for the rest).

    Every parameter group carries ``base_lr`` for :func:`set_lr_factor`. ``fused`` asks for the fused AdamW/SGD.

    Raises:
        ConfigError: if the model has nothing to train, or this torch has no Muon.
    """
    groups = parameter_groups(model, optim)
    if not groups:
        raise ConfigError("Nothing to train: every tower is locked and logit_scale.learnable is false; unlock one")
    if optim.name != "muon":
        return [_plain_optimizer(optim, groups, fused)]
    muon = vars(torch.optim).get("Muon")
    if muon is None:
        raise ConfigError(f"optim.name: muon needs torch 2.9 or newer, this is {torch.__version__}; use adamw")
    matrices = [g for g in groups if g["role"] == "matrix"]
    rest = [g for g in groups if g["role"] != "matrix"]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(muon(matrices, weight_decay=optim.weight_decay, momentum=optim.momentum))
    if rest:
        optimizers.append(_plain_optimizer(optim, rest, fused))
    return optimizers


def parameter_groups(model: nn.Module, optim: Optim) -> list[dict[str, Any]]:
    """One group for each weight decay and learning rate at the peak: ``params``, ``lr``, ``base_lr``,
    ``weight_decay``, ``role``; highest learning rate first."""
    named, factors = dict(model.named_parameters()), lr_factors(model, optim)
    temperature = optim.lr if optim.logit_scale_lr is None else optim.logit_scale_lr
    peaks = {"matrix": optim.muon_lr if optim.name == "muon" else optim.lr, "temperature": temperature}
    found: dict[tuple[int, float], dict[str, Any]] = {}
    for role, names in _names_by_role(model).items():
        # Without Muon matrices are decayed like the others: one group.
        kind = "decayed" if role == "matrix" and optim.name != "muon" else role
        decay = optim.weight_decay if role in ("matrix", "decayed") else 0.0
        for name in names:
            lr = peaks.get(role, optim.lr) * factors[name]
            group = {"params": [], "lr": lr, BASE_LR: lr, "weight_decay": decay, "role": kind}
            found.setdefault((ROLES.index(kind), -lr), group)["params"].append(named[name])
    return [found[key] for key in sorted(found)]


def _plain_optimizer(optim: Optim, groups: list[dict[str, Any]], fused: bool) -> torch.optim.Optimizer:
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, fused=fused or None)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=fused or None)


def is_fused(optim: Optim, device: torch.device, offloaded: bool = False, sharded: bool = False) -> bool:
    """Whether AdamW or SGD is torch's fused one: ``optim.fused``, and what ``auto`` means.

    Args:
        offloaded: DeepSpeed keeps the optimizer on the host.
        sharded: FSDP2 holds the parameters, for which torch has no fused SGD.

    Raises:
        ConfigError: the recipe asks for what does not exist.
    """
    lacking = sharded and optim.name == "sgd"
    if optim.fused is True and lacking:
        raise ConfigError("optim.fused: torch has no fused SGD for engine.parallel: fsdp2; use auto or false")
    if optim.fused != "auto":
        return optim.fused
    return device.type == "cuda" and not offloaded and not lacking


def moments(optim: Optim, trained: int, matrices: int) -> int:
    """Elements (or bytes) of what the optimizer keeps of ``trained`` parameters, of which Muon updates ``matrices``:
    two moments for AdamW, one momentum for SGD (none without) and for Muon."""
    if optim.name == "sgd":
        return trained if optim.momentum else 0
    return 2 * trained - (matrices if optim.name == "muon" else 0)


def set_lr_factor(groups: list[dict[str, Any]], factor: float) -> None:
    """Set every group's learning rate to ``factor`` times its peak."""
    for group in groups:
        group["lr"] = group[BASE_LR] * factor


@contextmanager
def stepping_if(finite: Tensor, optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[bool]:
    """Context around ``optimizer.step()``; yields whether to call it at all.

    Fused optimizers are always to be called: they are told on the device to change nothing where ``finite`` (a scalar
    bool tensor) is false, as ``torch.amp.GradScaler`` tells them, so the host waits for nothing. The others (the
    default on the CPU, where nothing is waited for, and Muon, which has no fused form) ask for the value.
    """
    if not all(group.get("fused") for o in optimizers for group in o.param_groups):
        yield bool(finite)
        return
    for optimizer in map(_as_amp_takes_it, optimizers):
        optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()
        _begin_momentum(optimizer)
    try:
        yield True
    finally:
        for optimizer in map(_as_amp_takes_it, optimizers):
            del optimizer.grad_scale, optimizer.found_inf


def _as_amp_takes_it(optimizer: torch.optim.Optimizer) -> Any:
    """torch reads ``grad_scale`` and ``found_inf`` from optimizers, whose class does not declare them."""
    return optimizer


def _begin_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Zeros where fused SGD has no momentum yet: if the first step is skipped, it would keep uninitialized memory."""
    if isinstance(optimizer, torch.optim.SGD):
        for group in optimizer.param_groups:
            for p in group["params"] if group["momentum"] else []:
                if p.grad is not None and optimizer.state[p].get("momentum_buffer") is None:
                    optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
