"""Losses that remember against loops over five steps in fp64 that keep their state in Python's dicts and lists: value,
gradients and state. And their identities: CLIP, DCL, what a first visit and a temperature's gradient must be."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

sys.path.insert(0, str(Path(__file__).parent))
from _every_jobs import settings_of

from dualenc.config import Component
from dualenc.data.values import stable_id
from dualenc.errors import ConfigError
from dualenc.losses import Extras, Loss, build_loss
from dualenc.losses.global_contrast import LogGap
from dualenc.losses.mochi import mixtures
from dualenc.memory import KeyQueue, LossState, Replicated, RunShape, SampleBuffer

PAIR, N, D, SAMPLES, SCALE = ("image", "text"), 11, 6, 17, 6.0
F64 = torch.float64
NO = torch.tensor(False)
RUN = RunShape(D, [PAIR], SAMPLES, dtype=F64)


class Step:
    """One step's features, keys, ids (2 and 10 absent, 1, 5 and 6 one pair), samples and domains."""

    def __init__(self, k: int) -> None:
        g = torch.Generator().manual_seed(k)
        self.a = normalize(torch.randn(N, D, generator=g, dtype=F64), dim=1)
        self.b = normalize(self.a + 0.5 * torch.randn(N, D, generator=g, dtype=F64), dim=1)
        self.keys = [normalize(x + 0.2 * torch.randn(N, D, generator=g, dtype=F64), dim=1) for x in (self.a, self.b)]
        self.numbers = (torch.arange(N) * 3 + 5 * k) % SAMPLES
        self.ids = self.numbers.clone()
        self.ids[[5, 6]] = int(self.ids[1])
        self.ids[[2, 10]] = -1
        self.domain = torch.tensor([stable_id("de"), stable_id("en"), stable_id("fr")])[torch.arange(N) % 3]
        self.scale = torch.tensor([SCALE], dtype=F64)
        self.inputs = [self.a, self.b, self.scale]
        for x in self.inputs:
            x.requires_grad_()
        self.number = k

    def extras(self) -> Extras:
        both = {"domain": self.domain}
        a, b = ({"keys": x} for x in self.keys)
        return Extras(PAIR, a, b, both, step=self.number, numbers=self.numbers)

    def here(self) -> list[int]:
        return [i for i in range(N) if int(self.ids[i]) >= 0]


def steps() -> Iterator[Step]:
    yield from (Step(k) for k in range(5))


def against(settings: dict[str, Any], reference: Any) -> dict[str, LossState]:
    """Compare five steps with ``reference(step) → value``, plain and in tiles; what the loss remembers at the end."""
    states: dict[str, LossState] = {}
    for how in ("plain", "tiled"):
        loss = build_loss(Component(**settings, **(settings_of(settings, how) or {})))
        states, naive = dict(loss.memory(RUN)), reference()
        for step in steps():
            want = naive(step)
            expected = torch.autograd.grad(want, step.inputs, allow_unused=True)
            out = loss(step.a, step.b, step.ids, step.scale, None, step.extras())
            torch.testing.assert_close(out.value, want, rtol=1e-9, atol=1e-12)
            for g, w in zip(torch.autograd.grad(out.value, step.inputs, allow_unused=True), expected, strict=True):
                x = torch.zeros_like(step.scale if w is None else w) if g is None else g
                torch.testing.assert_close(x, torch.zeros_like(x) if w is None else w, rtol=1e-9, atol=1e-11)
            for state in states.values():
                state.commit(NO)
    return states


# --- numbers for each sample -----------------------------------------------------------------------------------------


class Global:
    """SogCLR, iSogCLR and FastCLIP, row by row, for both sides; ``u``, ``tau`` … are dicts by side and sample."""

    def __init__(self, kind: str, c: Any) -> None:
        self.kind, self.c = kind, c
        self.u: dict[tuple[int, int], float] = {}
        self.tau: dict[tuple[int, int], float] = {}
        self.moments: dict[tuple[int, int], tuple[float, float, int]] = {}

    def __call__(self, step: Step) -> Tensor:
        here, total = step.here(), torch.zeros((), dtype=F64)
        new: dict[tuple[int, int], tuple[float, float]] = {}
        for side, (x, y) in enumerate(((step.a, step.b), (step.b, step.a))):
            for i in here:
                value, u, gradient = self.row(step, side, x[i], y, i, here)
                total = total + value
                new[side, int(step.numbers[i])] = (u, gradient)
        for key, (u, gradient) in new.items():
            self.u[key] = u
            if self.kind in ("isogclr", "v2"):
                self.move(key, gradient)
        return total / (2 * len(here))

    def row(self, step: Step, side: int, q: Tensor, y: Tensor, i: int, here: list[int]) -> tuple[Tensor, float, float]:
        c, key = self.c, (side, int(step.numbers[i]))
        single = self.kind in ("isogclr", "v2")
        tau = torch.tensor(self.tau.get(key, c.tau), dtype=F64) if single else 1 / step.scale.squeeze()
        if self.kind in ("sogclr", "v1"):
            tau = tau.detach()
        tau_leaf = tau.detach().clone().requires_grad_()
        own = [j for j in here if int(step.ids[j]) == int(step.ids[i])]
        others = [j for j in here if j not in own]
        s_own = torch.stack([q @ y[j] for j in own]).mean()

        def g_of(t: Tensor) -> Tensor:
            return torch.stack([torch.exp((q @ y[j] - s_own) / t) for j in others]).mean()

        g = g_of(tau)
        now, before = float(g.detach()), self.u.get(key)
        gamma = self.gamma(step.number)
        u = now if before is None else (1 - gamma) * before + gamma * now
        weighted = self.kind not in ("v0", "v1")
        factor = tau if weighted else torch.ones((), dtype=F64)
        implicit = factor.detach() * g / (c.epsilon + u)
        rho = c.rho if self.kind in ("isogclr", "v2", "v3") else 0.0
        value = factor * (math.log(c.epsilon + u) + rho)
        # of the objective τ·log(ε + g) + ρτ, with the running mean where g stands in the denominator
        frozen_g = g_of(tau_leaf)
        of_tau = tau_leaf * (math.log(c.epsilon + u) + rho) + tau_leaf.detach() * frozen_g / (c.epsilon + u)
        gradient = float(torch.autograd.grad(of_tau, tau_leaf)[0])
        return value + implicit - implicit.detach(), u, gradient

    def gamma(self, step: int) -> float:
        done = min(step * N / self.c.gamma_decay_samples, 1) if self.c.gamma_decay_samples else 1
        return 0.5 * (1 + math.cos(math.pi * done)) * (1 - self.c.gamma) + self.c.gamma

    def move(self, key: tuple[int, int], gradient: float) -> None:
        c = self.c
        gradient = max(-c.tau_clip, min(c.tau_clip, gradient))
        first, second, count = self.moments.get(key, (0.0, 0.0, 0))
        if self.kind == "isogclr":
            first = c.tau_momentum * first + (1 - c.tau_momentum) * gradient
            direction = first
        else:
            count += 1
            first, second = 0.9 * first + 0.1 * gradient, 0.98 * second + 0.02 * gradient**2
            direction = first / (1 - 0.9**count) / (math.sqrt(second / (1 - 0.98**count)) + 1e-8)
        self.moments[key] = (first, second, count)
        self.tau[key] = min(max(self.tau.get(key, c.tau) - c.tau_lr * direction, c.tau_min), c.tau_max)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("sogclr", {"gamma": 0.6, "epsilon": 0.01}),
        ("isogclr", {"tau": 0.1, "tau_min": 0.05, "rho": 1.5, "tau_lr": 0.01}),
        ("v0", {"gamma": 0.3, "gamma_decay_samples": 40}),
        ("v1", {"gamma": 0.3}),
        ("v2", {"tau": 0.1, "rho": 1.5}),
        ("v3", {"rho": 1.5, "epsilon": 0.02}),
    ],
)
def test_running_means_and_temperatures(kind: str, settings: dict[str, Any]) -> None:
    name = {"name": kind} if kind.endswith("sogclr") else {"name": "fastclip", "version": kind}
    config: Any = build_loss(Component(**name, **settings)).config
    made: list[Global] = []

    def begin() -> Global:
        made.append(Global(kind, config))
        return made[-1]

    states = against({**name, **settings}, begin)
    state = states["samples/image-text"]
    assert isinstance(state, SampleBuffer)
    kept = {k: x for k, (_, _, x) in state.held().items()}
    for k, side in enumerate("ab"):
        seen = {n: u for (s, n), u in made[-1].u.items() if s == k}
        want = torch.tensor([math.log(seen[n]) if n in seen else -math.inf for n in range(SAMPLES)], dtype=F64)
        torch.testing.assert_close(kept[f"log_u_{side}"], want, rtol=1e-9, atol=1e-9)
        if kind in ("isogclr", "v2"):
            taus = torch.tensor([made[-1].tau.get((k, n), config.tau) for n in range(SAMPLES)], dtype=F64)
            torch.testing.assert_close(kept[f"tau_{side}"], taus, rtol=1e-7, atol=1e-9)
            assert len(set(taus.tolist())) > 5


def gradients(settings: dict[str, Any]) -> list[Tensor]:
    """Of one batch without shared ids."""
    step, loss = Step(0), build_loss(Component(**settings))
    loss.memory(RUN)
    out = loss(step.a, step.b, torch.arange(N), step.scale, None, step.extras()) if loss.takes_extras else None
    assert out is not None
    found = torch.autograd.grad(out.value, step.inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, step.inputs, strict=True)]


def test_without_memory_the_gradient_is_clips_or_dcls() -> None:
    """γ = 1: ε = 1/(n − 1) gives InfoNCE, ε = 0 DCL; sogclr's is τ times that. v0's also at the scale."""
    alone: dict[str, Any] = {"gamma": 1.0}
    for epsilon, other in ((1 / (N - 1), {"name": "info_nce"}), (0.0, {"name": "dcl", "scale_by": "loss"})):
        want = gradients(other)
        for version in ("v0", "v1"):
            got = gradients({"name": "fastclip", "version": version, "epsilon": epsilon, **alone})
            for g, w in list(zip(got, want, strict=True))[: 3 if version == "v0" else 2]:
                torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)
            assert version == "v0" or float(got[2]) == 0
        got = gradients({"name": "sogclr", "epsilon": epsilon, **alone})
        for g, w in zip(got[:2], want[:2], strict=True):
            torch.testing.assert_close(SCALE * g, w, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.2, 0.8])
def test_a_first_visit_has_the_gradient_of_a_batch_alone(gamma: float) -> None:
    """The releases begin with u = 0, which multiplies it by 1/γ."""
    for name in ({"name": "sogclr"}, {"name": "fastclip", "rho": 1.0}):
        for got, want in zip(gradients({**name, "gamma": gamma}), gradients({**name, "gamma": 1.0}), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_v3_scale_has_the_gradient_of_the_objective() -> None:
    """γ = 1: that of τ·log(ε + g(τ)) + ρτ by autograd; FastCLIP's release counts the implicit part twice."""
    step, epsilon, rho = Step(0), 0.01, 1.5
    logits = step.a @ step.b.T
    tau = 1 / step.scale.squeeze()
    own = logits.diagonal()
    off = torch.eye(N, dtype=torch.bool)
    rows = []
    for s in (logits, logits.T):
        g = torch.exp((s - own[:, None]) / tau).masked_fill(off, 0).sum(1) / (N - 1)
        rows.append(tau * torch.log(epsilon + g) + rho * tau)
    want = torch.autograd.grad(torch.stack(rows).mean(), step.inputs)
    for g, w in zip(gradients({"name": "fastclip", "gamma": 1.0, "epsilon": epsilon, "rho": rho}), want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)


def test_logarithms_hold_where_exponentials_overflow() -> None:
    """A difference of cosines of 2 at τ = 0.005 is exp(400)."""
    a = torch.eye(3)[:2]
    loss = build_loss(Component(name="sogclr", gamma=0.5))
    states = loss.memory(RunShape(3, [PAIR], 2))
    for _ in range(2):
        extras = Extras(PAIR, {}, {}, numbers=torch.arange(2))
        x = a.clone().requires_grad_()
        out = loss(x, torch.stack([-a[0], a[0]]), torch.arange(2), torch.tensor([200.0]), None, extras)
        out.value.backward()
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()
        states["samples/image-text"].commit(NO)
    assert isinstance(LogGap().kinds, list)


# --- keys of slow towers ---------------------------------------------------------------------------------------------


class Queues:
    """MoCo and CoCoSoDa row by row; queues are lists of (id, lane, key), the newest last."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.s = settings
        self.queue: list[list[tuple[int, int, Tensor]]] = [[], []]

    def __call__(self, step: Step) -> Tensor:
        if self.s["name"] == "cocosoda":
            blocks = [(step.a, step.b, 1), (step.b, step.a, 0), (step.a, step.keys[1], 1), (step.b, step.keys[0], 0)]
            blocks += [(step.a, step.keys[0], 0), (step.b, step.keys[1], 1)] if self.s.get("within") else []
        else:
            blocks = [(step.a, step.keys[1], 1), (step.b, step.keys[0], 0)]
        here = step.here()
        value = torch.stack([self.block(step, k, *block) for k, block in enumerate(blocks)]).sum()
        for side in (0, 1):
            for i in here:
                lane = self.lane(step, i)
                if lane >= 0:
                    self.queue[side].append((int(step.ids[i]), lane, step.keys[side][i].detach()))
            for lane in range(3):
                mine = [x for x in self.queue[side] if x[1] == lane]
                gone = {id(x) for x in mine[: max(len(mine) - self.s["queue"], 0)]}
                self.queue[side] = [x for x in self.queue[side] if id(x) not in gone]
        return value / (len(blocks) * len(here))

    def lane(self, step: Step, i: int) -> int:
        if "domains" not in self.s:
            return 0
        names = [stable_id(x) for x in self.s["domains"]]
        said = int(step.domain[i])
        return names.index(said) if said in names else -1

    def block(self, step: Step, k: int, x: Tensor, y: Tensor, side: int) -> Tensor:
        here, scale, total = step.here(), step.scale.squeeze(), torch.zeros((), dtype=F64)
        mixed = self.mixed(step, k, x, y, side) if "mix" in self.s else None
        for n, i in enumerate(here):
            own = [j for j in here if int(step.ids[j]) == int(step.ids[i])]
            alike = [j for j in here if self.lane(step, j) == self.lane(step, i)]
            batch = sorted({*alike, *own}) if self.s.get("in_batch", True) else own
            queue = [q for id_, lane, q in self.queue[side] if id_ != int(step.ids[i]) and lane == self.lane(step, i)]
            logits = [scale * (x[i] @ y[j]) for j in batch] + [scale * (x[i] @ q) for q in queue]
            smooth, count = self.s.get("label_smoothing", 0.0), len(logits)
            further = [] if mixed is None else list(scale * mixed[n])
            log_z = torch.logsumexp(torch.stack(logits + further), 0)
            wanted = torch.stack([scale * (x[i] @ y[j]) for j in own]).mean()
            wanted = (1 - smooth) * wanted + smooth * torch.stack(logits).sum() / count
            total = total + log_z - wanted
        return total

    def mixed(self, step: Step, k: int, x: Tensor, y: Tensor, side: int) -> Tensor:
        m, here = self.s["mix"], step.here()
        ids = [int(step.ids[j]) for j in here] + [id_ for id_, _, _ in self.queue[side]]
        columns = torch.stack([y[j] for j in here] + [q for _, _, q in self.queue[side]])
        salt = step.ids.sum() + k + step.number
        sizes = (m["hardest"], m["between"], m["towards"])
        return mixtures(x[here], step.ids[here], columns, torch.tensor(ids), salt, sizes)


MOCO: dict[str, Any] = {"name": "moco", "queue": 14}


@pytest.mark.parametrize(
    "settings",
    [
        MOCO,
        {**MOCO, "queue": 5},
        {**MOCO, "in_batch": False, "label_smoothing": 0.1},
        {**MOCO, "queue": 3, "domains": ["en", "de"]},
        {**MOCO, "mix": {"hardest": 4, "between": 3, "towards": 2}},
        {**MOCO, "queue": 0},
        {"name": "cocosoda", "queue": 14},
        {"name": "cocosoda", "queue": 14, "within": True},
    ],
    ids=str,
)
def test_keys_and_queues(settings: dict[str, Any]) -> None:
    made: list[Queues] = []

    def begin() -> Queues:
        made.append(Queues(settings))
        return made[-1]

    for name, state in against(settings, begin).items():
        assert isinstance(state, KeyQueue)
        want = made[-1].queue["ab".index(name[-1])]
        found = [(int(i), int(lane)) for i, lane in zip(state.ids, state.lane, strict=True) if int(i) >= 0]
        assert sorted(found) == sorted((i, lane) for i, lane, _ in want)


def test_no_queue_and_towers_that_do_not_lag_are_info_nce() -> None:
    """CoCoSoDa's six blocks are then the same contrast three times; MoCo's value is InfoNCE's."""
    step = Step(1)
    want = build_loss(Component(name="info_nce"))(step.a, step.b, step.ids, step.scale).value
    step.keys = [step.a, step.b]
    for settings in ({"name": "moco", "queue": 0}, {"name": "cocosoda", "queue": 0}):
        loss = build_loss(Component(**settings))
        assert loss.memory(RUN) == {}
        torch.testing.assert_close(loss(step.a, step.b, step.ids, step.scale, None, step.extras()).value, want)


@pytest.mark.parametrize("how", ["plain", "tiled"])
@pytest.mark.parametrize(
    "settings",
    [
        {"name": "moco", "in_batch": False},
        {"name": "moco", "queue": 3, "domains": ["en", "de"]},
        {"name": "cocosoda"},
        {"name": "sogclr"},
        {"name": "fastclip", "version": "v2"},
    ],
    ids=str,
)
def test_wrong_items_of_samples_are_negatives_of_the_other_side(settings: dict[str, Any], how: str) -> None:
    """A wrong item that is like the row's own pair costs something, and the more the nearer; an absent one nothing."""
    values = []
    for near in (None, 0.0, 0.7):
        step, loss = Step(0), build_loss(Component(**settings, **(settings_of(settings, how) or {})))
        loss.memory(RUN)
        extras = step.extras()
        if near is not None:
            wrong = normalize(near * step.b + (1 - near) * torch.ones(D, dtype=F64), dim=1)[:, None]
            extras.b["negatives"] = wrong.repeat(1, 2, 1)
            extras.b["negatives_there"] = torch.ones(N, 2) * torch.tensor([1.0, 0.0])
        out = loss(step.a, step.b, step.ids, step.scale, None, extras)
        torch.autograd.grad(out.value, step.a)
        values.append(float(out.value.detach()))
    assert values[1] < values[2]
    assert values[0] < values[2] or settings["name"] == "sogclr"  # a mean over negatives falls by far ones


def test_byolip_is_the_cosine_of_predictions_and_slow_projections() -> None:
    loss, step = build_loss(Component(name="byolip", project=4, hidden=5)), Step(2)
    g = torch.Generator().manual_seed(0)
    predicted, slow = ([torch.randn(N, 8, generator=g, dtype=F64) for _ in "ab"] for _ in range(2))
    a, b = ({"predicted": p.requires_grad_(), "slow_predicted": s} for p, s in zip(predicted, slow, strict=True))
    out = loss(step.a, step.b, step.ids, step.scale, None, Extras(PAIR, a, b)).value
    here = step.here()
    rows = [cosine_similarity(predicted[x][i, 4:], slow[1 - x][i, :4], dim=0) for x in (0, 1) for i in here]
    torch.testing.assert_close(out, -torch.stack(rows).mean())
    assert float(torch.autograd.grad(out, predicted[0])[0][:, :4].abs().max()) == 0


class Neighbours:
    """BECLR, row by row; the memory is a list of (id, projection), the newest last."""

    def __init__(self, settings: dict[str, Any], centroids: list[Tensor]) -> None:
        self.s, self.centroids = settings, centroids
        self.memory: list[list[tuple[int, Tensor]]] = [[], []]

    def __call__(self, predicted: list[Tensor], slow: list[Tensor], step: Step) -> Tensor:
        here, total = step.here(), torch.zeros((), dtype=F64)
        targets = [normalize(x[:, :4], dim=1) for x in slow]
        for side in (0, 1):
            c = self.centroids[side]
            for i in here:
                z = targets[side][i]
                own = int((c @ z).argmax())
                mine = [x for _, x in self.memory[side] if int((c @ x).argmax()) == own]
                mine = sorted(mine, key=lambda x: -float(x @ z))[: self.s["neighbours"]]
                guess = predicted[1 - side][i, 4:]
                total = total - torch.stack([cosine_similarity(guess, x, dim=0) for x in [z, *mine]]).mean()
        for side in (0, 1):
            self.memory[side] += [(int(step.ids[i]), targets[side][i]) for i in here]
            self.memory[side] = self.memory[side][-self.s["memory"] :]
            q = torch.exp((targets[side][here] @ self.centroids[side].T - 1) / 0.05)
            for _ in range(3):
                q = q / q.sum(0) * len(here) / q.shape[1]
                q = q / q.sum(1, keepdim=True)
            mean = (q.T @ targets[side][here]) / q.sum(0)[:, None]
            self.centroids[side] = normalize(0.9 * self.centroids[side] + 0.1 * mean, dim=1)
        return total / (2 * len(here))


@pytest.mark.parametrize("neighbours", [0, 2])
def test_a_clustered_memory_adds_the_nearest_of_the_partners_cluster(neighbours: int) -> None:
    """Without neighbours it is BYOLIP; the centroids move all the same."""
    settings = {"project": 4, "hidden": 5, "memory": 15, "clusters": 3, "neighbours": neighbours, "strip_mb": 1e-6}
    loss, byolip = (build_loss(Component(name=n, **x)) for n, x in (("beclr", settings), ("byolip", {})))
    states = loss.memory(RUN)
    clusters = [states[f"clusters/image-text/{s}"] for s in "ab"]
    assert all(isinstance(x, Replicated) for x in clusters)
    naive = Neighbours(settings, [next(iter(x.held().values()))[2].clone() for x in clusters])
    g = torch.Generator().manual_seed(1)
    for step in steps():
        predicted, slow = ([torch.randn(N, 8, generator=g, dtype=F64) for _ in "ab"] for _ in range(2))
        a, b = ({"predicted": p.requires_grad_(), "slow_predicted": s} for p, s in zip(predicted, slow, strict=True))
        given = (step.a, step.b, step.ids, step.scale, None, Extras(PAIR, a, b, step=step.number))
        out, want = loss(*given), naive(predicted, slow, step)
        torch.testing.assert_close(out.value, want)
        for x, y in zip(*(torch.autograd.grad(v, predicted) for v in (out.value, want)), strict=True):
            torch.testing.assert_close(x, y)
        assert neighbours or float(out.value.detach()) == pytest.approx(float(byolip(*given).value.detach()))
        assert (float(out.metrics["neighbours"]) > 0) == bool(neighbours and step.number)
        for state in states.values():
            state.commit(NO)
    for x, want in zip(clusters, naive.centroids, strict=True):
        torch.testing.assert_close(next(iter(x.held().values()))[2], want)


# --- the states themselves -------------------------------------------------------------------------------------------


def test_a_skipped_step_changes_nothing_and_a_second_forward_replaces_the_first() -> None:
    queue, buffer = KeyQueue(4, RUN), SampleBuffer({"u": -1.0}, RUN)
    both = Replicated({"mean": torch.zeros(2)})
    numbers, there = torch.tensor([3, 5, 3]), torch.tensor([True, True, True])
    for skipped in (True, False):
        queue.propose(torch.full((3, D), torch.nan), torch.arange(3))
        queue.propose(torch.arange(3)[:, None].expand(3, D).double(), torch.tensor([7, -1, 9]))
        buffer.propose(numbers, there, {"u": torch.tensor([1.0, 2.0, 4.0])})
        both.propose({"mean": torch.ones(2)})
        for state in (queue, buffer, both):
            state.commit(torch.tensor(skipped))
            state.commit(torch.tensor(False))  # nothing is proposed any more
        if skipped:
            assert queue.ids.tolist() == [-1] * 4
            assert buffer.read(numbers, there)["u"].tolist() == [-1, -1, -1]
            assert both.now["mean"].tolist() == [0, 0]
    assert queue.ids.tolist() == [7, 9, -1, -1]
    assert queue.keys[:2, 0].tolist() == [0, 2]
    assert buffer.read(numbers, torch.tensor([True, True, False]))["u"].tolist() == [4, 2, 0]  # the last slot's stays
    assert both.now["mean"].tolist() == [1, 1]


def test_more_keys_than_places_leave_the_newest() -> None:
    queue = KeyQueue(3, RUN, lanes=2)
    for first in (0, 5):
        ids = torch.arange(first, first + 5)
        queue.propose(ids[:, None].expand(5, D).double(), ids, torch.tensor([0, 0, 1, 0, 0]))
        queue.commit(NO)
        here = {(int(lane), int(i)) for i, lane in zip(queue.ids, queue.lane, strict=True) if int(i) >= 0}
        lane_one = {(1, 2)} if first == 0 else {(1, 2), (1, 7)}
        assert here == {(0, first + k) for k in (1, 3, 4)} | lane_one
        assert all(float(k[0]) == float(i) for k, i in zip(queue.keys, queue.ids, strict=True) if int(i) >= 0)


def test_what_cannot_be_is_refused() -> None:
    wrapped: Loss = build_loss(Component(name="matryoshka", loss={"name": "moco"}, dims=[2, 4]))
    with pytest.raises(ConfigError, match="MoCo keeps keys or numbers from step to step and cannot be inside Matry"):
        wrapped.memory(RUN)
    with pytest.raises(ConfigError, match="keeps numbers for every sample"):
        gradients_without_memory()
    with pytest.raises(ConfigError, match="leave out mix or domains"):
        build_loss(Component(name="moco", mix={}, domains=["en"]))


def gradients_without_memory() -> None:
    step = Step(0)
    build_loss(Component(name="sogclr"))(step.a, step.b, step.ids, step.scale, None, step.extras())
