"""LiDAR and camera towers: scattering against naive loops, lift-splat against real points, batches, gradients."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "data"))
from _rigs import KITTI, NUSCENES, here, npy, rig_of, sweep_of

from benchmarks.bev_towers import naive_splat
from dualenc.config import Component
from dualenc.data.batch import map_tensors
from dualenc.data.driving.geometry import project, seen
from dualenc.data.driving.keyframes import Keyframe, kitti_object, nuscenes
from dualenc.data.modalities.camera import CameraConfig, CameraInput
from dualenc.data.modalities.lidar import LidarConfig, LidarInput
from dualenc.encoders import Tower, build_tower
from dualenc.encoders.own.bev import AttentionPool, BEVGrid
from dualenc.encoders.own.lidar_pillars import PillarScatter
from dualenc.encoders.own.lidar_range import range_image
from dualenc.encoders.own.lift_splat import depth_bins, frustum, splat
from dualenc.errors import ConfigError

pytestmark = here

BOX = (-40.0, -40.0, -5.0, 40.0, 40.0, 3.0)
LIDAR = LidarInput(LidarConfig(range=BOX, min_distance=2.0, max_points=4000))
CAMERA = CameraInput(CameraConfig(size=(64, 112)))
TOWERS: dict[str, tuple[str, dict[str, Any]]] = {
    "pillars": ("lidar", {"name": "own/pillars", "cell": 2.0, "pillar_width": 16, "widths": [16, 32]}),
    "range": ("lidar", {"name": "own/range_vit", "width": 32, "layers": 2, "heads": 2, "width_px": 128}),
    "cameras": ("camera", {"name": "own/cameras", "image": {"name": "own/convnet", "widths": [8, 16]}, "width": 32}),
    "lift_splat": (
        "camera",
        {"name": "own/lift_splat", "image": {"name": "own/convnet", "widths": [8, 16]}, "cell": 2.0, "channels": 16,
         "widths": [16, 32], "depth_bins": 20, "range": list(BOX)},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def keys() -> list[Keyframe]:
    few = nuscenes(NUSCENES)
    return [next(few), next(few), next(iter(kitti_object(KITTI)))]


@pytest.fixture(scope="module")
def rows(keys: list[Keyframe]) -> dict[str, list[dict[str, Tensor]]]:
    """Two keyframes of nuScenes and one of KITTI: six cameras, six and one."""
    return {
        "lidar": [LIDAR.eval(LIDAR.decode(sweep_of(k))) for k in keys],
        "camera": [CAMERA.eval(CAMERA.decode(rig_of(k))) for k in keys],
    }


def tower_of(name: str, **more: Any) -> Tower:
    kind, settings = TOWERS[name]
    torch.manual_seed(0)
    describe = (LIDAR if kind == "lidar" else CAMERA).describe()
    return build_tower(kind, Component.model_validate({**settings, **more}), describe, 24).eval()


def collate(name: str, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return (LIDAR if TOWERS[name][0] == "lidar" else CAMERA).collate(rows)


# --- scatter -----------------------------------------------------------------------------------------------------


def naive_pillars(scatter: PillarScatter, points: Tensor, count: Tensor) -> Tensor:
    """Point by point, pillar by pillar."""
    grid = scatter.grid
    out = torch.zeros(len(points), scatter.width, *grid.shape)
    reach = max(abs(grid.low[0]), abs(grid.low[1]), grid.low[0] + grid.shape[0] * grid.cell)
    for n in range(len(points)):
        pillars: dict[tuple[int, int], list[Tensor]] = {}
        for p in points[n, : count[n]]:
            x, y, z = (float(v) for v in p[:3])
            at = (int((x - grid.low[0]) // grid.cell), int((y - grid.low[1]) // grid.cell))
            inside = 0 <= at[0] < grid.shape[0] and 0 <= at[1] < grid.shape[1]
            if inside and scatter.low_z <= z < scatter.high_z:
                pillars.setdefault(at, []).append(p)
        for at, members in pillars.items():
            mean = torch.stack(members)[:, :3].mean(0)
            center = torch.tensor([grid.low[i] + (at[i] + 0.5) * grid.cell for i in (0, 1)])
            made = []
            for p in members:
                scaled = torch.cat([p[:2] / reach, p[2:3] / (scatter.high_z - scatter.low_z)])
                offsets = torch.cat([p[:3] - mean, p[:2] - center]) / grid.cell
                numbers = torch.cat([scaled, p[3:], offsets, p[:3].norm()[None] / reach])
                made.append(torch.relu(scatter.norm(scatter.linear(numbers))))
            out[n, :, at[0], at[1]] = torch.stack(made).amax(0)
    return out


def test_pillars_against_point_by_point(rows: dict[str, list[dict[str, Tensor]]]) -> None:
    torch.manual_seed(0)
    grid = BEVGrid.over((-20.0, -16.0, -5.0, 20.0, 16.0, 3.0), 2.0)
    assert grid.shape == (20, 16)
    scatter = PillarScatter(4, 8, grid, -5.0, 3.0)
    batch = LIDAR.collate([{**r, "points": r["points"][i :: 12 + i]} for i, r in enumerate(rows["lidar"])])
    weight = torch.randn(8, *grid.shape)
    got = []
    for run in (scatter, lambda p, c: naive_pillars(scatter, p, c)):
        out = run(batch["points"], batch["count"])
        got.append((out, *torch.autograd.grad((out * weight).sum(), list(scatter.parameters()))))
    assert (got[0][0] != 0).any()
    for a, b in zip(*got, strict=True):
        assert float((a - b).detach().abs().max()) <= 1e-5 * max(1.0, float(b.detach().abs().max()))


def test_splat_against_loops() -> None:
    g = torch.Generator().manual_seed(0)
    features, weights = torch.randn(9, 5, generator=g), torch.rand(9, 7, generator=g)
    cells = torch.randint(-1, 6, (9, 7), generator=g)
    grad = torch.randn(6, 5, generator=g)
    out, to_features, to_weights = torch.zeros(6, 5), torch.zeros(9, 5), torch.zeros(9, 7)
    for p in range(9):
        for d in range(7):
            c = int(cells[p, d])
            if c >= 0:
                out[c] += weights[p, d] * features[p]
                to_features[p] += weights[p, d] * grad[c]
                to_weights[p, d] = float(features[p] @ grad[c])
    for run in (splat, naive_splat):
        x, w = features.clone().requires_grad_(), weights.clone().requires_grad_()
        got = run(x, w, cells, 6)
        gx, gw = torch.autograd.grad((got * grad).sum(), [x, w])
        for a, b in ((got, out), (gx, to_features), (gw, to_weights)):
            assert float((a - b).detach().abs().max()) < 1e-5
    assert splat(features, weights, torch.full_like(cells, -1), 6).abs().max() == 0


def test_range_image_against_point_by_point(rows: dict[str, list[dict[str, Tensor]]]) -> None:
    batch = LIDAR.collate([{**r, "points": r["points"][::5]} for r in rows["lidar"][:2]])
    shape, up, around = (16, 64), (-25.0, 5.0), (-90.0, 90.0)
    got = range_image(batch["points"], batch["count"], batch["origin"], shape, up, around)
    expected = torch.zeros_like(got)
    nearest = torch.full((2, *shape), float("inf"))
    for n in range(2):
        for p in batch["points"][n, : batch["count"][n]]:
            ray = p[:3] - batch["origin"][n]
            far = float(ray.norm())
            r = int(np.floor((up[1] - np.degrees(np.arcsin(float(ray[2]) / far))) / (up[1] - up[0]) * shape[0]))
            c = int(np.floor((around[1] - np.degrees(np.arctan2(ray[1], ray[0]))) / 180 * shape[1]))
            if 0 <= r < shape[0] and 0 <= c < shape[1] and far < nearest[n, r, c]:
                nearest[n, r, c] = far
                expected[n, :, r, c] = torch.cat([ray, p[3:], torch.tensor([far, 1.0])])
    # A point on a pixel's border may fall to either side in fp32.
    wrong = ((got - expected).abs().amax(1) > 1e-5).float().mean()
    assert float(expected[:, -1].mean()) > 0.1
    assert float(wrong) < 0.002


# --- lift-splat --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 2], ids=["nuscenes", "kitti"])
def test_a_point_at_one_depth_lands_in_its_own_cell(which: int, keys: list[Keyframe]) -> None:
    """Real points, snapped to the nearest pixel and depth bin: all of a place's weight on that bin fills the point's
    own cell; the point itself is there or next door."""
    key = keys[which]
    camera = CameraInput(CameraConfig(size=(64, 192)))
    row = camera.eval(camera.decode(rig_of(key)))
    cloud = LIDAR.decode(sweep_of(key))
    points = cloud.points[:, :3].astype(np.float64)
    grid, depths = BEVGrid.over(BOX, 0.5), depth_bins(2.0, 42.0, 160)
    own = near = total = 0
    for n in range(len(key.views)):
        K, pose = (row[k][n].numpy().astype(np.float64) for k in ("intrinsics", "extrinsics"))
        uv, depth = project(points, np.linalg.inv(pose), K)
        ok = seen(uv + 0.5, depth, (192, 64)) & (depth > 2) & (depth < 42)
        ok &= ((points >= BOX[:3]) & (points < BOX[3:])).all(1)
        at = np.flatnonzero(ok)[:: 100 if which else 60]
        pixel, bin_ = np.rint(uv[at]).astype(int), ((depth[at] - 2) / 0.25).astype(int)
        # By hand, in fp64: back along the pixel's ray to the middle of the bin.
        snapped = (
            np.concatenate([pixel, np.ones((len(at), 1))], 1) @ np.linalg.inv(K).T * (2 + 0.25 * (bin_ + 0.5))[:, None]
        )
        snapped = snapped @ pose[:3, :3].T + pose[:3, 3]
        places = frustum((64, 192), (64, 192), row["intrinsics"][n : n + 1], row["extrinsics"][n : n + 1], depths)
        cells = grid.index(places[0, ..., :2]).view(-1, 160)
        chosen = torch.from_numpy(pixel[:, 1] * 192 + pixel[:, 0])
        weights = torch.zeros(len(at), 160)
        weights[torch.arange(len(at)), torch.from_numpy(bin_)] = 1
        # Every point has a channel of its own, so one splat shows where each of them went.
        maps = splat(torch.eye(len(at)), weights, cells[chosen], grid.cells).T
        for i, out in enumerate(maps):
            hit = int(out.argmax())
            assert float(out.sum()) == float(out[hit])
            borders = np.abs((snapped[i, :2] - grid.low) / grid.cell % 1 - 0.5).max() > 0.499
            expected = int(grid.index(torch.from_numpy(snapped[i, :2])))
            assert borders or (hit == expected if expected >= 0 else float(out.sum()) == 0)
            mine = int(grid.index(torch.from_numpy(points[at[i], :2])))
            apart = max(
                abs(hit // grid.shape[1] - mine // grid.shape[1]), abs(hit % grid.shape[1] - mine % grid.shape[1])
            )
            own, near, total = own + (apart == 0), near + (apart <= 1), total + 1
    assert total > 100
    assert near == total
    assert own > 0.6 * total


def test_moving_the_scene_moves_the_map(rows: dict[str, list[dict[str, Tensor]]]) -> None:
    """Extrinsics turned by a quarter: the splatted map turns by a quarter."""
    tower = tower_of("lift_splat")
    batch = CAMERA.collate(rows["camera"][:1])
    quarter = torch.tensor([[0.0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    with torch.no_grad():
        before = tower.splatted(batch)  # type: ignore[operator]
        after = tower.splatted({**batch, "extrinsics": quarter @ batch["extrinsics"]})  # type: ignore[operator]
    moved = torch.rot90(before, 1, (2, 3))
    # A place on a cell's border may fall to either side.
    off = ((after - moved).abs().amax(1) > 1e-4).float().mean()
    assert float(before.abs().amax(1).gt(0).float().mean()) > 0.05
    assert float(off) < 0.01


# --- towers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOWERS)
def test_a_row_alone_is_the_row_in_a_batch(name: str, rows: dict[str, list[dict[str, Tensor]]]) -> None:
    tower, mine = tower_of(name), rows[TOWERS[name][0]]
    with torch.no_grad():
        whole = tower.encode(collate(name, mine))
        for i in range(len(mine)):
            assert torch.allclose(tower.encode(collate(name, mine[i : i + 1]))[0], whole[i], atol=2e-5)
        again = build_tower(
            TOWERS[name][0], tower.component, (LIDAR if TOWERS[name][0] == "lidar" else CAMERA).describe(), 24
        )
        again.load_state_dict(tower.state_dict())
        assert torch.equal(again.eval().encode(collate(name, mine)), whole)
    assert whole.shape == (3, 24)
    assert float((whole[0] - whole[1]).abs().max()) > 1e-4


@pytest.mark.parametrize("name", TOWERS)
def test_every_weight_learns_and_the_dummy_is_finite(name: str, rows: dict[str, list[dict[str, Tensor]]]) -> None:
    tower = tower_of(name).train()
    batch = collate(name, rows[TOWERS[name][0]])
    (tower.encode(batch) * torch.randn(3, 24)).sum().backward()
    assert not [n for n, p in tower.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    source = LIDAR if TOWERS[name][0] == "lidar" else CAMERA
    assert torch.isfinite(tower.encode(source.collate([source.dummy()]))).all()


def test_order_of_points_and_missing_cameras(rows: dict[str, list[dict[str, Tensor]]]) -> None:
    row = rows["lidar"][0]
    mixed = {**row, "points": row["points"][torch.randperm(len(row["points"]))]}
    with torch.no_grad():
        tower = tower_of("pillars")
        assert torch.allclose(tower.encode(LIDAR.collate([row])), tower.encode(LIDAR.collate([mixed])), atol=1e-5)
        rig = CAMERA.collate(rows["camera"][:1])
        fewer = map_tensors(rig, lambda t: t)
        fewer["present"] = torch.tensor([[True, False, True, True, True, True]])
        scribbled = {**fewer, "image": fewer["image"].clone()}
        scribbled["image"][:, 1] = 255
        for name in ("cameras", "lift_splat"):
            tower = tower_of(name)
            assert torch.equal(tower.encode(fewer), tower.encode(scribbled))
            assert float((tower.encode(fewer) - tower.encode(rig)).abs().max()) > 1e-5
            turned = {**rig, "extrinsics": rig["extrinsics"].roll(1, 1)}
            assert float((tower.encode(turned) - tower.encode(rig)).abs().max()) > 1e-5, "the geometry is not used"
    pool = AttentionPool(8, 2)
    nothing = pool(torch.randn(2, 3, 8), torch.zeros(2, 3, dtype=torch.bool))
    assert torch.equal(nothing[0], nothing[1])


def test_bev_features_at_places(rows: dict[str, list[dict[str, Tensor]]]) -> None:
    """The seam for losses on regions: a map, its grid, and features read at the points' own places."""
    grid = BEVGrid.over(BOX, 2.0)
    maps = grid.centers().permute(2, 0, 1)[None]  # the map says where it is
    xy = LIDAR.collate(rows["lidar"][:1])["points"][:, :200, :2]
    inner = (xy.abs() < 38).all(-1)
    got = grid.sample(maps, xy)
    assert float((got - xy)[inner].abs().max()) < 1e-3
    coarse = torch.nn.functional.avg_pool2d(maps, 2)
    assert float((grid.sample(coarse, xy) - xy)[inner].abs().max()) < 1e-3


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ConfigError, match=r"own/vit does not take images of 64×112: set input.size: \[64, 64\]"):
        tower_of("cameras", image={"name": "own/vit", "width": 48, "layers": 1})
    with pytest.raises(ConfigError, match="no feature map; use own/convnet"):
        square = CameraInput(CameraConfig(size=(64, 64)))
        settings = {**TOWERS["lift_splat"][1], "image": {"name": "own/vit", "width": 48, "layers": 1}}
        build_tower("camera", Component.model_validate(settings), square.describe(), 24)
    with pytest.raises(ConfigError, match="head: none needs a last width of embed_dim"):
        tower_of("pillars", head="none")
    with pytest.raises(ConfigError, match="leave it out"):
        tower_of("cameras", image={"name": "own/convnet", "head": "none"})


def test_voxels_or_how_to_get_them(rows: dict[str, list[dict[str, Tensor]]]) -> None:
    TOWERS["voxels"] = ("lidar", {"name": "own/voxels", "cell": 2.0, "widths": [16, 32], "sparse_widths": [8, 16]})
    try:
        if importlib.util.find_spec("spconv") is None:
            with pytest.raises(ConfigError, match="pip install spconv"):
                tower_of("voxels")
            return
        tower = tower_of("voxels")
        with torch.no_grad():
            whole = tower.encode(LIDAR.collate(rows["lidar"]))
            alone = tower.encode(LIDAR.collate(rows["lidar"][1:2]))
        assert torch.allclose(whole[1], alone[0], atol=2e-5)
    finally:
        del TOWERS["voxels"]


def test_bare_clouds_are_taken(keys: list[Keyframe]) -> None:
    """What evaluations hand over: the bytes of a .npy, x forward."""
    points = keys[2].points()
    tower = tower_of("pillars")
    with torch.no_grad():
        one, other = (
            tower.encode(LIDAR.collate([LIDAR.eval(LIDAR.decode(x))])) for x in (npy(points), sweep_of(keys[2]))
        )
    assert torch.allclose(one, other, atol=1e-6)
