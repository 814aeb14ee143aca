"""Contrastive losses on features: one file per loss, a pure function and a thin module.

In your own training loop: :func:`info_nce`, :func:`sigmoid`, :func:`cwcl`, :func:`mse` (see
:mod:`dualenc.losses.functional`).

A recipe's ``loss: {name: …}`` is looked up in ``losses`` and built by :func:`build_loss`. To add a loss: write
``losses/yours.py`` with a registered subclass of :class:`Loss` (every file of this folder is imported), and its test.

``loss: [ … ]`` is a weighted sum of several (:mod:`dualenc.losses.weighted_sum`).

A loss has no parameters: logit scale and bias belong to the model. Parameters have to be reduced over ranks and
stepped, so they must be part of the module that the engine wraps. A loss that trains something gives it as ``heads``,
which training puts into the model, and reads their outputs from its extras. ``build_loss`` refuses a loss that holds
parameters itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pkgutil import iter_modules

from dualenc.config import Component, Data
from dualenc.data.values import check_needs
from dualenc.errors import ConfigError, did_you_mean

# These are the functions; the files of the same names are reached as modules, dualenc.losses.info_nce and so on.
from dualenc.losses.functional import cwcl, info_nce, mse, sigmoid
from dualenc.losses.loss import Extras, Loss, LossOutput, losses
from dualenc.losses.objective import objective
from dualenc.losses.weighted_sum import loss_of

for _found in iter_modules(__path__):
    import_module(f"{__name__}.{_found.name}")

__all__ = [
    "Extras",
    "Loss",
    "LossOutput",
    "build_loss",
    "check_loss",
    "cwcl",
    "info_nce",
    "losses",
    "mse",
    "objective",
    "sigmoid",
]


def build_loss(component: Component) -> Loss:
    """Build the loss a recipe names.

    Raises:
        ConfigError: for an unknown name (with the nearest known one) or setting.
    """
    loss = loss_of(component, "loss")
    if any(True for _ in loss.parameters()):
        raise TypeError(f"loss {component.name!r} has parameters outside the wrapped module; see dualenc.losses")
    return loss


def check_loss(loss: Loss, data: Data, pairs: Sequence[tuple[str, str]]) -> None:
    """Refuse a loss that needs a label which no source has, or names a pair which is not contrasted.

    Raises:
        ConfigError: naming it, and what to write.
    """
    check_needs(loss.needs, data)
    loss.check_pairs(pairs)
    known = {frozenset(p): p for p in pairs}
    for pair in loss.names_pairs:
        if frozenset(pair) not in known:
            near = did_you_mean("-".join(pair), ["-".join(p) for p in pairs])
            raise ConfigError(f"loss: {list(pair)} is not one of the recipe's pairs {[list(p) for p in pairs]}. {near}")
