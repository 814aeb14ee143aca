"""Models between a model and its fine-tuned version: (1 − α) A + α B of every weight (WiSE-FT, Wortsman et al. 2022).

Models that lie in one basin stay good in between: part of what fine-tuning gained, most of what it would have lost.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dualenc.encoders import Tower
from dualenc.encoders.dual_encoder import without_heads
from dualenc.errors import ConfigError
from dualenc.model.bundle import Bundle, state_digest
from dualenc.model.record import input_facts, tower_facts

_BY_NAME = ("own", "timm")
"""Families whose architecture is its name; the others' names say where weights came from, the architecture is kept."""


class Interpolation:
    """The models between ``a`` and ``b``; ``a``'s own model is what their weights are loaded into.

    Raises:
        ConfigError: naming the first field in which the two differ.
    """

    def __init__(self, a: Bundle, b: Bundle) -> None:
        refuse_others(a, b)
        self.bundle, self.provenance = a, dict(a.provenance)
        self._a, self._b = (_state(x) for x in (a, b))
        self._hashes = tuple(x.weights_hash or state_digest(s) for x, s in ((a, self._a), (b, self._b)))
        # A bound that holds for both: the parameter itself is what is interpolated.
        self.bundle.scale = a.scale.model_copy(update={"max": max(a.scale.max, b.scale.max)})
        (low, high), (low_b, high_b) = a.model.bounds, b.model.bounds
        self.bundle.model.bounds = (min(low, low_b), max(high, high_b))

    def at(self, alpha: float) -> Bundle:
        """The model at ``alpha``, with a hash of its own; the same object every time, in eval mode.

        At 0 and 1 the weights are those of ``a`` and ``b``, bit for bit.

        Raises:
            ConfigError: if ``alpha`` is not between 0 and 1.
        """
        state = between(self._a, self._b, alpha)
        model = self.bundle.model
        model.load_state_dict({**model.state_dict(), **state})  # it may have a loss's heads too
        model.eval()
        digest = {0.0: self._hashes[0], 1.0: self._hashes[1]}.get(alpha)
        self.bundle.weights_hash = digest or state_digest(state)
        two = {"a_weights": self._hashes[0], "b_weights": self._hashes[1], "alpha": alpha}
        self.bundle.provenance = {**self.provenance, "interpolated": two}
        return self.bundle


def between(a: Mapping[str, Tensor], b: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """(1 − α) a + α b, taken in fp64; integers (position tables, counters) come from the nearer end.

    The temperature is among the tensors as its logarithm, so it is interpolated geometrically.

    Raises:
        ConfigError: if ``alpha`` is not between 0 and 1.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"--alphas: {alpha:g} is not between 0 (the first model) and 1 (the second)")
    out = {}
    for name, x in a.items():
        y = b[name]
        if alpha in (0, 1) or not x.is_floating_point():
            out[name] = (x if alpha < 0.5 else y).clone()
        else:
            out[name] = ((1 - alpha) * x.double() + alpha * y.double()).to(x.dtype)
    return out


def refuse_others(a: Bundle, b: Bundle) -> None:
    """Raise ConfigError at the first field in which two models are not the same function of their weights."""
    _same(list(a.parts), list(b.parts), "modalities")
    _same([list(p) for p in a.model.pairs], [list(p) for p in b.model.pairs], "pairs")
    _same(a.embed_dim, b.embed_dim, "embed_dim")
    for m in a.parts:
        where = f"modalities.{m}"
        _same(a.parts[m].kind or m, b.parts[m].kind or m, f"{where}.kind")
        one, two = (input_facts(x.inputs[m]) for x in (a, b))
        _same(one["input"], two["input"], f"{where}.input")
        _same(one.get("tokens"), two.get("tokens"), f"{where}.input.tokenizer: ids of test texts")
        _same(_architecture(a, m), _architecture(b, m), f"{where}.encoder")
        _same(tower_facts(a, m), tower_facts(b, m), f"{where}.activation")
    one, two = ({k: [*v.shape] for k, v in _state(x).items()} for x in (a, b))
    _same(one, two, "tensors")


def _state(bundle: Bundle) -> dict[str, Tensor]:
    return {k: v.detach().cpu().clone() for k, v in without_heads(bundle.model.state_dict()).items()}


def _architecture(bundle: Bundle, m: str) -> dict[str, Any]:
    """The settings that a tower's function depends on, given its weights."""
    tower = bundle.model.towers[m]
    assert isinstance(tower, Tower)
    family, _, name = tower.component.name.partition("/")
    settings = json.loads(json.dumps(tower.component.settings, default=str))
    kept = {k: v for k, v in settings.items() if k not in ("pretrained", "resize_positions")}
    return {"family": family, **({"name": name} if family in _BY_NAME else {}), **_without_dropout(kept)}


def _without_dropout(x: Any) -> Any:
    """Drop dropout, patch dropout and stochastic depth, which act in training only."""
    if isinstance(x, dict):
        return {k: _without_dropout(v) for k, v in x.items() if "drop" not in k}
    return x


def _same(one: Any, two: Any, field: str) -> None:
    if isinstance(one, dict) and isinstance(two, dict):
        for k in [*one, *(k for k in two if k not in one)]:
            if k not in one or k not in two:
                has, lacks = ("first", "second") if k in one else ("second", "first")
                raise ConfigError(
                    f"interpolate: {field}.{k}: the {has} model has it, the {lacks} does not; only models of one "
                    "architecture can be mixed."
                )
            _same(one[k], two[k], f"{field}.{k}")
    elif json.dumps(one) != json.dumps(two):
        raise ConfigError(
            f"interpolate: {field}: {_shown(one)} in the first model, {_shown(two)} in the second; only models of one "
            "architecture and with the same inputs can be mixed."
        )


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"
