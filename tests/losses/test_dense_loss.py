"""Cells of images against texts of classes: loops on real towers, ranks and micro-batches, what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
import _dense_jobs
import _real_towers
from _dense_jobs import TOWERS, batch_of, loss_of, model, naive
from _spawn import spawn
from gradcheck import LIMIT

from dualenc.distributed.world import World
from dualenc.encoders.context_head import ContextHead, InContext
from dualenc.encoders.dual_encoder import telling_rows
from dualenc.errors import ConfigError
from dualenc.losses import objective

torch.set_num_threads(1)
PAIRS = [("image", "text")]


def value(net: Any, batch: Any, loss: Any) -> torch.Tensor:
    with telling_rows(net, batch.rows):
        out: torch.Tensor = objective(net(batch.inputs), batch, PAIRS, loss).value
    return out


@pytest.mark.parametrize("name", ["own convnet", "own vit", "timm ViT", "open_clip ViT", "HF CLIP", "HF SigLIP"])
@pytest.mark.parametrize("context", [0, 2])
def test_it_is_the_loop_over_cells(name: str, context: int) -> None:
    loss = loss_of(context=context)
    net, batch = model(name, loss).eval(), batch_of(name, 0)
    torch.testing.assert_close(value(net, batch, loss), naive(net, batch, loss).float(), rtol=2e-5, atol=2e-6)


def test_without_gamma_the_decoder_changes_nothing_and_without_an_image_neither() -> None:
    head = ContextHead(InContext("image", "text", 2, 8, 2), 16)
    torch.manual_seed(0)
    t, x, v = (torch.nn.functional.normalize(torch.randn(*s, 16), dim=-1) for s in ((3, 4), (2,), (2, 9)))
    partner, paired = torch.tensor([1, 0, 0]), torch.tensor([True, True, False])
    out = head(t, x, v, partner, paired)
    assert 0 < float((out[:2] - t[:2]).detach().abs().max()) < 1e-3, "it starts next to the texts themselves"
    torch.testing.assert_close(out[2], t[2])
    with torch.no_grad():
        head.gamma.fill_(1.0)
        moved = head(t, x, v, partner, paired)
        alone = head(t[:1, :2], x, v, partner[:1], paired[:1])
        torch.testing.assert_close(moved[0, :2], alone[0])  # other texts of the list do not matter
        assert not torch.allclose(head(t, x.flip(0), v.flip(0), partner, paired)[:2], moved[:2], atol=1e-3)
        head.gamma.zero_()
        torch.testing.assert_close(head(t, x, v, partner, paired), t)


def test_a_batch_without_labels_is_zero_with_zero_gradients() -> None:
    loss = loss_of()
    net, batch = model("own convnet", loss), batch_of("own convnet", 0)
    batch.extras["cells"]["*"].fill_(99)
    got = value(net, batch, loss)
    got.backward()
    assert float(got.detach()) == 0
    assert all(p.grad is None or float(p.grad.abs().max()) == 0 for p in net.parameters())


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"heads \(3\) must divide width \(8\)"):
        model("own convnet", loss_of(heads=3))
    with pytest.raises(ConfigError, match=r"for the pair \[image, text\] and not for \['audio', 'text'\]"):
        loss_of().check_pairs([("image", "text"), ("audio", "text")])
    loss = loss_of(context=0)
    net, batch = model("own convnet", loss), _real_towers.batch_of("own convnet", 0)
    batch.extras["cells"] = {"*": torch.zeros(batch.size, 4, dtype=torch.long)}
    with pytest.raises(ConfigError, match=r"set modalities\.text\.input\.negatives"):
        value(net, batch, loss)
    batch = batch_of("own convnet", 0)
    batch.extras["cells"]["*"] = batch.extras["cells"]["*"][:, 0]
    with pytest.raises(ConfigError, match=r"values\.cells: write \{member: …, type: ints, width: G²\}"):
        value(net, batch, loss)
    with pytest.raises(ConfigError, match=r"modalities\.text\.encoder: .* takes an image tower"):
        net.say_places("text")


def check(found: dict[str, Any], expected: int) -> None:
    off = _dense_jobs.differences(found)
    assert len(off) == expected
    wrong = {case: cell for case, cell in off.items() if not cell[0] <= LIMIT}
    assert not wrong, wrong


def test_one_rank_in_micro_batches_of_one_is_each_sample_by_itself() -> None:
    check(_dense_jobs.sweep(World(), ["single"], ["own convnet", "HF CLIP"]), 4)


@pytest.mark.dist
@pytest.mark.slow
def test_two_ranks_give_what_one_process_gives() -> None:
    engines = ["DDP", "FSDP2"]
    found = spawn(_dense_jobs.__file__, "sweep", 2, {"engines": engines, "names": ["HF CLIP"]}, timeout_s=280)[0]
    check(found, 2 * len(engines))


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.extra
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_engine_and_tower(ranks: int) -> None:
    engines = ["DDP", "FSDP2", *(f"ZeRO {z}" for z in range(4))]
    given = {"engines": engines, "names": list(TOWERS)}
    check(spawn(_dense_jobs.__file__, "sweep", ranks, given, timeout_s=900)[0], 2 * len(engines) * len(TOWERS))
