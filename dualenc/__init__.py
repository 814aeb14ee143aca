"""dualenc: a trainer for CLIP-style dual encoders of any pair of modalities.

>>> import dualenc
>>> model = dualenc.load_model("open_clip:ViT-B-32/openai")     # doctest: +SKIP
>>> model.encode(image=["cat.jpg"]).shape                        # doctest: +SKIP
torch.Size([1, 512])

docs/python.md shows the rest. Importing this package imports nothing else: a name is loaded when it is first used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dualenc import losses as losses
    from dualenc.api.model import Model as Model
    from dualenc.api.model import Predictions as Predictions
    from dualenc.api.model import load_model as load_model
    from dualenc.api.runs import evaluate as evaluate
    from dualenc.api.runs import load_recipe as load_recipe
    from dualenc.api.runs import train as train
    from dualenc.api.search_index import Hit as Hit
    from dualenc.api.search_index import SearchIndex as SearchIndex

__version__ = "0.1.0"

_PUBLIC = {
    "Hit": "dualenc.api.search_index",
    "Model": "dualenc.api.model",
    "Predictions": "dualenc.api.model",
    "SearchIndex": "dualenc.api.search_index",
    "evaluate": "dualenc.api.runs",
    "load_model": "dualenc.api.model",
    "load_recipe": "dualenc.api.runs",
}
_FOLDERS = ("losses", "train")
"""Public names that are folders: ``dualenc.losses.info_nce``, and ``dualenc.train``, which is called too."""

__all__ = ["__version__", *_FOLDERS, *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _FOLDERS:
        return import_module(f"dualenc.{name}")
    if name in _PUBLIC:
        value = vars(import_module(_PUBLIC[name]))[name]
        globals()[name] = value
        return value
    raise AttributeError(f"module 'dualenc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _TrainFolder(ModuleType):
    """The folder ``dualenc/train``, called as the function ``dualenc.api.runs.train`` that it gives its name to."""

    def __call__(self, *args: Any, **kw: Any) -> Any:
        return import_module("dualenc.api.runs").train(*args, **kw)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "train" and type(value) is ModuleType:  # Python sets a folder's name when it is first imported
            value.__class__ = _TrainFolder
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
