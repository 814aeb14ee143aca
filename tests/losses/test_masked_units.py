"""Losses on hidden places against loops and identities; ranks and micro-batches are in ``_term_jobs``."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from dualenc.config import Component
from dualenc.errors import ConfigError
from dualenc.losses import Extras, Loss, build_loss
from dualenc.losses.masked_units import chosen, told_apart

torch.set_num_threads(1)
PAIR = ("text", "audio")
ROWS, PLACES, CODES, DIM = 5, 4, 6, 3
IDS = torch.tensor([4, 11, -1, 7, 20])


def built(**settings: object) -> Loss:
    return build_loss(Component.model_validate({"name": "masked_units", "codes": CODES, **settings}))


def groups(seed: int = 0) -> dict[str, Tensor]:
    """What tower and heads say; the second place of the first clip and all of the last are not there."""
    g = torch.Generator().manual_seed(seed)
    of = {"masked_context": DIM, "unit_logits": CODES, "unit_guesses": CODES}
    out = {n: 2 * torch.randn(ROWS, PLACES, w, generator=g, dtype=torch.float64) for n, w in of.items()}
    codebook = torch.randn(CODES * DIM, generator=g, dtype=torch.float64)
    out["unit_codebook"] = codebook.expand(ROWS, -1).clone()
    for x in out.values():
        x[2] = math.nan  # a slot that takes no part
        x.requires_grad_()
    there = torch.ones(ROWS, PLACES)
    there[0, 1], there[4] = 0, 0
    return {**out, "masked_there": there}


def value_of(loss: Loss, said: dict[str, Tensor]) -> Tensor:
    nothing = torch.zeros(ROWS, DIM, dtype=torch.float64)
    scale = torch.ones(1, dtype=torch.float64)
    return loss(nothing, nothing, IDS, scale, None, Extras(PAIR, {}, said, step=3)).value


def loop(said: dict[str, Tensor], beta: float, alpha: float, gamma: float, kappa: float, tau: float) -> Tensor:
    """The paper's sums over single places, in the order of the module's formula, without Gumbel noise."""
    at = [(i, t) for i in range(ROWS) for t in range(PLACES) if IDS[i] >= 0 and said["masked_there"][i, t] > 0]
    units, code, used = {}, {}, [torch.zeros((), dtype=torch.float64) for _ in range(CODES)]
    for i, t in at:
        logits = said["unit_logits"][i, t]
        book = [said["unit_codebook"][i, v * DIM : (v + 1) * DIM] for v in range(CODES)]
        code[i, t] = int(logits.argmax())
        shared = sum(torch.exp(x / tau) for x in logits)
        soft = [torch.exp(x / tau) / shared for x in logits]
        # The code itself, with the gradient of the softmax.
        units[i, t] = book[code[i, t]] + sum((p - p.detach()) * e for p, e in zip(soft, book, strict=True))
        z = sum(torch.exp(x) for x in logits)
        used = [u + torch.exp(x) / z / len(at) for u, x in zip(used, logits, strict=True)]
    total = torch.zeros((), dtype=torch.float64)
    for i, t in at:
        c = said["masked_context"][i, t]

        def cosine(j: int, c: Tensor = c, i: int = i) -> Tensor:
            q = units[i, j]
            return (c * q).sum() / (c.square().sum() * q.square().sum()).sqrt()

        others = [j for k, j in at if k == i and (j == t or code[i, j] != code[i, t])]
        z = sum(torch.exp(cosine(j) / kappa) for j in others)
        guesses = said["unit_guesses"][i, t]
        predicted = guesses[code[i, t]] - torch.log(sum(torch.exp(x) for x in guesses))
        total = total - (beta * (cosine(t) / kappa - torch.log(z)) + gamma * predicted) / len(at)
    entropy = -sum(u * torch.log(u) for u in used)
    return total + beta * alpha * (CODES - torch.exp(entropy)) / CODES


def test_value_and_gradients_are_those_of_the_loop() -> None:
    said = groups()
    leaves = [x for x in said.values() if x.requires_grad]
    settings = {"contrast": 0.7, "diversity": 0.3, "predict": 1.3, "kappa": 0.2, "gumbel": 2.0}
    got = value_of(built(modality="audio", noise=False, **settings), said)
    want = loop(said, 0.7, 0.3, 1.3, 0.2, 2.0)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    for x, y in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(x.nan_to_num(), y.nan_to_num(), rtol=1e-10, atol=1e-12)
        assert not x[2].any(), "a slot that takes no part has a gradient"
        assert x[1].abs().max() > 0


def test_without_the_contrast_it_is_masked_prediction_of_frozen_codes() -> None:
    said = groups()
    here = (said["masked_there"] > 0) & (IDS >= 0)[:, None]
    code = said["unit_logits"].detach().argmax(2)
    want = cross_entropy(said["unit_guesses"][here], code[here])
    torch.testing.assert_close(value_of(built(noise=False, contrast=0), said), want)


def test_with_a_code_for_each_place_it_is_info_nce_within_the_clip() -> None:
    g = torch.Generator().manual_seed(1)
    c, q = (torch.randn(2, 6, 5, generator=g) for _ in range(2))
    code = torch.arange(6).expand(2, -1)
    each, nearest = told_apart(c, q, code, torch.ones(2, 6, dtype=torch.bool), 0.1)
    for i in range(2):
        logits = normalize(c[i], dim=1) @ normalize(q[i], dim=1).T / 0.1
        torch.testing.assert_close(each[i], cross_entropy(logits, torch.arange(6), reduction="none"))
        assert torch.equal(nearest[i], logits.argmax(1) == torch.arange(6))
    same, _ = told_apart(c, q, torch.zeros(2, 6, dtype=torch.long), torch.ones(2, 6, dtype=torch.bool), 0.1)
    assert same.abs().max() == 0, "places of one code are not told apart"


def test_noise_chooses_codes_by_their_probability_alike_for_the_same_clip_and_step() -> None:
    loss = built(seed=5)
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, 0.0], dtype=torch.float64).expand(3000, PLACES, -1)
    ids = torch.arange(3000) * 7919
    noise = loss._noise(ids, 3, logits)
    assert torch.equal(loss._noise(ids.flip(0), 3, logits).flip(0), noise)
    assert not torch.equal(loss._noise(ids, 4, logits), noise)
    often = chosen(logits, noise, 1.0).mean((0, 1))
    torch.testing.assert_close(often, logits[0, 0].softmax(0), rtol=0, atol=0.02)


def test_what_it_needs_is_named() -> None:
    with pytest.raises(ConfigError, match="own/audio_transformer, masked: true"):
        value_of(built(), {})
    with pytest.raises(ConfigError, match="'sound' is in none of the loss's pairs; write text"):
        built(modality="sound").heads(DIM, PAIR)


def test_masked_autoencoding_is_the_mean_square_of_standardised_patches() -> None:
    g = torch.Generator().manual_seed(4)
    patch, made = (torch.randn(ROWS, PLACES, 7, generator=g, dtype=torch.float64) for _ in range(2))
    made[2] = patch[2] = math.nan  # a slot that takes no part
    made.requires_grad_()
    said = {"masked_patch": 3 + 2 * patch, "reconstructed": made, "masked_there": groups()["masked_there"]}
    loss = build_loss(Component.model_validate({"name": "masked_autoencoding", "patch": 7}))
    want, count = 0.0, 0
    for i in (0, 1, 3, 4):
        for t in range(PLACES):
            if said["masked_there"][i, t] > 0:
                x = [float(v) for v in said["masked_patch"][i, t]]
                mean = sum(x) / 7
                deviation = math.sqrt(sum((v - mean) ** 2 for v in x) / 7 + 1e-4)
                want += (
                    sum((float(m.detach()) - (v - mean) / deviation) ** 2 for m, v in zip(made[i, t], x, strict=True))
                    / 7
                )
                count += 1
    got = value_of(loss, said)
    assert float(got.detach()) == pytest.approx(want / count, rel=1e-12)
    (grad,) = torch.autograd.grad(got, made)
    assert not grad[2].any()
    assert not grad[0, 1].any()
    perfect = (said["masked_patch"] - said["masked_patch"].mean(2, keepdim=True)) / (
        said["masked_patch"].var(2, correction=0, keepdim=True) + 1e-4
    ).sqrt()
    assert float(value_of(loss, {**said, "reconstructed": perfect})) == pytest.approx(0, abs=1e-20)
    with pytest.raises(ConfigError, match=r"loss\.patch: the tower gives 7 numbers a place, not 256; use patch: 7"):
        value_of(build_loss(Component(name="masked_autoencoding")), said)
    with pytest.raises(ConfigError, match="own/audio_transformer, masked: true"):
        value_of(loss, {})
