"""With engine.compile captions are padded to a few lengths; once these were seen nothing is compiled any more."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from dualenc.config import Component
from dualenc.data.modalities.modality import FewShapes
from dualenc.data.modalities.text import TextConfig, TextInput
from dualenc.encoders import build_tower

torch.set_num_threads(1)
CONTEXT = 77


def source(**settings: Any) -> TextInput:
    return TextInput(TextConfig(tokenizer="clip-bpe:1024", context_length=CONTEXT, **settings))


def batches(of: TextInput) -> Iterator[dict[str, torch.Tensor]]:
    """Two captions, the longer of 3, 5, … 77 tokens."""
    for n in range(3, CONTEXT + 1, 2):
        yield of.collate([torch.arange(1, n + 1), torch.tensor([1, 2, 3])])


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def test_lengths_are_few_and_settings_are_kept() -> None:
    few = source()
    assert isinstance(few, FewShapes)
    described = few.describe()
    few.few_shapes(4)
    assert {x["ids"].shape[1] for x in batches(few)} == {24, 40, 64, 77}
    assert few.describe() == described  # no checkpoint or digest changes
    # as it is sent to a worker that is spawned
    assert {x["ids"].shape[1] for x in batches(copy.copy(few))} == {24, 40, 64, 77}
    own, full = source(bucket=16), source(pad="context")
    for x in (own, full):
        x.few_shapes(4)
    assert {x["ids"].shape[1] for x in batches(own)} == {16, 32, 48, 64, 77}
    assert {x["ids"].shape[1] for x in batches(full)} == {77}


def test_nothing_is_compiled_again_after_the_lengths_were_seen() -> None:
    few = source()
    few.few_shapes(4)
    encoder = Component.model_validate({"name": "own/transformer", "width": 16, "layers": 2, "heads": 2})
    tower = build_tower("text", encoder, few.describe(), 8, "x").train()
    plain = [tower.encode(x).detach() for x in batches(few)]
    tower.compile(backend="aot_eager")
    seen, first = set(), []
    for x in batches(few):
        if x["ids"].shape[1] not in seen:
            seen.add(x["ids"].shape[1])
            tower(x)["features"].sum().backward()
            first.append(graphs())
    assert first[0] > 0
    for x, want in zip(batches(few), plain, strict=True):
        out = tower(x)["features"]
        out.sum().backward()
        torch.testing.assert_close(out.detach(), want)
    assert graphs() == first[-1], (first, graphs())
