"""``dualenc plan``: its parts against what they say of, its table, and its keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _shared import ROOT
from torch import nn
from typer.testing import CliRunner

from dualenc.cli import app
from dualenc.config import Component, Recipe, load_recipe
from dualenc.errors import ConfigError
from dualenc.losses import build_loss
from dualenc.model import build_bundle
from dualenc.plan import activations, loss_memory, table
from dualenc.plan.engine_memory import DDP, FSDP2, ONE, REDUCE_BUCKET, ZERO, holding
from dualenc.plan.live import LiveBytes
from dualenc.plan.planning import Planned, as_json, keys_of, kinds_for, micros, plan
from dualenc.plan.weights import build_on, count
from dualenc.plan.widest_rows import widest
from dualenc.plan.wire import wire

QUICKSTART = ROOT / "recipes" / "quickstart" / "quickstart.yaml"
GIB = 2**30


def recipe(*overrides: str) -> Recipe:
    return load_recipe(QUICKSTART, list(overrides))


@pytest.fixture(scope="module")
def planned() -> Planned:
    return plan(recipe(), ranks=4, memory=80 * GIB)


# --- counting live tensors -----------------------------------------------------------------------------------------


def test_live_bytes_are_those_of_tensors_that_still_exist() -> None:
    seen: list[int] = []
    with LiveBytes(seen.append) as live:
        a = torch.ones(1000)
        b = a + 1
        assert live.live == 8000
        view = b[10:]
        del b
        assert live.live == 8000, "a view holds its storage"
        del view
        assert live.live == 4000
        c = (a * 2).sum()
    assert max(seen) == 8004
    assert c.item() == 2000


def test_autograd_keeps_what_the_backward_needs() -> None:
    layer = nn.Linear(64, 64)
    with LiveBytes(lambda _: None) as live:
        live.ignore(layer.parameters())
        x = torch.ones(8, 64)
        y = nn.functional.gelu(layer(x))
        kept = live.live
        y = y.sum()
        assert kept == 3 * 8 * 64 * 4, "input, gelu's input and its output"
        y.backward()


def test_what_a_loss_trains_is_counted() -> None:
    loss = "loss=[info_nce, {name: barlip, project: 64, hidden: 32}]"
    plain, _ = build_on("meta", recipe())
    model, _ = build_on("meta", recipe(loss))
    d = recipe().embed_dim
    projector = d * 32 + 32 + 2 * 32 + 32 * 64 + 64  # linear, layer norm, linear
    assert count(model).trained - count(plain).trained == 2 * projector
    when, _ = activations.timeline(recipe(loss))
    assert not when.real
    assert when.after_forward(8) > activations.timeline(recipe())[0].after_forward(8)


# --- activations ---------------------------------------------------------------------------------------------------


def test_two_small_micro_batches_foretell_a_larger_one(monkeypatch: pytest.MonkeyPatch) -> None:
    small, _ = activations.timeline(recipe())
    monkeypatch.setattr(activations, "SIZES", (16, 17))
    large, _ = activations.timeline(recipe())
    assert not small.real
    assert len(small.fixed) == len(large.fixed)
    assert small.peak(16, lambda d: 4 * d) == pytest.approx(large.peak(16, lambda d: 4 * d), rel=0.01)
    assert small.after_forward(16) == pytest.approx(large.after_forward(16), rel=0.01)


def test_fake_tensors_are_as_large_as_real_ones() -> None:
    r = recipe("modalities.text.length_groups=false")  # on a CPU captions would be packed, which takes less
    when, _ = activations.timeline(r)
    bundle = build_bundle(r)
    rows = {m: widest(x, 8) for m, x in bundle.inputs.items()}
    with LiveBytes(lambda _: None) as live:
        live.ignore([*bundle.model.parameters(), *bundle.model.buffers(), *activations.tensors_in(rows)])
        out = bundle.model.train()(rows)
        assert live.live == pytest.approx(when.after_forward(8), rel=0.01)
    assert when.features == sum(x.shape[1] for x in out["features"].values())


def test_checkpointing_and_bf16_are_respected() -> None:
    deep = ["modalities.text.encoder.layers=6", "modalities.image.encoder={name: own/vit, patch: 16}"]
    plain, _ = activations.timeline(recipe(*deep))
    less, _ = activations.timeline(recipe(*deep, "engine.grad_checkpointing=true"))
    half, _ = activations.timeline(recipe(*deep, "engine.precision=bf16"))
    assert less.kept[1] < 0.3 * plain.kept[1]
    assert half.kept[1] < 0.75 * plain.kept[1]
    assert half.kept[0] > plain.kept[0], "autocast keeps bf16 copies of the weights"


def test_an_encoder_that_reads_values_is_run_for_real() -> None:
    when, model = activations.timeline(load_recipe(ROOT / "recipes" / "camera_lidar" / "objects.yaml"))
    assert when.real
    assert when.kept[1] > 0
    assert count(model).trained > 0


def test_rows_are_the_widest() -> None:
    _, inputs = build_on("meta", recipe())
    rows = {m: widest(x, 3) for m, x in inputs.items()}
    assert rows["image"].shape == (3, 3, 64, 64)
    assert rows["text"]["ids"].shape == (3, 32)
    assert bool(rows["text"]["mask"].all())


# --- the loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["info_nce", "sigmoid"])
def test_bytes_of_a_logit_foretell_a_larger_batch(name: str) -> None:
    loss = build_loss(Component(name=name))
    each = loss_memory.bytes_per_logit(loss)
    assert 10 < each < 60
    assert loss_memory._peak(loss, 600) == pytest.approx(each * 600**2, rel=0.1)


def test_tiles_and_rings_take_less_than_the_matrix() -> None:
    def of(*overrides: str) -> float:
        r = recipe("batch.size=65536", *overrides)
        return loss_memory.loss_bytes(r, 65536 // 64, 64, torch.device("cuda"))

    plain, tiled, ring = of("loss.impl=plain"), of(), of("loss.columns=ring")
    assert plain > 2 * tiled > 2 * ring
    assert of("loss.tile_mb=256") - tiled == pytest.approx(3 * 128 * 2**20)


# --- engines and traffic -------------------------------------------------------------------------------------------


def test_what_engines_hold(planned: Planned) -> None:
    w, optim = planned.weights, recipe().optim
    T = 4 * w.trained
    none = np.zeros(1)

    def of(kind: Any, ranks: int = 4, chunked: bool = False) -> Any:
        return holding(kind, w, optim, ranks, chunked, cuda=True)

    assert of(ONE).optimizer == of(DDP).optimizer == 2 * T
    assert of(DDP).working == T
    assert of(DDP).gradients(none) == 0
    assert of(DDP, chunked=True).gradients(none) == T, "besides the buckets"
    for kind in (FSDP2, ZERO[3]):
        assert of(kind).parameters == pytest.approx(T / 4, rel=0.05)
    assert of(ZERO[2]).parameters >= T
    assert of(ZERO[2]).working == 4 * REDUCE_BUCKET
    assert of(ZERO[2]).optimizer == 3 * T / 4, "two moments and a copy of the weights"
    assert of(FSDP2, ranks=8).kept < of(FSDP2, ranks=2).kept


def test_other_optimizers_and_averages(planned: Planned) -> None:
    w = planned.weights
    T = 4 * w.trained
    sgd = holding(DDP, w, recipe("optim.name=sgd", "optim.momentum=0.9").optim, 4, False, True)
    muon = holding(DDP, w, recipe("optim.name=muon").optim, 4, False, True)
    ema = holding(DDP, w, recipe("optim.ema_samples=1000").optim, 4, False, True)
    assert sgd.optimizer == T < muon.optimizer < 2 * T
    assert ema.average == ema.parameters
    assert not set(ZERO) & set(kinds_for(recipe("optim.name=muon"), 4)), "DeepSpeed refuses Muon"


def test_bytes_on_the_wire(planned: Planned) -> None:
    w, r = planned.weights, recipe()
    T = 4 * w.trained
    ddp, zero2 = (wire(k, w, r, 4, 1) for k in (DDP, ZERO[2]))
    assert ddp.gradients == 2 * 0.75 * T
    assert ddp.parameters == 0
    assert zero2.gradients == zero2.parameters == 0.75 * T
    assert ddp.features == 2 * 0.75 * 4 * 256 * 192 * 2  # there and back, of both modalities
    once, twice = (wire(FSDP2, w, r, 4, chunks) for chunks in (1, 2))
    assert once.gradients == twice.gradients == 0.75 * T < once.parameters < twice.parameters
    assert wire(ONE, w, r, 1, 4).total == 0


def test_groups_of_ranks_share_the_state() -> None:
    whole, groups = (plan(recipe(*more), ranks=8, memory=80 * GIB) for more in ([], ["engine.shard_size=2"]))
    small, large = (next(n for n in p.needs if n.kind is FSDP2) for p in (whole, groups))
    T = 4 * groups.weights.trained
    assert large.parameters == pytest.approx(T / 2, rel=0.05)
    assert large.optimizer == pytest.approx(T, rel=0.05)
    assert large.parameters > 3 * small.parameters
    assert large.wire.gradients == 0.5 * T + 2 * 0.75 * T / 2, "within a group, then its half among four"
    assert large.wire.parameters < small.wire.parameters
    assert all(("engine.shard_size=null" in keys_of(n, groups)) is (n.kind is not FSDP2) for n in groups.needs), (
        "other engines refuse the key"
    )
    with pytest.raises(ConfigError, match=r"engine\.shard_size: 8 ranks cannot be parted into groups of 3"):
        plan(recipe("engine.shard_size=3"), ranks=8, memory=GIB)


def test_what_a_loss_remembers_is_planned() -> None:
    moco = recipe("loss={name: moco, queue: 4096, mix: null}")
    kept = loss_memory.remembered(moco, 4)
    w = count(build_on("meta", moco)[0])
    queues = 4096 * (4 * moco.embed_dim + 8)  # keys and their ids
    assert kept == pytest.approx(2 * queues + 4 * w.total, rel=0.05)
    assert loss_memory.remembered(recipe(), 4) == 0
    with_memory, without = (plan(r, ranks=4, memory=80 * GIB).needs[0] for r in (moco, recipe("loss=dcl")))
    assert with_memory.loss >= kept
    assert with_memory.total - kept == pytest.approx(without.total, rel=0.25)
    noted = plan(recipe("loss=sogclr"), ranks=4, memory=80 * GIB).notes
    assert any(n.startswith("The loss keeps 8 bytes for every sample of the data") for n in noted), noted


def test_a_sum_of_losses_is_the_sum_of_its_parts() -> None:
    cpu = torch.device("cpu")

    def of(text: str) -> float:
        return loss_memory.loss_bytes(recipe("batch.size=8192", f"loss={text}"), 2048, 4, cpu)

    nce, koleo = of("{name: info_nce, tile_mb: 4}"), of("{name: koleo, strip_mb: 2}")
    assert of("[{name: info_nce, tile_mb: 4}, {name: koleo, strip_mb: 2}]") == pytest.approx(nce + koleo)
    assert koleo < of("{name: koleo, strip_mb: 64}")
    assert of("{name: matryoshka, dims: [16]}") == pytest.approx(of("info_nce"))


# --- the command ---------------------------------------------------------------------------------------------------


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["plan", *arguments])


def test_the_table_is_80_columns_wide_and_its_keys_are_a_recipe(planned: Planned) -> None:
    text = table.printed(planned)
    assert max(map(len, text.splitlines())) <= 80
    assert "Use DDP with the whole batch at once" in text
    for need in planned.needs:
        r = recipe(*keys_of(need, planned))
        assert need.kind.fits(r.engine)
        assert r.batch.micro in (None, need.micro)
    assert micros(64) == [64, 32, 16, 8, 4, 2]
    assert micros(3) == [3, 2, 1]


def test_json_has_every_engine_and_micro_batch() -> None:
    said = run("quickstart", "--ranks", "2", "--memory", "16", "--json")
    assert said.exit_code == 0, said.output
    found = json.loads(said.stdout)
    assert {(p["engine"], p["micro"]) for p in found["plans"]} >= {("DDP", 128), ("FSDP2", 64), ("ZeRO 3", 4)}
    parts = ("parameters", "gradients", "optimizer", "activations", "features", "loss", "working")
    for p in found["plans"]:
        assert sum(p[k] for k in parts) == pytest.approx(p["total"], abs=8)
        assert p["fits"] == (p["total"] <= found["usable"])
    assert found["recommended"]["engine"] == "DDP"


def test_a_small_device_takes_a_micro_batch_and_a_smaller_one_nothing() -> None:
    r = recipe("batch.size=4096")
    whole = plan(r, 2, 80 * GIB)
    assert whole.chosen is not None
    assert whole.chosen.micro == 2048
    some = plan(r, 2, 1 * GIB)
    assert some.chosen is not None
    assert some.chosen.micro < 2048
    assert "(each encoded twice)" in table.printed(some)
    none = plan(r, 2, 0.03 * GIB)
    text = table.printed(none)
    assert none.chosen is None
    assert as_json(none)["recommended"] is None
    assert "Nothing fits: " in text
    assert "comes nearest with" in text
    assert "use more ranks" in text or "With engine." in text


def test_what_helps_is_said_where_nothing_fits() -> None:
    deep = ["modalities.text.encoder.layers=12", "modalities.image.encoder={name: own/vit, patch: 4}", "batch.size=512"]
    r = recipe(*deep)
    least = plan(r, 2, 80 * GIB).nearest.total
    tight = plan(r, 2, 0.97 * least / 0.9)
    assert tight.chosen is None
    assert len(tight.helps) == 1
    said, need = tight.helps[0]
    assert said.startswith("engine.precision=bf16")
    assert tight.fits(need)
    assert f"With {said}," in " ".join(table.printed(tight).split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["quickstart", "--ranks", "3"], "batch.size (256) must be a multiple of the 3 ranks"),
        (["quickstart", "--memory", "0"], "--memory must be above 0 GiB"),
        (["quickstrat"], "Did you mean 'quickstart'?"),
    ],
)
def test_errors_say_what_to_write(arguments: list[str], words: str) -> None:
    said = run(*arguments)
    assert isinstance(said.exception, ConfigError)
    assert words in str(said.exception)


def test_no_data_is_read(tmp_path: Path) -> None:
    said = run(str(QUICKSTART), f"data.sources=[{{name: none, shards: '{tmp_path}/none.tar'}}]", "--ranks", "2")
    assert said.exit_code == 0, said.output
