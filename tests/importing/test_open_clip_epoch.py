"""open_clip's epoch_N.pt goes on: one more step of its own trainer's AdamW and one of ours, from the file it wrote,
end in the same weights."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from dualenc.checkpoint import save as ckpt
from dualenc.cli import app
from dualenc.config import load_recipe
from dualenc.data.batch import Batch
from dualenc.distributed.world import World
from dualenc.engine import build_engine, lr_factor
from dualenc.losses import build_loss
from dualenc.model import build_bundle
from dualenc.train.step import train_step

MODEL, ROWS, LR, WARMUP, STEPS, WD = "ViT-S-32-alt", 6, 1e-3, 2, 4, 0.2
FLAGS = (
    f"--model {MODEL} --train-data none.tar --train-num-samples {ROWS * STEPS} --batch-size {ROWS} --epochs 6 "
    "--workers 1 "
    f"--lr {LR} --warmup {WARMUP} --precision fp32 --wd 0.2 --name going-on --seed 3"
).split()
CAPTIONS = ["a cat", "two red bikes by a wall", "snow", "a dog on a beach at noon", "tea", "a very small blue house"]


def images(step: int) -> Tensor:
    return torch.randint(0, 256, (ROWS, 3, 224, 224), generator=torch.Generator().manual_seed(step), dtype=torch.uint8)


def as_open_clip(pixels: Tensor) -> Tensor:
    mean, std = (
        torch.tensor(v).view(1, 3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    return (pixels.float() / 255 - mean) / std


def optimizer_of(model: nn.Module, wd: float) -> torch.optim.AdamW:
    """The two groups of open_clip's trainer."""

    def plain(n: str, p: Tensor) -> bool:
        return p.ndim < 2 or any(part in n for part in ("bn", "ln", "bias", "logit_scale"))

    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if plain(n, p)], "weight_decay": 0.0},
        {"params": [p for n, p in named if not plain(n, p)], "weight_decay": wd},
    ]
    return torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.98), eps=1e-6)


def its_step(model: nn.Module, optimizer: torch.optim.AdamW, step: int, lr: float) -> float:
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    out = model(as_open_clip(images(step)), open_clip.tokenize(CAPTIONS))
    loss = open_clip.ClipLoss()(out["image_features"], out["text_features"], out["logit_scale"])
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def test_a_step_after_the_import_is_the_step_open_clip_would_have_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = open_clip.create_model(MODEL, output_dict=True).train()
    optimizer = optimizer_of(model, WD)
    for step in range(STEPS):
        its_step(model, optimizer, step, LR * min((step + 1) / WARMUP, 1))
    file = {"epoch": 1, "name": "x", "state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(file, tmp_path / "epoch_1.pt")
    before = {k: v.clone() for k, v in model.state_dict().items()}

    done = CliRunner().invoke(
        app, ["import", "open_clip", "--out", "on.yaml", "--checkpoint", "epoch_1.pt", "--", *FLAGS]
    )
    assert done.exit_code == 0, (done.output, done.exception)
    recipe = load_recipe("on.yaml")
    save = ckpt.newest_good(Path("runs/going-on"))
    assert save is not None
    state = ckpt.load_state(save)
    assert (state.step, state.samples_seen) == (STEPS, STEPS * ROWS)

    bundle = build_bundle(recipe)
    engine = build_engine(recipe.engine, recipe.optim, bundle.model, World())
    engine.load_model_state(ckpt.trained_weights(save))
    engine.load_optimizer_state(ckpt.optimizer_state(save), state.optimizer)
    factor = lr_factor(state.samples_seen, recipe.budget.steps * ROWS, recipe.schedule)
    engine.set_lr_factor(factor)
    text = bundle.inputs["text"]
    slots = torch.arange(ROWS)
    rows = text.collate([text.eval(text.decode(c)) for c in CAPTIONS])
    batch = Batch(ROWS, {"image": images(99), "text": rows}, {"image": slots, "text": slots}, slots, list(CAPTIONS))
    result = train_step(engine, batch, recipe.pairs, build_loss(recipe.loss))
    loss = its_step(model, optimizer, 99, LR * factor)

    assert float(result.loss) == pytest.approx(loss, abs=1e-5)
    ours = bundle.model.state_dict()
    for name, theirs in model.named_parameters():
        key = (
            f"{name}.image-text" if name == "logit_scale"
            else f"towers.image.trunk.{name.removeprefix('visual.')}" if name.startswith("visual.")
            else f"towers.text.net.{name}"
        )  # fmt: skip
        # The import says so: open_clip decays positions of two dimensions, dualenc does not.
        decayed = LR * factor * WD * before[name] if name.endswith("positional_embedding") else 0.0
        off = float((ours[key].reshape(theirs.shape) - decayed - theirs.detach()).abs().max())
        assert off < 1e-5, (name, off)
        assert not torch.equal(before[name], theirs.detach()), name


def test_a_file_without_an_optimizer_and_other_locks_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = open_clip.create_model(MODEL, output_dict=True)
    torch.save(model.state_dict(), "weights.pt")
    optimizer = optimizer_of(model, WD)
    whole = {"epoch": 1, "state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(whole, "epoch_1.pt")
    for out, file, more, said in (
        ("a.yaml", "weights.pt", [], "weights only"),
        ("b.yaml", "epoch_1.pt", ["--lock-image"], "other locks"),
        ("c.yaml", "absent.pt", [], "no file"),
    ):
        done = CliRunner().invoke(app, ["import", "open_clip", "--out", out, "--checkpoint", file, "--", *FLAGS, *more])
        assert said in str(done.exception)
