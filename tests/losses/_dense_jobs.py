"""Cells and lists of texts beside the batches of real towers, the dense loss in loops, and what the ranks run."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
import _caption_jobs
import _real_towers
from _caption_jobs import with_heads
from _real_towers import OPTIM, STEPS, inputs_of
from gradcheck import ENGINES

from dualenc.config import Component, EngineConfig
from dualenc.data.batch import WHOLE, Batch
from dualenc.distributed.world import World
from dualenc.encoders import DualEncoder
from dualenc.engine import build_engine
from dualenc.losses import Loss, build_loss
from dualenc.train.step import train_step

TOWERS = ("own convnet", "HF CLIP", "open_clip ViT")
TEXTS = ["a dog", "the old water", "one red cat"]
GRID = 4
"""Labelled cells of an image; a number of 3 or more is no text's."""


def loss_of(**more: Any) -> Loss:
    return build_loss(Component(name="dense", **{"context": 2, "width": 8, "heads": 2, **more}))


def model(name: str, loss: Loss | None = None) -> DualEncoder:
    """With the head, as training adds it; what starts at zero or next to it is moved."""
    return with_heads(name, loss or loss_of(), lambda _: 0.1)


def batch_of(name: str, step: int, rank: int = 0, world_size: int = 1) -> Batch:
    """That of the real towers, each sample with its three texts in an order of its own, one of which may be missing."""
    batch = _real_towers.batch_of(name, step, rank, world_size)
    source: Any = inputs_of(name)["text"]
    slots = list(range(rank, _real_towers.SIZE, world_size))
    rows = [slots[int(r)] for r in batch.rows["text"]]
    listed = [source.eval([TEXTS[(k + j) % 3]]) for j in rows for k in range(3)]
    made = source.collate(listed)
    length = max(made["ids"].shape[1], batch.inputs["text"]["ids"].shape[1])
    wide = {
        "ids": lambda x: nn.functional.pad(x, (0, length - x.shape[1]), value=source.pad_id),
        "mask": lambda x: nn.functional.pad(x, (0, length - x.shape[1])),
    }
    text = {k: f(batch.inputs["text"][k]) for k, f in wide.items()}
    text["negatives"] = {k: f(made[k]).view(len(rows), 3, length) for k, f in wide.items()}
    batch.inputs["text"] = text
    there = torch.ones(batch.size, 3, dtype=torch.long)
    cells = torch.stack([(torch.arange(GRID) * 7 + 3 * j + step) % 5 for j in slots])
    for k, j in enumerate(slots):
        there[k, 2] = int(j % 3 != 0)
    batch.extras["negatives_there"] = {"text": there}
    batch.extras["cells"] = {WHOLE: cells}
    return batch


def naive(net: DualEncoder, batch: Batch, loss: Loss) -> Tensor:
    """Every sample by itself, every cell in a loop, in double precision."""
    at = {m: {int(s): k for k, s in enumerate(r)} for m, r in batch.rows.items()}
    total, count = torch.zeros((), dtype=torch.float64), 0
    text = batch.inputs["text"]
    for s in range(batch.size):
        if s not in at["image"] or s not in at["text"] or int(batch.ids[s]) < 0:
            continue
        i, j = at["image"][s], at["text"][s]
        own = {"ids": text["ids"][j : j + 1], "mask": text["mask"][j : j + 1]}
        own["negatives"] = {k: v[j : j + 1] for k, v in text["negatives"].items()}
        out = net({"image": batch.inputs["image"][i : i + 1], "text": own})
        v = out["places"]["image"][0].double()
        group = "in_context" if loss.in_context else "negatives"
        t = out[group]["text"][0].double()
        side = math.isqrt(len(v))
        for cell, wanted in enumerate(batch.extras["cells"][WHOLE][s].tolist()):
            there = batch.extras["negatives_there"]["text"][s].tolist()
            if wanted >= 3 or not there[wanted]:
                continue
            y, x = divmod(cell, 2)
            place = v[int((y + 0.5) / 2 * side) * side + int((x + 0.5) / 2 * side)]
            scores = {k: (place * t[k]).sum() / 0.07 for k in range(3) if there[k]}
            total = total - (scores[wanted] - torch.logsumexp(torch.stack(list(scores.values())), 0))
            count += 1
    return total / max(count, 1)


def sweep(world: World, engines: list[str], names: list[str]) -> dict[str, Any]:
    """Rank 0: case → the parameters."""
    out: dict[str, Any] = {}
    for engine in engines:
        for name in names:
            for micro in (None, 1):
                loss = loss_of()
                built = build_engine(EngineConfig(**ENGINES[engine]), OPTIM, model(name, loss), world)
                for step in range(STEPS):
                    batch = batch_of(name, step, world.rank, world.world_size)
                    train_step(built, batch, [("image", "text")], loss, micro=micro)
                state = built.model_state()
                out[f"{engine}/{name}/{micro}"] = state if world.rank == 0 else {}
    return out


def one_process(name: str) -> dict[str, Tensor]:
    """The reference."""
    loss = loss_of()
    net = model(name, loss)
    return _caption_jobs.reference(net, lambda step: naive(net, batch_of(name, step), loss))


def differences(found: dict[str, Any]) -> dict[str, list[Any]]:
    """Case → largest relative difference from one process of any parameter, and its name."""
    return _caption_jobs.differences(found, one_process)
