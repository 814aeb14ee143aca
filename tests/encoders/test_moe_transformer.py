"""The text tower with an expert for each domain: dense at first, each row by its own expert, on ranks, resumed."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
import _runs
from _runs import SHARD, losses, rows, segments
from _spawn import spawn

from dualenc.config import settings_as
from dualenc.config.section import Component
from dualenc.data.modalities import DecodeError
from dualenc.data.modalities.text import TextConfig, TextInput
from dualenc.distributed.world import World
from dualenc.encoders import build_tower
from dualenc.encoders.own.moe_transformer import MoETextTransformer
from dualenc.encoders.tower import Tower
from dualenc.errors import ConfigError
from dualenc.model import load_model

torch.set_num_threads(1)
SIZES = {"width": 16, "layers": 3, "heads": 2}
DOMAINS = {"domain": "json:lang", "domains": ["en", "de", "fr"]}
CAPTIONS = ["a red star", "ein Haus am See mit Boot", "un chat", "a dog", "zwei Katzen"]
OF = ["en", "de", "fr", "en", "de"]


def source(**said: Any) -> TextInput:
    settings = {"tokenizer": "clip-bpe:8192", "context_length": 16, **said}
    return TextInput(settings_as(TextConfig, settings, "input"))


def tower(name: str, text: TextInput, **more: Any) -> Tower:
    torch.manual_seed(0)
    return build_tower("text", Component.model_validate({"name": f"own/{name}", **SIZES, **more}), text.describe(), 8)


def batch(text: TextInput, domains: list[str] = OF) -> dict[str, Tensor]:
    items = [text.decode({"txt": c.encode(), "json:lang": d}) for c, d in zip(CAPTIONS, domains, strict=True)]
    return text.collate([text.eval(x) for x in items])


def test_it_starts_as_the_dense_tower_and_experts_are_of_their_domain() -> None:
    plain, text = source(), source(**DOMAINS)
    dense = tower("transformer", plain).eval()
    x = batch(text)
    assert x["domain"].tolist() == [0, 1, 2, 0, 1]
    only = source(domain="json:lang", domains=["en"])
    assert torch.equal(tower("moe_transformer", only).eval().encode(batch(only, ["en"] * 5)), dense.encode(x))
    moe = tower("moe_transformer", text, routed=2).eval()
    assert isinstance(moe, MoETextTransformer)
    torch.testing.assert_close(moe.encode(x), dense.encode(x))
    names = [n for n, _ in moe.named_parameters() if ".experts." in n]
    assert {int(n.split(".")[2]) for n in names} == {1, 2}
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=0.2)
    out = moe.encode(x)
    for k in range(5):  # each row alone, by a dense tower with its expert's weights
        state = {}
        for name, p in moe.state_dict().items():
            head, found, rest = name.partition(".experts.")
            if not found or rest.startswith(f"{int(x['domain'][k])}."):
                state[f"{head}.mlp.{rest.partition('.')[2]}" if found else name] = p
        dense.load_state_dict(state)
        length = int(x["mask"][k].sum())
        alone = dense.encode({"ids": x["ids"][k : k + 1, :length], "mask": x["mask"][k : k + 1, :length]})
        torch.testing.assert_close(alone[0], out[k], rtol=1e-4, atol=1e-5)
    moe.length_groups = True
    torch.testing.assert_close(moe.encode(x), out, rtol=1e-4, atol=1e-5)


def test_an_expert_without_rows_has_gradient_zero_and_recomputing_changes_nothing() -> None:
    text = source(**DOMAINS)
    found = []
    for again in (False, True):
        moe = tower("moe_transformer", text).train()
        moe.set_grad_checkpointing(again)
        one, two = batch(text, ["en", "de", "en", "de", "en"]), batch(text, ["de", "en", "de", "de", "en"])
        (
            moe.encode(one).square().sum() + moe.encode(two).square().sum()
        ).backward()  # two views, each with a route of its own
        found.append({n: p.grad for n, p in moe.named_parameters()})
    assert all(g is not None for g in found[0].values())
    unused = [g for n, g in found[0].items() if ".experts.2." in n]
    assert unused
    assert all(float(g.abs().max()) == 0 for g in unused if g is not None)
    torch.testing.assert_close(found[0], found[1])


def test_what_is_refused() -> None:
    text = source(**DOMAINS)
    with pytest.raises(DecodeError, match="the domain 'it' is not one of"):
        text.decode({"txt": b"ciao", "json:lang": "it"})
    with pytest.raises(ConfigError, match=r"input\.domains is empty"):
        tower("moe_transformer", source())
    for said, message in (
        ({"domain": "json:lang"}, "give both"),
        ({"domain": "json:lang", "domains": ["en", "en"]}, "lists a domain twice"),
        ({**DOMAINS, "negatives": "json:wrong"}, "leave one of them out"),
    ):
        with pytest.raises(ConfigError, match=message):
            source(**said)
    assert text.collate([text.dummy()])["domain"].tolist() == [0]
    assert "domain" not in source().describe()["config"]


def with_languages(folder: Path) -> list[str]:
    """The quickstart's first samples, every third with the language de; overrides that train on them."""
    folder.mkdir()
    with tarfile.open(SHARD) as src, tarfile.open(folder / "few-000000.tar", "w") as dst:
        seen: list[str] = []
        for m in src:
            key = m.name.split(".")[0]
            if key not in seen and len(seen) == 96:
                break
            dst.addfile(m, src.extractfile(m))
            if key not in seen:
                seen.append(key)
                raw = json.dumps({"lang": "de" if len(seen) % 3 == 0 else "en"}).encode()
                info = tarfile.TarInfo(f"{key}.json")
                info.size = len(raw)
                dst.addfile(info, io.BytesIO(raw))
    return [
        f"data.sources=[{{name: few, shards: '{folder}/few-*.tar'}}]",
        "data.workers=0",
        "modalities.text.encoder.name=own/moe_transformer",
        "modalities.text.input.domain=json:lang",
        "modalities.text.input.domains=[en, de]",
        "optim.name=sgd",
    ]


@pytest.mark.dist
def test_two_ranks_are_one_and_a_resumed_run_is_the_unbroken_one(tmp_path: Path) -> None:
    given = [*with_languages(tmp_path / "data"), "checkpoint.every_steps=2"]
    one, two, cut = (tmp_path / n for n in ("one", "two", "cut"))
    segments(World(), [[*given, f"out={one}", "budget.steps=3"]])
    segments(World(), [[*given, f"out={cut}", f"budget.steps={n}"] for n in (2, 3)])
    assert losses(cut) == losses(one)
    spawn(_runs.__file__, "segments", 2, {"parts": [[*given, f"out={two}", "budget.steps=3", "batch.micro=8"]]})
    for a, b in zip(rows(one / "metrics.jsonl"), rows(two / "metrics.jsonl"), strict=True):
        assert a.get("loss") == pytest.approx(b.get("loss"), rel=1e-4)
    states = [load_model(str(x)).model.state_dict() for x in (one, two)]
    moved = [
        n
        for n in states[0]
        if ".experts.1." in n and not torch.equal(states[0][n], states[0][n.replace("s.1.", "s.0.")])
    ]
    assert moved
    for n, x in states[0].items():
        torch.testing.assert_close(x, states[1][n], rtol=1e-3, atol=1e-5)
    embedder = load_model(str(one)).embedder()
    de, en = (embedder.embed("text", [{"txt": b"a red star", "json:lang": d}]) for d in ("de", "en"))
    assert not torch.equal(de, en)
    assert torch.equal(en, embedder.embed("text", ["a red star"]))
