"""Export a model in other libraries' layouts, with a model card."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal, get_args

from dualenc.data.modalities.text import TextInput
from dualenc.errors import ConfigError, did_you_mean
from dualenc.model.bundle import Bundle, without_streams
from dualenc.model.export.card import write_card
from dualenc.model.export.layouts import write_open_clip, write_transformers
from dualenc.model.export.onnx_graphs import write_onnx
from dualenc.model.export.sentence_transformers_layout import MODALITIES, write_sentence_transformers

Layout = Literal["hf", "open_clip", "sentence-transformers", "onnx", "safetensors"]
_NAMES = {"hf": "transformers", "open_clip": "open_clip", "sentence-transformers": "sentence-transformers"}


def export(
    bundle: Bundle, layout: str, folder: str | Path, source: str | Path | None = None, results: Path | None = None
) -> Path:
    """Write ``bundle`` into ``folder`` and return it.

    Args:
        layout: ``hf`` (transformers), ``open_clip``, ``sentence-transformers``, ``onnx`` (a graph per tower) or
            ``safetensors`` (dualenc bundle). Other layouts than this one leave out views with a stream of their own
            (:class:`dualenc.config.stream.Stream`), which are for training.
        source: where the model was loaded from; a run's folder gives the card its recipe, data and numbers.
        results: results.json of ``dualenc eval`` for the card.

    Raises:
        ConfigError: if the layout is unknown, cannot express the model (with the reason and the layouts that can), or
            the folder is not empty.
    """
    if layout not in get_args(Layout):
        raise ConfigError(f"unknown --format {layout!r}. {did_you_mean(layout, get_args(Layout))}")
    if layout != "safetensors":
        bundle = without_streams(bundle)
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--out: {folder} already exists and is not empty; choose another folder.")
    made = not folder.exists()
    try:
        if layout in _NAMES and (reason := _no_place_for(bundle)):
            raise ConfigError(reason)
        if layout == "hf":
            write_transformers(bundle, folder)
        elif layout == "open_clip":
            write_open_clip(bundle, folder)
        elif layout == "sentence-transformers":
            write_sentence_transformers(bundle, folder)
        elif layout == "onnx":
            write_onnx(bundle, folder)
        else:
            bundle.save(folder)
    except ConfigError as e:
        if made:
            shutil.rmtree(folder, ignore_errors=True)  # half an export would look like a whole one
        if layout not in _NAMES:
            raise
        kinds = {p.kind or m for m, p in bundle.parts.items()}
        others = "onnx or safetensors" if kinds <= {"image", "text", "audio", "series"} else "safetensors"
        if layout != "sentence-transformers" and kinds <= set(MODALITIES) and not _no_place_for(bundle):
            others += ", or sentence-transformers"
        raise ConfigError(
            f"{bundle.name} cannot be exported to {_NAMES[layout]}: {str(e).rstrip('.')}. Use --format {others}."
        ) from e
    folder.mkdir(parents=True, exist_ok=True)
    found = Path(source).expanduser() if source is not None else None
    write_card(bundle, layout, folder, found if found is not None and found.is_dir() else None, results)
    return folder


def _no_place_for(bundle: Bundle) -> str | None:
    """What other libraries' layouts cannot hold: learned prompts, and words before every text."""
    for m, part in bundle.parts.items():
        if part.prompts is not None:
            return f"it has no place for the learned prompts of the {m} tower (modalities.{m}.prompts)"
        x = bundle.inputs[m]
        if isinstance(x, TextInput) and x.config.prefix is not None:
            return f"it has no place for {x.config.prefix!r} before every text (modalities.{m}.input.prefix)"
    return None
