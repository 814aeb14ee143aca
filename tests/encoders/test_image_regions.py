"""Features that are a maximum over boxes of an image tower's map: a loop, identities, refusals, what is saved."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from torchvision.ops import roi_align

from benchmarks.matrix import WORDS, built
from dualenc.config import Component
from dualenc.data.modalities import modalities
from dualenc.encoders import build_tower
from dualenc.encoders.image_regions import RegionTower, boxes
from dualenc.errors import ConfigError
from dualenc.model import load_model
from dualenc.model.export.export import export

torch.set_num_threads(1)
CONVNET = {"name": "own/convnet", "widths": [8, 16], "stem": 2}
TOWERS: dict[str, dict[str, Any]] = {
    "convnet": CONVNET,
    "vit": {"name": "own/vit", "width": 16, "layers": 1, "heads": 2},
    "timm": {"name": "timm/test_resnet"},
}


def tower_of(settings: dict[str, Any], size: int = 64) -> RegionTower:
    """In eval mode, alike for the same architecture."""
    source = modalities["image"](modalities["image"].Config.model_validate({"size": size}))
    torch.manual_seed(0)
    tower = build_tower("image", Component.model_validate(settings), source.describe(), 12).eval()
    assert isinstance(tower, RegionTower)
    return tower


def images(n: int = 3, size: int = 64) -> Tensor:
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("settings", TOWERS.values(), ids=TOWERS)
def test_one_box_is_the_plain_tower_bit_for_bit(settings: dict[str, Any]) -> None:
    """Features, gradients, and the plain tower's weights go into one with boxes; its description names none."""
    plain, one = tower_of(settings), tower_of({**settings, "regions": [1]})
    one.load_state_dict(plain.state_dict())
    for tower in (plain, one):
        tower.encode(images()).square().sum().backward()
    assert torch.equal(plain.encode(images()), one.encode(images()))
    wants = dict(one.named_parameters())
    assert all(torch.equal(p.grad, wants[n].grad) for n, p in plain.named_parameters() if p.grad is not None)
    assert "regions" not in plain.component.settings
    assert one.component.settings["regions"] == [1]
    several = tower_of({**settings, "regions": [1, 2]})
    several.load_state_dict(plain.state_dict())
    assert torch.equal(several(images())["pooled"], plain(images())["pooled"])
    assert not torch.allclose(several.encode(images()), plain.encode(images()), atol=1e-3)


@pytest.mark.parametrize("settings", [CONVNET, TOWERS["vit"]], ids=["convnet", "vit"])
def test_against_a_loop_over_boxes(settings: dict[str, Any]) -> None:
    """The mean of a box by torchvision's RoIAlign, whose sample points are the cells, then norm and head by hand."""
    tower = tower_of({**settings, "regions": [1, 2, 4]})
    with torch.no_grad():
        maps, got = tower.maps(tower.pixels(images())), tower.encode(images())
        trunk: Any = tower.trunk
        side = maps.shape[2]
        levels = []
        for k in (1, 2, 4):
            cells = side // k
            found = []
            for row in range(k):
                for column in range(k):
                    box = torch.tensor([[column, row, column + 1, row + 1]]).float() * cells
                    pooled = roi_align(maps.contiguous(), [box] * 3, 1, sampling_ratio=cells, aligned=True).flatten(1)
                    found.append(trunk.norm(pooled) @ tower.head.weight.T)  # type: ignore[operator,union-attr]
            levels.append(torch.stack(found).max(0).values)
        torch.testing.assert_close(got, (levels[0] + levels[1] + levels[2]) / 3, atol=1e-5, rtol=1e-5)


def test_boxes_of_a_side_that_no_grid_divides_are_those_of_adaptive_pooling() -> None:
    maps = torch.randn(2, 5, 7, 6)
    for k in (1, 2, 3, 4):
        got = torch.stack([box.mean((2, 3)) for box in boxes(maps, k)], 2)
        torch.testing.assert_close(got, torch.nn.functional.adaptive_avg_pool2d(maps, k).flatten(2))


def test_equal_boxes_are_the_whole_image() -> None:
    tower = tower_of({**TOWERS["vit"], "regions": [1, 2, 3]})
    maps = torch.randn(2, 16, 1, 1).expand(-1, -1, 8, 8)
    whole = tower.pool(maps)
    torch.testing.assert_close(tower.over_boxes(maps, whole), tower.head(whole), atol=1e-6, rtol=1e-5)


def test_a_model_with_boxes_is_saved_and_exported(tmp_path: Path) -> None:
    image = {"input": {"size": 64}, "encoder": {**CONVNET, "regions": [1, 3]}}
    bundle = built(24, image=image, text=WORDS)
    bundle.save(tmp_path / "m")
    again = load_model(str(tmp_path / "m"))
    tower = again.model.tower("image")
    assert isinstance(tower, RegionTower)
    assert tower.grids == (1, 3)
    assert torch.equal(again.model.encode("image", images()), bundle.model.encode("image", images()))
    with pytest.raises(ConfigError, match="open_clip has no place for the tower own/convnet"):
        export(bundle, "open_clip", tmp_path / "o")


@pytest.mark.slow
def test_a_timm_tower_with_boxes_reaches_sentence_transformers_as_a_tower_of_ours(tmp_path: Path) -> None:
    from dualenc.sentence_transformers import load

    timm = {"encoder": {**TOWERS["timm"], "regions": [1, 2]}, "input": {"size": 64}}
    bundle = built(24, image=timm, text=WORDS)
    export(bundle, "sentence-transformers", tmp_path / "s")
    png = io.BytesIO()
    Image.fromarray(images(1)[0].permute(1, 2, 0).numpy()).save(png, "PNG")
    want = bundle.embedder().embed("image", [png.getvalue()])
    got = load(tmp_path / "s", "cpu").encode([Image.open(png)], convert_to_tensor=True)
    torch.testing.assert_close(normalize(got, dim=1), want, atol=1e-5, rtol=0)


def test_what_cannot_pool_over_boxes_says_why() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({**CONVNET, "regions": [1, 20]}, r"grid of 20 × 20 boxes is finer than the last map, 16 × 16 cells; use at"),
        ({**CONVNET, "regions": [2], "grid": 2}, r"regions pools each box to its mean: leave out grid: 2"),
        ({**TOWERS["vit"], "regions": [2], "patch_dropout": 0.5}, r"regions needs every patch: set patch_dropout to 0"),
        ({"name": "timm/vit_tiny_patch16_224", "regions": [2]}, r"regions needs a map \[n, 192, h, w\] before pooling"),
        ({**CONVNET, "regions": []}, r"regions"),
        ({**CONVNET, "regions": [0]}, r"regions"),
    ]
    for settings, words in cases:
        with pytest.raises(ConfigError, match=words):
            tower_of(settings)
    camera: dict[str, Any] = {"name": "own/cameras", "image": {**CONVNET, "regions": [2]}}
    source = modalities["camera"](modalities["camera"].Config.model_validate({"size": [32, 64]}))
    with pytest.raises(ConfigError, match="regions: leave it out; the camera tower pools the whole image"):
        build_tower("camera", Component.model_validate(camera), source.describe(), 12)
