"""Which parameter gets which learning rate and weight decay, and the torch optimizers for that."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dualenc.config import Optim
from dualenc.encoders.dual_encoder import decay_groups
from dualenc.errors import ConfigError

BASE_LR = "base_lr"
"""Key of a parameter group: its learning rate at the schedule's peak."""


def parameters_by_role(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Trainable parameters in four roles.

    ``matrix`` (2-D) and ``decayed`` (token embeddings, convolutions) have weight decay; ``plain`` (gains, biases,
    positions) and ``temperature`` (scales and biases of the logits) have none.
    """
    decay, no_decay, temperature = decay_groups(model)
    tables = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    named = dict(model.named_parameters())
    matrices = [n for n in decay if named[n].ndim == 2 and n not in tables]
    others = [n for n in decay if n not in set(matrices)]
    roles = {"matrix": matrices, "decayed": others, "plain": no_decay, "temperature": temperature}
    return {role: [named[n] for n in names] for role, names in roles.items() if names}


def build_optimizers(model: nn.Module, optim: Optim, fused: bool = False) -> list[torch.optim.Optimizer]:
    """The optimizers of a model: one, or with Muon two (Muon for 2-D matrices, AdamW for the rest).

    Every parameter group carries ``base_lr`` for :func:`set_lr_factor`. ``fused`` asks for the fused AdamW/SGD.

    Raises:
        ConfigError: if the model has nothing to train, or this torch has no Muon.
    """
    parts = parameters_by_role(model)
    if not parts:
        raise ConfigError("Nothing to train: every tower is locked and logit_scale.learnable is false")
    if optim.name != "muon":
        return [_plain_optimizer(optim, _groups(parts, optim), fused)]
    muon = getattr(torch.optim, "Muon", None)
    if muon is None:
        raise ConfigError(f"optim.name: muon needs torch 2.9 or newer, this is {torch.__version__}; write adamw")
    matrices = parts.pop("matrix", [])
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        group = {"params": matrices, "lr": optim.muon_lr, BASE_LR: optim.muon_lr}
        optimizers.append(muon([group], weight_decay=optim.weight_decay, momentum=optim.momentum))
    if parts:
        optimizers.append(_plain_optimizer(optim, _groups(parts, optim), fused))
    return optimizers


def _groups(parts: dict[str, list[nn.Parameter]], optim: Optim) -> list[dict[str, Any]]:
    decayed = [p for kind in ("matrix", "decayed") for p in parts.get(kind, [])]
    temperature_lr = optim.lr if optim.logit_scale_lr is None else optim.logit_scale_lr
    wanted = [
        (decayed, optim.lr, optim.weight_decay),
        (parts.get("plain", []), optim.lr, 0.0),
        (parts.get("temperature", []), temperature_lr, 0.0),
    ]
    return [{"params": ps, "lr": lr, BASE_LR: lr, "weight_decay": decay} for ps, lr, decay in wanted if ps]


def _plain_optimizer(optim: Optim, groups: list[dict[str, Any]], fused: bool) -> torch.optim.Optimizer:
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, fused=fused or None)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=fused or None)


def set_lr_factor(groups: list[dict[str, Any]], factor: float) -> None:
    """Set every group's learning rate to ``factor`` times its peak."""
    for group in groups:
        group["lr"] = group[BASE_LR] * factor
