"""What a LiDAR or camera tower's bird's-eye-view map says about places: regions found again, objects matched over time,
classes and occupancy from frozen features. One call, one dictionary of numbers, on keyframes it was not trained on.

Every number comes with a control. View-to-view recall is an easy test: turning, mirroring and scaling by a tenth
leave a region's distance and heights almost as they were, so the nearest neighbour on (radius, mean height, height
extent) alone is a strong baseline: ``…_control``. Camera to LiDAR within a frame can be won by knowing where a cell is:
``…_shuffled`` is the same with another keyframe's images, and only the difference shows that the images were used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dualenc.data.arrays import npy_bytes
from dualenc.data.driving.geometry import F64, ground_motion, moved
from dualenc.data.driving.keyframes import Keyframe
from dualenc.data.driving.regions import find_regions, ground
from dualenc.encoders.own.bev import MapTower
from dualenc.errors import ConfigError
from dualenc.model import Embedder
from dualenc_evals.metrics import linear
from dualenc_evals.metrics.scores import Ints

MIN_POINTS = 5
"""Least number of points above the ground in a region or box that is evaluated."""
SAMPLED = 64
"""Most points that are read in a region or box."""
LIKE = 1.25
"""Candidates of similar size: at most this factor longer or shorter."""
APART = 7
"""Keyframes between a frame and the one whose images it gets in the shuffled control."""
CELL = 0.8
CLASSES = {
    "car": ("vehicle.car", "Car", "Van"),
    "large vehicle": ("vehicle.truck", "vehicle.bus", "vehicle.trailer", "vehicle.construction", "Truck", "Tram"),
    "two-wheeler": ("vehicle.motorcycle", "vehicle.bicycle", "Cyclist"),
    "person": ("human.", "Pedestrian", "Person_sitting"),
    "obstacle": ("movable_object.", "static_object."),
}


@dataclass
class RegionFrame:
    """One keyframe: its cloud in ego, and the regions and labelled boxes that have enough points above the ground."""

    key: Keyframe
    points: F64
    extra: F64
    solid: npt.NDArray[np.bool_]
    regions: list[Ints] = field(default_factory=list)
    boxes: list[tuple[str, str, Ints]] = field(default_factory=list)

    @classmethod
    def of(cls, key: Keyframe, rng: np.random.Generator) -> RegionFrame:
        raw = key.points()
        points = moved(raw[:, :3], key.lidar_to_ego)
        out = cls(key, points, raw[:, 3:], ~ground(points))
        region = find_regions(points)
        out.regions = [_some(np.flatnonzero(region == k), rng) for k in range(int(region.max(initial=-1)) + 1)]
        out.regions = [r for r in out.regions if len(r) >= MIN_POINTS]
        for box in key.boxes:
            inside = np.flatnonzero(box.inside(points) & out.solid)
            if len(inside) >= MIN_POINTS:
                out.boxes.append((box.cls, box.instance, _some(inside, rng)))
        return out

    def lidar(self, motion: F64 | None = None, kept: npt.NDArray[Any] | None = None) -> dict[str, Any]:
        """The sweep as a shard holds it, moved and thinned."""
        xyz = self.points if motion is None else moved(self.points, motion)
        rows = np.concatenate([xyz, self.extra], axis=1)
        rows = rows if kept is None else rows[kept]
        about = {"columns": list(self.key.columns), "to_ego": np.eye(4).tolist()}
        return {"json:lidar": about, "lidar.npy": npy_bytes(rows.astype(np.float32))}

    def camera(self, wrong: bool = False) -> dict[str, Any]:
        """The images as a shard holds them; ``wrong``: each with the pose of the next camera."""
        poses = [v.to_ego.tolist() for v in self.key.views]
        poses = poses[1:] + poses[:1] if wrong else poses
        views = [
            {
                "name": v.name, "member": f"cam_{i}", "size": v.size, "intrinsics": v.intrinsics.tolist(),
                "to_ego": poses[i],
            }
            for i, v in enumerate(self.key.views)
        ]  # fmt: skip
        pictures = {f"cam_{i}": v.path.read_bytes() for i, v in enumerate(self.key.views)}
        return {"json:cameras": {"views": views}, **pictures}


def evaluate_regions(
    embedder: Embedder, test: Sequence[Keyframe], train: Sequence[Keyframe] = (), seed: int = 0
) -> dict[str, Any]:
    """All probes below that the model and the keyframes allow.

    Args:
        embedder: of a model with a bird's-eye-view tower for LiDAR, for cameras, or both.
        test: keyframes in the order they were taken; train: those whose labels the probes learn from.

    Returns:
        ``{"metrics": {name: share}, "n": {…}}``.

    Raises:
        ConfigError: the model has no such tower.
    """
    rng = np.random.default_rng(seed)
    lidar, camera = (_modality(embedder, kind) for kind in ("lidar", "camera"))
    if lidar is None and camera is None:
        raise ConfigError("regions: the model has no bird's-eye-view tower (own/pillars, own/voxels, own/lift_splat)")
    frames, learned = [RegionFrame.of(k, rng) for k in test], [RegionFrame.of(k, rng) for k in train]
    out: dict[str, float] = {}
    if lidar is not None:
        out |= view_to_view(embedder, lidar, frames, rng)
        out |= instances(embedder, lidar, frames, rng)
        out |= occupancy(embedder, lidar, frames, learned, rng)
        if learned:
            out |= classes(embedder, lidar, frames, learned, seed)
    if lidar is not None and camera is not None:
        out |= across(embedder, camera, lidar, frames)
    regions, boxes = sum(len(f.regions) for f in frames), sum(len(f.boxes) for f in frames)
    n = {"keyframes": len(frames), "training keyframes": len(learned), "regions": regions, "boxes": boxes}
    return {"metrics": {k: round(float(v), 4) for k, v in out.items()}, "n": n}


# --- the parts ----------------------------------------------------------------------------------------------------


def view_to_view(
    embedder: Embedder, m: str, frames: Sequence[RegionFrame], rng: np.random.Generator
) -> dict[str, float]:
    """R@1 and R@5 of regions between two views, among the regions of all frames; then a harder form of it."""
    out: dict[str, float] = {}
    for name, scale, kept_share in (("view", (0.9, 1.1), 0.8), ("hard_view", (0.8, 1.25), 0.5)):
        sides, numbers = [], []
        for _ in "ab":
            motions = [ground_motion(rng, 180 if name == "hard_view" else 90, scale, True, True) for _ in frames]
            kept = [rng.random(len(f.points)) < kept_share for f in frames]
            items = [f.lidar(t, k) for f, t, k in zip(frames, motions, kept, strict=True)]
            places = [[moved(f.points[r], t) for r in f.regions] for f, t in zip(frames, motions, strict=True)]
            sides.append(pooled(embedder, m, items, places))
            numbers.append(torch.tensor(np.array([_three(p) for frame in places for p in frame]), dtype=torch.float32))
        scaled = torch.cat(numbers).std(0)
        mask = _like([f.points[r] for f in frames for r in f.regions]) if name == "hard_view" else None
        out |= _recalls(f"{name}_region", sides[0] @ sides[1].T, mask)
        out |= _recalls(f"{name}_region_control", -torch.cdist(numbers[0] / scaled, numbers[1] / scaled), mask)
        out[f"{name}_region_chance"] = _chance(len(sides[0]), mask)
    return out


def instances(embedder: Embedder, m: str, frames: Sequence[RegionFrame], rng: np.random.Generator) -> dict[str, float]:
    """R@1 of labelled objects in the next keyframe, among all objects of that keyframe; then with every keyframe turned
    and mirrored on its own, so that no object is found again by its position alone."""
    out: dict[str, float] = {}
    for name in ("instance", "turned_instance"):
        motions = [np.eye(4) if name == "instance" else ground_motion(rng, 180, (1, 1), True, True) for _ in frames]
        places = [[moved(f.points[b], t) for *_, b in f.boxes] for f, t in zip(frames, motions, strict=True)]
        sizes = [len(p) for p in places]
        items = [f.lidar(t) for f, t in zip(frames, motions, strict=True)]
        features = torch.split(pooled(embedder, m, items, places), sizes)
        three = [torch.tensor(np.array([_three(p) for p in ps]).reshape(-1, 3), dtype=torch.float32) for ps in places]
        spread = torch.cat(three).std(0)
        hits: dict[str, list[float]] = {f"{name}_R@1": [], f"{name}_control_R@1": [], f"{name}_chance": []}
        for k in range(len(frames) - 1):
            if frames[k].key.drive != frames[k + 1].key.drive or not frames[k].key.drive:
                continue
            later = [i for _, i, _ in frames[k + 1].boxes]
            scores = (features[k] @ features[k + 1].T, -torch.cdist(three[k] / spread, three[k + 1] / spread))
            for row, (_, which, _) in enumerate(frames[k].boxes):
                if which in later:
                    at = later.index(which)
                    for key, s in zip(hits, scores, strict=False):
                        hits[key].append(float((s[row] >= s[row][at]).sum() == 1))
                    hits[f"{name}_chance"].append(1 / len(later))
        out |= {k: float(np.mean(v)) for k, v in hits.items() if v}
    return out


def across(embedder: Embedder, camera: str, lidar: str, frames: Sequence[RegionFrame]) -> dict[str, float]:
    """R@1 and R@5, a region's camera features → its LiDAR features: with its own images, with another frame's, and
    with its own under the poses of other cameras (which lowers it only where the calibration is used)."""
    places = [[f.points[r] for r in f.regions] for f in frames]
    keys = pooled(embedder, lidar, [f.lidar() for f in frames], places, projected=True)
    out: dict[str, float] = {}
    turned = [frames[(i + min(APART, len(frames) - 1)) % len(frames)] for i in range(len(frames))]
    for name, shown in (
        ("camera_to_lidar", [f.camera() for f in frames]),
        ("camera_to_lidar_shuffled", [f.camera() for f in turned]),
        ("camera_to_lidar_wrong_calibration", [f.camera(wrong=True) for f in frames]),
    ):
        queries = pooled(embedder, camera, shown, places, projected=True)
        out |= _recalls(name, queries @ keys.T, None)
    for k in (1, 5):
        out[f"camera_to_lidar_gap_R@{k}"] = out[f"camera_to_lidar_R@{k}"] - out[f"camera_to_lidar_shuffled_R@{k}"]
    out["camera_to_lidar_chance"] = _chance(len(keys), None)
    return out


def classes(
    embedder: Embedder, m: str, test: Sequence[RegionFrame], train: Sequence[RegionFrame], seed: int
) -> dict[str, float]:
    """Linear probe: the class of a labelled box from the frozen map at its points."""
    x, y = (_boxes(embedder, m, frames) for frames in (train, test))
    known = np.flatnonzero(np.isin(y[1], x[1]))
    weights, _ = linear.tuned(x[0], x[1], len(CLASSES), seed)
    ranks, _ = linear.ranks_under(weights, y[0][torch.from_numpy(known)], y[1][known])
    truth = y[1][known]
    each = [float((ranks[truth == c] == 1).mean()) for c in np.unique(truth)]
    most = np.bincount(truth).max() / max(len(truth), 1)
    return {
        "class_top1": float((ranks == 1).mean()),
        "class_mean_recall": float(np.mean(each)),
        "class_most_frequent": float(most),
        "class_chance": 1 / len(each),
    }


def occupancy(
    embedder: Embedder, m: str, test: Sequence[RegionFrame], train: Sequence[RegionFrame], rng: np.random.Generator
) -> dict[str, float]:
    """Linear probe: is there something above the ground in a cell without a measurement?

    Half of the points are removed from the sweep. The probe is asked about cells without a kept point: those with a
    removed point above the ground, and as many without one that are within two cells of one that has. Chance is 0.5.
    """
    sets = []
    for frames in (train or test[: len(test) // 2], test if train else test[len(test) // 2 :]):
        items, places, labels = [], [], []
        for f in frames:
            kept = rng.random(len(f.points)) < 0.5
            items.append(f.lidar(kept=kept))
            asked, occupied = _cells(f, kept, rng)
            places.append(asked)
            labels.append(occupied)
        if not items or not sum(map(len, labels)):
            return {}
        values = torch.cat(at(embedder, m, items, places))
        sets.append((torch.nn.functional.normalize(values, dim=-1), np.concatenate(labels)))
    weights = linear.fit(sets[0][0], sets[0][1], 2, 100.0)
    ranks, _ = linear.ranks_under(weights, sets[1][0], sets[1][1])
    return {"occupancy_top1": float((ranks == 1).mean()), "occupancy_chance": 0.5}


# --- pieces -------------------------------------------------------------------------------------------------------


def pooled(
    embedder: Embedder, m: str, items: Sequence[Any], places: Sequence[Sequence[F64]], projected: bool | None = None
) -> Tensor:
    """[R, W] the mean of the map over each list of places, L2-normalised; through the projector if there is one."""
    through = map_tower(embedder, m).projects if projected is None else projected
    flat = [np.concatenate(p) if len(p) else np.zeros((0, 3)) for p in places]
    rows = []
    for values, parts in zip(at(embedder, m, items, flat, through), places, strict=True):
        rows += [v.mean(0) for v in torch.split(values, [len(p) for p in parts])]
    if not rows:
        raise ConfigError("regions: these keyframes contain no regions and no boxes")
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1)


def at(
    embedder: Embedder,
    m: str,
    items: Sequence[Any],
    places: Sequence[Any],
    projected: bool = False,
    batch_size: int = 8,
) -> list[Tensor]:
    """Features of a bird's-eye-view tower's map at places of the world.

    Args:
        items: raw items, as ``embedder.embed`` takes them.
        places: for each item, x, y (further columns are ignored) in the ego frame, in metres: [k, ≥ 2].
        projected: through the tower's projector (``local_dim``), L2-normalised; else the map itself.

    Returns:
        For each item [k, W], fp32, on the CPU; zero outside the map.

    Raises:
        ConfigError: a modality without such a tower or projector; in a training run.
        DataError: an item that cannot be used.
    """
    tower = map_tower(embedder, m)
    if projected and not tower.projects:
        raise ConfigError(f"modalities.{m}.encoder.local_dim: the tower was trained without a projector")
    if len(places) != len(items):
        raise ConfigError(f"places: got {len(places)} for {len(items)} items; give one list per item")
    given = [torch.as_tensor(p, dtype=torch.float32, device=embedder.device) for p in places]
    out: list[Tensor] = []
    with torch.no_grad():
        for x in embedder.batches(m, items, batch_size):
            of_these = given[len(out) : len(out) + len(x["to_ego"])]
            out += [values.float().cpu() for values in tower.at(x, of_these, projected)]
    return out


def map_tower(embedder: Embedder, m: str) -> MapTower:
    """The tower of a modality, if it has a map to sample.

    Raises:
        ConfigError: it has none; or the model is in training, where an engine may hold its weights in pieces.
    """
    tower: Any = embedder.bundle.model.tower(m) if m in embedder.modalities else None
    if embedder.training_run or not isinstance(tower, MapTower):
        raise ConfigError(f"{m!r} has no bird's-eye-view map to sample; own/pillars and own/lift_splat have one")
    return tower


def _boxes(embedder: Embedder, m: str, frames: Sequence[RegionFrame]) -> tuple[Tensor, Ints]:
    chosen = [[(c, b) for cls, _, b in f.boxes if (c := _class(cls)) is not None] for f in frames]
    places = [[f.points[b] for _, b in boxes] for f, boxes in zip(frames, chosen, strict=True)]
    x = pooled(embedder, m, [f.lidar() for f in frames], places, projected=False)
    return x, np.array([c for boxes in chosen for c, _ in boxes], dtype=np.int64)


def _class(name: str) -> int | None:
    return next((i for i, begins in enumerate(CLASSES.values()) if name.startswith(begins)), None)


def _cells(f: RegionFrame, kept: npt.NDArray[np.bool_], rng: np.random.Generator) -> tuple[F64, Ints]:
    def cells(rows: npt.NDArray[Any]) -> set[tuple[int, int]]:
        return {(int(x), int(y)) for x, y in np.floor(f.points[rows, :2] / CELL)}

    near = np.abs(f.points[:, :2]).max(1) < 40
    full, seen = cells(~kept & f.solid & near), cells(kept)
    yes = sorted(full - seen)
    around = {(x + i, y + j) for x, y in cells(f.solid & near) for i in range(-2, 3) for j in range(-2, 3)}
    no = sorted(around - seen - cells(~kept))
    count = min(len(yes), len(no), 200)
    picked = [[side[i] for i in rng.choice(len(side), count, replace=False)] for side in (yes, no) if count]
    xy = (np.array([c for side in picked for c in side], dtype=float).reshape(-1, 2) + 0.5) * CELL
    return np.concatenate([xy, np.zeros((len(xy), 1))], axis=1), np.repeat([1, 0], count)


def _recalls(name: str, scores: Tensor, mask: Tensor | None) -> dict[str, float]:
    """The right answer of row i is column i; ties count against it; ``mask``: the candidates of each row."""
    scores = scores if mask is None else scores.masked_fill(~mask, -float("inf"))
    rank = (scores >= scores.diagonal()[:, None]).sum(1)
    return {f"{name}_R@{k}": float((rank <= k).float().mean()) for k in (1, 5)}


def _like(regions: Sequence[F64]) -> Tensor:
    size = torch.tensor([float(np.ptp(p[:, :2], axis=0).max()) for p in regions])
    ratio = size[:, None] / size[None]
    return (ratio <= LIKE) & (ratio >= 1 / LIKE)


def _chance(n: int, mask: Tensor | None) -> float:
    return 1 / max(n, 1) if mask is None else float((1 / mask.sum(1)).mean())


def _three(points: F64) -> list[float]:
    """Mean distance from the car, mean height, height extent: what a motion on the ground hardly changes."""
    return [
        float(np.linalg.norm(points[:, :2], axis=1).mean()), float(points[:, 2].mean()), float(np.ptp(points[:, 2]))
    ]  # fmt: skip


def _some(rows: Ints, rng: np.random.Generator) -> Ints:
    return rows if len(rows) <= SAMPLED else np.sort(rng.choice(rows, SAMPLED, replace=False))


def _modality(embedder: Embedder, kind: str) -> str | None:
    for m in embedder.modalities:
        if embedder.bundle.parts[m].kind == kind and isinstance(embedder.bundle.model.tower(m), MapTower):
            return m
    return None
