"""How well the head of the loss ``caption`` knows the captions of shards: perplexity of a token before training, after
it, and after it given the item of another sample.

    python -m benchmarks.caption_perplexity RUN [SHARDS]

RUN is the folder of a run with that loss, such as ``runs/compare/quickstart/caption/seed-0``. SHARDS default to the
quickstart's drawings in a style that was not trained on. Perplexity is exp of the mean of −log p over all tokens.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualenc.checkpoint import save as ckpt
from dualenc.config import load_recipe
from dualenc.data.batch import map_tensors
from dualenc.data.shards.reader import SampleError, iter_samples
from dualenc.encoders import DualEncoder
from dualenc.encoders.caption_head import CaptionHead
from dualenc.errors import CheckpointError, ConfigError
from dualenc.losses import build_loss
from dualenc.model import Bundle
from dualenc.shipped import recipes_folder
from dualenc.train.build import add_heads, begin_model

SIZE = 100


def perplexities(run: Path, shards: str) -> dict[str, float]:
    """``untrained``, ``trained``, ``another item`` → perplexity of a token.

    Raises:
        CheckpointError: there is no checkpoint. ConfigError: the run has no caption head.
    """
    save = ckpt.newest_good(run)
    if save is None:
        raise CheckpointError(f"{run} has no checkpoint; name the folder of a run")
    recipe = load_recipe(str(save / "recipe.yaml"))
    bundle = begin_model(recipe, fresh=True)
    add_heads(build_loss(recipe.loss), bundle, recipe.seed)
    name, head = _head(bundle.model)
    given, inputs = recipe.data.sources[0].members, bundle.inputs
    members = {m: list(given.get(m) or inputs[m].default_members) for m in (head.asked.of, head.asked.captions)}
    batches = _batches(bundle, shards, members)
    out = {"untrained": _perplexity(bundle.model, name, batches)}
    weights = ckpt.trained_weights(save)
    shapes = weights.shapes
    with torch.no_grad():
        for key, x in bundle.model.state_dict().items():
            x.copy_(weights.read(key, 0, math.prod(shapes[key])).view(shapes[key]))
    out["trained"] = _perplexity(bundle.model, name, batches)
    others = [{**x, head.asked.of: map_tensors(x[head.asked.of], lambda v: v.roll(1, 0))} for x in batches]
    return out | {"another item": _perplexity(bundle.model, name, others)}


def _head(model: DualEncoder) -> tuple[str, CaptionHead]:
    for name, head in model.heads.items():
        if isinstance(head, CaptionHead):
            return name, head
    raise ConfigError("loss: the run has no caption head; name one that was trained with the loss caption")


def _batches(bundle: Bundle, shards: str, members: dict[str, list[str]]) -> list[dict[str, Any]]:
    rows: dict[str, list[Any]] = {m: [] for m in members}
    for _, found in iter_samples(shards, members):
        if isinstance(found, SampleError):
            raise found
        for m, made in rows.items():
            made.append(bundle.inputs[m].eval(bundle.inputs[m].decode(found.values[m])))
    starts = range(0, len(next(iter(rows.values()))), SIZE)
    return [{m: bundle.inputs[m].collate(made[k : k + SIZE]) for m, made in rows.items()} for k in starts]


@torch.no_grad()
def _perplexity(model: DualEncoder, name: str, batches: list[dict[str, Any]]) -> float:
    model.eval()
    total = sum(rows.double().sum(0) for x in batches for rows in model(x)[name].values())
    assert isinstance(total, Tensor)
    return math.exp(float(total[0] / total[1]))


def main(argv: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description="Perplexity of captions under the head of the loss caption.")
    parser.add_argument("run", type=Path)
    parser.add_argument("shards", nargs="?", default=str(recipes_folder() / "quickstart/data/val-style-000000.tar"))
    given = parser.parse_args(argv)
    for name, value in perplexities(given.run, given.shards).items():
        print(f"{name:14} {value:10,.2f}")


if __name__ == "__main__":
    main()
