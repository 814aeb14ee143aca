"""Object-like regions of a LiDAR sweep without labels: ground removed, the rest clustered, implausible sizes dropped.

As in CALICO (arXiv 2306.00349): the ground is a plane fitted in strips along x (after Zermas et al. 2017), clusters are
DBSCAN's on x and y. ``filters: simple`` keeps clusters 0.3 to 10 m across and outside a box around the car itself;
``calico`` keeps what its released code keeps (height, aspect, area), which is fewer.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from dualenc.config import Positive, Section
from dualenc.data.driving.geometry import F64, Bools
from dualenc.data.driving.places import POOR

_Metres = Annotated[float, Field(gt=0)]
STRIP = 10.0
"""Metres along x that one ground plane covers."""
_LOWEST, _SEED, _ABOVE, _FITS = 50, 0.5, 0.2, 5
_VOXEL = 0.1


class RegionsConfig(Section):
    """How regions are found."""

    eps: _Metres = Field(default=0.75, description="metres between neighbours")
    min_points: Positive = Field(default=5, description="points in a neighbourhood that starts a cluster")
    method: Literal["dbscan", "hdbscan"] = "dbscan"
    filters: Literal["simple", "calico"] = "simple"
    ego: _Metres = Field(default=2.0, description="metres around the car in which returns come from the car itself")
    reach: _Metres = Field(
        default=54.0, description="metres ahead, behind and to the sides in which regions are searched"
    )
    poor: Positive = Field(default=4096, description="places outside all regions that are kept")


def ground(points: F64, reach: float = 54.0) -> Bools:
    """[n]: which of ``points [n, 3]`` (ego: z up) are ground: at most 0.2 m above the plane fitted to their strip."""
    out = np.zeros(len(points), bool)
    strip = np.floor(np.clip(points[:, 0], -reach, reach) / STRIP).astype(np.int64)
    for s in np.unique(strip):
        at = np.flatnonzero(strip == s)
        z = points[at, 2]
        near = z < np.sort(z)[:_LOWEST].mean() + _SEED
        for _ in range(_FITS):
            if near.sum() < 3:
                break
            middle = points[at][near].mean(0)
            *_, axes = np.linalg.svd(points[at][near] - middle, full_matrices=False)
            normal = axes[-1] * np.sign(axes[-1, 2] or 1.0)
            height = (points[at] - middle) @ normal
            near = height < _ABOVE
        out[at] = near
    return out


def find_regions(points: F64, config: RegionsConfig | None = None) -> npt.NDArray[np.int64]:
    """[n]: the region of each of ``points [n, 3]`` in ego, numbered from 0 nearest first; ``POOR`` for none.

    Needs scikit-learn (pip install 'dualenc[tools]').
    """
    c = config or RegionsConfig()
    out = np.full(len(points), POOR, np.int64)
    near = np.abs(points[:, :2]).max(1) if len(points) else np.zeros(0)
    kept = np.flatnonzero((near > c.ego) & (near < c.reach))
    if not len(kept):
        return out
    kept = kept[~ground(points[kept], c.reach)]
    if len(kept) < c.min_points:
        return out
    # Dense sweeps are redundant: one point per 10 cm cell, weighted by its count, makes DBSCAN several times faster.
    cells = np.floor(points[kept] / _VOXEL).astype(np.int64)
    _, first, inverse, count = np.unique(cells, axis=0, return_index=True, return_inverse=True, return_counts=True)
    found = _clusters(points[kept[first], :2], count, c)[inverse.ravel()]
    good = [k for k in np.unique(found[found >= 0]) if _is_object(points[kept[found == k]], c)]
    good.sort(key=lambda k: float(np.linalg.norm(points[kept[found == k], :2].mean(0))))
    for number, k in enumerate(good):
        out[kept[found == k]] = number
    return out


def region_places(points: F64, config: RegionsConfig | None = None) -> npt.NDArray[np.float32]:
    """What ``regions.npy`` holds: float32 [m, 4], every place in a region and an even sample of the others."""
    c = config or RegionsConfig()
    region = find_regions(points, c)
    inside = np.abs(points[:, :2]).max(1) < c.reach if len(points) else np.zeros(0, bool)
    poor = np.flatnonzero((region == POOR) & inside)
    if len(poor) > c.poor:
        poor = poor[np.linspace(0, len(poor) - 1, c.poor).round().astype(np.int64)]
    kept = np.concatenate([np.flatnonzero(region >= 0), poor])
    return np.concatenate([points[kept, :3], region[kept, None]], axis=1).astype(np.float32)


def _clusters(xy: F64, weight: npt.NDArray[np.int64], c: RegionsConfig) -> npt.NDArray[np.int64]:
    if c.method == "hdbscan":
        from sklearn.cluster import HDBSCAN

        labels = HDBSCAN(min_cluster_size=2 * c.min_points, copy=True).fit_predict(xy)
    else:
        from sklearn.cluster import DBSCAN

        labels = DBSCAN(eps=c.eps, min_samples=c.min_points).fit_predict(xy, sample_weight=weight)
    return np.asarray(labels, np.int64)


def _is_object(p: F64, c: RegionsConfig) -> bool:
    extent = np.ptp(p[:, :2], axis=0)
    if c.filters == "simple":
        return bool(0.3 < extent.max() < 10.0)
    middle = p[:, :2] - p[:, :2].mean(0)
    *_, axes = np.linalg.svd(middle, full_matrices=False)
    long, short = sorted(np.ptp(middle @ axes.T, axis=0))[::-1]
    top = float(p[:, 2].max())
    # The released code measures heights from the sensor, 1.84 m above the road; ego's origin is on the road.
    return bool(0.25 <= top <= 4.84 and short >= 0.1 * long and 0.25 <= _hull_area(p[:, :2]) <= 20.0)


def _hull_area(xy: F64) -> float:
    """Square metres of the convex hull of ``xy [n, 2]``; 0 where all points are on a line."""
    from scipy.spatial import ConvexHull, QhullError

    try:
        return float(ConvexHull(xy).volume)  # in 2-D, scipy's volume is the area
    except QhullError:
        return 0.0
