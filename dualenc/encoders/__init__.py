"""Towers and the model made of them; every file below this folder is imported, so to add a tower, add its file."""

import math
import pkgutil
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from dualenc.config import Component
from dualenc.encoders.adapters.hf_naflex import check_grid
from dualenc.encoders.decay import decay_groups
from dualenc.encoders.dual_encoder import DualEncoder
from dualenc.encoders.families import encoder_origin, families, find, own_towers
from dualenc.encoders.tower import Tower, activations
from dualenc.encoders.trainable.rows import batch_norm_notes, refuse_mixing, warn_of_untrained_norms
from dualenc.encoders.trainable.unused import unused_parameters
from dualenc.errors import ConfigError

__all__ = [
    "DualEncoder",
    "Tower",
    "activations",
    "batch_norm_notes",
    "build_tower",
    "check_input",
    "decay_groups",
    "encoder_origin",
    "families",
    "input_defaults",
    "list_encoders",
    "own_towers",
    "refuse_mixing",
    "unused_parameters",
    "warn_of_untrained_norms",
]

for _module in pkgutil.walk_packages(__path__, f"{__name__}."):
    import_module(_module.name)


def list_encoders() -> dict[str, list[str]]:
    """Family → names, for ``dualenc list encoders``."""
    return {family: families[family]().names() for family in families}


def build_tower(
    kind: str, component: Component, describe: Mapping[str, Any], embed_dim: int, where: str = "encoder"
) -> Tower:
    """Build one tower; random weights come from torch's global generator, so seed it.

    Args:
        kind: the modality's kind ("image", "text", …).
        component: ``name`` FAMILY/NAME and that tower's settings.
        describe: what the modality's input says of itself (``ModalityInput.describe()``).
        embed_dim: D of the shared space.
        where: dotted key of the component, for messages.

    Raises:
        ConfigError: naming the key: unknown family, name or setting, or an input the tower cannot take.
        CheckpointError: if pretrained weights do not fit.
    """
    family, name, config = find(kind, component, where)
    tower = family.build(kind, name, config, describe, embed_dim, where)
    check_grid(tower, describe, where)
    return tower


def input_defaults(kind: str, component: Component, where: str = "encoder") -> dict[str, Any]:
    """Settings of the modality's ``input`` that this encoder was made with; defaults for the recipe."""
    family, name, config = find(kind, component, where)
    return family.input_defaults(kind, name, config)


def check_input(
    kind: str,
    component: Component,
    describe: Mapping[str, Any],
    reference: Mapping[str, Any] | None = None,
    where: str = "input",
) -> None:
    """Refuse an input that pretrained weights were not made for.

    Args:
        describe: the input as it would be built.
        reference: the input built from the encoder's own defaults: two tokenizers of different names are equal if
            their hashes are. Without it names are compared.

    Raises:
        ConfigError: naming the field, its value and the one to write.
    """
    family, name, config = find(kind, component, "encoder")
    got = describe["config"]
    for key, need in family.demands(kind, name, config).items():
        have = got.get(key)
        if key == "tokenizer":
            same = have == need
            if reference is not None:
                same = describe["tokenizer"]["sha256"] == reference["tokenizer"]["sha256"]
        elif key == "context_length":
            # A shorter context cuts long captions but changes no feature of the others.
            same = int(have) <= int(need)
        elif isinstance(need, Mapping):
            # Of a section only what the weights depend on; name the first key that differs.
            inner = next((k for k, v in need.items() if not _equal((have or {}).get(k), v)), None)
            same = inner is None
            if inner is not None:
                key, have, need = f"{key}.{inner}", (have or {}).get(inner), need[inner]
        else:
            same = _equal(have, need)
        if not same:
            raise ConfigError(
                f"{where}.{key}: the weights of {component.name} were made with {_shown(need)}, got {_shown(have)}. "
                "Leave the key out to have the right one"
                + (", or add encoder.resize_positions: true." if key in ("size", "context_length") else ".")
            )


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(math.isclose(x, y, abs_tol=1e-6) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in value) + "]"
    return repr(value)
