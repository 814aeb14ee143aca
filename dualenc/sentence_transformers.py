"""Towers of this project inside a ``SentenceTransformer``: the module that ``dualenc export --format
sentence-transformers`` names for towers that sentence-transformers has no class for (``own/…``, ``open_clip/…``).

sentence-transformers 6 imports a class of another package only under ``trust_remote_code=True``, an installed package's
too. The exported folder has no code in it; :func:`load` builds the same model without that switch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.input_module import InputModule
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Router, Transformer
from torch import Tensor, nn

from dualenc.api.items import RawItems
from dualenc.errors import ConfigError, DataError
from dualenc.model import Bundle
from dualenc.model.bundle import kind_of
from dualenc.model.decoding import collate_usable, read_ahead
from dualenc.model.export.sentence_transformers_layout import MODALITIES, OURS
from dualenc.model.load import load_bundle

_ROWS = "rows"
"""The key of rows that are a single tensor."""


class Towers(InputModule):
    """Some towers of a bundle: items → ``sentence_embedding`` [n, D], L2-normalised, as ``dualenc embed`` gives them.

    Attributes:
        bundle: the model; what :meth:`save` writes and ``dualenc`` reads.
    """

    config_file_name = "dualenc.json"
    save_in_root = False

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bundle = bundle
        self.model: nn.Module = bundle.model
        kinds = {kind_of(m, part): m for m, part in reversed(bundle.parts.items())}
        self._names = {kind: m for kind, m in kinds.items() if kind in MODALITIES}

    @property
    def modalities(self) -> list[Any]:
        """What ``encode`` takes: text, image, audio."""
        return list(self._names)

    def preprocess(  # type: ignore[override]
        self, inputs: Sequence[Any], prompt: str | None = None, modality: Any = None, **_: Any
    ) -> dict[str, Any]:
        """Items of one modality → the tensors its tower takes; an item may also be written ``{modality: item}``.

        Raises:
            DataError: naming the position of an item that cannot be used.
            ConfigError: items of a modality the model does not have.
        """
        from sentence_transformers.base.modality import infer_batch_modality

        kind = str(modality or infer_batch_modality(inputs, supported_modalities=self.modalities))
        if kind not in self._names:
            raise ConfigError(f"this model encodes {', '.join(self._names)}, not {kind}")
        source = self.bundle.inputs[self._names[kind]]
        inputs = [x[kind] if isinstance(x, Mapping) and set(x) == {kind} else x for x in inputs]
        given = [prompt + x if prompt and kind == "text" else x for x in inputs]
        items = RawItems(source, given)
        source.dummy()
        (got,) = read_ahead(lambda i: source.eval(source.decode(items[i])), len(items), len(items))
        for i, x in enumerate(got):
            if isinstance(x, DataError):
                raise DataError(f"{kind} item {i} of {len(items)} cannot be encoded: {x}") from x
        (rows,) = collate_usable(source, {i: [x] for i, x in enumerate(got)}, len(got), {})
        tensors = {_ROWS: rows} if isinstance(rows, Tensor) else dict(rows)
        return {**tensors, "modality": kind}

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Adds ``sentence_embedding``."""
        kind = str(features["modality"])
        given = {k: v for k, v in features.items() if k not in ("modality", "task", "prompt_length")}
        features["sentence_embedding"] = self.bundle.model.encode(self._names[kind], given.get(_ROWS, given))
        return features

    def get_embedding_dimension(self) -> int:
        """D."""
        return self.bundle.embed_dim

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Write the towers as a bundle."""
        self.bundle.save(output_path)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **kwargs: Any) -> Self:  # type: ignore[override]
        """Read what :meth:`save` wrote, from a folder or from the Hub."""
        hub = {k: kwargs.get(k) for k in ("token", "cache_folder", "revision")}
        local = bool(kwargs.get("local_files_only", False))
        folder = cls.load_dir_path(model_name_or_path, subfolder, local_files_only=local, **hub)  # type: ignore[arg-type]
        if folder is None:
            raise ConfigError(f"{model_name_or_path} has no folder {subfolder!r}")
        return cls(load_bundle(Path(folder)))


_CLASSES: dict[str, Any] = {
    OURS: Towers,
    **{c.__name__: c for c in (Transformer, Pooling, Dense, Normalize)},
}


def load(folder: str | Path, device: torch.device | str | None = None) -> SentenceTransformer:
    """A ``SentenceTransformer`` from a folder of ``dualenc export --format sentence-transformers``.

    The same as ``SentenceTransformer(folder, trust_remote_code=True)``; no code is taken from the folder, and only the
    classes that such an export names are built.

    Raises:
        ConfigError: the folder is not such an export.
    """
    root = Path(folder)
    try:
        listed = json.loads((root / "modules.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ConfigError(
            f"the modules.json of {folder} cannot be read ({e}); export a model to this folder first"
        ) from e
    modules = [_router(root) if _short(m["type"]) == "Router" else _module(root, m["path"], m["type"]) for m in listed]
    return SentenceTransformer(modules=modules, device=None if device is None else str(device))


def _router(root: Path) -> Router:
    config = json.loads((root / "router_config.json").read_text(encoding="utf-8"))
    made = {name: _module(root, name, kind) for name, kind in config["types"].items()}
    routes = {route: [made[name] for name in names] for route, names in config["structure"].items()}
    return Router(routes, default_route=config["parameters"].get("default_route"))


def _module(root: Path, path: str, kind: str) -> Any:
    found = _CLASSES.get(kind) or _CLASSES.get(_short(kind))
    if found is None:
        raise ConfigError(f"{root}: modules.json names the class {kind}, which no export of dualenc has")
    return found.load(str(root), subfolder=path, local_files_only=True)


def _short(kind: str) -> str:
    return kind.rpartition(".")[2] if kind.startswith("sentence_transformers.") else kind


__all__ = ["Towers", "load"]
