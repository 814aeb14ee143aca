"""What a loss takes and returns."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dualenc.config import Section
from dualenc.data.batch import TeacherRows
from dualenc.distributed.world import world_size
from dualenc.encoders.caption_head import Captioning
from dualenc.encoders.context_head import InContext
from dualenc.errors import ConfigError
from dualenc.losses.blockwise.sweeps import How
from dualenc.memory import LearnedView, LossState, RunShape, SlowTowers
from dualenc.registry import Registry

SideName = Literal["a", "b"]
"""Which of the two sets of features that a loss compares."""


@dataclass(slots=True)
class LossOutput:
    """A loss on one rank.

    Attributes:
        value: scalar tensor. Its mean over ranks is the loss of the global batch, and the mean over ranks of its
            gradients (what every engine computes) is the gradient of that loss.
        metrics: name → scalar tensor without gradient, averaged alike: the mean over ranks is the global number.
    """

    value: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class Extras:
    """What a loss may get besides the features of a pair, by slot like them: [B, …], zero where a slot has none.

    Attributes:
        pair: the two modalities.
        a, b: name → rows of either side: the batch's ``extras`` (without gradient) and the model's further outputs
            (projections of the features, with gradient).
        both: name → rows of the pair as a whole, and the labels that ``data.sources.N.values`` names: [B] or
            [B, width], int64 or float64; ``dualenc.data.batch.present`` says which slots have one.
        teachers: name → what a teacher says of the batch.
        pairs: all pairs that are contrasted; empty where the loss is called by itself.
        step: of the run, counted from 0.
        numbers: [B] int64: the number of each slot's sample among all samples of the data, the same in every epoch, on
            any number of ranks; None where the loss is called by itself.
        seen: samples that the run has seen before this step; None: ``step`` batches of this size.
    """

    pair: tuple[str, str]
    a: dict[str, Tensor]
    b: dict[str, Tensor]
    both: dict[str, Tensor] = field(default_factory=dict)
    teachers: Mapping[str, TeacherRows] = field(default_factory=dict)
    pairs: Sequence[tuple[str, str]] = ()
    step: int = 0
    numbers: Tensor | None = None
    seen: int | None = None

    def samples_seen(self, slots: int) -> int:
        """Samples that the run has seen before this step; ``slots``: B of this rank's batch."""
        return self.step * slots * world_size() if self.seen is None else self.seen


class Loss(nn.Module):
    """A contrastive loss between two sets of features: what ``losses.build_loss`` returns.

    A subclass is registered in :data:`losses`, is built from its ``Config``, and has a ``forward`` that compares the
    local rows with the columns of all ranks and returns a :class:`LossOutput`::

        def forward(self, a, b, ids, logit_scale, logit_bias=None)                  # takes_extras = False
        def forward(self, a, b, ids, logit_scale, logit_bias=None, extras=None)     # takes_extras = True

    ``a, b``: [B, D] L2-normalised fp32 features of this rank's slots; B is equal on all ranks. ``ids``: [B] int64 pair
    ids: slots with equal ids, here or on another rank, are positives of each other, −1 marks a slot that takes part in
    nothing. ``logit_scale, logit_bias``: [1]; logits are ``logit_scale · cosine + logit_bias``.
    """

    Config: ClassVar[type[Section]] = Section
    """Its settings in a recipe."""
    takes_extras: ClassVar[bool] = False
    """Whether ``forward`` is also given :class:`Extras`: labels, a teacher's features, further outputs of the model."""
    needs: Sequence[str] = ()
    """Names of the labels (``data.sources.N.values``) that it cannot do without; set in ``__init__`` where they follow
    from the settings. A recipe without them is refused before anything is built."""
    names_pairs: Sequence[tuple[str, str]] = ()
    """Pairs that its settings name; the recipe must have them."""
    hidden: Sequence[float] = ()
    """Shares of the towers' depth at which it wants their hidden states, pooled and mapped to the features' width: the
    groups ``dualenc.encoders.dual_encoder.hidden_group(share)`` of its extras."""
    captioning: Mapping[str, Captioning] = MappingProxyType({})
    """Group of its extras → the head that says there, [B, 2], how likely each caption is given an item of another
    modality: see :class:`dualenc.encoders.caption_head.CaptionHead`."""

    in_context: Mapping[str, InContext] = MappingProxyType({})
    """Group of its extras → the head that says there, [B, K, D], how an image changes the texts that a sample lists:
    see :class:`dualenc.encoders.context_head.ContextHead`."""
    places_of: Sequence[str] = ()
    """Modalities whose images' places it wants: ``places`` [B, K, D] of its extras, see
    :meth:`dualenc.encoders.dual_encoder.DualEncoder.say_places`."""

    only_pair: tuple[str, str] | None = None
    """The one pair that it is for, if it is not for any."""

    def check_pairs(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Refuse pairs that it is not for.

        Raises:
            ConfigError: naming the first, and how to list the loss.
        """
        if self.only_pair is not None and (others := [p for p in pairs if {*p} != {*self.only_pair}]):
            said = "[{}, {}]".format(*self.only_pair)
            name = next((n for n in losses if losses[n] is type(self)), type(self).__name__)
            raise ConfigError(
                f"loss: {name} is for the pair {said} and not for {list(others[0])}; write {{name: {name}, pairs: "
                f"[{said}]}} in the list"
            )

    def heads(self, dim: int, modalities: Sequence[str]) -> Mapping[str, Mapping[str, nn.Module]]:
        """What it trains besides the towers: group → modality → a module on the features [n, ``dim``].

        A module under ``dualenc.encoders.dual_encoder.EVERY`` serves all modalities. The outputs [n, E] are
        ``extras.a[group]`` and ``extras.b[group]``.

        They become part of the model that is trained and of its checkpoints, and of no model that is saved for use.
        Batch statistics in them would depend on how the batch is cut into ranks and micro-batches.
        """
        return {}

    def memory(self, run: RunShape) -> Mapping[str, LossState]:
        """Begin what it remembers from step to step, and name it; called once, before the first step or a resume.

        It keeps hold of the states, reads them in ``forward`` and proposes their next values there. Training commits
        them after every step that was not skipped, and saves and restores them by these names.
        """
        return {}

    def gathers(self, global_batch: int, device: torch.device) -> Collection[SideName]:
        """The sides whose features ``forward`` gathers just as it is given them, so that this may begin as soon as
        their tower is done, while the next one runs. It changes when features are sent and no number.

        A side named here that ``forward`` does not gather is sent for nothing.
        """
        return ()

    def slow(self, pairs: Sequence[tuple[str, str]]) -> Mapping[str, SlowTowers]:
        """The slow copies of towers that it wants; what they say of the batch is in its extras.

        Args:
            pairs: those that it is for.
        """
        return {}

    def views(self, pairs: Sequence[tuple[str, str]]) -> Mapping[str, LearnedView]:
        """The views that a network of its own makes; they are rows of a modality, made before the towers run.

        Args:
            pairs: those that it is for.
        """
        return {}

    if TYPE_CHECKING:

        def __call__(self, *args: Any, **kwargs: Any) -> LossOutput: ...


class TiledConfig(Section):
    """How a loss is computed; every way gives the same numbers."""

    impl: Literal["auto", "plain", "tiled", "triton"] = Field(
        "auto", description="auto: the plain matrix below a global batch of 2048, else triton on CUDA, else tiled"
    )
    columns: Literal["gathered", "ring"] = Field(
        "gathered",
        description="ring: features travel around the ranks, so no rank holds all of them; not with impl: plain",
    )
    tile_mb: Annotated[float, Field(gt=0)] | None = Field(
        None, description="MiB of a tile of logits; default 2 on CPU (it stays in the cache), 128 on CUDA"
    )

    @model_validator(mode="after")
    def _ring_is_tiled(self) -> Self:
        if self.impl == "plain" and self.columns == "ring":
            raise ValueError(
                "impl: plain needs all columns at once, which columns: ring does not gather; write impl: auto"
            )
        return self

    def gathers(self, global_batch: int, device: torch.device) -> Collection[SideName]:
        """See :meth:`Loss.gathers`: of a loss whose plain form gathers both sides. Tiles need one, the ring none."""
        how = self.choose(global_batch, device)
        if how is None:
            return "a", "b"
        tiles: tuple[SideName, ...] = () if how.ring else ("b",)
        return tiles

    def choose(self, global_batch: int, device: torch.device) -> How | None:
        """How to compute a batch of this size on this device, or None for the plain matrix.

        Raises:
            ConfigError: if ``impl`` is triton and cannot be used here.
        """
        if self.impl == "triton" and (missing := why_no_triton(device)):
            raise ConfigError(f"loss.impl is triton, but {missing}; write auto or tiled")
        if self.impl == "plain" or (self.impl == "auto" and self.columns == "gathered" and global_batch < 2048):
            return None
        name = "triton_kernels" if self.impl != "tiled" and not why_no_triton(device) else "tiled"
        tile_mb = self.tile_mb or (128.0 if device.type == "cuda" else 2.0)
        return How(tile_mb, self.columns == "ring", importlib.import_module(f"dualenc.losses.blockwise.{name}"))


def why_no_triton(device: torch.device) -> str | None:
    """What is missing for the Triton kernels, or None."""
    if device.type != "cuda":
        return f"the features are on {device.type} and it needs CUDA"
    return None if importlib.util.find_spec("triton") else "the package triton is not installed"


losses: Registry[type[Any]] = Registry("loss", "dualenc.losses", needs=("Config",), base=Loss)
"""Name → a :class:`Loss`, built from one instance of its ``Config``."""
