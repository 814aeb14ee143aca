"""One or more calibrated images of one moment → uint8 images with the intrinsics and extrinsics that now apply to them.

Cropping, resizing and flipping an image changes its intrinsics; rotating, scaling and mirroring the scene changes the
extrinsics. ``to_ego`` leads from the frame of the extrinsics back to ego: see :mod:`dualenc.data.modalities.lidar`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, Field
from torch import Tensor

from dualenc.config import Positive, Section
from dualenc.data.driving.geometry import (
    F64,
    Bools,
    checked_intrinsics,
    checked_pose,
    cut_and_resized,
    inverse,
    mirrored,
    project,
    seen,
)
from dualenc.data.driving.places import MEMBER, Places, PlacesConfig, collated, draw, nothing, read_regions
from dualenc.data.modalities.image import Byte, Colour, Spread, Triple, coloured, to_tensor
from dualenc.data.modalities.lidar import Motion
from dualenc.data.modalities.modality import DecodeError, modalities
from dualenc.data.modalities.picture import Picture, png_of
from dualenc.errors import DataError

JSON = "json:cameras"
Edges = tuple[float, float, float, float]


class CameraAugment(Section):
    """Training only. ``zoom``: how much each image is enlarged further before a random crop; ``scene``: a motion of the
    whole scene, which changes only the extrinsics."""

    zoom: tuple[Annotated[float, Field(ge=1)], Annotated[float, Field(ge=1)]] = Field(
        default=(1.0, 1.0), description="range of an enlargement before the random crop"
    )
    flip: bool = Field(default=False, description="mirror images and geometry left and right")
    colour: Colour | None = Field(default=None, description="colour jitter; null: none")
    scene: Motion = Field(default=Motion(), description="motion of the whole scene")


class CameraConfig(Section):
    """How images become a row: resized to cover ``size`` (height, width), then cropped."""

    size: tuple[Positive, Positive] = Field(default=(128, 352), description="height and width in px")
    mean: Triple = Field(default=(0.48145466, 0.4578275, 0.40821073), description="subtracted from RGB in 0…1")
    std: tuple[Spread, Spread, Spread] = Field(
        default=(0.26862954, 0.26130258, 0.27577711), description="RGB is divided by this"
    )
    interpolation: Literal["bicubic", "bilinear", "lanczos"] = Field(
        default="bilinear", description="filter for resizing"
    )
    cameras: list[str] | None = Field(default=None, description="camera names, in this order; default: all of a sample")
    missing: Literal["refuse", "mask"] = Field(
        default="refuse", description="whether a sample that lacks one of the cameras is refused, or that camera masked"
    )
    calibration: Literal["needed", "optional"] = Field(
        default="needed", description="optional: accept an image without calibration, as one camera of unknown geometry"
    )
    cut: Literal["top", "middle"] = Field(default="top", description="which rows an image that is too tall loses")
    background: tuple[Byte, Byte, Byte] = Field(default=(255, 255, 255), description="colour behind transparent pixels")
    max_pixels: Positive = Field(default=25_000_000, description="larger images are rejected before decoding")
    augment: CameraAugment = Field(default=CameraAugment(), description="training only")
    places: PlacesConfig | None = Field(
        default=None, description="places in the scene that rows list, for region losses (rad)"
    )


@dataclass(frozen=True, slots=True)
class Shot:
    """One camera's opened image, None where it is masked; ``known``: whether its geometry is known."""

    picture: Picture | None
    intrinsics: F64
    to_ego: F64
    known: bool


class Rig(list[Shot]):
    """The shots of one moment, with the array in ``regions.npy`` and the places drawn from it."""

    regions: npt.NDArray[np.float32] | None = None
    places: Places | None = None


@modalities.register("camera")
class CameraInput:
    """Rigs as rows; ``collate`` → ``{"image": uint8 [B, N, 3, H, W], "intrinsics": float32 [B, N, 3, 3], "extrinsics":
    float32 [B, N, 4, 4] (camera → model frame), "to_ego": float32 [B, 4, 4] (model frame → ego), "present", "known":
    bool [B, N]}``: N is the most cameras of a row of the batch; ``present`` says which are there.

    An item is ``json:cameras`` = ``{"drive": name, "views": [{"name", "member", "size": [width, height], "intrinsics":
    [3, 3], "to_ego": [4, 4], "drive"}]}`` with the members it names, or the bytes of one image.
    """

    Config: ClassVar[type[BaseModel]] = CameraConfig
    default_members: ClassVar[list[str]] = [f"{JSON}+cam*", "jpg", "jpeg", "png", "webp"]
    prompt: ClassVar[str] = "a photo of a {}."

    def __init__(self, config: CameraConfig, base_dir: str | Path | None = None) -> None:
        from PIL import Image

        self.config = config
        if config.places is not None:
            self.default_members = [f"{JSON}+cam*+{MEMBER}"]  # type: ignore[misc]
        self._filter = Image.Resampling[config.interpolation.upper()]

    # --- the protocol -----------------------------------------------------------------------------------------

    def decode(self, raw: Any) -> Rig:
        """Read the images' headers and check the calibration against them.

        Raises:
            DecodeError: an image that is missing, broken or of another size than its calibration; intrinsics that are
                singular; an invalid pose; a calibration of another drive.
        """
        if not isinstance(raw, Mapping):
            if self.config.calibration == "needed":
                raise DecodeError("the image has no calibration; to accept it without, set input.calibration: optional")
            return Rig([Shot(self._opened(raw, "the image"), np.eye(3), np.eye(4), False)])
        views = views_of(raw)
        wanted = self.config.cameras or list(views)
        shots = Rig(self._shot(name, views.get(name), raw) for name in wanted)
        if all(s.picture is None for s in shots):
            raise DecodeError(f"the sample has none of the cameras {', '.join(wanted)}")
        if self.config.places is not None:
            shots.regions = read_regions(raw) if MEMBER in raw else None
        return shots

    def as_raw(self, x: Any, rate: int | None = None) -> Any:
        """A mapping of images and calibration as it is; a PIL image or uint8 [H, W, 3] → the bytes of a PNG."""
        return x if isinstance(x, Mapping) else png_of(x)

    def placed(self, x: Rig, rng: np.random.Generator) -> Rig:
        """The shots with places drawn, where the config asks for them."""
        if self.config.places is None:
            return x
        if x.regions is None:
            raise DecodeError(f"there is no {MEMBER}: build the shards with regions=true, or leave out input.places")
        x.places = draw(x.regions, self.config.places, rng)
        return x

    def train(self, x: Rig, rng: np.random.Generator) -> dict[str, Tensor]:
        """Each image cropped, flipped and colour-jittered on its own; the scene moved as a whole."""
        augment = self.config.augment
        motion = augment.scene.draw(rng)
        made = []
        for shot in x:
            zoom, across, down = rng.uniform(*augment.zoom), rng.random(), rng.random()
            flip = augment.flip and rng.random() < 0.5
            roomy = augment.zoom[1] > 1
            made.append(self._view(shot, zoom, across if roomy else 0.5, down if roomy else None, flip, rng))
        return self._row(x, made, motion)

    def eval(self, x: Rig) -> dict[str, Tensor]:
        """The images, with a fixed crop."""
        return self._row(x, [self._view(shot, 1.0, 0.5, None, False, None) for shot in x], np.eye(4))

    def collate(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Stack rows; those with fewer cameras are padded with black ones that are not ``present``."""
        n = max(len(r["image"]) for r in rows)
        whole = ("to_ego", "places", "labels")
        out = {k: torch.stack([_filled(r[k], n, k) for r in rows]) for k in rows[0] if k not in whole}
        return {**out, "to_ego": torch.stack([r["to_ego"] for r in rows]), **collated(rows)}

    def dummy(self) -> dict[str, Tensor]:
        """One black image of a camera that looks ahead, with a horizontal field of view of 90°."""
        height, width = self.config.size
        K = np.array([[width / 2, 0, width / 2], [0, width / 2, height / 2], [0, 0, 1.0]])
        ahead = np.array([[0, 0, 1.0, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
        shot = Shot(None, K, ahead, True)
        rig = Rig([shot])
        rig.places = None if self.config.places is None else nothing(self.config.places)
        row = self._row(rig, [(torch.zeros(3, height, width, dtype=torch.uint8), K)], np.eye(4))
        return {**row, "present": torch.ones(1, dtype=torch.bool)}

    def describe(self) -> dict[str, Any]:
        """The kind and its settings."""
        return {"kind": "camera", "config": self.config.model_dump(mode="json")}

    @staticmethod
    def preview(raw: Any) -> dict[str, str]:
        """The first camera's image."""
        from dualenc.data.show import thumbnail_uri

        if isinstance(raw, Mapping):
            raw = next((raw[v["member"]] for v in views_of(raw).values() if v["member"] in raw), b"")
        return {"picture": thumbnail_uri(raw)}

    # --- parts ------------------------------------------------------------------------------------------------

    def _shot(self, name: str, view: Mapping[str, Any] | None, raw: Mapping[str, Any]) -> Shot:
        if view is None or view["member"] not in raw:
            if self.config.missing == "mask":
                return Shot(None, np.eye(3), np.eye(4), False)
            why = "no calibration" if view is None else f"no image {view['member']}"
            raise DecodeError(f"camera {name} has {why}; to go on without it, set input.missing: mask")
        picture = self._opened(raw[view["member"]], f"camera {name}")
        K, to_ego = calibration_of(view, raw[JSON])
        size = view.get("size")
        if size is not None and tuple(size) != picture.size:
            raise DecodeError(
                f"camera {name}: the image has {picture.size[0]}×{picture.size[1]} pixels, but its calibration is for "
                f"{size[0]}×{size[1]}"
            )
        return Shot(picture, K, to_ego, True)

    def _opened(self, raw: Any, what: str) -> Picture:
        if not isinstance(raw, bytes | bytearray | memoryview):
            raise DecodeError(f"{what} must be bytes, got {type(raw).__name__}")
        picture = Picture(bytes(raw), self.config.background)
        width, height = picture.size
        if width * height > self.config.max_pixels:
            raise DecodeError(f"{what}: {width}×{height} pixels are more than max_pixels ({self.config.max_pixels:,})")
        return picture

    def _view(
        self, shot: Shot, zoom: float, across: float, down: float | None, flip: bool, rng: np.random.Generator | None
    ) -> tuple[Tensor, F64]:
        """The image uint8 [3, H, W] and its intrinsics."""
        from PIL import Image

        height, width = self.config.size
        if shot.picture is None:
            return torch.zeros(3, height, width, dtype=torch.uint8), shot.intrinsics
        w, h = shot.picture.size
        scale = zoom * max(width / w, height / h)
        spare = 1.0 if self.config.cut == "top" else 0.5
        box = _placed((w, h), (width / scale, height / scale), across, spare if down is None else down)
        image = shot.picture.rgb(at_least=int(np.ceil(1.5 * scale * min(w, h))) if scale < 1 else None)
        # A JPEG may come at a half, quarter or eighth of its size, rounded up: exact by the factor, not by the sides.
        factor = 2 ** round(np.log2(max(w, h) / max(image.size)))
        edges = (box[0] / factor, box[1] / factor, box[2] / factor, box[3] / factor)
        inside = (*edges[:2], min(edges[2], image.width), min(edges[3], image.height))
        image = image.resize((width, height), self._filter, box=inside)
        K = cut_and_resized(shot.intrinsics, box, (width, height))
        if flip:
            image, K = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), mirrored(K, width)
        if rng is not None and self.config.augment.colour is not None:
            image = coloured(image, self.config.augment.colour, rng)
        return to_tensor(image), K

    def _row(self, x: Rig, made: list[tuple[Tensor, F64]], motion: F64) -> dict[str, Tensor]:
        def numbers(value: Any) -> Tensor:
            return torch.from_numpy(np.asarray(value, dtype=np.float32))

        to_ego = inverse(motion)
        named = {} if x.places is None else x.places.row(to_ego, hidden=~seen_by_any(x, x.places.xyz))
        return {
            **named,
            "image": torch.stack([image for image, _ in made]),
            "intrinsics": numbers([K for _, K in made]),
            "extrinsics": numbers([motion @ s.to_ego for s in x]),
            "to_ego": numbers(to_ego),
            "present": torch.tensor([s.picture is not None for s in x]),
            "known": torch.tensor([s.known for s in x]),
        }


def seen_by_any(shots: list[Shot], points: F64) -> Bools:
    """[n]: which of ``points [n, 3]`` (ego) project into the uncropped image of a camera that is present."""
    out = np.zeros(len(points), bool)
    for s in shots:
        if s.picture is not None and s.known:
            out |= seen(*project(points, inverse(s.to_ego), s.intrinsics), s.picture.size)
    return out


def views_of(raw: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Name → what ``json:cameras`` says of a camera.

    Raises:
        DecodeError: it does not have the form that :class:`CameraInput` describes.
    """
    doc = raw.get(JSON)
    views = doc.get("views") if isinstance(doc, Mapping) else None
    if not isinstance(views, list) or not views:
        raise DecodeError(f"{JSON} must be {{drive, views: [{{name, member, intrinsics, to_ego}}, …]}}")
    for view in views:
        if not isinstance(view, Mapping) or not {"name", "member", "intrinsics", "to_ego"} <= view.keys():
            raise DecodeError(f"{JSON}: a view needs name, member, intrinsics and to_ego")
    return {str(v["name"]): v for v in views}


def calibration_of(view: Mapping[str, Any], doc: Mapping[str, Any]) -> tuple[F64, F64]:
    """(intrinsics [3, 3], camera → ego [4, 4]) of a view.

    Raises:
        DecodeError: singular intrinsics, an invalid pose, a calibration of another drive.
    """
    name = f"camera {view['name']}"
    mine, theirs = doc.get("drive"), view.get("drive")
    if mine and theirs and mine != theirs:
        raise DecodeError(f"{name}: its calibration is of drive {theirs!r}, but the sample is of {mine!r}")
    try:
        return checked_intrinsics(view["intrinsics"], name), checked_pose(view["to_ego"], name)
    except DataError as e:
        raise DecodeError(str(e)) from e


def _placed(whole: tuple[int, int], part: tuple[float, float], across: float, down: float) -> Edges:
    """The box of ``part`` (width, height) inside ``whole``; ``across`` and ``down`` say how the rest is split."""
    left, top = across * max(whole[0] - part[0], 0.0), down * max(whole[1] - part[1], 0.0)
    return left, top, min(left + part[0], float(whole[0])), min(top + part[1], float(whole[1]))


def _filled(x: Tensor, n: int, key: str) -> Tensor:
    if len(x) == n:
        return x
    # Matrices of absent cameras must still be invertible.
    more = torch.eye(x.shape[-1]) if key in ("intrinsics", "extrinsics") else torch.zeros((), dtype=x.dtype)
    return torch.cat([x, more.to(x.dtype).expand(n - len(x), *x.shape[1:])])
