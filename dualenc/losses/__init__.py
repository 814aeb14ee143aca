"""Contrastive losses on features: one file per loss, a pure function and a thin module.

In your own training loop: :func:`info_nce`, :func:`sigmoid`, :func:`cwcl`, :func:`mse` (see
:mod:`dualenc.losses.functional`).

A recipe's ``loss: {name: …}`` is looked up in ``losses`` and built by :func:`build_loss`. To add a loss: write
``losses/yours.py`` with a registered subclass of :class:`Loss` (every file of this folder is imported), and its test.

The losses here have no parameters: logit scale and bias belong to the model. Parameters have to be reduced over ranks
and stepped, so they must be part of the module that the engine wraps; a loss with parameters reads them from the
``outputs`` of the model's forward, like scale and bias. ``build_loss`` refuses a loss that holds its own.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from dualenc.config import Component, settings_as

# These are the functions; the files of the same names are reached as modules, dualenc.losses.info_nce and so on.
from dualenc.losses.functional import cwcl, info_nce, mse, sigmoid
from dualenc.losses.loss import Extras, Loss, LossOutput, losses
from dualenc.losses.objective import objective

for _found in iter_modules(__path__):
    import_module(f"{__name__}.{_found.name}")

__all__ = [
    "Extras",
    "Loss",
    "LossOutput",
    "build_loss",
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
    factory = losses[component.name]
    loss = factory(settings_as(factory.Config, component.settings, "loss"))
    if not isinstance(loss, Loss):
        raise TypeError(f"loss {component.name!r}: {factory.__name__} is not a subclass of dualenc.losses.Loss")
    if any(True for _ in loss.parameters()):
        raise TypeError(f"loss {component.name!r} has parameters outside the wrapped module; see dualenc.losses")
    return loss
