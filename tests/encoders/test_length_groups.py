"""Captions of like length are encoded together: the same features and gradients from fewer token positions."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dualenc.config import Component, load_recipe
from dualenc.data.modalities import modalities
from dualenc.encoders import build_tower
from dualenc.encoders.length_groups import cuts, in_length_groups
from dualenc.encoders.packing import attend, attend_last, pack
from dualenc.encoders.tower import Tower
from dualenc.errors import CheckpointError, ConfigError
from dualenc.model import build_bundle
from dualenc.shipped import find_recipe
from dualenc.train.resume import fingerprint, refuse_changes

HF = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 600}
CLIP = {"max_position_embeddings": 77, "eos_token_id": 599, "bos_token_id": 598, "pad_token_id": 0}
OPEN_CLIP = {"embed_dim": 16, "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 1, "width": 16},
             "text_cfg": {"context_length": 77, "vocab_size": 600, "width": 16, "heads": 2, "layers": 2}}  # fmt: skip
TOWERS: dict[str, dict[str, Any]] = {
    "own/transformer": {"width": 16, "layers": 2, "heads": 2},
    "open_clip/ViT": {"config": OPEN_CLIP},
    "hf/clip": {"config": {**HF, **CLIP, "model_type": "clip_text_model"}},
    "hf/bert": {"config": {**HF, "model_type": "bert", "max_position_embeddings": 77}, "pooling": "mean"},
}


IN_GROUPS = ["modalities.text.encoder={name: hf/distilbert, config: {model_type: distilbert, dim: 16, hidden_dim: 32, "
             "n_layers: 1, n_heads: 2, vocab_size: 8192, max_position_embeddings: 77}, pooling: mean}"]  # fmt: skip


def tower(name: str) -> Tower:
    source = modalities["text"](modalities["text"].Config(tokenizer="clip-bpe:600", context_length=77))
    torch.manual_seed(0)
    return build_tower("text", Component.model_validate({"name": name, **TOWERS[name]}), source.describe(), 16)


def batch() -> dict[str, Tensor]:
    source = modalities["text"](modalities["text"].Config(tokenizer="clip-bpe:600", context_length=77))
    rng = np.random.default_rng(0)
    texts = [" ".join(["dog"] * int(n)) for n in [60, *rng.integers(1, 9, 63)]]
    out: dict[str, Tensor] = source.collate([source.eval(source.decode(t)) for t in texts])
    return out


@pytest.mark.parametrize("name", sorted(TOWERS))
def test_grouped_rows_have_the_same_features_and_gradients(name: str) -> None:
    x, net = batch(), tower(name).double().eval()  # in float64 rounding does not hide a mistake
    found = {}
    for grouped in (False, True):
        net.length_groups = grouped
        net.zero_grad()
        y = net.encode(x)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        grads = {k: p.grad.clone() for k, p in net.named_parameters() if p.grad is not None}
        found[grouped] = (y.detach(), grads)
    (plain, grads), (y, got) = found[False], found[True]
    assert (y - plain).abs().max() <= 1e-12 * plain.abs().max()
    assert got.keys() == grads.keys()
    for k, g in grads.items():
        assert (got[k] - g).abs().max() <= 1e-10 * g.abs().max().clamp(min=1e-3), k


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (["modalities.image.length_groups=true"], "modalities.image.length_groups: only captions"),
        ([*IN_GROUPS, "modalities.text.length_groups=true", "engine.parallel=fsdp2"], "parallel=fsdp2 gathers weights"),
        ([*IN_GROUPS, "modalities.text.length_groups=true", "engine.kind=deepspeed"], "kind=deepspeed gathers weights"),
    ],
)
def test_groups_in_training_are_refused_where_they_cannot_be(said: list[str], message: str) -> None:
    recipe = load_recipe(find_recipe("quickstart"), said)
    with pytest.raises(ConfigError, match=message):
        build_bundle(recipe)


def test_what_a_recipe_packs() -> None:
    def text(*said: str) -> tuple[bool, bool]:
        net = build_bundle(load_recipe(find_recipe("quickstart"), list(said))).model.tower("text")
        return net.length_groups, net.packs_on_device

    assert text() == (True, False)
    assert text("engine.parallel=fsdp2") == (True, False)
    assert text("modalities.text.length_groups=true", "engine.kind=deepspeed") == (True, True)
    assert text("modalities.text.length_groups=false") == (False, False)
    assert text(*IN_GROUPS) == (False, False)
    assert text("modalities.text.encoder.dropout=0.1") == (False, False)
    model = build_bundle(load_recipe(find_recipe("quickstart"), [])).model
    model.compile_towers(blocks=True)
    model.group_lengths()  # as an evaluation within the run would
    assert not model.tower("text").length_groups


@pytest.mark.parametrize("causal", [True, False])
def test_attention_within_packed_rows(causal: bool) -> None:
    """Rows of equal length together, and rows padded for attention, against row by row."""
    torch.manual_seed(0)
    lengths = torch.tensor([3, 1, 5, 3])
    rows = [torch.randn(3, int(n), 2, 4, dtype=torch.float64, requires_grad=True) for n in lengths]

    def alone(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        logits = torch.einsum("ihd,jhd->hij", q, k) / 2
        if causal:
            logits = logits.masked_fill(torch.ones(logits.shape[1:]).triu(1).bool(), -torch.inf)
        return torch.einsum("hij,jhd->ihd", logits.softmax(-1), v).flatten(1)

    wanted = [alone(*row, causal) for row in rows]
    last = torch.stack([alone(row[0, -1:], *row[1:], False)[0] for row in rows])
    weights = torch.linspace(-1, 1, 8, dtype=torch.float64)
    grads = torch.autograd.grad(sum((w * weights).sum() for w in [*wanted, last]), rows)
    for by_length in (True, False):
        packing = pack(lengths, 5, by_length)
        flat = torch.cat([torch.cat([row, row.new_zeros(3, 5 - row.shape[1], 2, 4)], 1) for row in rows], 1)
        q, k, v = flat[:, packing.tokens]
        y, end = attend(q, k, v, packing, causal=causal), attend_last(q[packing.ends], k, v, packing)
        filled = torch.zeros(20, 8, dtype=torch.float64).index_copy(0, packing.tokens, y).view(4, 5, 8)
        for i, w in enumerate(wanted):
            torch.testing.assert_close(filled[i, : len(w)], w)
        torch.testing.assert_close(end[packing.back], last)
        got = torch.autograd.grad((y * weights).sum() + (end * weights).sum(), rows)
        for a, b in zip(got, grads, strict=True):
            torch.testing.assert_close(a, b)


def test_packed_blocks_run_once_and_compute_no_padding() -> None:
    x, seen = batch(), []
    real = int(x["mask"].sum())
    for name in ("own/transformer", "open_clip/ViT"):
        net = tower(name)
        net.length_groups = True
        for block in net.blocks():
            block.register_forward_hook(lambda _, given, out: seen.append((len(given[0]), len(out))))
        net.encode(x)
    assert seen == [(real, real), (real, 64)] * 2


def test_recomputed_blocks_give_the_packed_gradients() -> None:
    x = batch()
    for name in ("own/transformer", "open_clip/ViT"):
        net, grads = tower(name).train(), []
        net.length_groups = True
        for recompute in (False, True):
            net.set_grad_checkpointing(recompute)
            net.zero_grad()
            net.encode(x).square().sum().backward()
            grads.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
        assert len(grads[0]) > 20
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_one_long_caption_costs_one_row() -> None:
    x, seen = batch(), []

    def encode(part: Mapping[str, Tensor]) -> Tensor:
        seen.append(tuple(part["ids"].shape))
        return part["ids"][:, 1:2].float() + torch.arange(1)

    y = in_length_groups(encode, x)
    assert torch.equal(y, x["ids"][:, 1:2].float())
    assert sum(n for n, _ in seen) == 64
    assert (1, x["ids"].shape[1]) in seen
    assert sum(n * length for n, length in seen) < 0.4 * x["ids"].numel()


def test_cuts_are_the_cheapest() -> None:
    rng = np.random.default_rng(1)

    def price(runs: list[tuple[int, int]], lengths: np.ndarray) -> int:
        return sum((end - start) * int(lengths[end - 1]) + 20 for start, end in runs)

    for n in range(1, 9):
        lengths = np.sort(rng.integers(1, 40, n))
        every = [
            list(itertools.pairwise((0, *inner, n)))
            for k in range(n)
            for inner in itertools.combinations(range(1, n), k)
        ]
        assert price(cuts(lengths, 20), lengths) == min(price(runs, lengths) for runs in every)


def test_a_run_may_resume_with_another_setting() -> None:
    """Checkpoints of before have false, or no such key."""
    now = fingerprint(load_recipe(find_recipe("quickstart"), []))
    for saved in (fingerprint(load_recipe(find_recipe("quickstart"), ["modalities.text.length_groups=false"])), now):
        refuse_changes(saved, now, Path("save"))
    parts = now["modalities"].items()
    old = {**now, "modalities": {m: {k: v for k, v in x.items() if k != "length_groups"} for m, x in parts}}
    refuse_changes(old, now, Path("save"))
    with pytest.raises(CheckpointError, match="embed_dim"):
        refuse_changes({**old, "embed_dim": 7}, now, Path("save"))
