"""Is a released model there? Looked up by its small files; no weights are read or downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dualenc.encoders.adapters import hf
from dualenc.encoders.adapters import open_clip as oc
from dualenc.encoders.released.load_released import OPEN_CLIP_CONFIG, OPEN_CLIP_FILES
from dualenc.encoders.released.whole_models import FAMILIES
from dualenc.errors import ConfigError

FORMS = ("open_clip:", "hf:", "laion_clap:")
"""Prefixes of models that are not folders of dualenc's own."""

_HF_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def find_released(spec: str) -> None:
    """Look up ``hf:REPO``, ``open_clip:NAME/TAG`` or ``laion_clap:FILE`` where loading would: as a file or folder, in
    the local cache, or, unless HF_HUB_OFFLINE is set, on the Hub.

    Raises:
        ConfigError: the model or its weights cannot be found.
    """
    form, _, rest = spec.partition(":")
    if form == "hf":
        _find_hf(rest)
    elif form == "open_clip":
        _find_open_clip(rest)
    elif not Path(rest).expanduser().is_file():
        raise ConfigError(f"{spec}: there is no such file; give for example laion_clap:FOLDER/630k-audioset-best.pt")


def _find_hf(where: str) -> None:
    files: tuple[str, ...] = _HF_FILES
    if hf.file_of(where, OPEN_CLIP_CONFIG) is not None and not hf.read_json(where, "config.json"):
        files = OPEN_CLIP_FILES
    else:
        config = hf.load_config(where)
        if config.model_type not in FAMILIES:
            raise ConfigError(
                f"hf:{where} is a {config.model_type!r} model; {', '.join(FAMILIES)} are dual encoders that can be "
                "loaded whole"
            )
    folder = Path(where)
    if not (any((folder / f).is_file() for f in files) if folder.is_dir() else _on_hub(where, files)):
        raise ConfigError(f"hf:{where} has no weights within reach: none of {', '.join(files)}{_offline()}")


def _find_open_clip(spec: str) -> None:
    from open_clip.pretrained import get_pretrained_cfg

    name, _, weights = spec.partition("/")
    oc.architecture(name, oc.OpenClipConfig(pretrained=weights or False))
    tag: dict[str, Any] = dict(get_pretrained_cfg(name, weights)) if weights else {}
    if weights and not tag:
        oc.pretrained_file(name, weights, f"open_clip:{spec}")
    repository, _, file = tag.get("hf_hub", "").rpartition("/")
    if repository and not _on_hub(repository, (file,) if file else OPEN_CLIP_FILES):
        raise ConfigError(
            f"open_clip:{spec}: its weights, {repository} on the Hugging Face Hub, are not within reach{_offline()}"
        )


def _on_hub(repository: str, files: tuple[str, ...]) -> bool:
    """Whether one of the files is in the cache or, where a network may be used, in the repository."""
    import huggingface_hub as hub
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        if any(isinstance(hub.try_to_load_from_cache(repository, f), str) for f in files):
            return True
        return not HF_HUB_OFFLINE and any(hub.file_exists(repository, f) for f in files)
    except (HfHubHTTPError, HFValidationError, OSError):  # no such repository, a private one, no network
        return False


def _offline() -> str:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return " (HF_HUB_OFFLINE is set, so only the local cache was searched)" if HF_HUB_OFFLINE else ""
