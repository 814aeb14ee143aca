"""Names that older or wrapped checkpoints use, and positional embeddings of another length.

Every rule is a public trap: a checkpoint written by a wrapper or an older library, whose values are right and whose
names are not.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dualenc.errors import CheckpointError

logger = logging.getLogger(__name__)

# (pattern, replacement; None drops the tensor, why). Applied in this order to every name.
RENAMED: tuple[tuple[str, str | None, str], ...] = (
    (r"(^|\.)_orig_mod\.", r"\1", "torch.compile wrapped the model or a part of it"),
    (r"(^|\.)_fsdp_wrapped_module\.", r"\1", "FullyShardedDataParallel wrapped the model or a part of it"),
    (r"(^|\.)_checkpoint_wrapped_module\.", r"\1", "activation checkpointing wrapped a part of it"),
    (r"^module\.", "", "DistributedDataParallel, or torch's AveragedModel, wrapped the model"),
    (r"(^|\.)n_averaged$", None, "the counter of torch's AveragedModel"),
    (r"(^|\.)embeddings\.position_ids$", None, "a buffer that transformers kept in files before 4.31 (LAION CLAP#113)"),
    (r"\.LayerNorm\.gamma$", ".LayerNorm.weight", "BERT as TensorFlow named it"),
    (r"\.LayerNorm\.beta$", ".LayerNorm.bias", "BERT as TensorFlow named it"),
)


def migrate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names of today. Wrappers stand in any order and depth; a ``model.`` before every name is
    one too (Lightning's, a training script's).

    Raises:
        CheckpointError: if two tensors would have one name (a file with a model and its wrapped copy).
    """
    names = {old: _renamed(str(old)) for old in tensors}
    kept = {old: name for old, name in names.items() if name is not None}
    while kept and all(name.startswith("model.") for name in kept.values()):
        kept = {old: name for old, n in kept.items() if (name := _renamed(n.removeprefix("model."))) is not None}
    out: dict[str, Tensor] = {}
    for old, name in kept.items():
        if name in out:
            raise CheckpointError(f"tensor {old!r} and another one are both {name!r} once wrapper names are removed")
        out[name] = tensors[old]
    return out


def _renamed(name: str) -> str | None:
    """The name after every rule, applied until none changes it; None for a tensor that is dropped."""
    before = None
    while name != before:
        before = name
        for pattern, new, _ in RENAMED:
            if re.search(pattern, name):
                if new is None:
                    return None
                name = re.sub(pattern, new, name)
    return name


def migrate_open_clip(cfg: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Apple's MobileCLIP files, whose names are neither open_clip's nor timm's; other tensors as they are."""
    if not any(k.startswith("image_encoder.model.") for k in tensors):
        return tensors
    from open_clip.convert import convert_state_dict
    from open_clip.model import CustomTextCLIP

    keys = ("vision_cfg", "text_cfg")
    with torch.device("meta"):  # only its names are asked for
        shape = CustomTextCLIP(int(cfg["embed_dim"]), *(dict(cfg[k]) for k in keys))
    out: dict[str, Tensor] = convert_state_dict(shape, tensors)
    return out


# --- positions ---------------------------------------------------------------------------------------------------

_POSITIONS = re.compile(r"(^|\.)(positional_embedding|pos_embed|position_embedding\.weight)$")


def resize_positions(tensors: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Fit learned positions to ``module``: images of another size, texts of another length.

    A grid is resized as a picture (bicubic, antialiased), its class token kept (Dosovitskiy et al. 2021, §3.2; the
    settings of open_clip and timm); a text's positions linearly. Tensors that fit are not touched.
    """
    own = module.state_dict()
    out = dict(tensors)
    for name, place in own.items():
        old = tensors.get(name)
        if old is None or old.shape == place.shape or not _POSITIONS.search(name) or old.shape[-1] != place.shape[-1]:
            continue
        rows, count = old.reshape(-1, old.shape[-1]).float(), place.numel() // place.shape[-1]
        picture = any("patch_embed" in k or k in ("conv1.weight", "attnpool.c_proj.weight") for k in own)
        new = resize_grid(rows, count) if picture else _line(rows, count)
        if new is None:
            continue  # load_exactly will name it
        logger.info("positions %s: %d resized to %d", name, len(rows), count)
        out[name] = new.reshape(place.shape).to(old.dtype)
    return out


def _line(rows: Tensor, count: int) -> Tensor:
    return nn.functional.interpolate(rows.T[None], size=count, mode="linear", align_corners=False)[0].T.contiguous()


def resize_grid(rows: Tensor, count: int) -> Tensor | None:
    """[extra + g², W] → [extra + h², W]; None if neither number is a square, even without a class token."""
    for extra in (0, 1):
        a, b = math.isqrt(len(rows) - extra), math.isqrt(count - extra)
        if a * a + extra == len(rows) and b * b + extra == count:
            token, grid = rows[:extra], rows[extra:].T.reshape(1, -1, a, a)
            resized = nn.functional.interpolate(grid, size=(b, b), mode="bicubic", antialias=True, align_corners=False)
            return torch.cat([token, resized.reshape(rows.shape[1], -1).T])
    return None
