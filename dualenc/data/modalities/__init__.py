"""One file per modality; every file in this folder is imported, so adding a modality is adding its file."""

import pkgutil
from importlib import import_module

from dualenc.data.modalities.modality import DecodeError, FromMemory, ModalityInput, build_inputs, modalities, rows_of

__all__ = ["DecodeError", "FromMemory", "ModalityInput", "build_inputs", "modalities", "rows_of"]

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
