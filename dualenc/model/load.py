"""MODEL, as every command takes it → a bundle. Anything that would silently change a number is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from dualenc.checkpoint.ranges import Files
from dualenc.config import Component, LogitScale, Prompts, Unlocked, settings_as
from dualenc.config.stream import Stream
from dualenc.encoders import Tower, activations
from dualenc.encoders.released.load_released import (
    Released,
    from_hf,
    from_laion_clap,
    from_open_clip,
    from_open_clip_folder,
)
from dualenc.encoders.released.weights import read_weights
from dualenc.errors import CheckpointError, ConfigError, did_you_mean
from dualenc.model.bundle import (
    DESCRIPTION,
    FORMAT,
    LIBRARIES,
    WEIGHTS,
    Bundle,
    assemble,
    build_input,
    file_digest,
    part_of,
    pieces_digest,
)
from dualenc.model.record import check_activations, check_inputs, read_record
from dualenc.plugins import changed, import_recorded
from dualenc.versions import versions

logger = logging.getLogger(__name__)

_FORMS = (
    "a run folder, a checkpoint or bundle folder, open_clip:NAME/TAG, hf:REPO, laion_clap:FILE.pt, or a folder in the "
    "layout of open_clip, transformers or sentence-transformers"
)
MODULES = "modules.json"
"""What sentence-transformers lists a model's modules in."""
# Only these compute features from inputs; a different version is worth a log line.
_NOTED = ("torch", "open_clip_torch", "timm", "transformers")


def load_model(spec: str, device: torch.device | str = "cpu") -> Bundle:
    """Load a model.

    Args:
        spec: a run folder (its newest finished checkpoint), a checkpoint, a bundle folder, ``open_clip:NAME[/TAG]``
            (TAG may be a file; without it the weights are random, with a warning), ``hf:REPO_OR_FOLDER`` (CLIPModel,
            SiglipModel, ClapModel), ``laion_clap:FILE.pt``, or a folder in the layout of open_clip, transformers or
            sentence-transformers.
        device: auto, cpu, cuda …

    Raises:
        ConfigError: if there is no such model.
        CheckpointError: naming the field, if weights, tokenizer or activation are not those that were saved, or a
            tensor is missing, left over or of another shape; naming the plugin, if it needs one that is not installed
            or not allowed (:mod:`dualenc.plugins`).
    """
    form, colon, rest = spec.partition(":")
    if colon and form == "open_clip":
        bundle = released_bundle(from_open_clip(rest), spec)
    elif colon and form == "hf":
        bundle = released_bundle(from_hf(rest), spec)
    elif colon and form == "laion_clap":
        bundle = released_bundle(from_laion_clap(rest), spec)
    else:
        bundle = _load_folder(spec)
    return bundle.to(device)


def _load_folder(spec: str) -> Bundle:
    folder = model_folder(spec)
    if (folder / DESCRIPTION).is_file():
        return load_bundle(folder)
    if (folder / MODULES).is_file():
        from dualenc.model.read_sentence_transformers import load_sentence_transformers  # which reads bundles itself

        return load_sentence_transformers(folder)
    if (folder / "open_clip_config.json").is_file():
        return released_bundle(from_open_clip_folder(folder), spec)
    return released_bundle(from_hf(str(folder)), spec)


def model_folder(spec: str) -> Path:
    """The folder that holds a model's description: in a run, that of its newest finished checkpoint.

    Raises:
        ConfigError: there is no such folder, or no model in it.
        CheckpointError: a run without a finished checkpoint.
    """
    folder = Path(spec).expanduser()
    if not folder.is_dir():
        if folder.is_file():
            raise ConfigError(f"{spec} is a file; a MODEL is {_FORMS}.")
        near = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        raise ConfigError(
            f"There is no model {spec!r}; give {_FORMS}. {did_you_mean(folder.name, near) if near else ''}"
        )
    if (folder / "checkpoints").is_dir():
        folder = newest_save(folder)
    if (folder / "model" / DESCRIPTION).is_file():
        folder = folder / "model"
    if any((folder / name).is_file() for name in (DESCRIPTION, MODULES, "open_clip_config.json", "config.json")):
        return folder
    raise ConfigError(
        f"{spec} has no model: there is no {DESCRIPTION}, {MODULES}, open_clip_config.json or config.json in it."
    )


def newest_save(run: Path) -> Path:
    """The newest finished checkpoint of a run folder (with its manifest and description).

    Raises:
        CheckpointError: if there is none.
    """
    saves = [
        p
        for p in (run / "checkpoints").iterdir()
        if not p.name.startswith(".") and (p / "manifest.json").is_file() and (p / "model" / DESCRIPTION).is_file()
    ]
    if not saves:
        raise CheckpointError(f"{run} has no finished checkpoint: the run stopped before its first one.")
    return max(saves, key=lambda p: p.name)


# --- dualenc's layout ----------------------------------------------------------------------------------------------


def load_bundle(folder: Path) -> Bundle:
    """Read a bundle folder.

    Raises:
        CheckpointError: naming the field that is not as it was saved.
    """
    said = _read_description(folder)
    names = [str(n) for d in said["modalities"].values() for n in (d["kind"], d["encoder"]["name"])]
    import_recorded(said.get("plugins", {}), names, str(folder))
    tensors, digest, made = _weights(folder, said["weights"])
    parts, inputs = {}, {}
    for m, d in said["modalities"].items():
        where = f"{folder}: modalities.{m}"
        try:
            inputs[m] = build_input(d["kind"], d["input"]["config"], f"{where}.input.config", folder / "inputs" / m)
        except ConfigError as e:
            raise CheckpointError(f"{where}.input cannot be built: {e}") from e
        _same(d["input"], inputs[m].describe(), f"{where}.input", skip=("name",))
        encoder = Component.model_validate(d["encoder"])
        settings = d["input"]["config"]
        parts[m] = part_of(d["kind"], settings, encoder, d["lock"], d.get("shares"), d.get("stream"), d.get("prompts"))
    check_inputs(made, inputs, str(folder))
    scale = settings_as(LogitScale, said["logit_scale"], f"{folder}: logit_scale")
    pairs = [(str(a), str(b)) for a, b in said["pairs"]]
    try:
        bundle = assemble(said["name"], parts, inputs, pairs, scale, int(said["embed_dim"]), tensors, str(folder))
    except ConfigError as e:
        raise CheckpointError(f"{folder}: its architecture cannot be built: {e}") from e
    for m, d in said["modalities"].items():
        tower = bundle.model.tower(m)
        assert isinstance(tower, Tower)
        _same(d["activation"], activations(tower), f"{folder}: modalities.{m}.activation")
    check_activations(made, bundle, str(folder))
    bundle.provenance, bundle.weights_hash = dict(said["provenance"]), digest
    _note_versions(said["versions"], folder)
    for other in changed(said.get("plugins", {})):
        logger.warning("%s was saved with another version of a plugin: %s", folder, other)
    return bundle


def _weights(folder: Path, said: Mapping[str, Any]) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
    """The weights, from one file or from those that ranks wrote, their hash, and the record in the one file.

    The files must be as described.
    """
    files = dict(said["files"]) if "files" in said else {str(said["file"]): said["sha256"]}
    for name, digest in files.items():
        path = folder / name
        if path.parent != folder or not path.is_file():
            raise CheckpointError(f"{folder}: weights.file: there is no {name!r} in it")
        found = file_digest(path)
        if found != digest:
            raise CheckpointError(
                f"{folder}: weights.sha256: {name} has {found[:12]}…, but {DESCRIPTION} says "
                f"{digest[:12]}…: the file was changed or damaged after it was saved."
            )
    paths = [folder / name for name in sorted(files)]
    if "files" not in said:
        return read_weights(paths[0], renamed=False), str(said["sha256"]), read_record(paths[0])
    return Files(paths).all(), pieces_digest(files), {}


class _DescribedInput(BaseModel):
    config: dict[str, Any]


class _DescribedPart(BaseModel):
    kind: str
    input: _DescribedInput
    encoder: Component
    activation: Any
    lock: bool | Literal["trunk"] | Unlocked = False
    shares: str | None = None
    stream: Stream | str | None = None
    prompts: Prompts | None = None


class _DescribedWeights(BaseModel):
    file: str | None = None
    sha256: str
    files: dict[str, str] | None = None

    @model_validator(mode="after")
    def _one(self) -> _DescribedWeights:
        if (self.file is None) == (self.files is None):
            raise ValueError("give either file or files")
        return self


class _Described(BaseModel):
    """What ``dualenc.json`` must hold; other keys are from another version and are ignored."""

    format: int
    name: str
    embed_dim: Annotated[int, Field(gt=0, lt=1 << 20)]
    pairs: Annotated[list[tuple[str, str]], Field(min_length=1)]
    logit_scale: dict[str, Any]
    modalities: Annotated[dict[str, _DescribedPart], Field(min_length=1)]
    versions: dict[str, str]
    provenance: dict[str, Any]
    weights: _DescribedWeights


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} cannot be read ({e})") from e
    if isinstance(said, dict) and said.get("format", FORMAT) != FORMAT:
        raise CheckpointError(
            f"{path}: format: {said['format']!r} is not {FORMAT}; this folder needs another version of dualenc"
        )
    try:
        settings_as(_Described, said if isinstance(said, dict) else {}, str(path))
    except ConfigError as e:
        raise CheckpointError(str(e)) from e
    return dict(said)


def _same(saved: Any, now: Any, where: str, skip: tuple[str, ...] = ()) -> None:
    """Raise CheckpointError at the first field that differs from the saved one. Fields added since do not count."""
    if isinstance(saved, Mapping) and isinstance(now, Mapping):
        for k, v in saved.items():
            if k in skip:
                continue
            if k not in now:
                raise CheckpointError(f"{where}.{k}: saved as {v!r}, but this version has no such field")
            _same(v, now[k], f"{where}.{k}", skip)
    elif json.dumps(saved) != json.dumps(now):
        raise CheckpointError(f"{where}: saved as {saved!r}, but here it is {now!r}; features would differ.")


def _note_versions(saved: Mapping[str, str], folder: Path) -> None:
    now = versions(LIBRARIES, "absent")
    other = [f"{k} {saved[k]} → {now[k]}" for k in _NOTED if k in saved and saved[k] != now[k]]
    if other:
        logger.info("%s was saved with other versions: %s", folder, ", ".join(other))


# --- other libraries' layouts --------------------------------------------------------------------------------------


def released_bundle(found: Released, spec: str) -> Bundle:
    """A model in another library's layout as a bundle.

    Raises:
        CheckpointError: naming the field that is not as the weights were saved.
    """
    first, second = found.inputs
    made = read_record(found.file) if found.file is not None else {}
    # Neither library's layout records how an odd border is cut: the record in a dualenc file does.
    centres = {m: {"centre": facts["input"]["centre"]} for m, facts in made.items() if "centre" in facts["input"]}
    inputs = {
        m: build_input(m, {**found.inputs[m], **centres.get(m, {})}, f"{spec}: input of {m}") for m in (first, second)
    }
    check_inputs(made, inputs, spec)
    parts = {m: part_of(m, inputs[m].describe()["config"], found.encoders[m]) for m in (first, second)}
    bundle = assemble(found.name, parts, inputs, [(first, second)], found.scale, found.embed_dim, found.tensors, spec)
    bundle.provenance = {"source": spec, "weights": "random" if found.tensors is None else found.source}
    if found.clap_scales is not None:  # a DualEncoder has one; an export back to transformers writes both
        bundle.provenance["clap_logit_scales"] = list(found.clap_scales)
    check_activations(made, bundle, spec)
    if found.file is not None:
        bundle.weights_hash = file_digest(found.file)
    return bundle


__all__ = ["WEIGHTS", "load_bundle", "load_model", "newest_save"]
