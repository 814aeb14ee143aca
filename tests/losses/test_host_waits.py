"""How often each registered loss makes the host wait for the device in a step: never, but for those listed here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
import _caption_jobs
import _cwcl_jobs
import _dense_jobs
import _every_jobs
import _memory_jobs
import _region_jobs
import _term_jobs
from _tiny import PAIRS, tiny
from _traffic import Traffic

from dualenc.config import Component
from dualenc.data.batch import Batch
from dualenc.encoders.dual_encoder import telling_rows
from dualenc.losses import Loss, build_loss, losses, objective
from dualenc.memory import RunShape
from dualenc.train.memory import Memory, slow_models

torch.set_num_threads(1)

ALLOWED = {
    "groco": "rows are sorted together with those that have as many positives, so their numbers are read",
    "supremix": "mixtures are made of the distinct labels of the batch, whose number is read",
    "prc": "most places are in no region: as rows of zeros they would multiply the loss's time",
    "point_contrast": "as prc: places that one of the modalities lacks are left out",
    "rad": "as prc; and regions are counted by name",
}
"""Losses that read the device, each with its reason."""
TILED = "tiles leave absent slots out, and find positives by sorting: both take a number of rows"
LARGEST = 40
"""Times a step that a loss of the list may wait: more, and something waits inside a loop over rows."""

Step = Callable[[], None]


def _step(model: nn.Module, batch: Batch, pairs: list[tuple[str, str]], loss: Loss) -> Step:
    outputs = model(batch.inputs)
    return lambda: objective(outputs, batch, pairs, loss).value.backward()  # type: ignore[no-untyped-call]


def _remembering(case: str) -> Step:
    loss = _memory_jobs.loss_of(case)
    net = _term_jobs.model(loss)
    memory = Memory(
        loss, slow_models(loss, net, torch.device("cpu")), RunShape(8, [_term_jobs.PAIR], _memory_jobs.SAMPLES, 0, 1)
    )
    batch = memory.recall(_memory_jobs.batch_of(0, 0, 1), net)
    outputs = net(batch.inputs)

    def run() -> None:
        objective(outputs, batch, [_term_jobs.PAIR], loss).value.backward()  # type: ignore[no-untyped-call]
        memory.keep(net, torch.tensor(False))

    return run


def _of_contrast(case: dict[str, Any]) -> Step:
    return _step(_cwcl_jobs.model("trunk"), _every_jobs.batch_of(0, 0, 1), PAIRS, build_loss(Component(**case)))


def _of_term(name: str) -> Step:
    loss = _term_jobs.loss_of(name)
    return _step(_term_jobs.model(loss), _term_jobs.make_batch(0), [_term_jobs.PAIR], loss)


def _of_regions(name: str) -> Step:
    loss = build_loss(Component(name=name))
    return _step(_region_jobs.model(name), _region_jobs.make_batch(0), [_region_jobs.PAIR], loss)


def _of_both_towers(jobs: Any) -> Step:
    loss, batch = jobs.loss_of(), jobs.batch_of("own vit", 0)
    net = jobs.model("own vit", loss)
    with telling_rows(net, batch.rows):
        outputs = net(batch.inputs)
    return lambda: objective(outputs, batch, [("image", "text")], loss).value.backward()  # type: ignore[no-untyped-call]


def cases() -> Iterator[tuple[str, str, Callable[[], Step]]]:
    """(registered name, case, how to get its step)."""
    for name, case in zip(_every_jobs.NAMES, _every_jobs.CASES, strict=True):
        yield case["name"], name, partial(_of_contrast, case)
    for name in _term_jobs.names():
        yield name, name, partial(_of_term, name)
    for name, settings in _memory_jobs.CASES.items():
        yield settings["name"], f"memory: {name}", partial(_remembering, name)
    for name in ("prc", "point_contrast", "rad"):
        yield name, name, partial(_of_regions, name)
    yield "caption", "caption", partial(_of_both_towers, _caption_jobs)
    yield "dense", "dense", partial(_of_both_towers, _dense_jobs)


CASES = list(cases())


def test_every_registered_loss_is_walked() -> None:
    assert {name for name, _, _ in CASES} == {n for n in losses if losses.source(n) == "dualenc"}
    assert set(ALLOWED) <= {name for name, _, _ in CASES}


def test_only_the_listed_losses_wait() -> None:
    found: dict[str, int] = {}
    for name, case, prepare in CASES:
        step = prepare()
        with Traffic() as seen:
            step()
        waits = seen.calls["waits"]
        allowed = name in ALLOWED
        if (waits > 0) != allowed or waits > LARGEST:
            found[case] = waits
    assert not found, f"waits of the host in a step: {found}"


@pytest.mark.parametrize(("name", "most"), [("info_nce", 20), ("dcl", 20)])
def test_tiles_wait_a_few_times(name: str, most: int) -> None:
    """Why: ``TILED``. Of two pairs and one tile each."""
    step = _step(tiny(), _every_jobs.batch_of(0, 0, 1), PAIRS, build_loss(Component(name=name, impl="tiled")))
    with Traffic() as seen:
        step()
    assert 0 < seen.calls["waits"] <= most, seen.calls
