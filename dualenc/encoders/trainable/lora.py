"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685), put into a tower by peft and merged for every checkpoint.

W' = W + alpha / rank · B A. Merging works on the tensors by name, so it needs neither peft nor the trained module: a
bundle holds the plain architecture, and whatever reads it knows nothing of adapters.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dualenc.config import Lora
from dualenc.encoders.tower import Tower
from dualenc.errors import ConfigError, did_you_mean

_BASE = ".base_layer."
_A, _B = ".lora_A.default.weight", ".lora_B.default.weight"


def add_adapters(tower: Tower, config: Lora, where: str) -> None:
    """Put adapters beside the tower's layers, in place; only they (and the head, if asked) are trained after.

    B starts at 0, so the features stay what they were.

    Args:
        where: dotted key of the settings, for messages.

    Raises:
        ConfigError: if peft is not installed, or no layer can carry an adapter.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as e:
        if e.name != "peft":
            raise
        raise ConfigError(f"{where}: adapters need an extra: pip install 'dualenc[finetune]'") from e
    names = targets(tower, config, where)
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # any number: it only scales
        lora_dropout=config.dropout,
        target_modules=names,
        bias="none",
    )
    inject_adapter_in_model(settings, tower)
    if tower.channels_last:  # torch's convolutions are slow where weights and pictures differ
        tower.to(memory_format=torch.channels_last)
    for name, p in tower.named_parameters():
        p.requires_grad_(".lora_" in name or is_part(name, tower.fresh) or (config.head and name.startswith("head.")))


def targets(tower: Tower, config: Lora, where: str) -> list[str]:
    """Full names of the layers that get an adapter.

    ``auto``: all linear layers before the head; in a tower without any, all convolutions that are not grouped. The
    projections inside nn.MultiheadAttention (open_clip's ViTs) are left out: torch reads their weights past the
    layer's forward, so an adapter there would do nothing.

    Raises:
        ConfigError: naming what was not found.
    """
    inside = {
        f"{name}.{child}"
        for name, m in tower.named_modules()
        if isinstance(m, nn.MultiheadAttention)
        for child, _ in m.named_modules()
    }
    layers = {
        name: m
        for name, m in tower.named_modules()
        if isinstance(m, nn.Linear | nn.Conv2d)
        and not name.startswith("head")
        and name not in inside
        and not is_part(name, tower.fresh)
    }
    if config.targets == "auto":
        linear = [name for name, m in layers.items() if isinstance(m, nn.Linear)]
        found = linear or [name for name, m in layers.items() if isinstance(m, nn.Conv2d) and m.groups == 1]
        if not found:
            raise ConfigError(f"{where}.targets: {tower.component.name} has no linear layer or convolution to adapt")
        return found
    out: list[str] = []
    for ending in config.targets:
        matching = [name for name in layers if name == ending or name.endswith(f".{ending}")]
        if not matching:
            raise ConfigError(
                f"{where}.targets: no layer of {tower.component.name} that can be adapted is called {ending!r}. "
                f"{did_you_mean(ending, {name.rpartition('.')[2] for name in layers})}"
            )
        out += matching
    return list(dict.fromkeys(out))


def is_part(name: str, parts: tuple[str, ...]) -> bool:
    """Whether a parameter or layer of a tower is within one of its parts."""
    return name.partition(".")[0] in parts


def merged(state: Mapping[str, Tensor], factors: Mapping[str, float]) -> dict[str, Tensor]:
    """A state dict with adapters → that of the plain architecture, adapters merged into the weights they belong to.

    Args:
        factors: prefix of the adapted towers' names (``towers.image.``) → alpha / rank.
    """
    out: dict[str, Tensor] = {}
    for name, x in state.items():
        factor = next((f for prefix, f in factors.items() if name.startswith(prefix)), None)
        if factor is None:
            out[name] = x
        elif ".lora_" not in name:
            layer, base, rest = name.partition(_BASE)
            if base and rest == "weight":
                a, b = state[layer + _A], state[layer + _B]
                x = x + factor * (b.flatten(1) @ a.flatten(1)).view_as(x)
            out[f"{layer}.{rest}" if base else name] = x
    return out
