"""``phases:`` of a recipe: what changes at a given number of samples within one run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dualenc.config.reading import merge
from dualenc.errors import ConfigError, did_you_mean

CHANGEABLE = ("modalities", "loss", "data", "batch", "optim", "schedule")
"""Keys of a recipe that a phase may change."""
_AT = re.compile(r"(?P<number>\d[\d_,]*(?:\.\d+)?) *(?P<unit>samples|steps|epochs|passes|%)")


class Phase(BaseModel):
    """From ``at`` on the recipe is another one: its other keys replace those of the recipe, as ``base:`` does."""

    model_config = ConfigDict(extra="allow", frozen=True)
    at: int | str = Field(
        description="where it begins: a number of samples, '1_000_000 samples', '500 steps', '2 epochs' or '80 %' of "
        "the run; rounded down to whole steps"
    )

    @field_validator("at")
    @classmethod
    def _readable(cls, at: int | str) -> int | str:
        if isinstance(at, str) and _AT.fullmatch(at.strip()) is None:
            raise ValueError("write where the phase begins as '1_000_000 samples', '500 steps', '2 epochs' or '80 %'")
        return at

    @model_validator(mode="after")
    def _changes_what_it_may(self) -> Phase:
        for key in self.changes:
            if key not in CHANGEABLE:
                raise ValueError(
                    f"a phase cannot change {key}. {did_you_mean(key, CHANGEABLE)} (a run keeps everything else)"
                )
        return self

    @property
    def changes(self) -> dict[str, Any]:
        """What it changes, nested as in a recipe; dotted keys are taken apart."""
        out: dict[str, Any] = {}
        for key, value in (self.model_extra or {}).items():
            node: Any = value
            for part in reversed(key.split(".")):
                node = {part: node}
            out = merge(out, node)
        return out

    def samples(self, batch: int, per_epoch: int, total: int) -> float:
        """Samples seen when it begins.

        Args:
            batch: samples of a step; per_epoch: of an epoch of the recipe's data; total: of the whole run.
        """
        if isinstance(self.at, int):
            return self.at
        found = _AT.fullmatch(self.at.strip())
        assert found is not None
        number = float(found["number"].replace("_", "").replace(",", ""))
        each = {"samples": 1, "steps": batch, "epochs": per_epoch, "passes": per_epoch, "%": total / 100}
        return number * each[found["unit"]]

    @property
    def in_steps(self) -> bool:
        """Whether it begins at a step of that number, whatever batches were before it."""
        return isinstance(self.at, str) and self.at.strip().endswith("steps")

    @property
    def in_percent(self) -> bool:
        """Whether it begins at a share of the run."""
        return isinstance(self.at, str) and self.at.strip().endswith("%")

    @property
    def in_epochs(self) -> bool:
        """Whether the data must be counted to say where it begins."""
        return isinstance(self.at, str) and self.at.strip().endswith(("epochs", "passes"))


def check_kept(number: int, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Refuse a phase that changes what a run keeps: the architecture, the kind of optimizer.

    Raises:
        ConfigError: naming the key.
    """
    if after["optim"].get("trajectory") and before["batch"]["size"] != after["batch"]["size"]:
        raise ConfigError(
            f"phases.{number}.batch.size: {after['batch']['size']!r} differs from the {before['batch']['size']!r} that "
            "the run begins with, and optim.trajectory weighs steps of one size; leave one of them out"
        )
    for section, key in (("optim", k) for k in ("name", "ema_samples", "trajectory")):
        if before[section].get(key) != after[section].get(key):
            raise ConfigError(
                f"phases.{number}.{section}.{key}: {after[section].get(key)!r} differs from the "
                f"{before[section].get(key)!r} that the run begins with, and a run keeps it; leave it out"
            )
    if list(before["modalities"]) != list(after["modalities"]):
        raise ConfigError(
            f"phases.{number}.modalities: a phase cannot add modalities; the run has {', '.join(before['modalities'])}"
        )
    for m, part in after["modalities"].items():
        was = before["modalities"][m]
        for key in ("kind", "shares", "init_from", "lora", "prompts"):
            if part.get(key) != was.get(key):
                raise ConfigError(f"phases.{number}.modalities.{m}.{key}: a run keeps it; leave it out")
        if part["encoder"]["name"] != was["encoder"]["name"]:
            raise ConfigError(
                f"phases.{number}.modalities.{m}.encoder.name: a run keeps its tower {was['encoder']['name']}; a phase "
                "can change settings that leave its weights alone, such as patch_dropout"
            )
