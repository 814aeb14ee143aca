"""Every registered loss without a table of its own: a model with the heads it trains, batches with labels and absent
rows, and what the ranks run. A loss that is added is found in the registry; settings that it needs stand here."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
sys.path.insert(0, str(Path(__file__).parent))
import _every_jobs
from _tiny import Block
from gradcheck import CLIP, ENGINES, LR, MOMENTUM, OPTIM

from dualenc.config import Component, EngineConfig, LogitScale
from dualenc.data.batch import WHOLE, Batch
from dualenc.data.values import stable_id
from dualenc.distributed.world import World
from dualenc.encoders import DualEncoder, Tower
from dualenc.engine import build_engine
from dualenc.losses import Loss, barlip, build_loss, losses, objective
from dualenc.train.step import train_step

SIZE, K, STEPS, WIDTH, DIM = 16, 4, 2, 16, 8
PAIR = ("image", "audio")
REMEMBERING = {"sogclr", "isogclr", "fastclip", "moco", "cocosoda", "byolip", "beclr", "entity_classifier"}
"""Losses with a memory: ``_memory_jobs``."""
ELSEWHERE = (
    {case["name"] for case in _every_jobs.CASES} | {"prc", "point_contrast", "rad", "caption", "dense"} | REMEMBERING
)
"""Losses with tables of their own: contrasts on the soft-target core, on regions, heads on both towers, and these."""
SETTINGS: dict[str, dict[str, Any]] = {
    "sum": {"terms": ["info_nce", {"name": "koleo", "weight": 0.3}, {"name": "siamlip", "project": 4, "hidden": 5}]},
    "matryoshka": {"dims": [2, 8]},
    "autotcl": {"of": "image", "into": "audio"},
    "layers": {"depths": [0.5, 1.0]},
    "barlip": {"project": 6, "hidden": 8, "scale": 1.0},
    "siamlip": {"project": 6, "hidden": 8},
    "swalip": {"prototypes": 5},
    "masked_units": {"codes": 5},
    "masked_autoencoding": {"patch": WIDTH},
    "private_space": {"width": 4},
    "rotation": {"modality": "image"},
    "whitened": {"groups": 4},
    "supremix": {"label": "depth", "mixed": 2, "strip_mb": 1e-6},
    "koleo": {"strip_mb": 1e-6},
    "uniformity": {"strip_mb": 1e-6},
}


def names() -> list[str]:
    """The losses of this table."""
    return [n for n in losses if n not in ELSEWHERE and losses.source(n) == "dualenc"]


def loss_of(name: str) -> Loss:
    return build_loss(Component.model_validate({"name": name, **SETTINGS.get(name, {})}))


class SpeakingTower(Tower):
    """Features of rows and of places in them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_dim = DIM
        self.stack = nn.ModuleList([Block(WIDTH, 0.0), Block(WIDTH, 0.0)])
        self.head, self.local = nn.Linear(WIDTH, DIM), nn.Linear(WIDTH, DIM)

    def outputs(self, x: Any) -> dict[str, Tensor]:
        y = x["x"]
        for block in self.stack:
            y = block(y)
        at = self.local(y[:, None] + x["places"])
        masked = {
            "target": at,
            "context": at.roll(1, 2),
            "last": at.flip(2),
            "there": (x["places"][..., 0] < 1).float(),
        }
        said = {"features": self.head(y), "pooled": y, "local": nn.functional.normalize(at, dim=-1)}
        masked["patch"] = x["places"]
        return said | {f"masked_{name}": z for name, z in masked.items()}


def model(loss: Loss) -> DualEncoder:
    """With the loss's heads, as training adds them."""
    torch.manual_seed(0)
    out = DualEncoder({m: SpeakingTower() for m in PAIR}, [PAIR], LogitScale(init=7.0, bias=-1.0))
    for group, head in loss.heads(DIM, PAIR).items():
        out.add_head(group, head)
    if loss.hidden:
        out.keep_hidden(loss.hidden, DIM, make_batch(0).inputs)
    return out


def make_batch(step: int, rank: int = 0, world_size: int = 1) -> Batch:
    """The slots j with j % world_size == rank: every fifth lacks the image, 6 the audio, 3 is lost, 1, 2 and 9
    have one id, and some no label."""
    g = torch.Generator().manual_seed(step)
    slots, mine = torch.arange(SIZE), torch.arange(rank, SIZE, world_size)
    there = {"image": slots[slots % 5 != 4], "audio": slots[slots != 6]}
    ids = slots + 1000 * step
    ids[[2, 9]] = ids[1].item()
    ids[3] = -1
    depth = torch.randint(0, 24, (SIZE,), generator=g).double() / 2
    depth[[5, 8]] = torch.nan
    label = torch.randint(0, 4, (SIZE,), generator=g)
    label[7] = -1
    tree = torch.tensor([[stable_id(f"{x}"), stable_id(f"{x} {x % 3}")] for x in label.tolist()])
    tree[7] = -1
    inputs, rows = {}, {}
    extras = {n: {WHOLE: x[mine]} for n, x in (("depth", depth), ("label", label), ("tree", tree))}
    extras["turns"] = {"image": ((5 * slots + step) % 7 % 5 - 1)[mine]}
    for m, at in there.items():
        x, places = torch.randn(SIZE, WIDTH, generator=g), torch.randn(SIZE, K, WIDTH, generator=g)
        region = torch.randint(-1, 3, (SIZE, K), generator=g)
        keep = torch.tensor([int(s) for s in mine if s in at], dtype=torch.long)
        rows[m] = (keep - rank) // world_size
        use = keep if len(keep) else torch.zeros(1, dtype=torch.long)
        inputs[m] = {"x": x[use], "places": places[use]}
        extras.setdefault("region", {})[m] = region[mine]
    return Batch(len(mine), inputs, rows, ids[mine], [f"s/{j}" for j in mine.tolist()], step, extras=extras)


def reference(name: str) -> dict[str, Tensor]:
    """Trained parameters after STEPS steps of one process on whole batches, with torch's SGD."""
    loss = loss_of(name)
    net = model(loss).train()
    trained = dict(net.named_parameters())
    sgd = torch.optim.SGD(trained.values(), lr=LR, momentum=MOMENTUM)
    for step in range(STEPS):
        batch = make_batch(step)
        sgd.zero_grad()
        objective(net(batch.inputs), batch, [PAIR], loss).value.backward()
        nn.utils.clip_grad_norm_(trained.values(), CLIP)
        sgd.step()
    return {k: p.detach().clone() for k, p in trained.items()}


def run(world: World, engine: str, name: str, chunks: int) -> dict[str, Tensor]:
    """The same by the real step; whole on rank 0."""
    loss = loss_of(name)
    built = build_engine(EngineConfig(**ENGINES[engine]), OPTIM, model(loss), world)
    for step in range(STEPS):
        batch = make_batch(step, world.rank, world.world_size)
        train_step(built, batch, [PAIR], loss, micro=None if chunks == 1 else -(-batch.size // chunks))
    return built.model_state()


def sweep(world: World, engines: list[str], only: list[str] | None = None) -> dict[str, Any]:
    """Rank 0: case → the parameters."""
    out: dict[str, Any] = {}
    for engine in engines:
        for name in only or names():
            for chunks in (1, 2):
                got = run(world, engine, name, chunks)
                out[f"{engine}/{name}/{chunks}"] = got if world.rank == 0 else {}
    return out


def sweep_own_statistics(world: World) -> dict[str, Any]:
    """BarLIP, wrong: sums of the rank's own rows."""
    barlip.total = lambda x: x * world.world_size
    return sweep(world, ["DDP"], ["barlip"])


def differences(found: dict[str, Any]) -> dict[str, list[Any]]:
    """Case → largest relative difference from one process of any parameter, and its name."""
    wants: dict[str, dict[str, Tensor]] = {}
    out: dict[str, list[Any]] = {}
    for case, got in found.items():
        name = case.split("/")[1]
        if name not in wants:
            wants[name] = reference(name)
        off = {k: float((got[k] - p).abs().max() / p.abs().max().clamp(min=1e-3)) for k, p in wants[name].items()}
        worst = max(off, key=lambda k: off[k])
        out[case] = [off[worst], worst]
    return out
