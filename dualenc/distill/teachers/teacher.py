"""Teachers of a run: where their features come from, and what the loss needs to know about each.

``online``: the model runs next to the student, without gradient, on its own preprocessing of the same items (the loader
brings them as the batch's ``views``). ``cached``: features that ``dualenc embed --recipe`` wrote. Both put the same
thing into the batch's ``teachers``, so the loss cannot tell which it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from dualenc.config import Recipe, Teacher, pair_name
from dualenc.data.batch import Batch, TeacherRows, map_tensors
from dualenc.data.dataset import TeacherView
from dualenc.data.modalities import ModalityInput
from dualenc.data.shards.index import ShardSet
from dualenc.distill.objective import TeacherInfo
from dualenc.distill.teachers.cache import Cache, as_student_sees, augmentation
from dualenc.errors import ConfigError, DataError
from dualenc.losses.objective import mark, to_slots
from dualenc.model import Bundle, load_model

Pair = tuple[str, str]
_CHUNK = 256


class TeacherSource(Protocol):
    """A teacher in a run.

    Attributes:
        name: of its rows in a batch's ``teachers``.
        embed_dim: D_t.
        modalities: student's modality → the teacher's name for it, for those it has.
        views: what the loader has to bring besides the student's inputs.
        redraw: modality → (seed, passes): how the student must draw its augmentation.
    """

    name: str
    embed_dim: int
    modalities: dict[str, str]
    views: dict[str, TeacherView]
    redraw: dict[str, tuple[int, int]]
    info: TeacherInfo

    def features(self, batch: Batch) -> TeacherRows:
        """Its output for a batch, by modality and slot, on the batch's device."""
        ...

    def covers(self, sets: Sequence[ShardSet]) -> None:
        """Refuse data that it has no features of, before the first step."""
        ...

    def describe(self) -> dict[str, Any]:
        """What must stay the same when a run is resumed."""
        ...


def build_teacher(
    k: int, config: Teacher, recipe: Recipe, student: Mapping[str, ModalityInput], device: torch.device
) -> TeacherSource:
    """The k-th teacher of a recipe.

    Raises:
        ConfigError: if there is no such model, or it has no pair of the student's.
        CheckpointError: if its weights are not those that the recipe names.
        DataError: for a cache that is missing, unfinished, of another teacher, or drawn in another way.
    """
    where = f"distill.teachers.{k}"
    if config.fusion is not None:
        from dualenc.distill.teachers.cross_encoder import FusionTeacher

        return FusionTeacher(k, config, recipe, student, device, where)
    if config.cache is not None:
        return CachedTeacher(k, config, recipe, student, where)
    return OnlineTeacher(k, config, recipe, student, device, where)


class OnlineTeacher:
    """A model that runs next to the student; see :class:`TeacherSource`. It is in no optimizer and no checkpoint."""

    def __init__(
        self,
        k: int,
        config: Teacher,
        recipe: Recipe,
        student: Mapping[str, ModalityInput],
        device: torch.device,
        where: str,
    ) -> None:
        assert config.model is not None
        self.name, self.config = f"teacher{k}", config
        self.bundle: Bundle = load_model(config.model, device=device)
        self.bundle.model.requires_grad_(False).eval()
        self.about = self.bundle.embedder().describe()
        check_weights(config, self.about, where)
        self.embed_dim = self.bundle.embed_dim
        self.modalities = shared_modalities(config, self.about, student, where)
        self.info = info_of(self.name, config, self.about, recipe.pairs, self.modalities, where)
        self.redraw: dict[str, tuple[int, int]] = {}
        self.views = {
            f"{self.name}/{m}": TeacherView(m, as_student_sees(self.bundle.inputs[t], student[m]), m in config.plain)
            for m, t in self.modalities.items()
        }

    @torch.no_grad()
    def features(self, batch: Batch) -> TeacherRows:
        """Runs the teacher's towers."""
        out = TeacherRows({})
        for m, t in self.modalities.items():
            rows = batch.rows[m]
            x = batch.views[f"{self.name}/{m}"]
            parts = []
            for k in range(0, max(len(rows), 1), _CHUNK):
                part = map_tensors(x, lambda v, k=k: v[k : k + _CHUNK])
                with torch.autocast(rows.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
                    parts.append(self.bundle.model.encode(t, part))
            out.features[m] = to_slots(torch.cat(parts).float(), rows, batch.size)
            out.has[m] = mark(rows, batch.size)
        return out

    def covers(self, sets: Sequence[ShardSet]) -> None:
        """Nothing to check: it runs on any data."""

    def describe(self) -> dict[str, Any]:
        """The weights' hash, and how its input is made."""
        return {"weights": self.about["weights"], "plain": self.config.plain}


class CachedTeacher:
    """Stored features; see :class:`TeacherSource`. With ``model`` in the recipe its hash is compared first."""

    def __init__(
        self, k: int, config: Teacher, recipe: Recipe, student: Mapping[str, ModalityInput], where: str
    ) -> None:
        assert config.cache is not None
        self.name, self.config = f"teacher{k}", config
        self.cache = Cache(config.cache)
        about, drawing = self.cache.description, self.cache.description.preprocessing
        self.about: dict[str, Any] = about.model
        if config.model is not None:
            wanted = load_model(config.model).embedder().describe()["weights"]
            if wanted != self.about["weights"]:
                raise DataError(
                    f"{where}.cache: {config.cache} holds features of weights {self.about['weights'][:12]}…, "
                    f"{config.model} has {wanted[:12]}…: write it again with dualenc embed {config.model}"
                )
        check_weights(config, self.about, where)
        self.embed_dim = int(self.about["embed_dim"])
        self.modalities = {m: t for m, t in about.modalities.items() if m in student}
        self.info = info_of(self.name, config, self.about, recipe.pairs, self.modalities, where)
        self.views: dict[str, TeacherView] = {}
        drawn = [m for m in self.modalities if m not in drawing["plain"]]
        for m in config.plain:
            if m in drawn:
                raise DataError(
                    f"{where}.plain: {m} was stored as the student sees it in {config.cache}; write the cache again "
                    f"with --plain {m}, or leave it out here"
                )
        now = augmentation(student, drawn)
        for m in drawn:
            if now[m] != drawing["augment"][m]:
                raise DataError(
                    f"{where}.cache: the views of {m} in {config.cache} were drawn with augment "
                    f"{drawing['augment'][m]}, the recipe has {now[m]}: write the cache again, or with --plain {m}"
                )
        self.redraw = {m: (int(drawing["seed"]), int(about.views[m])) for m in drawn}

    def features(self, batch: Batch) -> TeacherRows:
        """Looks the samples up.

        Raises:
            DataError: for a sample that the cache does not know, unless ``max_missing`` allows it.
        """
        gone = self.cache.missing([k for k, i in zip(batch.keys, batch.ids.tolist(), strict=True) if i >= 0])
        if gone and not self.config.max_missing:
            raise DataError(
                f"{self.config.cache} has no features of {gone[0]} ({len(gone)} of this batch's {batch.size} samples): "
                "write it again with dualenc embed, or allow it with the teacher's max_missing"
            )
        passes = batch.passes.tolist() if batch.passes is not None else [0] * batch.size
        out = TeacherRows({})
        device = batch.ids.device
        for m in self.modalities:
            x, has = self.cache.rows(m, batch.keys, passes)
            out.features[m], out.has[m] = x.to(device), has.to(device)
        return out

    def covers(self, sets: Sequence[ShardSet]) -> None:
        """See :meth:`Cache.covers`."""
        self.cache.covers(sets, self.config.max_missing)

    def describe(self) -> dict[str, Any]:
        """The weights' hash, and how the views were drawn."""
        return {
            "weights": self.about["weights"],
            "views": self.cache.description.views,
            "plain": self.cache.description.preprocessing["plain"],
            "seed": self.cache.description.preprocessing["seed"],
            "dtype": self.cache.description.dtype,
        }


# --- what both need ----------------------------------------------------------------------------------------------


def check_weights(config: Teacher, about: Mapping[str, Any], where: str) -> None:
    """Refuse a teacher whose hash is not the one the recipe names.

    Raises:
        DataError: naming both.
    """
    if config.weights is not None and not str(about["weights"]).startswith(config.weights):
        raise DataError(
            f"{where}.weights: expected {config.weights}, but {config.model or config.cache} has "
            f"{str(about['weights'])[: max(12, len(config.weights))]}…; it is another teacher, correct one of them"
        )


def shared_modalities(
    config: Teacher, about: Mapping[str, Any], student: Mapping[str, ModalityInput], where: str
) -> dict[str, str]:
    """Student's modality → the teacher's name for it.

    Raises:
        ConfigError: if ``modalities`` names one that the student or the teacher does not have.
    """
    for m, t in config.modalities.items():
        if m not in student or t not in about["modalities"]:
            raise ConfigError(
                f"{where}.modalities: {m}: {t} does not fit; the student has {list(student)}, the teacher "
                f"{list(about['modalities'])}"
            )
    named = {m: config.modalities.get(m, m) for m in student}
    return {m: t for m, t in named.items() if t in about["modalities"]}


def info_of(
    name: str,
    config: Teacher,
    about: Mapping[str, Any],
    pairs: Sequence[Pair],
    modalities: Mapping[str, str],
    where: str,
) -> TeacherInfo:
    """The teacher's logit scales by pair of the student.

    Raises:
        ConfigError: if the teacher has both sides of no pair, or no logit scale for one.
    """
    scale, bias = {}, {}
    for pair in ((a, b) for a, b in pairs):
        if any(m not in modalities for m in pair):
            continue
        a, b = (modalities[m] for m in pair)
        key = next((k for k in (pair_name((a, b)), pair_name((b, a))) if k in about["logit_scale"]), None)
        if key is None and config.logit_scale is None:
            raise ConfigError(
                f"{where}: the teacher contrasts {list(about['logit_scale'])}, so it has no logit scale for "
                f"{pair_name(pair)}; set logit_scale"
            )
        scale[pair] = config.logit_scale or float(about["logit_scale"][key])
        bias[pair] = float(about.get("logit_bias", {}).get(key, 0.0))
    if not scale:
        raise ConfigError(
            f"{where}: {config.model or config.cache} has {', '.join(about['modalities'])}, which covers none of the "
            f"student's pairs {[pair_name((a, b)) for a, b in pairs]}; name another teacher, or map its names with "
            "modalities"
        )
    return TeacherInfo(name, config.weight, scale, bias)


def with_teachers(batch: Batch, teachers: Sequence[TeacherSource]) -> Batch:
    """The batch with every teacher's output, and without the views, which are no longer needed."""
    outputs = {t.name: t.features(batch) for t in teachers}
    return replace(batch, teachers={**batch.teachers, **outputs}, views={})
