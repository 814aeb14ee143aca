"""Weights that go on in a changed model: a later phase, whose images may be larger or whose loss has new heads.

A tensor of the same name and shape goes on unchanged. Learned positions of another number are fitted: those of images
as a picture (bicubic, as released checkpoints are), those of texts and other sequences keep the first places and begin
anew after them. A new head of a loss begins as it would in a run of its own; one that is no longer there is dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from dualenc.checkpoint.ranges import Stored
from dualenc.encoders.dual_encoder import DualEncoder, is_head
from dualenc.encoders.released.migrations import resize_grid
from dualenc.encoders.tower import ImageTower
from dualenc.errors import ConfigError

_POSITIONS = re.compile(r"(^|\.)(positions|positional_embedding|pos_embed|position_embeddings?\.weight)$")


class Carried:
    """The saved tensors of the run so far as those of ``model``, as a :class:`~dualenc.checkpoint.ranges.Stored`.

    Args:
        saved: weights by name, or their average.
        model: whole, with the weights it begins with; it is read now.

    Attributes:
        fitted: names of tensors that are not the saved ones.

    Raises:
        ConfigError: a tensor that the model needs is not there, or has another shape and is not one of positions.
    """

    def __init__(self, saved: Stored, model: DualEncoder) -> None:
        self._saved = saved
        own = model.state_dict()
        self.shapes = {name: tuple(x.shape) for name, x in own.items()}
        self._own = {
            name: fitted(name, whole(saved, name), x, _is_image(model, name)) for name, x in _other(saved.shapes, own)
        }
        self.fitted = set(self._own)

    def read(self, name: str, start: int, end: int) -> Tensor:
        """Elements ``start`` … ``end`` − 1 of the flattened tensor."""
        if name in self._own:
            return self._own[name].flatten()[start:end]
        return self._saved.read(name, start, end)


class Kept:
    """The part of saved optimizer state that a changed model goes on with, as a :class:`Stored`.

    State of a parameter that is no longer trained, or whose shape changed, is dropped; that of one which was not
    trained before begins at zero.
    """

    def __init__(self, saved: Stored, trained: Mapping[str, tuple[int, ...]]) -> None:
        self._saved = saved
        self.shapes = {k: s for k, s in saved.shapes.items() if trained.get(k.rpartition("/")[0]) == tuple(s)}

    def read(self, name: str, start: int, end: int) -> Tensor:
        """Elements ``start`` … ``end`` − 1 of the flattened tensor."""
        return self._saved.read(name, start, end)


def whole(saved: Stored, name: str) -> Tensor | None:
    """A saved tensor in its shape, or None."""
    if name not in saved.shapes:
        return None
    shape = saved.shapes[name]
    return saved.read(name, 0, torch.Size(shape).numel()).view(shape)


def _other(saved: Mapping[str, tuple[int, ...]], own: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
    return [(name, x) for name, x in own.items() if saved.get(name) != tuple(x.shape)]


def fitted(name: str, old: Tensor | None, new: Tensor, image: bool) -> Tensor:
    """``old`` in the shape of ``new``, whose values are those a run of its own begins with.

    Raises:
        ConfigError: it cannot be.
    """
    if old is None and is_head(name):
        return new.detach().clone()
    check_fits(name, None if old is None else tuple(old.shape), tuple(new.shape))
    assert old is not None
    rows, count = old.reshape(-1, old.shape[-1]).float(), new.numel() // new.shape[-1]
    if image:
        made = resize_grid(rows, count)
        if made is None:
            raise ConfigError(
                f"phases: the positions {name} are no square grid, so they cannot be fitted to another size"
            )
    else:
        made = new.detach().reshape(-1, new.shape[-1]).float().clone()
        kept = min(len(rows), count)
        made[:kept] = rows[:kept]
    return made.reshape(new.shape).to(new.dtype)


def check_fits(name: str, old: tuple[int, ...] | None, new: tuple[int, ...]) -> None:
    """Refuse a tensor that cannot go on in another shape.

    Raises:
        ConfigError: naming it and both shapes.
    """
    if old == new or (old is None and is_head(name)):
        return
    if old is None:
        raise ConfigError(f"phases: a phase needs the tensor {name}, which the model before it does not have")
    if not _POSITIONS.search(name) or old[-1] != new[-1]:
        raise ConfigError(
            f"phases: {name} has shape {list(old)} before a phase and {list(new)} in it, and only learned positions "
            "can be fitted; keep the setting that changes it (a tower that pools to a grid needs one image size)"
        )


def _is_image(model: nn.Module, name: str) -> bool:
    words = name.split(".")
    return words[0] == "towers" and len(words) > 1 and isinstance(model.get_submodule(".".join(words[:2])), ImageTower)
