"""Points and boxes drawn over the images of a keyframe, to see at a glance whether the calibration is right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dualenc.data.driving.geometry import F64, inverse, moved, project, seen
from dualenc.data.driving.keyframes import Box
from dualenc.data.driving.places import MEMBER, read_regions
from dualenc.data.modalities.camera import CameraConfig, CameraInput, Shot, views_of
from dualenc.data.modalities.lidar import LidarConfig, LidarInput
from dualenc.data.modalities.picture import Picture
from dualenc.data.show import colours, points_over, webp_uri
from dualenc.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

PICTURE_PX = 640
TILE_PX = 256
COLUMNS = 3
REACH = 50.0
_EDGES = [(a, b) for a in range(8) for b in range(a) if bin(a ^ b).count("1") == 1]


def overlay_uri(
    lidar: Any, cameras: Mapping[str, Any], boxes: Any = None, regions: bytes | None = None
) -> tuple[str, str]:
    """A ``data:`` URI of one image, and a line about it.

    The image shows every camera with the points that project into it, near ones red and far ones blue, the boxes, and
    the cloud from above with each camera's field of view; with ``regions`` (a ``regions.npy``) also the cloud in grey
    with each region in its own colour.

    Raises:
        DecodeError: whatever training would refuse.
    """
    cloud = LidarInput(LidarConfig(features=[])).decode(lidar)
    shots = CameraInput(CameraConfig()).decode(cameras)
    points = moved(cloud.points[:, :3].astype(np.float64), cloud.to_ego)
    solid = [_box(b) for b in boxes or []]
    tiles, counts = [], []
    for shot in shots:
        tile, count = _camera(shot, points, solid)
        tiles.append(tile)
        counts.append(count)
    pictures = _pasted([tiles[i : i + COLUMNS] for i in range(0, len(tiles), COLUMNS)])
    px = max(pictures.height, PICTURE_PX if len(shots) > 1 else PICTURE_PX // 2)  # one camera: less black below it
    tops = [_from_above(points, colours(np.linalg.norm(points[:, :2], axis=1)), shots, solid, px)]
    names = list(views_of(cameras))
    about = f"{len(points):,} points; inside: " + ", ".join(f"{n} {c:,}" for n, c in zip(names, counts, strict=True))
    if regions is not None:
        places = read_regions({MEMBER: regions})
        tops.append(_from_above(*_in_regions(points, places), shots, solid, px))
        about += f"; {len(set(places[places[:, 3] >= 0, 3])):,} regions of {int((places[:, 3] >= 0).sum()):,} places"
    return webp_uri(_pasted([[pictures, *tops]])), about


def side_by_side(images: list[bytes], lidar: Any = None) -> tuple[str, str]:
    """A ``data:`` URI of images beside each other, and of points from above (an object's fill the picture), and a line
    about them.

    Raises:
        DecodeError: an image or the points are damaged.
    """
    from PIL import Image

    tiles, about = [], []
    for raw in images:
        image = Picture(raw, (255, 255, 255)).rgb()
        about.append(f"{image.width}×{image.height}")
        scale = TILE_PX / image.height
        tiles.append(image.resize((max(round(image.width * scale), 1), TILE_PX), Image.Resampling.LANCZOS))
    if lidar is not None:
        cloud = LidarInput(LidarConfig(features=[])).decode(lidar)
        points = moved(cloud.points[:, :3].astype(np.float64), cloud.to_ego)
        tiles.append(_alone(points))
        about.append(f"{len(points):,} points")
    return webp_uri(_pasted([tiles])), ", ".join(about)


def _alone(points: F64) -> Image.Image:
    """Points from above, forward up, as large as they fit; high ones bright."""
    from PIL import Image

    pixels = np.full((TILE_PX, TILE_PX, 3), 18, np.uint8)
    if len(points):
        seen_from_above = np.stack([-points[:, 1], -points[:, 0]], 1)
        low, high = np.percentile(seen_from_above, [1, 99], axis=0)
        reach = max(float((high - low).max()), 1e-3)
        cells = ((seen_from_above - (low + high) / 2) / (1.1 * reach) + 0.5) * TILE_PX
        dot = (
            4 if len(points) < 500 else 3 if len(points) < 4000 else 1
        )  # an object's few points are large enough to see
        inside = ((cells >= 0) & (cells < TILE_PX - dot)).all(1)
        height = points[:, 2] - points[:, 2].min()
        shade = colours(60 * (1 - height / max(float(height.max()), 1e-3)))[inside]
        x, y = cells[inside].astype(int).T
        for dy, dx in np.ndindex(dot, dot):
            pixels[y + dy, x + dx] = shade
    return Image.fromarray(pixels)


def _in_regions(points: F64, places: npt.NDArray[np.float32]) -> tuple[F64, npt.NDArray[np.uint8]]:
    """The sweep in grey, then the places in regions, drawn large enough to see; neighbouring region numbers get distant
    hues (golden angle)."""
    inside = np.repeat(places[places[:, 3] >= 0], 9, axis=0)
    inside[:, :2] += np.tile(np.mgrid[-1:2, -1:2].reshape(2, 9).T * 0.12, (len(inside) // 9, 1))
    hues = (inside[:, 3] * 0.618034) % 1.0
    bright = np.stack([np.clip(np.abs((hues * 6 + shift) % 6 - 3) - 1, 0, 1) for shift in (0, 4, 2)], 1)
    colour = np.concatenate([np.full((len(points), 3), 70.0), 60 + 195 * bright]).astype(np.uint8)
    return np.concatenate([points, inside[:, :3].astype(np.float64)]), colour


def _camera(shot: Shot, points: F64, boxes: list[Box]) -> tuple[Image.Image, int]:
    from PIL import ImageDraw

    assert shot.picture is not None
    image = shot.picture.rgb()
    to_camera = inverse(shot.to_ego)
    uv, depth = project(points, to_camera, shot.intrinsics)
    ok = seen(uv, depth, image.size)
    scale = PICTURE_PX / image.width
    image = points_over(image, uv[ok], depth[ok], PICTURE_PX)
    draw = ImageDraw.Draw(image)
    for box in boxes:
        corners, far = project(box.corners(), to_camera, shot.intrinsics)
        if (far > 0.5).all():
            for a, b in _EDGES:
                draw.line([*(corners[a] * scale), *(corners[b] * scale)], fill=(255, 255, 255), width=1)
    return image, int(ok.sum())


def _from_above(
    points: F64, colour: npt.NDArray[np.uint8], shots: list[Shot], boxes: list[Box], px: int
) -> Image.Image:
    from PIL import Image, ImageDraw

    def at(xy: F64) -> F64:
        return (np.stack([-xy[:, 1], -xy[:, 0]], 1) / REACH + 1) * px / 2

    pixels = np.full((px, px, 3), 18, np.uint8)
    near = np.abs(points[:, :2]).max(1) < REACH
    cells = at(points[near, :2]).astype(int).clip(0, px - 1)
    pixels[cells[:, 1], cells[:, 0]] = colour[near]
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    for shot in shots:
        assert shot.picture is not None
        ends = np.array([[0, 0, 1.0], [shot.picture.size[0], 0, 1.0]]) @ np.linalg.inv(shot.intrinsics).T
        rays = at(moved(np.concatenate([np.zeros((1, 3)), ends[:, :] * 12]), shot.to_ego)[:, :2])
        draw.line([tuple(rays[1]), tuple(rays[0]), tuple(rays[2])], fill=(255, 255, 255), width=1)
    for box in boxes:
        corners = at(box.corners()[:, :2])
        for a, b in _EDGES:
            draw.line([tuple(corners[a]), tuple(corners[b])], fill=(230, 230, 230), width=1)
    return image


def _box(doc: Any) -> Box:
    try:
        center, axes, half = (np.asarray(doc[k], dtype=np.float64) for k in ("center", "axes", "half"))
        box = Box(str(doc["class"]), str(doc["instance"]), center.reshape(3), axes.reshape(3, 3), half.reshape(3))
    except (KeyError, TypeError, ValueError) as e:
        raise DataError(f"a box needs class, instance, center [3], axes [3, 3] and half [3] ({e})") from e
    return box


def _pasted(rows: list[list[Image.Image]]) -> Image.Image:
    from PIL import Image

    width = max(sum(t.width for t in row) for row in rows)
    out = Image.new("RGB", (width, sum(max(t.height for t in row) for row in rows)), (18, 18, 18))
    top = 0
    for row in rows:
        left = 0
        for tile in row:
            out.paste(tile, (left, top))
            left += tile.width
        top += max(t.height for t in row)
    return out
