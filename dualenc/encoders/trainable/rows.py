"""Does a tower keep the rows of a batch apart?

If it does not (batch norm in training mode, a router with a capacity, padding that is seen), a row's gradient depends
on the other rows of the batch, and so on the number of ranks and the micro-batch. Frozen batch norms are fine; anything
else is found here, by a test before the first step.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dualenc.config import Component
from dualenc.encoders.tower import Tower, batch_norms
from dualenc.errors import ConfigError

logger = logging.getLogger(__name__)

TOLERANCE = 1e-3
"""Largest difference that rounding may cause between a row alone and in a batch, relative to the largest feature."""

_known: dict[str, str | None] = {}
"""Architecture and input → what :func:`mixing_module` found: a recipe's towers are tested once per process."""


def refuse_mixing(tower: Tower, batch: Any, where: str, described: str) -> None:
    """Refuse a tower whose rows depend on each other, in the mode it is in (training mode, parts of it frozen).

    Args:
        batch: two different collated rows of its modality.
        where: dotted key of the encoder, for the message.
        described: the input in words; with the architecture it is the key of cached results.

    Raises:
        ConfigError: naming the first module that mixes them.
    """
    if not tower.freeze_bn:
        return  # the recipe asks for batch statistics, so rows mix anyway
    key = f"{tower.component.model_dump_json()} {described} {[m.training for m in tower.modules()]}"
    if key not in _known:
        _known[key] = mixing_module(tower, batch)
    found = _known[key]
    if found is not None:
        raise ConfigError(
            f"{where}: in {tower.component.name} a row's features depend on the other rows of the batch (through "
            f"{found}), so its gradient would depend on the number of ranks and on batch.micro. Choose another "
            "encoder, or lock it (lock: true)" + _escape(tower.component)
        )


def _escape(component: Component) -> str:
    family = component.name.partition("/")[0]
    return "." if family == "own" else "; or set freeze_bn: false to train it anyway."


def mixing_module(tower: Tower, batch: Any) -> str | None:
    """The first module through which one row reaches another, or "its forward"; None if rows stay apart.

    Two things are tried: in the mode the tower is in, whether the gradient of the first row's features reaches the
    second row (dropout does not matter for that); in eval mode, whether the first row alone has the same features.
    """
    with untouched(tower):
        if not _reaches(tower, batch) and _same_alone(tower, batch):
            return None
        return _first_that_mixes(tower, batch) or "its forward"


def _reaches(tower: Tower, batch: Any) -> bool:
    leaves: list[Tensor] = []
    hooks = [m.register_forward_hook(_collector(leaves)) for m in tower.modules() if isinstance(m, nn.Embedding)]
    try:
        features = tower.encode(_with_leaves(batch, leaves))
    finally:
        for hook in hooks:
            hook.remove()
    return _touches_second(features[0], leaves)


def _touches_second(first: Tensor, leaves: list[Tensor]) -> bool:
    weights = torch.linspace(0.5, 1.5, first.numel(), dtype=first.dtype).view_as(first)
    rows = [x for x in leaves if x.ndim and len(x) == 2]
    if not rows or not first.requires_grad:
        return False
    grads = torch.autograd.grad((first * weights).sum(), rows, allow_unused=True)
    return any(g is not None and bool((g[1].nan_to_num() != 0).any()) for g in grads)


def _collector(leaves: list[Tensor]) -> Any:
    """A forward hook that keeps what an embedding gives for each row: token ids themselves have no gradient."""

    def keep(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        if not out.requires_grad:
            out = out.requires_grad_()
        leaves.append(out)
        return out

    return keep


def _with_leaves(x: Any, leaves: list[Tensor]) -> Any:
    """The same batch, whose numbers and pixels are tensors of the graph."""
    if isinstance(x, dict):
        return {k: _with_leaves(v, leaves) for k, v in x.items()}
    if isinstance(x, Tensor) and (x.is_floating_point() or (x.dtype == torch.uint8 and x.ndim >= 3)):
        leaves.append(x.detach().float().requires_grad_())
        return leaves[-1] * 1  # a tower may write into its input
    return x


def _same_alone(tower: Tower, batch: Any) -> bool:
    modes = [(m, m.training) for m in tower.modules()]
    tower.eval()
    with torch.no_grad():
        together, alone = tower.encode(batch)[0], tower.encode(_first_row(batch))[0]
    for m, mode in modes:
        m.training = mode
    return bool((together - alone).abs().max() <= TOLERANCE * together.abs().max())


def _first_row(x: Any) -> Any:
    if isinstance(x, dict):
        return {k: _first_row(v) for k, v in x.items()}
    return x[:1] if isinstance(x, Tensor) else x


def _first_that_mixes(tower: Tower, batch: Any) -> str | None:
    """The first module without children whose own first output row depends on its second input row."""
    names = {id(m): name for name, m in tower.named_modules()}
    found: list[str] = []

    def look(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        x = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if found or x is None or not x.is_floating_point() or not isinstance(out, Tensor) or not out.ndim:
            return
        if not x.ndim or len(x) != 2 or len(out) != 2 or not out.requires_grad:
            return
        if x.requires_grad and _touches_second(out[0], [x]):
            found.append(f"{names[id(module)]}, {type(module).__name__}")

    hooks = [
        m.register_forward_hook(look, with_kwargs=True) for m in tower.modules() if next(m.children(), None) is None
    ]
    try:
        tower(_with_leaves(batch, []))
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Restore buffers (running statistics) and torch's generator after a forward."""
    kept = [(x, x.clone()) for x in model.buffers()]
    with torch.random.fork_rng(devices=[]):
        yield
    with torch.no_grad():
        for x, value in kept:
            x.copy_(value)


# --- notes on batch norms ---------------------------------------------------------------------------------


def batch_norm_notes(towers: dict[str, Tower]) -> list[str]:
    """A sentence for every trained tower with batch norms: what their statistics are in training."""
    out = []
    for m, tower in towers.items():
        norms = batch_norms(tower)
        if not norms:
            continue
        if tower.freeze_bn:
            out.append(
                f"{m}: {len(norms)} batch norms of {tower.component.name} keep their running statistics in training "
                "(freeze_bn: true); their gains and biases are trained."
            )
        else:
            out.append(
                f"{m}: {len(norms)} batch norms of {tower.component.name} use the statistics of each micro-batch "
                "(freeze_bn: false), so the gradient depends on the number of ranks and on batch.micro."
            )
    return out


def warn_of_untrained_norms(m: str, tower: Tower) -> None:
    """Warn of frozen batch norms with untrained statistics: they do not normalise."""
    norms: list[Any] = batch_norms(tower)
    if not norms or not tower.freeze_bn:
        return
    if all(n.running_mean is not None and not n.running_mean.any() and bool((n.running_var == 1).all()) for n in norms):
        logger.warning(
            "%s: %s starts from random weights with frozen batch norms, which learns poorly: start from released "
            "weights, or set freeze_bn: false (the gradient then depends on ranks and micro-batches).",
            m,
            tower.component.name,
        )
