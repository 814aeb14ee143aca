"""A weighted list of losses: the sum, its pairs, its metrics, its trained parts; a single name is what it was."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dualenc.config import Component, Recipe, load_recipe
from dualenc.errors import ConfigError
from dualenc.losses import Extras, Loss, LossOutput, build_loss, check_loss, objective

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from _tiny import PAIRS, make_batch, tiny

torch.set_num_threads(1)


def recipe(loss: Any) -> Recipe:
    encoder = {"encoder": {"name": "x"}}
    raw = {"name": "r", "modalities": {"image": encoder, "text": encoder}, "batch": {"size": 8}, "budget": {"steps": 1}}
    return Recipe.model_validate({**raw, "data": {"sources": [{"name": "s", "shards": "x"}]}, "loss": loss})


def value(loss: Any, step: int = 0) -> LossOutput:
    batch = make_batch(1)
    batch.step = step
    return objective(tiny()(batch.inputs), batch, PAIRS, build_loss(recipe(loss).loss))


def test_a_name_a_mapping_and_a_list_of_one_are_one_loss() -> None:
    assert recipe("sigmoid").loss == recipe({"name": "sigmoid"}).loss == Component(name="sigmoid")
    want = value({"name": "sigmoid"})
    for given in ("sigmoid", ["sigmoid"], [{"name": "sigmoid"}]):
        assert torch.equal(value(given).value, want.value)
    assert recipe({"name": "info_nce", "label_smoothing": 0.1}).loss.settings == {"label_smoothing": 0.1}


def test_the_sum_and_its_metrics() -> None:
    one, two = value("info_nce"), value("sigmoid")
    both = value(["info_nce", {"name": "sigmoid", "weight": 0.25}, {"name": "info_nce", "label_smoothing": 0.2}])
    third = value({"name": "info_nce", "label_smoothing": 0.2})
    torch.testing.assert_close(both.value, one.value + 0.25 * two.value + third.value)
    for pair in ("image-text", "audio-text"):
        assert torch.equal(both.metrics[f"loss/info_nce0/{pair}"], one.metrics[f"loss/{pair}"])
        assert torch.equal(both.metrics[f"loss/sigmoid/{pair}"], two.metrics[f"loss/{pair}"])
        assert torch.equal(both.metrics[f"loss/info_nce2/{pair}"], third.metrics[f"loss/{pair}"])
    assert torch.equal(both.metrics["top1/image-to-text"], one.metrics["top1/image-to-text"])
    assert "sigmoid_top1/image-to-text" in both.metrics


def test_a_loss_for_some_pairs_is_averaged_over_these() -> None:
    """Named in either order; the others contribute nothing."""
    want = value("info_nce").metrics["loss/audio-text"]
    got = value([{"name": "info_nce", "pairs": [["text", "audio"]], "weight": 3}])
    torch.testing.assert_close(got.value, 3 * want)
    assert "loss/info_nce/image-text" not in got.metrics
    split = value([{"name": "info_nce", "pairs": [p]} for p in PAIRS])
    torch.testing.assert_close(split.value, 2 * value("info_nce").value)


def test_a_weight_rises_over_samples() -> None:
    """A batch has 16 slots: at step 4, 64 of 256 samples have been seen."""
    term = {"name": "info_nce", "warmup_samples": 256}
    full = value("info_nce").value
    for step, share in ((0, 0.0), (4, 0.25), (16, 1.0), (99, 1.0)):
        torch.testing.assert_close(value([term], step).value, share * full)


def test_wrong_lists_are_named() -> None:
    with pytest.raises(ConfigError, match=r"There is no loss 'info_nec'\. Did you mean 'info_nce'"):
        build_loss(recipe([{"name": "info_nec"}]).loss)
    with pytest.raises(ConfigError, match=r"loss\.terms\.1\.label_smoothing"):
        build_loss(recipe(["sigmoid", {"name": "info_nce", "label_smoothing": 2}]).loss)
    with pytest.raises(ConfigError, match=r"loss\.terms\.0\.weight"):
        build_loss(recipe([{"name": "sigmoid", "weight": 0}]).loss)
    with pytest.raises(ConfigError, match=r"loss\.terms: .*at least 1"):
        build_loss(recipe([]).loss)
    r = recipe([{"name": "sigmoid", "pairs": [["image", "txt"]]}])
    with pytest.raises(
        ConfigError, match=r"\['image', 'txt'\] is not one of the recipe's pairs .* Did you mean 'image-text'"
    ):
        check_loss(build_loss(r.loss), r.data, r.pairs)


class Scaled(Loss):
    """It trains a linear map of the features, and needs a label."""

    takes_extras = True
    needs = ("weight",)

    def __init__(self, config: Any) -> None:
        super().__init__()

    def heads(self, dim: int, modalities: Any) -> dict[str, dict[str, nn.Module]]:
        return {"map": {"every": nn.Linear(dim, 3)}}

    def forward(
        self, a: Tensor, b: Tensor, ids: Tensor, scale: Tensor, bias: Tensor | None = None, extras: Extras | None = None
    ) -> LossOutput:
        assert extras is not None
        return LossOutput((extras.a["map"] * extras.b["map"]).sum())


def test_trained_parts_of_each_loss_reach_it_under_its_own_name() -> None:
    name = f"{__name__}:Scaled"
    alone = build_loss(Component(name=name))
    assert list(alone.heads(4, ["image"])) == ["map"]
    loss = build_loss(recipe([name, {"name": name, "weight": 2}, "info_nce"]).loss)
    zero, one = "test_weighted_sum_Scaled0__map", "test_weighted_sum_Scaled1__map"
    assert list(loss.heads(4, ["image", "text"])) == [zero, one]
    assert loss.needs == ("weight",)
    x = torch.ones(2, 3)
    groups = {zero: x, one: 2 * x}
    a, ids = nn.functional.normalize(torch.randn(2, 4), dim=1), torch.arange(2)
    out = loss(a, a, ids, torch.ones(1), None, Extras(("image", "text"), groups, groups))
    alone_nce = build_loss(Component(name="info_nce"))(a, a, ids, torch.ones(1))
    torch.testing.assert_close(out.value, 6.0 + 2 * 24.0 + alone_nce.value)


def test_the_quickstart_accepts_a_list() -> None:
    r = load_recipe("quickstart", ["loss=[info_nce, {name: sigmoid, weight: 0.5}]"])
    assert r.loss.name == "sum"
    assert [t["name"] if isinstance(t, dict) else t for t in r.loss.settings["terms"]] == ["info_nce", "sigmoid"]
