"""By how many quarters was an image turned: the loss in a loop, where the label comes from, a run on two ranks."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
import _runs
from _runs import few_samples, rows, segments
from _spawn import spawn

from dualenc.config import Component, settings_as
from dualenc.data.batch import ABSENT
from dualenc.data.modalities.image import ImageConfig, ImageInput
from dualenc.distributed.world import World
from dualenc.errors import ConfigError
from dualenc.losses import Extras, build_loss

torch.set_num_threads(1)
TURNED = "modalities.image_turned={shares: image, input: {size: 64, augment: {quarter_turns: true}}}"
PAIRS = "pairs=[[image, text], [image, image_turned]]"
ROTATION = "{name: rotation, pairs: [[image, image_turned]]%s}"


def test_a_loop_over_images() -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, generator=g, dtype=torch.float64)
    logits[2] = torch.nan  # a slot without the image
    turns, ids = torch.tensor([0, 3, ABSENT, 1, 2, 1]), torch.tensor([7, 8, 9, -1, 10, 11])
    logits.requires_grad_()
    loss = build_loss(Component.model_validate({"name": "rotation", "modality": "view"}))
    x, scale = torch.zeros(6, 3), torch.ones(1)
    side = {"turns": turns, "turn_logits": logits}
    out = loss(x, x, ids, scale, None, Extras(("image", "view"), {}, side))
    out.value.backward()
    kept = [0, 1, 4, 5]
    odds = logits.detach().exp()
    each = [-float((odds[i] / odds[i].sum())[turns[i]].log()) for i in kept]
    assert out.value.item() == pytest.approx(sum(each) / 4, rel=1e-12)
    right = sum(int(logits[i].argmax() == turns[i]) for i in kept)
    assert out.metrics["turns_right"].item() == pytest.approx(right / 4)
    assert logits.grad is not None
    want = (logits.detach()[kept].softmax(1) - torch.eye(4)[turns[kept]]) / 4
    torch.testing.assert_close(logits.grad[kept], want.double())
    assert not logits.grad[[2, 3]].any()


def test_weight_zero_is_the_loss_without_it() -> None:
    """In its warm-up's first step the weight is 0."""
    g = torch.Generator().manual_seed(0)
    a, b = (torch.nn.functional.normalize(torch.randn(5, 4, generator=g), dim=1) for _ in range(2))
    side = {"turns": torch.tensor([0, 1, 2, 3, 0]), "rotation__turn_logits": torch.randn(5, 4, generator=g)}
    extras, scale = Extras(("image", "view"), {}, side), torch.tensor([5.0])
    terms = ["info_nce", {"name": "rotation", "modality": "view", "warmup_samples": 100}]
    both = build_loss(Component.model_validate({"name": "sum", "terms": terms}))
    plain = build_loss(Component(name="info_nce"))
    args = (a, b, torch.arange(5), scale, None)
    assert torch.equal(both(*args, extras).value, plain(*args).value)
    extras.seen = 50
    assert both(*args, extras).value > plain(*args).value + 0.1


def test_the_view_says_how_it_was_turned() -> None:
    """The crop is that of the same draw without turns; the label turns it back. Descriptions are as before without."""
    config = {"size": 32, "augment": {"scale": [0.5, 1.0], "flip": True, "colour": {}}}
    upright = ImageInput(settings_as(ImageConfig, config, "input"))
    turned = ImageInput(
        settings_as(ImageConfig, {**config, "augment": {**config["augment"], "quarter_turns": True}}, "input")  # type: ignore[dict-item]
    )
    assert "quarter_turns" not in upright.describe()["config"]["augment"]
    assert turned.describe()["config"]["augment"]["quarter_turns"] is True
    png = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(png, "PNG")
    x, found, made = turned.decode(png.getvalue()), [], []
    for seed in range(64):
        row = turned.train(x, np.random.default_rng(seed))
        k = row["labels"]["turns"]
        plain = upright.train(x, np.random.default_rng(seed)).permute(1, 2, 0).numpy()
        back = row["pixels"].permute(1, 2, 0).numpy()
        for _ in range(k):  # a quarter clockwise, as Pillow turns
            back = np.asarray(Image.fromarray(np.ascontiguousarray(back)).transpose(Image.Transpose.ROTATE_270))
        assert np.array_equal(back, plain)
        found.append(k)
        made.append(row)
    assert all(8 <= found.count(k) <= 24 for k in range(4))
    batch = turned.collate([*made[:3], turned.dummy()])
    assert batch["labels"]["turns"].tolist() == [*found[:3], ABSENT]
    assert batch["pixels"].shape == (4, 3, 32, 32)
    assert torch.equal(turned.eval(x), upright.eval(x))
    with pytest.raises(ConfigError, match="quarter_turns needs square images"):
        settings_as(ImageConfig, {"resize": "naflex", "augment": {"quarter_turns": True}}, "input")


def test_what_it_lacks_is_named() -> None:
    loss = build_loss(Component(name="rotation"))
    x, ids, scale = torch.zeros(2, 3), torch.arange(2), torch.ones(1)
    with pytest.raises(ConfigError, match="'image_turned' is in none of the loss's pairs"):
        loss.heads(3, ["image", "text"])
    with pytest.raises(ConfigError, match="rotation is for pairs with 'image_turned'"):
        loss(x, x, ids, scale, None, Extras(("image", "text"), {}, {}))
    with pytest.raises(ConfigError, match=r"rotation needs modalities.image_turned.input.augment.quarter_turns"):
        loss(x, x, ids, scale, None, Extras(("image", "image_turned"), {}, {}))


@pytest.mark.dist
def test_two_ranks_are_one(tmp_path: Path) -> None:
    """The turns follow from seed, sample and epoch: a real run, in micro-batches, and on two ranks."""
    loss = f"loss=[{{name: info_nce, pairs: [[image, text]]}}, {ROTATION % ', weight: 0.5'}]"
    given = [few_samples(tmp_path / "data", (64,)), "data.workers=0", TURNED, PAIRS, loss]
    given += ["optim.name=sgd", "optim.lr=0.05", "budget.steps=4"]
    one, two = tmp_path / "one", tmp_path / "two"
    segments(World(), [[*given, f"out={one}", "batch.micro=8"]])
    spawn(_runs.__file__, "segments", 2, {"parts": [[*given, f"out={two}"]]})
    logged = list(zip(rows(one / "metrics.jsonl"), rows(two / "metrics.jsonl"), strict=True))
    keys = ("loss", "loss/rotation/image-image_turned", "turns_right/image-image_turned")
    for a, b in logged:
        for key in keys:
            assert a.get(key) == pytest.approx(b.get(key), rel=1e-4), key
    assert sum(keys[2] in a for a, _ in logged) == 4
