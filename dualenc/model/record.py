"""How the inputs of weights were made, kept inside the weights file.

A folder's json files can be edited or mixed up, and most such changes raise no error: the features are only worse. So
every safetensors file that is written here carries, in its header, how its inputs are made and which activations its
towers have, and loading compares. The header is part of the file's hash and is ignored by other libraries.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dualenc.data.modalities import ModalityInput
from dualenc.data.modalities.text import PROBES, TextInput
from dualenc.encoders import Tower, activations
from dualenc.errors import CheckpointError

if TYPE_CHECKING:
    from dualenc.model.bundle import Bundle

KEY = "dualenc"
# Settings under which no feature of a good item changes, or that the ids tell (tokenizer, lower).
_FREE = ("tokenizer", "lower", "pad", "bucket", "augment", "max_pixels", "background", "crop", "decode")


def record(bundle: Bundle) -> dict[str, str]:
    """The metadata of a weights file: how each modality's input is made, and the towers' activations.

    One key: safetensors writes several in any order, and equal models would be files with other hashes.
    """
    made = {m: {**input_facts(x), "activation": tower_facts(bundle, m)} for m, x in bundle.inputs.items()}
    return {KEY: json.dumps({"format": 1, "modalities": made}, ensure_ascii=False)}


def read_record(weights: Path) -> dict[str, Any]:
    """Modality → its facts; empty for files without a record, such as those of other libraries.

    Raises:
        CheckpointError: if there is a record and it is damaged.
    """
    from safetensors import safe_open

    if weights.suffix != ".safetensors":
        return {}
    with safe_open(str(weights), framework="pt") as f:
        text = (f.metadata() or {}).get(KEY)
    try:
        said = json.loads(text) if text else {}
        facts = dict(said["modalities"]) if said.get("format") == 1 else {}
        if not all({"input", "activation"} <= set(f) and isinstance(f["input"], dict) for f in facts.values()):
            raise KeyError("input or activation")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise CheckpointError(f"{weights}: the record of its inputs is damaged ({type(e).__name__}: {e})") from e
    return facts


def check_inputs(said: Mapping[str, Any], inputs: Mapping[str, ModalityInput], where: str) -> None:
    """Refuse inputs that are not made as the weights' record says.

    Raises:
        CheckpointError: naming the first field that differs.
    """
    for m, facts in said.items():
        if m not in inputs:
            raise CheckpointError(
                f"{where}: modalities.{m}: the weights were made with it, but the description lacks it"
            )
        now = input_facts(inputs[m])
        for key, value in facts["input"].items():
            _compare(value, now["input"].get(key, value), f"{where}: modalities.{m}.input.config.{key}")
        if "tokens" in facts:
            _compare(facts["tokens"], now.get("tokens"), f"{where}: modalities.{m}.input.tokenizer: ids of test texts")


def check_activations(said: Mapping[str, Any], bundle: Bundle, where: str) -> None:
    """Refuse towers whose activations are not those of the record.

    Raises:
        CheckpointError: naming the field.
    """
    for m, facts in said.items():
        _compare(facts["activation"], tower_facts(bundle, m), f"{where}: modalities.{m}.activation")


def input_facts(source: ModalityInput) -> dict[str, Any]:
    """The settings of an input that features depend on, with equal values for every layout it is read from."""
    config = json.loads(json.dumps(source.describe()["config"]))
    facts: dict[str, Any] = {"input": {k: v for k, v in config.items() if k not in _FREE}}
    if isinstance(source, TextInput):
        facts["tokens"] = [source.tokenizer.encode(t) for t in PROBES]
    return facts


def tower_facts(bundle: Bundle, m: str) -> list[str]:
    """The activations of a tower under one name each, whichever library's class computes them."""
    tower = bundle.model.tower(m)
    assert isinstance(tower, Tower)
    return sorted({_plain(a) for a in activations(tower)})


def _plain(activation: str) -> str:
    name = activation.lower()
    if "quickgelu" in name:
        return "quick_gelu"
    if "gelu" in name and "tanh" in name:
        return "gelu_tanh"
    return "gelu" if name.startswith("gelu") else activation


def _compare(saved: Any, now: Any, field: str) -> None:
    if isinstance(saved, list) and isinstance(now, list) and len(saved) == len(now):
        # json and yaml keep floats exactly; settings that passed through float32 do not
        numbers = all(isinstance(v, int | float) for v in [*saved, *now])
        if numbers and torch.allclose(torch.tensor(saved).double(), torch.tensor(now).double(), rtol=0, atol=1e-6):
            return
    if saved != now:
        raise CheckpointError(
            f"{field}: the weights were made with {_shown(saved)}, but here it is {_shown(now)}; features would "
            "differ. Change it back, or use the folder the weights came with."
        )


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "…"
