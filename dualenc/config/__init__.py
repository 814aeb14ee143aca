"""The recipe: everything about one run, as typed data; see :mod:`dualenc.config.recipe`."""

from dualenc.config.distill import Anchor, Distill, LookAhead, Teacher
from dualenc.config.modality import Lora, Modality, Prompts, Unlocked
from dualenc.config.phases import Phase
from dualenc.config.reading import apply_override, dump_yaml, load_yaml, parse, read_yaml, settings_as
from dualenc.config.recipe import (
    Batches,
    Budget,
    Checkpoints,
    Data,
    EngineConfig,
    Evals,
    Guard,
    LogitScale,
    Optim,
    Recipe,
    Schedule,
    Tracking,
    TrajectoryAverage,
    load_recipe,
    pair_name,
    phase_recipes,
)
from dualenc.config.section import Component, Positive, Section, Share
from dualenc.config.source import Source, Value

__all__ = [
    "Anchor",
    "Batches",
    "Budget",
    "Checkpoints",
    "Component",
    "Data",
    "Distill",
    "EngineConfig",
    "Evals",
    "Guard",
    "LogitScale",
    "LookAhead",
    "Lora",
    "Modality",
    "Optim",
    "Phase",
    "Positive",
    "Prompts",
    "Recipe",
    "Schedule",
    "Section",
    "Share",
    "Source",
    "Teacher",
    "Tracking",
    "TrajectoryAverage",
    "Unlocked",
    "Value",
    "apply_override",
    "dump_yaml",
    "load_recipe",
    "load_yaml",
    "pair_name",
    "parse",
    "phase_recipes",
    "read_yaml",
    "settings_as",
]
