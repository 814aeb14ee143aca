"""Towers, temperature and bias: collated inputs → normalised features."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dualenc.config import LogitScale, Lora, Prompts, pair_name
from dualenc.config.stream import Stream
from dualenc.encoders.caption_head import CaptionHead, Captioning, Vocabulary, partners, refuse_unless_causal
from dualenc.encoders.context_head import ContextHead, InContext
from dualenc.encoders.hidden import Hidden, PlaceStates
from dualenc.encoders.negatives import joined, parted
from dualenc.encoders.places import features_of_places, heard
from dualenc.encoders.streams import BlockNoise, build_projector
from dualenc.encoders.tower import ImageTower, Tower
from dualenc.encoders.trainable import lock as locking
from dualenc.encoders.trainable.lora import add_adapters, merged
from dualenc.encoders.trainable.prompts import add_prompts
from dualenc.encoders.trainable.recompute import recompute_every
from dualenc.errors import ConfigError


class DualEncoder(nn.Module):
    """Two or more towers that share a feature space, and a temperature for each pair that is contrasted.

    Args:
        towers: modality → tower; all give ``embed_dim`` features.
        pairs: the pairs of modalities that are contrasted.
        scale: how the temperature starts, its bound, whether it is learned, and the bias.
        lock: modalities whose tower keeps its weights (LiT, Zhai et al. 2022): no gradient, always in eval mode.
        heads: of these, the ones whose head is trained all the same.
        unlocked: modality → how many of its tower's last blocks are trained; what stands before them is locked, what
            comes after them is trained too.
        shared: modality → the one whose tower encodes it too (two views of one thing).

    The temperature is kept as its logarithm, shape [1], fp32. The bound is applied here, in the forward: clamping the
    parameter after a step would act on a copy where an optimizer keeps masters of its own (DeepSpeed). Its gradient
    passes the bound unchanged (see :class:`_StraightClamp`).
    """

    def __init__(
        self,
        towers: Mapping[str, Tower],
        pairs: Iterable[tuple[str, str]],
        scale: LogitScale,
        lock: Iterable[str] = (),
        heads: Iterable[str] = (),
        unlocked: Mapping[str, int] | None = None,
        shared: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.shared = dict(shared or {})
        self.towers = nn.ModuleDict({m: tower for m, tower in towers.items() if m not in self.shared})
        self.pairs = [(a, b) for a, b in pairs]
        self.locked = tuple(lock)
        names = [pair_name(p) for p in self.pairs]
        log = math.log(scale.init)
        # As in CLIP the logarithm stays within [0, log max]; a start outside of that is taken at its word.
        self.bounds = (min(0.0, log), max(math.log(scale.max), log))
        start = {n: nn.Parameter(torch.full((1,), log), requires_grad=scale.learnable) for n in names}
        self.logit_scale = _Scales(start)
        bias = {n: nn.Parameter(torch.full((1,), scale.bias)) for n in names} if scale.bias is not None else {}
        self.logit_bias = _Biases(bias)
        self.heads = nn.ModuleDict()
        for m in self.locked:
            locking.lock(self.tower(m))
        for m in heads:
            self.tower(m).head.requires_grad_(True)
        self.unlocked = dict(unlocked or {})
        for m, groups in self.unlocked.items():
            locking.unlock_last(self.tower(m), groups, f"modalities.{m}.lock")
        self.adapters: dict[str, float] = {}
        self.hidden: dict[str, Hidden] = {}
        self.says_places: set[str] = set()
        """Modalities whose images' places are in the outputs, see :meth:`say_places`."""
        self.watcher: Callable[[str, Tensor], None] | None = None
        """Called in the forward with each modality's name and features, before the next tower runs."""
        self.rows: Mapping[str, Tensor] | None = None
        """Which slots the rows of the next forward belong to: see :func:`telling_rows`."""
        self.streams: dict[str, tuple[str, Stream]] = {}
        self.noise: dict[str, BlockNoise] = {}
        self.projectors = nn.ModuleDict()

    @property
    def modalities(self) -> list[str]:
        """What it encodes."""
        return [*self.towers, *self.shared]

    def forward(self, inputs: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
        """Encode whatever modalities ``inputs`` holds.

        Args:
            inputs: modality → its collated rows (a tensor, or a dict of tensors).

        Returns:
            ``features``: modality → [n_m, D], L2-normalised, fp32. ``logit_scale``: pair → [1], the bounded factor of
            the cosines (not its logarithm). ``logit_bias``: pair → [1]; empty where the model has none.
            ``frozen``: locked modality → [n_m, W], what its encoder itself says of the rows, before the head,
            L2-normalised, fp32, without gradient; losses such as CWCL take their targets from it. Then one group for
            each of the heads: modality → [n_m, E]; and what towers say of their rows besides, such as ``local`` →
            [n_m, K, D'], and ``negatives`` [n_m, K, D] of rows that bring wrong items.
        """
        features, frozen, places = {}, {}, dict[str, PlaceStates]()
        more: dict[str, dict[str, Tensor]] = {}
        for m, x in inputs.items():
            everything, k = joined(x)
            if m in self.hidden:
                self.hidden[m].begin()
            tower = self.tower(m)
            if m in self.says_places:
                with heard(tower, m) as last_block:
                    said = self.outputs_of(m, everything)
                said["places"] = normalised(features_of_places(tower, everything, last_block).flatten(1, 2))
            else:
                said = self.outputs_of(m, everything)
            if m in self.hidden:
                said |= {hidden_group(depth): y for depth, y in self.hidden[m].take(everything).items()}
            said = parted(said, k)
            features[m], own = normalised(said.pop("features")), said.pop("pooled")
            if m in self.hidden and (last := self.hidden[m].take_places()) is not None:
                places[m] = last.first(len(features[m]))
            if self.watcher is not None:
                self.watcher(m, features[m])
            if m in self.locked:
                frozen[m] = normalised(own.detach())
            for name, value in said.items():
                more.setdefault(name, {})[m] = value
        out = {
            **more,
            "features": features,
            "frozen": frozen,
            "logit_scale": self.logit_scale(*self.bounds),
            "logit_bias": self.logit_bias(),
        }
        for name, head in self.heads.items():
            if isinstance(head, CaptionHead):
                out[name] = self._captioned(head, inputs, places)
                continue
            if isinstance(head, ContextHead):
                out[name] = self._in_context(head, out)
                continue
            assert isinstance(head, nn.ModuleDict)
            use = {m: next((k for k in (m, self.shared.get(m, m)) if k in head), EVERY) for m in features}
            rows = out.get(name, features)  # hidden states of that name, or the features
            for part in head.values():
                rows = out.get(part.group, {}) if isinstance(part, GroupHead) else rows
            out[name] = {m: head[use[m]](x).float() for m, x in rows.items() if m in use and use[m] in head}
        return out

    def _captioned(
        self, head: CaptionHead, inputs: Mapping[str, Any], places: Mapping[str, PlaceStates]
    ) -> dict[str, Tensor]:
        """Modality of the captions → [n, 2], if both modalities are there."""
        text, of = head.asked.captions, head.asked.of
        if text not in places or of not in places:
            return {}
        y, z = places[text], places[of]
        counts = len(y.states), len(z.states)
        return {text: head(y, inputs[text], z, *partners(self.rows, text, of, counts, y.states.device))}

    def _in_context(self, head: ContextHead, out: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Modality of the texts → [n, K, D], if both modalities are there and samples list texts."""
        text, of = head.asked.texts, head.asked.of
        listed, features = out.get("negatives", {}), out["features"]
        if text not in listed or of not in features:
            return {}
        x, image = listed[text], features[of]
        which = partners(self.rows, text, of, (len(x), len(image)), x.device)
        return {text: head(x, image, out["places"][of], *which)}

    def keep_hidden(self, depths: Sequence[float], dim: int, rows: Mapping[str, Any]) -> None:
        """Let every forward also give the pooled hidden states at ``depths`` (shares of a tower's depth), each mapped
        to [n, ``dim``] by a head: the groups :func:`hidden_group`.

        Args:
            rows: modality → some collated rows, which tell the widths.

        Raises:
            ConfigError: a tower has no repeated blocks.
        """
        widths: dict[str, dict[str, int]] = {}
        was = self.training
        self.eval()
        for m, x in rows.items():
            kept = self._hidden(m)
            kept.pool(depths)
            kept.begin()
            with torch.no_grad():
                self.tower(m)(x)
            for depth, y in kept.take(x).items():
                widths.setdefault(hidden_group(depth), {})[m] = y.shape[1]
        self.train(was)
        for group, of in widths.items():
            self.add_head(group, {m: nn.Linear(width, dim) for m, width in of.items() if m not in self.shared})

    def say_places(self, m: str) -> None:
        """Let every forward also give ``places``: [n, K, D] unit features of the K places of each image, row by row,
        see :mod:`dualenc.encoders.places`.

        Raises:
            ConfigError: the modality's tower says nothing of places.
        """
        with heard(self.tower(m), f"modalities.{m}.encoder"):
            self.says_places.add(m)

    def add_context_head(self, name: str, asked: InContext) -> None:
        """Let every forward with both modalities also give the texts that samples list as the image changes them: the
        group ``name`` of the texts' modality, [n, K, D], see :class:`ContextHead`. Like :meth:`add_head` it serves a
        loss only.

        Raises:
            ConfigError: the images' tower says nothing of places.
        """
        self.say_places(asked.of)
        self.heads[name] = ContextHead(asked, self.tower(asked.of).embed_dim)

    def _hidden(self, m: str) -> Hidden:
        """What keeps the states of the tower that encodes ``m``, for all modalities that it encodes."""
        owner, tower = self.shared.get(m, m), self.tower(m)
        if owner not in self.hidden:
            kept = Hidden(tower, (), owner)
            self.hidden |= {x: kept for x in self.modalities if self.shared.get(x, x) == owner}
            # Its blocks may run only once for a batch, on its rows in their order.
            tower.keeps_shape, tower.length_groups = True, False
        return self.hidden[owner]

    def add_caption_head(self, name: str, asked: Captioning, rows: Mapping[str, Any], vocabulary: Vocabulary) -> None:
        """Let every forward with both modalities also say how likely its captions are: the group ``name`` of the
        captions' modality, [n, 2], see :class:`CaptionHead`. Like :meth:`add_head` it serves a loss only.

        Args:
            rows: modality → some collated rows, of both.

        Raises:
            ConfigError: a tower without repeated blocks, or a text tower that is not causal.
        """
        widths = {}
        was = self.training
        self.eval()
        for m in (asked.captions, asked.of):
            kept, x = self._hidden(m), rows[m]
            kept.keep_places()
            kept.begin()
            with torch.no_grad():
                self.tower(m)(x)
            kept.take(x)
            places = kept.take_places()
            assert places is not None
            widths[m] = places.states.shape[2]
        text = asked.captions
        where = f"modalities.{text}.encoder"
        refuse_unless_causal(self.tower(text), self.hidden[text], rows[text], vocabulary.size, where)
        self.train(was)
        self.heads[name] = CaptionHead(asked, widths[text], widths[asked.of], vocabulary)

    def add_head(self, name: str, head: Mapping[str, nn.Module]) -> None:
        """Add modality → module on the features [n, D], whose outputs [n, E] become the group ``name`` of the outputs.

        The module of ``EVERY`` serves all modalities that have none of their own.

        Heads serve losses only. They are parameters of this module, so that every engine and optimizer sees them, but
        no part of the model that is saved for use: see :func:`without_heads`.
        """
        self.heads[name] = nn.ModuleDict(head)

    def encode(self, modality: str, x: Any) -> Tensor:
        """One modality's collated rows → [n, D], L2-normalised, fp32.

        Under FSDP2 or ZeRO-3 call ``forward({modality: x})`` of the wrapped model instead.
        """
        return normalised(self.outputs_of(modality, x)["features"])

    def outputs_of(self, m: str, x: Any) -> dict[str, Tensor]:
        """What a modality's tower says of collated rows (``Tower.outputs``), not normalised; the features of one with a
        stream come from its projector."""
        if m not in self.streams:
            said: dict[str, Tensor] = self.tower(m)(x)
            return said
        projector, stream = self.streams[m]
        with self.noise[self.shared[m]].active(stream) if self.shared[m] in self.noise else nullcontext():
            said = self.tower(m)(x)
        return said | {"features": self.projectors[projector](said["pooled"])} if projector in self.projectors else said

    def add_streams(self, streams: Mapping[str, tuple[str, Stream]], rows: Mapping[str, Any]) -> None:
        """Give modalities that share a tower a stream of their own: see :class:`dualenc.config.stream.Stream`.

        Args:
            streams: modality → the modality whose projector it has, and its settings.
            rows: modality → some collated rows, which tell the width.

        Raises:
            ConfigError: dropout or drop path in a tower without repeated blocks.
        """
        was = self.training
        self.eval()
        for m, (owner, stream) in streams.items():
            tower = self.tower(m)
            if (stream.dropout or stream.drop_path) and self.shared[m] not in self.noise:
                self.noise[self.shared[m]] = BlockNoise(tower, f"modalities.{m}.stream")
            if owner == m:
                with torch.no_grad():
                    width = tower(rows[m])["pooled"].shape[1]
                if (projector := build_projector(stream, width, tower.embed_dim)) is not None:
                    self.projectors[m] = projector
        self.streams = dict(streams)
        self.train(was)

    def add_adapters(self, m: str, config: Lora) -> None:
        """Train low-rank adapters in the tower of ``m`` instead of its weights; :meth:`plain` merges them.

        Raises:
            ConfigError: see :func:`dualenc.encoders.trainable.lora.add_adapters`.
        """
        add_adapters(self.tower(m), config, f"modalities.{m}.lora")
        self.adapters[f"towers.{m}."] = config.alpha / config.rank

    def add_prompts(self, m: str, config: Prompts, at: int | None) -> None:
        """Train prompts in the tower of ``m`` instead of its weights; they stay part of the model.

        Args:
            at: the place of the first one in a text; None: they come after all places.

        Raises:
            ConfigError: see :func:`dualenc.encoders.trainable.prompts.add_prompts`.
        """
        add_prompts(self.tower(m), config, at, f"modalities.{m}.prompts")

    def plain(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of this module → that of the model for use: adapters merged, without heads of a loss."""
        return without_heads(merged(state, self.adapters))

    def tower(self, m: str) -> Tower:
        """The tower that encodes a modality."""
        tower = self.towers[self.shared.get(m, m)]
        assert isinstance(tower, Tower)
        return tower

    def trained_towers(self) -> dict[str, Tower]:
        """Modality → tower, of those that are not locked; a shared tower is listed under its owner."""
        return {m: self.tower(m) for m in self.towers if m not in self.locked}

    def train(self, mode: bool = True) -> DualEncoder:
        """As ``nn.Module.train``; locked towers, and the locked part of others, stay in eval mode."""
        super().train(mode)
        for m, groups in self.unlocked.items():
            locking.train_last(self.tower(m), groups, mode)
        for m in self.locked:
            self.tower(m).eval()
        return self

    def set_grad_checkpointing(self, enable: bool | int = True) -> None:
        """Trade time for memory in every tower that is trained; a number N: in every N-th block of it.

        Raises:
            ConfigError: a stream has dropout or drop path, which a recomputed block would not draw again.
        """
        if enable and self.noise:
            raise ConfigError(
                "engine.grad_checkpointing: blocks run again in the backward would not draw the dropout and drop path "
                "of modalities.NAME.stream; set these to 0, or use batch.micro to save memory"
            )
        for tower in self.trained_towers().values():
            if isinstance(enable, bool):
                tower.set_grad_checkpointing(enable)
            else:
                recompute_every(tower, enable)

    def set_channels_last(self) -> None:
        """Put the convolutional image towers in channels-last layout."""
        for tower in self.towers.values():
            if isinstance(tower, ImageTower):
                tower.set_channels_last()

    def group_lengths(self) -> None:
        """Let text towers leave padding out, see :attr:`Tower.length_groups`."""
        for tower in self.towers.values():
            assert isinstance(tower, Tower)
            tower.length_groups = not tower.keeps_shape

    def compile_towers(self, blocks: bool = False) -> None:
        """torch.compile each tower in place, or each of its repeated ``blocks``; names in the state dict stay as they
        are. A tower without blocks is compiled whole."""
        for tower in self.towers.values():
            assert isinstance(tower, Tower)
            tower.keeps_shape, tower.length_groups = True, False  # every new size is compiled again
            for part in (tower.blocks() if blocks else []) or [tower]:
                part.compile()


@contextmanager
def telling_rows(model: nn.Module, rows: Mapping[str, Tensor]) -> Iterator[None]:
    """Around a forward of ``model``, however an engine wraps it: which slots the rows of each modality belong to. Heads
    on two modalities of a sample need it; without it row i of one belongs to row i of the other.

    Args:
        model: a :class:`DualEncoder`; others are not told.
        rows: modality → [n_m], ``Batch.rows``.
    """
    if not isinstance(model, DualEncoder):
        yield
        return
    model.rows = rows
    try:
        yield
    finally:
        model.rows = None


def normalised(x: Tensor) -> Tensor:
    """Rows of length 1 in fp32: autocast may give bf16, but the norm and everything after it is fp32."""
    return nn.functional.normalize(x.float(), dim=-1)


def prefix(x: Tensor, dim: int | None) -> Tensor:
    """[n, D] → the first ``dim`` dimensions [n, dim], L2-normalised; all of them as they are for None or D.

    Raises:
        ConfigError: ``dim`` is not between 1 and D.
    """
    if dim is None or dim == x.shape[-1]:
        return x
    if not 1 <= dim < x.shape[-1]:
        raise ConfigError(f"dim: {dim} is not between 1 and the features' width, {x.shape[-1]}")
    return normalised(x[..., :dim])


def hidden_group(depth: float) -> str:
    """The group of the outputs with the pooled hidden states at a share of the towers' depth."""
    return f"hidden{round(1000 * depth)}"


class GroupHead(nn.Linear):
    """A linear head on another group of the outputs than the features, such as what a tower says of hidden places: for
    losses that train a map of it. All modules of a head read the same group."""

    def __init__(self, group: str, width: int, out: int) -> None:
        super().__init__(width, out)
        self.group = group


EVERY = "every"
"""In a head: the module that serves every modality without one of its own."""
_HEADS = "heads."


def is_head(name: str) -> bool:
    """Whether a tensor of the state dict belongs to a head that only a loss uses."""
    return name.startswith(_HEADS)


def without_heads(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state dict that belong to the model itself: all but the heads that only a loss uses."""
    return {k: v for k, v in state.items() if not is_head(k)}


def heads_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The others: the heads' tensors."""
    return {k: v for k, v in state.items() if is_head(k)}


class _StraightClamp(torch.autograd.Function):
    """Clamp whose gradient is that of the identity.

    A clamp's own gradient is 0 beyond its bound, so a temperature that once reached the bound would never come back.
    Dropping only the outward part is no way out: the sign of a rank's share of the gradient is not the sign of the
    sum, so the result would depend on the number of ranks. A straight gradient is linear; its cost is that the
    parameter itself may wander beyond the bound (at most lr a step under Adam) and has to walk back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *grad: Any) -> tuple[Tensor, None, None]:
        return grad[0], None, None


class _Callable(nn.ParameterDict):
    """A ParameterDict with a forward: calling it is what makes engines that shard parameters bring them here."""

    __call__ = nn.Module.__call__


class _Scales(_Callable):
    """pair → logarithm of its scale."""

    def forward(self, low: float, high: float) -> dict[str, Tensor]:
        """pair → exp of the bounded logarithm, [1], fp32."""
        out = {}
        for pair, log in self.items():
            bounded: Tensor = _StraightClamp.apply(log.float(), low, high)
            out[pair] = bounded.exp()
        return out


class _Biases(_Callable):
    """pair → logit bias."""

    def forward(self) -> dict[str, Tensor]:
        """pair → [1], fp32."""
        # A copy: wrappers such as DDP mistake a parameter among the outputs for an unused one.
        return {pair: bias.float().clone() for pair, bias in self.items()}
