"""The caption head against loops in double precision, who sees what, ranks and micro-batches, resume."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
import _caption_jobs
import _real_towers
from _caption_jobs import GROUP, TOWERS, loss_of, model
from _real_towers import batch_of
from _runs import few_samples, losses, newest, rows, segments
from _spawn import spawn
from _traffic import Traffic
from gradcheck import LIMIT

from benchmarks.caption_perplexity import perplexities
from dualenc.config import Component
from dualenc.data.modalities import modalities
from dualenc.distributed.world import World
from dualenc.encoders import DualEncoder, caption_head
from dualenc.encoders.caption_head import CaptionHead, Captioning, Vocabulary, partners
from dualenc.encoders.dual_encoder import hidden_group, telling_rows
from dualenc.encoders.hidden import PlaceStates
from dualenc.errors import ConfigError
from dualenc.losses import build_loss, objective
from dualenc.model import load_model
from dualenc.train.build import vocabulary_of
from dualenc.train.flops import FlopCount

torch.set_num_threads(1)
PAIRS = [("image", "text")]


def head_and_states() -> tuple[CaptionHead, PlaceStates, dict[str, Tensor], PlaceStates]:
    """In double precision: four captions of 6, 2, 4 and 5 tokens, three items of five places or three."""
    torch.manual_seed(0)
    head = CaptionHead(Captioning("image", "text", 2, 2), 8, 6, Vocabulary(11)).double()
    with torch.no_grad():
        head.tokens.mul_(20)
        for p in head.parameters():
            p.add_(0.1 * torch.randn_like(p))
    text = PlaceStates(torch.randn(4, 6, 8, dtype=torch.float64, requires_grad=True), None)
    of = PlaceStates(torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True), torch.ones(3, 5) > 0)
    of.there[1, 3:] = False
    lengths = torch.tensor([6, 2, 4, 5])
    x = {"ids": torch.randint(0, 11, (4, 6)), "mask": torch.arange(6) < lengths[:, None]}
    return head, text, x, of


PARTNER, PAIRED = torch.tensor([2, 0, 1, 0]), torch.tensor([True, True, True, False])


def gradients(head: CaptionHead, text: PlaceStates, of: PlaceStates, value: Tensor) -> list[Tensor]:
    inputs = [*head.parameters(), text.states, of.states]
    return list(torch.autograd.grad(value, inputs, retain_graph=True))


def test_values_and_gradients_are_those_of_loops() -> None:
    head, text, x, of = head_and_states()
    got = head(text, x, of, PARTNER, PAIRED)
    weights, want = dict(head.named_parameters()), []
    for i, k in ((0, 2), (1, 0), (2, 1)):
        ids = x["ids"][i][x["mask"][i]].tolist()
        want.append(_caption_jobs.loop(weights, 2, text.states[i], ids, of.states[k][of.there[k]]))
    assert got[:, 1].tolist() == [5, 1, 3, 0]
    assert got[3].tolist() == [0, 0], "a caption without an item counts nothing"
    torch.testing.assert_close(got[:3, 0], torch.stack([sum(w) for w in want]), rtol=1e-10, atol=1e-10)
    per_token = sum(sum(w) for w in want) / 9
    pairs = zip(*(gradients(head, text, of, v) for v in (got[:, 0].sum() / got[:, 1].sum(), per_token)), strict=True)
    for g, w in pairs:
        torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-10)


def test_tiles_and_places_that_are_left_out_change_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    head, text, x, of = head_and_states()
    found = []
    for tile, chooses in ((1 << 25, True), (1 << 25, False), (11 * 4, True), (11 * 4, False)):
        monkeypatch.setattr(caption_head, "TILE", tile)
        if not chooses:
            monkeypatch.setattr(caption_head, "chosen_places", lambda real: None)
        with Traffic() as seen:
            out = head(text, x, of, PARTNER, PAIRED)
            grads = gradients(head, text, of, out[:, 0].sum())
        assert chooses or seen.calls["waits"] == 0
        found.append([out, *grads])
        monkeypatch.undo()
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_token_is_asked_of_those_before_it_and_of_its_own_item() -> None:
    head, text, x, of = head_and_states()
    short = {"ids": x["ids"], "mask": (torch.arange(6) < 4).expand(4, 6)}
    out = head(text, short, of, PARTNER, torch.ones(4) > 0)
    at_text, at_items = torch.autograd.grad(out[0, 0], [text.states, of.states])
    assert bool((at_text[0, :3] != 0).all()), "three tokens after the first, each from the state before it"
    assert float(at_text[0, 3:].abs().max()) == float(at_text[1:].abs().max()) == 0
    assert [bool(g.any()) for g in at_items] == [False, False, True]


@pytest.mark.parametrize("name", ["own vit", "open_clip ViT"])
def test_later_tokens_change_nothing_and_another_image_does(name: str) -> None:
    net = model(name).eval()
    batch = batch_of(name, 0)
    images, text = batch.inputs["image"][:3], {k: v[:3] for k, v in batch.inputs["text"].items()}
    length = text["ids"].shape[1]

    def said(images: Tensor, ids: Tensor) -> Tensor:
        """Of the first three tokens after the start."""
        asked = {"ids": ids, "mask": torch.ones_like(ids) > 0}
        head = next(h for h in net.heads.values() if isinstance(h, CaptionHead))
        places = {}
        with torch.no_grad():
            for m, x in (("image", images), ("text", asked)):
                net.hidden[m].begin()
                net.tower(m)(x)
                net.hidden[m].take(x)
                places[m] = net.hidden[m].take_places()
            asked["mask"] = (torch.arange(length) < 4).expand_as(ids)
            all_ = torch.arange(len(ids)), torch.ones(len(ids)) > 0
            return head(places["text"], asked, places["image"], *all_)

    before = said(images, text["ids"])
    changed = text["ids"].clone()
    changed[:, 4:] = 7
    torch.testing.assert_close(said(images, changed), before, rtol=1e-5, atol=1e-5)
    changed[:, 2] = 9
    assert bool((said(images, changed)[:, 0] - before[:, 0]).abs().gt(1e-4).all())
    assert bool((said(images.flip(0), text["ids"])[:, 0] - before[:, 0])[[0, 2]].abs().gt(1e-5).all())


def test_a_tower_that_sees_later_tokens_is_refused() -> None:
    with pytest.raises(ConfigError) as e:
        model("HF SigLIP")
    assert "sees only those before it, and modalities.text.encoder (hf/small) is not one; use own/tr" in str(e.value)


def test_settings_that_do_not_fit_are_named() -> None:
    with pytest.raises(ConfigError, match=r"heads \(3\) must divide .*modalities\.text\.encoder \(16\)"):
        model("own vit", loss_of(heads=3))
    with pytest.raises(ConfigError, match="of and captions are both 'text'"):
        build_loss(Component(name="caption", of="text"))
    with pytest.raises(ConfigError, match=r"modalities\.image is not text"):
        vocabulary_of(_real_towers.inputs_of("own vit")["image"], Captioning("text", "image", 1, 1))
    with pytest.raises(ConfigError, match=r"for the pair \[image, text\] and not for \['audio', 'text'\]; write"):
        loss_of().check_pairs([("text", "image"), ("audio", "text")])
    net = model("own vit")
    with pytest.raises(ConfigError, match=r"not seen; layers and caption cannot be used with engine\.compile"):
        net.hidden["text"].take({})


def test_padding_that_the_tower_sees_is_not_asked_for() -> None:
    net, head = model("own vit").eval(), None
    batch = batch_of("own vit", 0)
    cls = modalities["text"]
    full = cls(cls.Config(tokenizer="clip-bpe:600", context_length=8, pad="context"))
    assert vocabulary_of(full, Captioning("image", "text", 1, 1)).end == 599
    captions = ["a photo of two dogs", "red cat"]
    by_pad = []
    for source in (full, _real_towers.inputs_of("own vit")["text"]):
        text = source.collate([source.eval(source.decode(c)) for c in captions])
        head = next(h for h in net.heads.values() if isinstance(h, CaptionHead))
        head.end = vocabulary_of(source, head.asked).end
        with torch.no_grad():
            by_pad.append(net({"image": batch.inputs["image"][:2], "text": text})[GROUP]["text"])
    assert by_pad[0][0, 1] > by_pad[0][1, 1]
    torch.testing.assert_close(by_pad[0], by_pad[1])


def test_rows_find_their_partner() -> None:
    rows_ = {"text": torch.tensor([5, 0, 3, 2]), "image": torch.tensor([3, 5, 1])}
    at, there = partners(rows_, "text", "image", (4, 3), torch.device("cpu"))
    assert there.tolist() == [True, False, True, False]
    assert [int(at[0]), int(at[2])] == [1, 0]
    nobody = {"text": torch.tensor([0, 1]), "image": torch.tensor([], dtype=torch.long)}
    assert partners(nobody, "text", "image", (2, 1), torch.device("cpu"))[1].tolist() == [False, False]
    dummies = {m: torch.tensor([], dtype=torch.long) for m in ("text", "image")}
    assert partners(dummies, "text", "image", (1, 1), torch.device("cpu"))[1].tolist() == [False]
    with pytest.raises(ValueError, match="4 rows of text and 3 of image"):
        partners(None, "text", "image", (4, 3), torch.device("cpu"))


def outputs(net: DualEncoder, batch: Any) -> dict[str, dict[str, Tensor]]:
    with telling_rows(net, batch.rows):
        return net(batch.inputs)


def test_weight_zero_is_the_contrast_alone() -> None:
    """The first step of a warm-up: value and gradients of towers and scale, bit for bit."""
    batch, found = batch_of("own vit", 0), []
    for loss in (loss_of(warmup_samples=100), build_loss(Component(name="sum", terms=["info_nce"]))):
        net = model("own vit")
        value = objective(outputs(net, batch), batch, PAIRS, loss).value
        value.backward()
        grads = {k: p.grad for k, p in net.named_parameters() if not k.startswith("heads.")}
        found.append((value, grads))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(g, found[1][1][k]) for k, g in found[0][1].items() if g is not None)


def test_a_batch_without_a_pair_is_zero_with_zero_gradients() -> None:
    batch = batch_of("own vit", 0)
    batch.ids.fill_(-1)
    net = model("own vit")
    value = objective(outputs(net, batch), batch, PAIRS, build_loss(Component(name="sum", terms=["caption"]))).value
    assert float(value.detach()) == 0
    value.backward()
    assert all(float(p.grad.abs().max()) == 0 for k, p in net.named_parameters() if k.startswith("heads."))


def test_wrong_texts_of_rows_and_hidden_states_at_all_depths_go_along() -> None:
    """Negatives are encoded with the captions, and ``layers`` asks the same towers for its own states."""
    batch, net = batch_of("own vit", 0), model("own vit").eval()
    with torch.no_grad():
        want = outputs(net, batch)[GROUP]["text"]
        net.keep_hidden([0.5, 1.0], 4, batch.inputs)
        text = batch.inputs["text"]
        batch.inputs["text"] = {**text, "negatives": {k: v.roll(1, 0)[:, None] for k, v in text.items()}}
        out = outputs(net, batch)
    torch.testing.assert_close(out[GROUP]["text"], want)
    assert out["negatives"]["text"].shape == (len(want), 1, 16)
    assert out[hidden_group(1.0)]["text"].shape == (len(want), 4)


def test_operations_of_the_head_are_counted() -> None:
    batch, counted = batch_of("own vit", 0), []
    for net in (_real_towers.build("own vit", "info_nce"), model("own vit")):
        count = FlopCount(net)
        count.note(batch)
        counted.append(count.per_sample)
    assert 1.2 * counted[0] < counted[1] < 20 * counted[0]


# --- ranks, micro-batches, runs -------------------------------------------------------------------------------------


def check(found: dict[str, Any], expected: int) -> None:
    off = _caption_jobs.differences(found)
    assert len(off) == expected
    wrong = {case: cell for case, cell in off.items() if not cell[0] <= LIMIT}
    assert not wrong, wrong


def test_one_rank_in_micro_batches_of_one_is_each_sample_by_itself() -> None:
    check(_caption_jobs.sweep(World(), ["single"], ["own convnet", "HF CLIP"]), 4)


@pytest.mark.dist
@pytest.mark.slow
def test_two_ranks_give_what_one_process_gives() -> None:
    engines = ["DDP", "FSDP2"]
    found = spawn(_caption_jobs.__file__, "sweep", 2, {"engines": engines, "names": ["own convnet"]}, timeout_s=280)[0]
    check(found, 2 * len(engines))


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.extra
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_engine_and_tower(ranks: int) -> None:
    engines = ["DDP", "FSDP2", *(f"ZeRO {z}" for z in range(4))]
    given = {"engines": engines, "names": list(TOWERS)}
    check(spawn(_caption_jobs.__file__, "sweep", ranks, given, timeout_s=900)[0], 2 * len(engines) * len(TOWERS))


def test_a_wrong_partner_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check has teeth: rows taken in their order, whatever slot they belong to."""
    right = caption_head.partners

    def in_order(*given: Any) -> tuple[Tensor, Tensor]:
        at, there = right(*given)
        return torch.arange(len(at)) % given[3][1], there

    monkeypatch.setattr("dualenc.encoders.dual_encoder.partners", in_order)
    found = {"single/own vit/None": _caption_jobs.run(World(), "single", "own vit", None)}
    monkeypatch.undo()
    assert _caption_jobs.differences(found)["single/own vit/None"][0] > 1e-3


@pytest.mark.slow
def test_a_run_resumes_its_head_and_the_model_has_none(tmp_path: Path) -> None:
    """Beside slow copies of the towers, which have no head, and hidden states of the same blocks."""
    listed = "[info_nce, caption, {name: layers, weight: 0.1}, {name: moco, weight: 0.1, queue: 64}]"
    given = [f"loss={listed}", few_samples(tmp_path / "data", (96,)), "data.workers=0", "checkpoint.every_steps=2"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    segments(World(), [[*given, f"out={whole}", "budget.steps=4"]])
    found = segments(World(), [[*given, f"out={cut}", f"budget.steps={n}"] for n in (2, 4)])
    assert [(x["began"], x["ended"]) for x in found] == [(0, 2), (2, 4)]
    assert losses(cut) == losses(whole)
    one, two = ({k: x for p in newest(s).rglob("*.safetensors") for k, x in load_file(p).items()} for s in (whole, cut))
    assert f"heads.{GROUP}.blocks.0.seen.weight" in one
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not any(k.startswith("heads.") for k in load_model(str(cut)).model.state_dict())
    found = perplexities(whole, f"{tmp_path / 'data'}/few-000000.tar")
    assert found["trained"] < found["untrained"] < 9100
    assert found["another item"] != found["trained"]
    nats = [r["loss/caption/image-text"] for r in rows(whole / "metrics.jsonl") if "loss" in r]
    assert nats[-1] < nats[0] < 9.1, "a vocabulary of 8,192: log 8192 = 9.01"


@pytest.mark.slow
@pytest.mark.extra
def test_a_head_that_is_trained_for_long_looks_at_the_image(tmp_path: Path) -> None:
    given = ["loss=[info_nce, caption]", few_samples(tmp_path / "data", (96,)), "data.workers=0", "optim.lr=3e-3"]
    given += ["modalities.text.encoder.width=64", "tracking.log_every=50", "checkpoint.every_steps=null"]
    segments(World(), [[*given, "budget.steps=250", f"out={tmp_path / 'run'}"]])
    found = perplexities(tmp_path / "run", f"{tmp_path / 'data'}/few-000000.tar")
    assert found["trained"] < 1.5, found
    assert found["another item"] > 5, found
