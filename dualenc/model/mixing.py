"""Two rows of every modality, to test whether its tower keeps rows apart."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from dualenc.data.modalities import ModalityInput
from dualenc.data.modalities.text import TextInput
from dualenc.encoders import DualEncoder, refuse_mixing, warn_of_untrained_norms


def check_trained_towers(
    model: DualEncoder, inputs: Mapping[str, ModalityInput], begun_elsewhere: Collection[str] = ()
) -> None:
    """Refuse trained towers that mix the rows of a batch; warn of frozen batch norms with untrained statistics.

    Args:
        begun_elsewhere: modalities whose weights come from another model later: no warning for them.

    Raises:
        ConfigError: see :func:`dualenc.encoders.refuse_mixing`.
    """
    mode = model.training
    model.train()
    for m, tower in model.trained_towers().items():
        described = json.dumps(inputs[m].describe()["config"], sort_keys=True)
        refuse_mixing(tower, two_rows(inputs[m]), f"modalities.{m}.encoder", described)
        if m not in begun_elsewhere:
            warn_of_untrained_norms(m, tower)
    model.train(mode)


def two_rows(source: ModalityInput) -> Any:
    """A batch of two rows that differ: two captions, or the modality's dummy row with noise on it."""
    if isinstance(source, TextInput):
        return source.collate([source.eval(source.decode(text)) for text in ("a photo of a dog", "two cats")])
    generator = torch.Generator().manual_seed(0)
    return _noisy(source.collate([source.dummy(), source.dummy()]), generator)


def _noisy(x: Any, generator: torch.Generator) -> Any:
    if isinstance(x, Mapping):
        return {k: _noisy(v, generator) for k, v in x.items()}
    if isinstance(x, Tensor) and x.dtype == torch.uint8 and x.ndim >= 3:
        return torch.randint(0, 256, x.shape, generator=generator, dtype=torch.uint8)
    if isinstance(x, Tensor) and x.is_floating_point():
        return x + 0.01 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    return x
