"""The caption head written as loops over samples and tokens, real towers with it, and what the ranks run."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
import _real_towers
from _real_towers import CLIP, LR, MOMENTUM, OPTIM, STEPS, batch_of, inputs_of
from _tiny import naive_info_nce
from gradcheck import ENGINES

from dualenc.config import Component, EngineConfig
from dualenc.data.batch import Batch
from dualenc.distributed.world import World
from dualenc.encoders import DualEncoder, caption_head
from dualenc.engine import build_engine
from dualenc.losses import Loss, build_loss
from dualenc.train.build import add_heads
from dualenc.train.step import train_step

TOWERS = ("own convnet", "HF CLIP", "open_clip ViT")
"""A map and tokens to look at; three causal text towers."""
GROUP = "caption__caption"
WEIGHT = 0.7


def loss_of(**more: Any) -> Loss:
    part = {"name": "caption", "layers": 2, "heads": 2, "weight": WEIGHT, **more}
    return build_loss(Component(name="sum", terms=["info_nce", part]))


class _Bundle:
    """What ``add_heads`` reads of a bundle."""

    def __init__(self, name: str) -> None:
        self.model, self.inputs, self.embed_dim = _real_towers.build(name, "info_nce"), inputs_of(name), 16


def with_heads(name: str, loss: Loss, move: Callable[[Tensor], float]) -> DualEncoder:
    """The towers with what the loss adds, as training does it; ``move``: by how much a vector of the heads is moved."""
    bundle: Any = _Bundle(name)
    add_heads(loss, bundle, 0)
    torch.manual_seed(2)
    with torch.no_grad():
        for p in bundle.model.heads.parameters():
            if p.ndim == 1 and move(p):
                p.add_(move(p) * torch.randn_like(p))
    out: DualEncoder = bundle.model
    return out


def model(name: str, loss: Loss | None = None) -> DualEncoder:
    """What starts at zero is moved, as in ``_real_towers.build``."""
    return with_heads(name, loss or loss_of(), lambda p: 0.0 if p.any() else 0.05)


# --- loops --------------------------------------------------------------------------------------------------------


def _norm(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    x = x - x.mean()
    return x / (x.square().mean() + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def _linear(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return w[f"{name}.weight"] @ x + w[f"{name}.bias"]


def _look(query: Tensor, keys: list[Tensor], values: list[Tensor], heads: int) -> Tensor:
    """Softmax attention of one query, head by head."""
    size, out = len(query) // heads, []
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        e = [torch.exp((query[part] * k[part]).sum() / math.sqrt(size)) for k in keys]
        out.append(sum(x / sum(e) * v[part] for x, v in zip(e, values, strict=True)))
    return torch.cat(out)


def loop(w: dict[str, Tensor], heads: int, states: Tensor, ids: list[int], seen: Tensor) -> list[Tensor]:
    """−log p of every token of one caption but the first.

    Args:
        w: the head's tensors.
        states: [≥ L, W] of the text tower; ids: the L real tokens.
        seen: [K, M], the other tower's states.
    """
    layers = len({k.split(".")[1] for k in w if k.startswith("blocks.")})
    memory = [_linear(_norm(s, w, "norm_memory"), w, "memory") for s in seen]
    xs = [_norm(states[t], w, "norm_text") for t in range(len(ids) - 1)]
    for layer in range(layers):
        at = f"blocks.{layer}"
        qkv = [_linear(_norm(x, w, f"{at}.norm1"), w, f"{at}.attention.qkv").chunk(3) for x in xs]
        looks = [
            _look(q, [k for _, k, _ in qkv[: t + 1]], [v for _, _, v in qkv[: t + 1]], heads)
            for t, (q, _, _) in enumerate(qkv)
        ]
        xs = [x + _linear(y, w, f"{at}.attention.out") for x, y in zip(xs, looks, strict=True)]
        kv = [_linear(m, w, f"{at}.seen").chunk(2) for m in memory]
        for t, x in enumerate(xs):
            q = _linear(_norm(x, w, f"{at}.norm2"), w, f"{at}.query")
            x = x + _linear(_look(q, [k for k, _ in kv], [v for _, v in kv], heads), w, f"{at}.out")
            hidden = _linear(_norm(x, w, f"{at}.norm3"), w, f"{at}.mlp.0")
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
            xs[t] = x + _linear(hidden, w, f"{at}.mlp.2")
    out = []
    for t, x in enumerate(xs):
        logits = w["tokens"] @ _norm(x, w, "norm")
        out.append(torch.log(torch.exp(logits).sum()) - logits[ids[t + 1]])
    return out


# --- training -----------------------------------------------------------------------------------------------------


def pairs_of(batch: Batch) -> list[tuple[int, int, int]]:
    """(slot, row of the image, row of the text) of slots that have both and an id."""
    at = {m: {int(s): k for k, s in enumerate(r)} for m, r in batch.rows.items()}
    both = [s for s in range(batch.size) if s in at["image"] and s in at["text"] and int(batch.ids[s]) >= 0]
    return [(s, at["image"][s], at["text"][s]) for s in both]


def alone(net: DualEncoder, batch: Batch) -> tuple[list[dict[str, Any]], list[int]]:
    """The outputs for each sample encoded by itself, without padding, and the samples' ids."""
    out, ids = [], []
    for s, i, j in pairs_of(batch):
        text = batch.inputs["text"]
        length = int(text["mask"][j].sum())
        text = {k: x[j : j + 1, :length] for k, x in text.items()}
        out.append(net({"image": batch.inputs["image"][i : i + 1], "text": text}))
        ids.append(int(batch.ids[s]))
    return out, ids


def naive(net: DualEncoder, batch: Batch) -> Tensor:
    """InfoNCE in double precision, and the sum over captions over the number of tokens."""
    said, ids = alone(net, batch)
    a, b = (torch.cat([x["features"][m] for x in said]).double() for m in ("image", "text"))
    rows = torch.cat([x[GROUP]["text"] for x in said]).double()
    nce = naive_info_nce(a, b, ids, said[0]["logit_scale"]["image-text"].double())
    return nce + WEIGHT * rows[:, 0].sum() / rows[:, 1].sum()


def reference(net: DualEncoder, loss_at: Callable[[int], Tensor]) -> dict[str, Tensor]:
    """Trained parameters after STEPS steps of one process that encodes every sample by itself, with torch's SGD.

    Args:
        loss_at: the loss of a step.
    """
    net.train()
    trained = {k: p for k, p in net.named_parameters() if p.requires_grad}
    sgd = torch.optim.SGD(trained.values(), lr=LR, momentum=MOMENTUM)
    for step in range(STEPS):
        sgd.zero_grad()
        loss_at(step).backward()
        for p in trained.values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        nn.utils.clip_grad_norm_(trained.values(), CLIP)
        sgd.step()
    return {k: p.detach().clone() for k, p in trained.items()}


def run(world: World, engine: str, name: str, micro: int | None) -> dict[str, Tensor]:
    """The same by the real step; whole on rank 0."""
    loss = loss_of()
    built = build_engine(EngineConfig(**ENGINES[engine]), OPTIM, model(name, loss), world)
    for step in range(STEPS):
        batch = batch_of(name, step, world.rank, world.world_size)
        train_step(built, batch, [("image", "text")], loss, micro=micro)
    return built.model_state()


def sweep(world: World, engines: list[str], names: list[str], tile: int = 600 * 5) -> dict[str, Any]:
    """Rank 0: case → the parameters. Logits are cut into tiles of five places, of which ranks have unequal numbers."""
    out: dict[str, Any] = {}
    caption_head.TILE = tile
    for engine in engines:
        for name in names:
            for micro in (None, 1):
                got = run(world, engine, name, micro)
                out[f"{engine}/{name}/{micro}"] = got if world.rank == 0 else {}
    return out


def one_process(name: str) -> dict[str, Tensor]:
    """The reference of this head."""
    net = model(name)
    return reference(net, lambda step: naive(net, batch_of(name, step)))


def differences(found: dict[str, Any], alone: Callable[[str], dict[str, Tensor]] = one_process) -> dict[str, list[Any]]:
    """Case → largest relative difference from one process of any parameter, and its name."""
    wants: dict[str, dict[str, Tensor]] = {}
    out: dict[str, list[Any]] = {}
    for case, got in found.items():
        name = case.split("/")[1]
        want = wants.setdefault(name, {}) or alone(name)
        wants[name] = want
        off = {k: float((got[k] - p).abs().max() / p.abs().max().clamp(min=1e-3)) for k, p in want.items()}
        worst = max(off, key=lambda k: off[k])
        out[case] = [off[worst], worst]
    return out
