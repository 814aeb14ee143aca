"""Features on disk: the files, and how they are read.

    FOLDER/features.json        format, description, its digest, whether it is complete, the parts in order
    FOLDER/NAME.safetensors     one part (a shard, or a block of items), plain safetensors:
                                  MODALITY        features [n, D], or [n, V, D] with V > 1 views; fp32, fp16 or int8
                                  MODALITY.scale  int8 only, fp32 [n] or [n, V]: feature = int8 · scale
                                  MODALITY.rows   int64 [n]: the part's id that each row belongs to
    FOLDER/NAME.json            ids of the part, what was lost and why, what it was made from, size and SHA-256 of its
                                safetensors file

The description is what every feature depends on: the model, the views, how rows are drawn, the dtype. A part records
its description and its data, so a run that was killed keeps the parts that are finished and writes the others: the
folder is then byte for byte what an uninterrupted run leaves. A part's json is written after its features, and
``features.json`` says ``finished`` last.

An id may occur more than once (a shard that repeats a key): every sample has its row. A sample without a row is either
listed under ``lost`` or has no such modality.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dualenc.errors import ConfigError, DataError, did_you_mean

logger = logging.getLogger(__name__)

ABOUT = "features.json"
FORMAT = 2
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.int8}
_OLD = "teacher.json"
"""What the caches of format 1 had in place of features.json."""


@dataclass(frozen=True, slots=True)
class Description:
    """What all features of a store depend on.

    Attributes:
        model: how the model describes itself: hash of its weights, inputs, versions.
        modalities: name in the store → the model's name for it.
        views: V of each modality.
        dtype: fp32, fp16 or int8 (each row scaled by its largest entry: an error below 1/254 of that).
        preprocessing: what a row depends on besides the model's own input (augmentation, seed …).
    """

    model: dict[str, Any]
    modalities: dict[str, str]
    views: dict[str, int]
    dtype: str = "fp32"
    preprocessing: dict[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """As plain JSON data."""
        out: dict[str, Any] = json.loads(json.dumps(asdict(self), default=str))
        return out

    @property
    def digest(self) -> str:
        """128 bits of BLAKE2b over the JSON of :meth:`plain` with sorted keys, in hex."""
        return digest_of(self.plain())


@dataclass(frozen=True, slots=True)
class Lost:
    """A missing row: its bytes could not be used, or its sample could not be read."""

    id: str
    modality: str
    reason: str


@dataclass(frozen=True, slots=True)
class PartInfo:
    """A part as features.json lists it: its name, number of ids, rows and lost rows by modality, the data it was made
    from, SHA-256 of its safetensors file."""

    name: str
    ids: int
    rows: dict[str, int]
    lost: dict[str, int]
    data: dict[str, Any]
    sha256: str


class FeaturePart:
    """One part of a store. Features are memory-mapped, and read where they are used.

    Attributes:
        ids: of all its samples or items, in order, including those without a row.
        lost: the rows that could not be made.
        data: what the part was made from.
        digest: of the description its features belong to.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.name, self.path = name, folder / f"{name}.safetensors"
        record = read_json(folder / f"{name}.json")
        try:
            self.ids: list[str] = [str(x) for x in record["ids"]]
            self.lost = [Lost(str(x["id"]), str(x["modality"]), str(x["reason"])) for x in record["lost"]]
            self.data: dict[str, Any] = dict(record["data"])
            self.digest, self.sha256, self.bytes = str(record["of"]), str(record["sha256"]), int(record["bytes"])
            self.counts: dict[str, int] = {str(m): int(n) for m, n in record["rows"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise DataError(
                f"{folder}/{name}.json does not describe a part of stored features ({e!r}); write it again"
            ) from e

    @classmethod
    def whole(cls, folder: Path, name: str, digest: str) -> FeaturePart | None:
        """The part of that name, if it is undamaged and belongs to the description of that digest."""
        if not (folder / f"{name}.json").is_file():
            return None
        try:
            part = cls(folder, name)
            part.verify()
        except DataError as e:
            logger.warning("%s (it is being written again)", e)
            return None
        return part if part.digest == digest else None

    def info(self) -> PartInfo:
        """How features.json lists it."""
        lost = dict.fromkeys(self.counts, 0)
        for x in self.lost:
            lost[x.modality] = lost.get(x.modality, 0) + 1
        return PartInfo(self.name, len(self.ids), dict(self.counts), lost, self.data, self.sha256)

    def verify(self) -> None:
        """Read the whole file.

        Raises:
            DataError: it is not the one that was written.
        """
        try:
            with self.path.open("rb") as f:
                whole = hashlib.file_digest(f, "sha256").hexdigest() == self.sha256
        except OSError as e:
            raise DataError(f"{self.path} cannot be read ({e}); write it again") from e
        if not whole:
            raise DataError(f"{self.path} is damaged: its SHA-256 is not the one in {self.name}.json; write it again")

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the file, mapped."""
        from safetensors import SafetensorError, safe_open

        try:
            if self.path.stat().st_size != self.bytes:
                raise DataError(
                    f"{self.path} has {self.path.stat().st_size} bytes, {self.name}.json says {self.bytes}; write it "
                    "again"
                )
            with safe_open(str(self.path), framework="pt") as f:
                out = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as e:
            raise DataError(f"{self.path} cannot be read ({e}); write it again") from e
        for m, n in self.counts.items():
            x, rows = out.get(m), out.get(f"{m}.rows")
            if x is None or rows is None or len(x) != n or len(rows) != n or x.ndim not in (2, 3):
                raise DataError(f"{self.path} does not hold the {n} rows of {m} that {self.name}.json lists")
            if n and not 0 <= int(rows.min()) <= int(rows.max()) < len(self.ids):
                raise DataError(f"{self.path}: {m}.rows names ids that are not in {self.name}.json")
            if x.dtype is torch.int8 and f"{m}.scale" not in out:
                raise DataError(f"{self.path} has no {m}.scale, which int8 features need")
        return out

    def rows(self, m: str) -> Tensor:
        """int64 [n]: the id that each row of a modality belongs to."""
        return self.tensors[f"{m}.rows"]

    @cached_property
    def _places(self) -> dict[str, npt.NDArray[np.int64]]:
        return {}

    def row_of(self, m: str) -> npt.NDArray[np.int64]:
        """int64 [ids]: the row of each id, −1 where it has none."""
        if m not in self._places:
            out = np.full(len(self.ids), -1, np.int64)
            out[self.rows(m).numpy()] = np.arange(self.counts[m])
            self._places[m] = out
        return self._places[m]

    def features(self, m: str) -> Tensor:
        """[n, V, D] fp32 of a modality, as they are stored: fp16 and int8 leave the unit sphere by a rounding."""
        x = self.tensors[m]
        y = x.float()
        if x.dtype is torch.int8:
            y = y * self.tensors[f"{m}.scale"][..., None]
        return y if y.ndim == 3 else y[:, None]

    def at(self, m: str, rows: Tensor, views: Tensor) -> Tensor:
        """[k, D] fp32: one view of each of ``rows`` [k], as :meth:`features` would give it."""
        x = self.tensors[m]
        index = (rows, views) if x.ndim == 3 else (rows,)
        y = x[index].float()
        return y * self.tensors[f"{m}.scale"][index][:, None] if x.dtype is torch.int8 else y


class FeatureStore:
    """A folder of features.

    Attributes:
        description: what all features depend on; digest: its digest.

    Raises:
        DataError: the folder holds no features, or they are unfinished, damaged or of another format.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        about = read_about(self.folder)
        if not about["finished"]:
            raise DataError(f"{folder} is not finished: dualenc embed was stopped; run the same command to resume")
        try:
            self.description = Description(**about["description"])
            self.digest, listed = str(about["digest"]), list(about["parts"])
            self.infos = [PartInfo(**x) for x in listed]
        except (KeyError, TypeError) as e:
            raise DataError(f"{self.folder / ABOUT} does not describe stored features ({e!r}); write them again") from e
        self._parts: dict[str, FeaturePart] = {}

    def part(self, name: str) -> FeaturePart:
        """A part by name.

        Raises:
            DataError: it is missing, damaged, or was made under another description.
        """
        if name not in self._parts:
            part = FeaturePart(self.folder, name)
            if part.digest != self.digest:
                raise DataError(
                    f"{self.folder}/{name}.json belongs to other features ({part.digest[:12]}…, {ABOUT} says "
                    f"{self.digest[:12]}…); write them again"
                )
            self._parts[name] = part
        return self._parts[name]

    @property
    def parts(self) -> list[FeaturePart]:
        """All parts in order.

        Raises:
            DataError: one was changed after the store was finished.
        """
        out = []
        for info in self.infos:
            part = self.part(info.name)
            if part.info() != info:
                raise DataError(
                    f"{self.folder}/{info.name}.json is not what {ABOUT} lists: it was changed after it was written; "
                    "write the features again"
                )
            out.append(part)
        return out

    def read(self, m: str) -> tuple[list[str], Tensor]:
        """Ids and features [N, V, D] fp32 of all rows of a modality.

        Raises:
            ConfigError: there is no such modality.
        """
        if m not in self.description.modalities:
            raise ConfigError(f"{self.folder} has no {m!r}. {did_you_mean(m, self.description.modalities)}")
        parts = [p for p in self.parts if p.counts.get(m)]
        ids = [p.ids[i] for p in parts for i in p.rows(m).tolist()]
        if not parts:
            return [], torch.zeros(0, self.description.views[m], int(self.description.model.get("embed_dim", 0)))
        return ids, torch.cat([p.features(m) for p in parts])


# --- helpers ----------------------------------------------------------------------------------------------------


def stored(x: Tensor, dtype: str, name: str) -> dict[str, Tensor]:
    """Features [n, V, D] fp32 as the tensors of a part; a single view has no axis."""
    x = x[:, 0] if x.shape[1] == 1 else x
    if dtype != "int8":
        return {name: x.to(DTYPES[dtype]).contiguous()}
    largest = x.abs().amax(-1).clamp(min=1e-12)
    return {name: (x / largest[..., None] * 127).round().to(torch.int8), f"{name}.scale": largest / 127}


def part_name(*words: str) -> str:
    """A file name for a part; words with characters a file name cannot have get a hash, so that names stay distinct."""
    joined = "_".join(words)
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in joined)[-120:].lstrip(".")
    if len(words) == 1 and safe == joined:
        return safe
    return f"{safe}-{hashlib.blake2b(repr(words).encode('utf-8', 'surrogateescape'), digest_size=6).hexdigest()}"


def digest_of(plain: Any) -> str:
    """128 bits of BLAKE2b over the JSON of plain data, in hex."""
    text = json.dumps(plain, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def read_about(folder: Path) -> dict[str, Any]:
    """What a folder's features.json says.

    Raises:
        DataError: it is missing, damaged, or of another format.
    """
    path = folder / ABOUT
    if not path.is_file():
        if (folder / _OLD).is_file():
            raise DataError(
                f"{folder} holds teacher features in a format that is no longer supported; write them again with "
                f"dualenc embed MODEL --recipe RECIPE --out {folder}"
            )
        raise DataError(
            f"{folder} holds no features ({ABOUT} is missing): write them with dualenc embed MODEL SHARDS or dualenc "
            f"embed MODEL --recipe RECIPE, --out {folder}"
        )
    about = read_json(path)
    if about.get("format") != FORMAT:
        raise DataError(f"{path}: format: {about.get('format')!r} is not {FORMAT}; write the features again")
    if not {"finished", "description", "digest", "parts"} <= about.keys():
        raise DataError(f"{path} does not describe stored features; write them again")
    return about


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises DataError where there is none."""
    try:
        out = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise DataError(f"{path} cannot be read ({e}); write the features again") from e
    if not isinstance(out, dict):
        raise DataError(f"{path} does not describe stored features; write them again")
    return out


def totals(infos: Iterable[PartInfo], modalities: Sequence[str]) -> dict[str, Any]:
    """Samples, and rows that were embedded, lost (unusable, each listed in its part's json) and absent, by modality."""
    infos = list(infos)
    samples = sum(i.ids for i in infos)
    rows = {m: sum(i.rows.get(m, 0) for i in infos) for m in modalities}
    lost = {m: sum(i.lost.get(m, 0) for i in infos) for m in modalities}
    absent = {m: samples - rows[m] - lost[m] for m in modalities}
    return {"samples": samples, "embedded": rows, "lost": lost, "absent": absent}
