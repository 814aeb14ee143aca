"""Losses that add to another: value and gradient against loops in double precision, the identities of their papers, and
what the ranks of a batch give."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
import _term_loops
from _term_loops import LOOPS, nce

from dualenc.config import Component
from dualenc.encoders.dual_encoder import EVERY, hidden_group
from dualenc.errors import ConfigError
from dualenc.losses import Extras, Loss, build_loss, losses
from dualenc.losses.barlip import cross_correlation
from dualenc.losses.koleo import koleo
from dualenc.losses.private_space import joint_entropies
from dualenc.losses.supremix import beta_quantiles, drawn, neighbours
from dualenc.losses.swalip import assignments
from dualenc.losses.uniformity import uniformity
from dualenc.losses.whitened import InverseRoot, whitened

torch.set_num_threads(1)
torch.manual_seed(0)
IDS = torch.tensor([4, 11, -1, 4, 7, 20, 9, -1, 3])
"""Two rows of one id, two absent ones."""
LABELS = [1.0, 2.0, 9.0, 1.2, 3.5, math.nan, 5.0, 4.0, 8.0]
PAIR = ("image", "audio")
DIM = 8


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def features(n: int = len(IDS), seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    a = unit(torch.randn(n, DIM, generator=g, dtype=torch.float64))
    b = unit(a + 0.7 * torch.randn(n, DIM, generator=g, dtype=torch.float64))
    return [a, b, torch.tensor([5.0], dtype=torch.float64)]


def given(loss: Loss, a: Tensor, b: Tensor) -> tuple[Extras, list[Tensor]]:
    """The extras that training would give: what the loss's heads say of a and b, labels, places of a map. As leaves, so
    that a gradient at them is seen; it is that of the heads' parameters by the chain rule."""
    sides: list[dict[str, Tensor]] = [{}, {}]
    leaves = []
    torch.manual_seed(1)
    for group, head in loss.heads(DIM, PAIR).items():
        for side, m, x in zip(sides, PAIR, (a, b), strict=True):
            module = (head[m] if m in head else head[EVERY]).double()
            side[group] = module(x.detach()).detach().double().requires_grad_()
            leaves.append(side[group])
    g = torch.Generator().manual_seed(2)
    for depth in loss.hidden:
        for side in sides:
            side[hidden_group(depth)] = torch.randn(len(a), DIM, generator=g, dtype=torch.float64).requires_grad_()
            leaves.append(side[hidden_group(depth)])
    for side in sides:
        local = unit(torch.randn(len(a), 4, 3, generator=g, dtype=torch.float64)).requires_grad_()
        leaves.append(local)
        side["local"] = local
        side["region"] = torch.randint(-1, 3, (len(a), 4), generator=g)
        side["region"][4] = -1  # a sample without a place
    return Extras(PAIR, *sides, both={"label": torch.tensor(LABELS, dtype=torch.float64)}, step=3), leaves


def built(name: str) -> Loss:
    return build_loss(Component(name=name, **LOOPS[name][1]))


def gradients(value: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return [
        torch.zeros_like(x) if g is None else g
        for x, g in zip(
            inputs, torch.autograd.grad(value.sum(), inputs, allow_unused=True, retain_graph=True), strict=True
        )
    ]


def loop_value(name: str, a: Tensor, b: Tensor, scale: Tensor, extras: Extras) -> Tensor:
    """The loop on the valid rows."""
    keep = [i for i, x in enumerate(IDS.tolist()) if x >= 0]
    table = beta_quantiles(torch.device("cpu"), torch.float64)
    more = {
        **{m: {k: [x[i] for i in keep] for k, x in side.items()} for m, side in (("a", extras.a), ("b", extras.b))},
        "label": [LABELS[i] for i in keep],
        "drawn": drawn(IDS[keep], IDS[keep], 3, table).tolist(),
        "step": 3,
    }
    loop, settings = LOOPS[name]
    return loop([a[i] for i in keep], [b[i] for i in keep], IDS[keep].tolist(), scale, more, **settings)


@pytest.mark.parametrize("name", LOOPS)
def test_value_and_gradient_equal_the_loop(name: str) -> None:
    loss = built(name)
    inputs = [x.requires_grad_() for x in features()]
    a, b, scale = unit(inputs[0]), unit(inputs[1]), inputs[2]  # losses may use that features have length 1
    extras, leaves = given(loss, a, b)
    more = {"extras": extras} if loss.takes_extras else {}
    got = loss(a, b, IDS, scale, None, **more).value
    want = loop_value(name, a, b, scale, extras)
    torch.testing.assert_close(got, want.squeeze(), rtol=1e-9, atol=1e-11)
    for g, w in zip(gradients(got, [*inputs, *leaves]), gradients(want, [*inputs, *leaves]), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("name", LOOPS)
def test_what_stands_in_absent_slots_changes_nothing(name: str) -> None:
    loss = built(name)
    a, b, scale = features()
    extras, _ = given(loss, a, b)
    more = {"extras": extras} if loss.takes_extras else {}
    want = loss(a, b, IDS, scale, None, **more).value.detach()
    gone = IDS < 0
    a, b = a.clone(), b.clone()
    a[gone], b[gone] = 3e3, -7e3
    for side in (extras.a, extras.b):
        for k, x in side.items():
            if x.is_floating_point():
                side[k] = torch.where(gone.view(-1, *[1] * (x.ndim - 1)), 1e3, x.detach())
    torch.testing.assert_close(loss(a, b, IDS, scale, None, **more).value.detach(), want)


@pytest.mark.parametrize("name", LOOPS)
def test_no_valid_row_is_zero_with_zero_gradients(name: str) -> None:
    loss = built(name)
    inputs = [x.requires_grad_() for x in features()]
    extras, leaves = given(loss, *inputs[:2])
    more = {"extras": extras} if loss.takes_extras else {}
    value = loss(*inputs[:2], torch.full_like(IDS, -1), inputs[2], None, **more).value
    if value.requires_grad:
        assert all(float(g.abs().max()) == 0 for g in gradients(value, [*inputs, *leaves]))
    assert torch.isfinite(value)
    assert name == "barlip" or float(value.detach()) == 0.0


def plain(a: Tensor, b: Tensor, scale: Tensor, ids: Tensor = IDS) -> Tensor:
    return build_loss(Component(name="info_nce"))(a, b, ids, scale).value


# --- identities ---------------------------------------------------------------------------------------------------


def test_koleo_of_an_orthonormal_batch() -> None:
    """−log √2: every nearest neighbour is √2 away."""
    eye = torch.eye(6, dtype=torch.float64)
    assert float(koleo(eye, torch.arange(6))) == pytest.approx(-math.log(math.sqrt(2)), abs=1e-12)


def test_koleo_stays_finite_on_equal_rows() -> None:
    x = torch.ones(3, 4, dtype=torch.float64).div(2).requires_grad_()
    value = koleo(x, torch.arange(3))
    assert torch.isfinite(value)
    assert bool(torch.isfinite(torch.autograd.grad(value, x)[0]).all())


def test_koleo_strips_change_nothing() -> None:
    (a, _, _), ids = features(50), torch.arange(50)
    torch.testing.assert_close(koleo(a, ids, 1e-9), koleo(a, ids))
    torch.testing.assert_close(uniformity(a, ids, 2.0, 1e-9), uniformity(a, ids))


def test_uniformity_of_an_orthonormal_batch_and_of_one_point() -> None:
    eye = torch.eye(6, dtype=torch.float64)
    assert float(uniformity(eye, torch.arange(6))) == pytest.approx(-4.0)
    assert float(uniformity(eye[:1].expand(6, -1), torch.arange(6))) == pytest.approx(0.0)


def test_matryoshka_at_full_width_is_the_plain_loss() -> None:
    a, b, scale = features()
    got = build_loss(Component(name="matryoshka", dims=[DIM]))(a, b, IDS, scale).value
    assert torch.equal(got, plain(a, b, scale))
    inner = build_loss(Component(name="matryoshka", dims=[4], loss={"name": "sigmoid"}))
    x, y = unit(a[:, :4]), unit(b[:, :4])
    want = build_loss(Component(name="sigmoid"))(x, y, IDS, scale, torch.tensor([-2.0])).value
    torch.testing.assert_close(inner(a, b, IDS, scale, torch.tensor([-2.0])).value, want)
    with pytest.raises(ConfigError, match=r"loss\.dims: 16 is wider than the features \(8"):
        build_loss(Component(name="matryoshka", dims=[16]))(a, b, IDS, scale)


def test_barlip_of_equal_rows_with_independent_dimensions_is_zero() -> None:
    x = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    c = cross_correlation(x, x, torch.arange(4))
    torch.testing.assert_close(c, torch.eye(2, dtype=torch.float64), atol=2e-5, rtol=0)
    loss = build_loss(Component(name="barlip", project=None))
    assert float(loss(x, x, torch.arange(4), torch.ones(1)).value) < 1e-10
    assert loss.heads(4, PAIR) == {}


def test_swalip_assignments_are_balanced_over_the_valid_rows() -> None:
    scores = torch.rand(len(IDS), 3, dtype=torch.float64)
    q = assignments(scores, IDS, 0.2, 200)
    assert float(q[IDS < 0].abs().max()) == 0
    torch.testing.assert_close(q[IDS >= 0].sum(1), torch.ones(7, dtype=torch.float64))
    torch.testing.assert_close(q.sum(0), torch.full((3,), 7 / 3, dtype=torch.float64), rtol=1e-4, atol=0)


def test_swalip_assigns_to_near_prototypes_and_epsilon_sharpens() -> None:
    """A released Sinkhorn works on distances, and so assigns to the farthest; its ε is never used."""
    near = torch.eye(4, dtype=torch.float64).repeat(2, 1)
    soft, sharp = (assignments(near, torch.arange(8), epsilon, 10) for epsilon in (0.5, 0.05))
    assert torch.equal(soft.argmax(1), near.argmax(1))
    assert float(soft.amax(1).max()) < 0.8
    assert float(sharp.amax(1).min()) > 0.999


def test_siamlip_sends_no_gradient_to_targets() -> None:
    loss = built("siamlip")
    a, b, scale = features()
    extras, _ = given(loss, a, b)
    z = extras.a["predicted"]
    value = loss(a, b, IDS, scale, None, extras=extras).value
    grad = torch.autograd.grad(value, z)[0]
    half = z.shape[1] // 2
    assert float(grad[:, :half].abs().max()) == 0
    assert float(grad[:, half:].abs().max()) > 0


def test_hallucinator_at_step_zero_is_the_loss_once_more() -> None:
    a, b, scale = features()
    got = build_loss(Component(name="hallucinator", step=0, share=0.25))(a, b, IDS, scale).value
    torch.testing.assert_close(got, 1.25 * plain(a, b, scale))


def test_an_even_gate_is_the_plain_loss() -> None:
    a, b, scale = features()
    loss = built("pair_gate")
    extras, _ = given(loss, a, b)  # gates start even
    torch.testing.assert_close(loss(a, b, IDS, scale, None, extras=extras).value, plain(a, b, scale))
    assert sorted(loss.heads(DIM, ["text", "image", "audio"])) == [
        "gate_audio_image",
        "gate_audio_text",
        "gate_image_text",
    ]


def test_a_closed_gate_sends_no_gradient_to_its_dimension() -> None:
    loss = built("pair_gate")
    (gate,) = (head[EVERY] for head in loss.heads(DIM, PAIR).values())
    with torch.no_grad():
        gate.logit[3] = -200.0
    a, b, scale = (x.float() for x in features())
    a.requires_grad_()
    extras = Extras(PAIR, {"gate_audio_image": gate(a)}, {"gate_audio_image": gate(b)})
    grad = torch.autograd.grad(loss(a, b, IDS, scale, None, extras=extras).value, a)[0]
    assert float(grad[:, 3].abs().max()) == 0
    assert float(grad.abs().max()) > 0


def test_joint_entropy_is_that_of_the_concatenation() -> None:
    """Of a kernel of [c; s] / √2, as both halves have length 1; with one point as private space, of c alone."""
    c, s, _ = features()
    both = unit(torch.cat([c, s], 1))
    joint = joint_entropies(c, s, IDS, 0.5, 64.0)[0]
    torch.testing.assert_close(
        joint, joint_entropies(both, both, IDS, 0.5, 64.0)[0] * 0 + _kernel(torch.cat([c, s], 1))
    )
    one = s[:1].expand_as(s)
    torch.testing.assert_close(joint_entropies(c, one, IDS, 0.5, 64.0)[0], _kernel(c))


def _kernel(x: Tensor) -> Tensor:
    rows = x[IDS >= 0]
    ids = IDS[IDS >= 0]
    k = torch.exp(-(torch.cdist(rows, rows) ** 2) / (2 * 0.5)) * (ids[:, None] != ids[None])
    return (k.sum(1) / (ids[:, None] != ids[None]).sum(1)).log().mean()


@pytest.mark.parametrize("groups", [1, 2, DIM])
def test_whitened_groups_have_unit_covariance(groups: int) -> None:
    x, _, _ = features(64)
    ids = torch.arange(64)
    ids[5] = -1
    order = torch.randperm(DIM, generator=torch.Generator().manual_seed(0))
    y = whitened(x, ids, groups, order, 1e-12)[ids >= 0][:, order]
    cov = (y.T @ y / 63).unflatten(0, (groups, -1)).unflatten(2, (groups, -1))
    blocks = torch.stack([cov[g, :, g] for g in range(groups)])
    torch.testing.assert_close(
        blocks, torch.eye(DIM // groups, dtype=torch.float64).expand_as(blocks), atol=1e-6, rtol=0
    )
    if groups == 1:  # full ZCA: the shuffle is irrelevant
        torch.testing.assert_close(whitened(x, ids, 1, torch.arange(DIM), 1e-12), whitened(x, ids, 1, order, 1e-12))
    if groups == DIM:  # each dimension standardised
        kept = x[ids >= 0]
        want = (kept - kept.mean(0)) / kept.std(0, unbiased=False)
        torch.testing.assert_close(whitened(x, ids, DIM, order, 1e-12)[ids >= 0], want)


def test_the_inverse_root_has_a_gradient_at_equal_eigenvalues() -> None:
    a = torch.eye(3, dtype=torch.float64)[None] * 2
    x = torch.randn(1, 3, 3, dtype=torch.float64)
    for start in (a, a + 0.1 * x @ x.mT):
        assert torch.autograd.gradcheck(lambda m: InverseRoot.apply((m + m.mT) / 2), start.clone().requires_grad_())


def test_whitening_uses_another_shuffle_each_time() -> None:
    """In the release all positives of a sample share one."""
    loss = build_loss(Component(name="whitened", groups=4, shuffles=1))
    a, b, scale = features()
    values = {float(loss(a, b, IDS, scale, None, extras=Extras(PAIR, {}, {}, step=s)).value) for s in range(4)}
    assert len(values) == 4
    two = build_loss(Component(name="whitened", groups=4, shuffles=2))
    again = [float(two(a, b, IDS, scale, None, extras=Extras(PAIR, {}, {}, step=7)).value) for _ in "ab"]
    assert again[0] == again[1]
    with pytest.raises(ConfigError, match="3 does not divide the 8 dimensions"):
        build_loss(Component(name="whitened", groups=3))(a, b, IDS, scale)


def test_supremix_without_mixtures_is_supcon_on_labels() -> None:
    """Labels as ids: the several positives of info_nce."""
    a, b, scale = features()
    labels = torch.tensor([0.0, 1, 2, 0, 2, 1, 3, 3, 1], dtype=torch.float64)
    loss = build_loss(Component(name="supremix", mixed=0, mix_negatives=False))
    ids = torch.arange(9)
    got = loss(a, b, ids, scale, None, extras=Extras(PAIR, {}, {}, {"label": labels})).value
    torch.testing.assert_close(got, plain(a, b, scale, labels.long()))


def test_supremix_mixes_to_the_anchors_own_label() -> None:
    at = torch.tensor([0.0, 1.0, 3.0, 7.0], dtype=torch.float64)
    low, high, there = neighbours(at, at, 0.0, 5.0, 2)
    assert there.tolist() == [[False, False], [True, False], [True, False], [False, False]]
    for i in (1, 2):
        j, k = at[low[i, 0]], at[high[i, 0]]
        mu = (k - at[i]) / (k - j)
        assert float(mu * j + (1 - mu) * k) == pytest.approx(float(at[i]))


def test_supremix_draws_beta_and_repeats_itself() -> None:
    table = beta_quantiles(torch.device("cpu"), torch.float64)
    ids = torch.randint(1 << 62, (400,), generator=torch.Generator().manual_seed(0))
    lam = drawn(ids, ids, 5, table)
    assert float(lam.mean()) == pytest.approx(2 / 10, abs=0.005)
    assert float(lam.var()) == pytest.approx(2 * 8 / (10**2 * 11), abs=0.001)
    assert torch.equal(lam[7:9], drawn(ids[7:9], ids, 5, table))
    assert not torch.equal(lam, drawn(ids, ids, 6, table))
    late = drawn(ids, ids, 10**7, table)  # products of large steps wrap around
    assert float(late.mean()) == pytest.approx(2 / 10, abs=0.005)


def test_supremix_says_what_label_it_lacks() -> None:
    a, b, scale = features()
    loss = build_loss(Component(name="supremix", label="depth"))
    assert loss.needs == ("depth",)
    with pytest.raises(ConfigError, match=r"one number a sample as 'depth'; write data\.sources\.N\.values"):
        loss(a, b, IDS, scale)


def test_local_contrast_looks_at_no_other_sample() -> None:
    loss = built("local_contrast")
    a, b, scale = features()
    extras, _ = given(loss, a, b)
    for side in (extras.a, extras.b):
        side["region"] = torch.zeros_like(side["region"])
    alone = [
        float(loss(a, b, torch.where(torch.arange(9) == i, 0, -1), scale, None, extras=extras).value) for i in range(9)
    ]
    whole = float(loss(a, b, torch.arange(9), scale, None, extras=extras).value)
    assert whole == pytest.approx(sum(alone) / 9)
    with pytest.raises(ConfigError, match=r"modalities\.image\.encoder\.local_dim"):
        loss(a, b, IDS, scale, None, extras=Extras(PAIR, {}, {}))


def test_layers_are_additive_and_the_temperature_is_their_own() -> None:
    a, b, scale = features()
    groups = [{hidden_group(d): x for d, x in zip((0.5, 1.0), features(seed=s)[:2], strict=True)} for s in (1, 2)]
    extras = Extras(PAIR, *groups)

    def of(*depths: float, tau: float = 0.07) -> Tensor:
        return build_loss(Component(name="layers", depths=list(depths), tau=tau))(a, b, IDS, scale, extras=extras).value

    torch.testing.assert_close(of(0.5, 1.0), of(0.5) + of(1.0))
    x, y = (g[hidden_group(1.0)] for g in groups)
    torch.testing.assert_close(of(1.0, tau=0.2), plain(x, y, scale))  # scale is 5


def test_every_wrapper_passes_on_needs_and_heads() -> None:
    inner = {"name": "supremix", "label": "age"}
    for name, settings in (("matryoshka", {"dims": [8]}), ("hallucinator", {}), ("pair_gate", {}), ("whitened", {})):
        loss = build_loss(Component(name=name, **settings, loss=inner))
        assert loss.needs == ("age",)
        heads = build_loss(Component(name=name, **settings, loss={"name": "siamlip"})).heads(DIM, PAIR)
        assert "inner__predicted" in heads
    with pytest.raises(ConfigError, match=r"loss\.loss\.label_smoothing"):
        build_loss(Component(name="matryoshka", dims=[8], loss={"name": "info_nce", "label_smoothing": 2}))


def test_every_term_has_a_loop() -> None:
    assert {*LOOPS} <= {*losses}
    assert all(callable(vars(_term_loops)[name]) for name in LOOPS)
    a, b, scale = features()
    torch.testing.assert_close(
        nce(list(a[:3]), list(b[:3]), [0, 1, 2], scale).squeeze(), plain(a[:3], b[:3], scale, torch.arange(3))
    )
