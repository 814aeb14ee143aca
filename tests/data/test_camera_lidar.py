"""Camera and LiDAR: projections equal the golden pairs, through every transform; broken inputs are named."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _rigs import FOLDER, KITTI, NUSCENES, golden, here, keyframes, npy, rig_of, sweep_of
from conftest import write_tar
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dualenc.config import Data, Modality
from dualenc.data.driving.geometry import F64, moved, project, seen
from dualenc.data.driving.keyframes import Keyframe, kitti_object, kitti_raw, nuscenes
from dualenc.data.loader import Loader
from dualenc.data.modalities import DecodeError, build_inputs
from dualenc.data.modalities.camera import CameraConfig, CameraInput, Shot
from dualenc.data.modalities.lidar import Cloud, LidarConfig, LidarInput, transformed
from dualenc.data.shards.reader import iter_samples
from dualenc.data.show import preview
from dualenc.errors import ConfigError, DataError

pytestmark = here

MOTION: dict[str, Any] = {"rotate_deg": 180, "scale": (0.8, 1.25), "flip_x": True, "flip_y": True}


def test_every_golden_pair_before_and_after_the_cloud_is_moved() -> None:
    """Counts and means are the golden ones; what float32 and the motions do to a point is less than 0.01 px."""
    rows = golden()
    lidar = LidarInput(LidarConfig(features=[], augment={**MOTION}))  # type: ignore[arg-type]
    done = 0
    for n, key in enumerate(keyframes()):
        raw = key.points()[:, :3]
        cloud = lidar.decode(sweep_of(key))
        moved = transformed(cloud, lidar.config.augment.draw(np.random.default_rng(n)))
        assert np.abs(moved.to_ego - np.eye(4)).max() > 1e-3
        for shot, view in zip(CameraInput(CameraConfig()).decode(rig_of(key)), key.views, strict=True):
            row = rows[str(view.path.relative_to(FOLDER))]
            assert shot.picture is not None
            from_ego, size = np.linalg.inv(shot.to_ego), shot.picture.size
            uv, depth = project(raw, from_ego @ key.lidar_to_ego, shot.intrinsics)
            ok = seen(uv, depth, size)
            assert int(ok.sum()) == row["n_in_image"]
            assert np.abs(uv[ok].mean(0) - [row["mean_u"], row["mean_v"]]).max() < 0.01
            # P's last row may move the origin of depths (KITTI); the golden ones are without it.
            assert abs(depth[ok].mean() - row["P"][2][3] - row["mean_depth_in_image"]) < 1e-3
            for c in (cloud, moved):
                got, far = project(c.points[:, :3].astype(np.float64), from_ego @ c.to_ego, shot.intrinsics)
                assert abs(int(seen(got, far, size).sum()) - row["n_in_image"]) <= 2
                assert np.abs(got[ok] - uv[ok]).max() < 0.01
            done += 1
    assert done == len(rows) == 131


# --- transforms --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def frames() -> list[Keyframe]:
    return [next(iter(kitti_object(KITTI))), next(iter(nuscenes(NUSCENES)))]


def marked(uv: F64, size: tuple[int, int], radius: float, kind: str) -> bytes:
    """A dark picture with a soft bright spot at each of ``uv``."""
    grid = np.stack(np.meshgrid(np.arange(size[0]), np.arange(size[1])), -1).astype(np.float32)
    picture = np.zeros((size[1], size[0]), np.float32)
    for spot in uv:
        picture += 255 * np.exp(-np.square(grid - spot.astype(np.float32)).sum(-1) / (2 * radius**2))
    out = io.BytesIO()
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).convert("RGB").save(out, kind, quality=97)
    return out.getvalue()


def apart(uv: F64, least: float, most: int) -> list[int]:
    """Some of ``uv`` that are at least so many pixels apart."""
    kept: list[int] = []
    for i in np.random.default_rng(0).permutation(len(uv)):
        if all(np.abs(uv[i] - uv[j]).max() > least for j in kept):
            kept.append(int(i))
        if len(kept) == most:
            break
    return kept


@pytest.fixture(scope="module", params=[0, 1], ids=["kitti-png", "nuscenes-jpeg"])
def spotted(request: Any, frames: list[Keyframe]) -> tuple[Cloud, list[Shot], CameraInput, int]:
    """A real sweep and calibration; the pictures show nothing but where a dozen of its points are."""
    key = frames[request.param]
    cloud = LidarInput(LidarConfig(features=[])).decode(sweep_of(key))
    points = cloud.points[:, :3].astype(np.float64)
    view = key.views[0]
    with Image.open(view.path) as image:
        size = image.size
    uv, depth = project(points, np.linalg.inv(view.to_ego), view.intrinsics)
    inside = np.flatnonzero(seen(uv, depth, size) & (np.abs(uv / size - 0.5) < 0.45).all(1))
    chosen = inside[apart(uv[inside], size[0] / 12, 12)]
    kind = "PNG" if request.param == 0 else "JPEG"
    one = Keyframe(key.id, key.drive, key.sweep, key.columns, key.top, key.lidar_to_ego, (view,))
    rig = rig_of(one, {view.name: marked(uv[chosen], size, size[0] / 300, kind)})
    colour = {"brightness": 0.0}
    config = CameraConfig.model_validate(
        {"size": (160, 480) if request.param == 0 else (256, 448),
         "augment": {"zoom": (1, 1.6), "flip": True, "colour": colour, "scene": MOTION}}
    )  # fmt: skip
    camera = CameraInput(config)
    return Cloud(cloud.points[chosen], cloud.origin, cloud.to_ego), camera.decode(rig), camera, 0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_points_stay_on_their_pixels_whatever_is_done_to_either(seed: int, spotted: Any) -> None:
    """Less than half a pixel between where a moved point projects to and where its spot is in the changed picture."""
    cloud, shots, camera, _ = spotted
    rng = np.random.default_rng(seed)
    row = camera.train(shots, rng)
    moved = transformed(cloud, LidarConfig(augment={**MOTION}).augment.draw(rng))  # type: ignore[arg-type]
    to_model = np.linalg.inv(row["to_ego"].numpy().astype(np.float64)) @ moved.to_ego
    to_camera = np.linalg.inv(row["extrinsics"][0].numpy().astype(np.float64)) @ to_model
    uv, _ = project(moved.points[:, :3].astype(np.float64), to_camera, row["intrinsics"][0].numpy().astype(np.float64))
    grey = row["image"][0].float().mean(0).numpy()
    checked = 0
    for u, v in uv:
        x, y = round(u), round(v)
        if not (8 <= x < grey.shape[1] - 8 and 8 <= y < grey.shape[0] - 8):
            continue
        window = np.maximum(grey[y - 7 : y + 8, x - 7 : x + 8] - 8, 0)
        assert window.sum() > 100, "there is no spot where the point should be"
        found = [(window.sum(axis) * np.arange(-7, 8)).sum() / window.sum() for axis in (0, 1)]
        assert abs(x + found[0] - u) < 0.5
        assert abs(y + found[1] - v) < 0.5
        checked += 1
    assert checked >= 1


def test_evaluation_is_always_the_same_and_transforms_depend_on_the_generator(frames: list[Keyframe]) -> None:
    lidar = LidarInput(LidarConfig(max_points=5000, augment={**MOTION, "drop": 0.5}))  # type: ignore[arg-type]
    cloud = lidar.decode(sweep_of(frames[1]))
    assert lidar.eval(cloud)["points"].equal(lidar.eval(cloud)["points"])
    assert len(lidar.eval(cloud)["points"]) == 5000
    a, b = (lidar.train(cloud, np.random.default_rng(3)) for _ in range(2))
    assert a["points"].equal(b["points"])
    assert not a["to_ego"].equal(lidar.train(cloud, np.random.default_rng(4))["to_ego"])
    assert len(a["points"]) <= 5000


def test_the_sensors_place_and_its_own_frame(frames: list[Keyframe]) -> None:
    key = frames[1]
    cloud = LidarInput(LidarConfig()).decode(sweep_of(key))
    np.testing.assert_allclose(cloud.origin, key.lidar_to_ego[:3, 3])
    own = LidarInput(LidarConfig(frame="sensor", features=["intensity", "ring"])).decode(sweep_of(key))
    np.testing.assert_allclose(own.points[:, :3], key.points()[:, :3], atol=1e-5)
    assert own.points[:, 4].max() == 31
    far = LidarInput(LidarConfig(min_distance=2.0)).decode(sweep_of(key))
    assert 0.3 < 1 - len(far.points) / len(cloud.points) < 0.4, "a third of this sweep is the car itself"


def test_a_centred_cloud_knows_where_it_was(frames: list[Keyframe]) -> None:
    at = LidarInput(LidarConfig()).decode(sweep_of(frames[0]))
    x = LidarInput(LidarConfig(center=True)).decode(sweep_of(frames[0]))
    np.testing.assert_allclose(x.points[:, :3].mean(0, dtype=np.float64), 0, atol=1e-4)
    np.testing.assert_allclose(moved(x.points[:, :3].astype(np.float64), x.to_ego), at.points[:, :3], atol=1e-4)
    np.testing.assert_allclose(moved(x.origin[None], x.to_ego)[0], at.origin, atol=1e-9)


# --- broken ------------------------------------------------------------------------------------------------------


def broken(key: Keyframe) -> dict[str, tuple[dict[str, Any], str]]:
    """What is wrong → (members of the sample, a part of the sentence)."""
    rig, sweep = rig_of(key), sweep_of(key)
    cameras, lidar = rig.pop("json:cameras"), sweep.pop("json:lidar")

    def sample(change: dict[str, Any] | None = None, lose: str = "", **members: Any) -> dict[str, Any]:
        first = {**cameras["views"][0], **(change or {})}
        doc = {"lidar": lidar, "cameras": {"drive": key.drive, "views": [first, *cameras["views"][1:]]}}
        out = {**rig, **sweep, **members, "json": json.dumps(doc).encode()}
        return {k: v for k, v in out.items() if k != lose}

    holes = key.points()[:500].copy()
    holes[7, 1] = np.nan
    name = key.views[0].name
    other = cameras["views"][0]["intrinsics"]
    flat = [[0.0, *other[0][1:]], *other[1:]]
    tilted = (np.array(cameras["views"][0]["to_ego"]) * 1.5).tolist()
    return {
        "whole": (sample(), ""),
        "empty": (sample(**{"lidar.npy": npy(np.zeros((0, len(key.columns))))}), "the cloud is empty"),
        "nan": (sample(**{"lidar.npy": npy(holes)}), "1 of 500 points are not finite"),
        "cut": (sample(**{"lidar.npy": sweep["lidar.npy"][:3000]}), "not a .npy array"),
        "missing": (sample(lose=cameras["views"][0]["member"]), f"camera {name} has no image cam_"),
        "singular": (sample({"intrinsics": flat}), f"camera {name}: singular intrinsics (focal lengths 0 and"),
        "drive": (
            sample({"drive": "scene-0001"}),
            "its calibration is of drive 'scene-0001', but the sample is of 'scene-0523'",
        ),
        "size": (sample({"size": [1224, 370]}), "1600×900 pixels, but its calibration is for 1224×370"),
        "pose": (sample({"to_ego": tilted}), "the pose must be a rotation and a translation"),
    }


def test_broken_samples_are_named_and_counted(frames: list[Keyframe], tmp_path: Path) -> None:
    cases = broken(frames[1])
    members = [(f"{k}.{e}", raw) for k, (sample, _) in cases.items() for e, raw in sample.items()]
    shard = write_tar(tmp_path / "s-000.tar", members)
    config = {"camera": {"input": {"size": [64, 112]}}, "lidar": {}}
    inputs = build_inputs({n: Modality.model_validate({"encoder": {"name": "x"}, **c}) for n, c in config.items()})
    data = Data.model_validate({"sources": [{"name": "s", "shards": str(shard)}], "workers": 0})
    loader = Loader(data, inputs, [("camera", "lidar")], 0, len(cases))
    batch = next(iter(loader))
    loader.close()
    reasons = {b.key: b.reason for b in batch.bad}
    assert reasons.keys() == cases.keys() - {"whole"}
    for k, reason in reasons.items():
        assert cases[k][1] in reason, k
        assert "\n" not in reason
    assert (batch.ids >= 0).sum() == 1
    assert batch.inputs["camera"]["image"].shape == (1, 6, 3, 64, 112)
    assert {b.member for b in batch.bad if b.key == "nan"} == {"nan.json:lidar+lidar.npy"}


def test_points_and_cameras_that_may_be_missing(frames: list[Keyframe]) -> None:
    points = frames[1].points()[:500, :4].copy()
    points[7, 1] = np.inf
    assert len(LidarInput(LidarConfig(not_finite="drop")).decode(npy(points)).points) == 499
    rig = rig_of(frames[1])
    del rig[rig["json:cameras"]["views"][2]["member"]]
    camera = CameraInput(CameraConfig(missing="mask", size=(32, 56)))
    row = camera.eval(camera.decode(rig))
    assert row["present"].tolist() == [True, True, False, True, True, True]
    assert row["image"][2].max() == 0
    only = {k: v for k, v in rig.items() if k == "json:cameras"}
    with pytest.raises(DecodeError, match=r"the sample has none of the cameras CAM_BACK, "):
        camera.decode(only)
    bare = frames[0].views[0].path.read_bytes()
    with pytest.raises(DecodeError, match=r"input\.calibration: optional"):
        camera.decode(bare)
    taken = CameraInput(CameraConfig(calibration="optional", size=(32, 112)))
    both = taken.collate([taken.eval(taken.decode(bare)), taken.eval(taken.decode(rig_of(frames[1])))])
    assert both["present"].sum(1).tolist() == [1, 6]
    assert both["known"].sum(1).tolist() == [0, 6]
    with pytest.raises(DecodeError, match="no column 'time', only x, y, z, intensity, ring"):
        LidarInput(LidarConfig(features=["time"])).decode(sweep_of(frames[1]))


def test_a_report_can_show_both(frames: list[Keyframe]) -> None:
    assert preview(npy(frames[0].points()), "lidar")["picture"].startswith("data:image/png")
    assert preview(rig_of(frames[1]), "camera")["picture"].startswith("data:image/webp")  # type: ignore[arg-type]


# --- joined members ----------------------------------------------------------------------------------------------


def test_joined_members_are_read_together(tmp_path: Path) -> None:
    shard = write_tar(
        tmp_path / "s-000.tar",
        [("a.json", b'{"k": 1}'), ("a.cam_x.jpg", b"x"), ("a.cam_y.png", b"y"), ("a.cam_z.pkl", b"z"),
         ("a.t.npy", b"n"), ("b.json", b'{"k": 2}'), ("c.t.npy", b"n")],
    )  # fmt: skip
    wanted = {"rig": ["json:k+cam*"], "both": ["json:k+t.npy", "t.npy"], "all": ["cam*"]}
    got = {k: f.values for k, f in iter_samples(str(shard), wanted) if not isinstance(f, Exception)}
    a, b, c = (got[k] for k in sorted(got))
    assert a["rig"] == {"json:k": 1, "cam_x.jpg": b"x", "cam_y.png": b"y"}
    assert a["both"] == {"json:k": 1, "t.npy": b"n"}
    assert a["all"] == {"cam_x.jpg": b"x", "cam_y.png": b"y"}
    assert b == {"rig": {"json:k": 2}, "all": {}}
    assert c == {"both": b"n", "all": {}}
    data = Data.model_validate(
        {"sources": [{"name": "s", "shards": str(shard), "members": {"camera": ["json:k+a.pkl"], "lidar": ["npy"]}}]}
    )
    inputs = build_inputs({m: Modality.model_validate({"encoder": {"name": "x"}}) for m in ("camera", "lidar")})
    with pytest.raises(ConfigError, match="pickled"):
        Loader(data, inputs, [("camera", "lidar")], 0, 1)


# --- KITTI raw ---------------------------------------------------------------------------------------------------


def test_kitti_raw_is_the_same_geometry_in_another_layout(tmp_path: Path) -> None:
    """A frame of the object set, laid out as the raw data are: the same projection."""
    given = dict(
        line.split(":", 1) for line in (KITTI / "calib" / "000000.txt").read_text().splitlines() if ":" in line
    )
    day = tmp_path / "2011_09_26"
    drive = day / "2011_09_26_drive_0001_sync"
    for part, source, name in (("image_02", "image_2/000000.png", "0000000000.png"),
                               ("velodyne_points", "velodyne/000000.bin", "0000000000.bin")):  # fmt: skip
        (drive / part / "data").mkdir(parents=True)
        (drive / part / "data" / name).symlink_to(KITTI / source)
    tr = np.array([float(v) for v in given["Tr_velo_to_cam"].split()]).reshape(3, 4)
    velo = [
        f"R: {' '.join(map(repr, map(float, tr[:, :3].ravel())))}",
        f"T: {' '.join(map(repr, map(float, tr[:, 3])))}",
    ]
    (day / "calib_velo_to_cam.txt").write_text("\n".join(["calib_time: 15-Mar-2012", *velo]))
    cams = [f"R_rect_00: {given['R0_rect']}", f"P_rect_02: {given['P2']}", "S_rect_02: 1.224e+03 3.7e+02"]
    (day / "calib_cam_to_cam.txt").write_text("\n".join(cams))
    raw, first = next(iter(kitti_raw(drive, ("02",)))), next(iter(kitti_object(KITTI)))
    np.testing.assert_allclose(raw.views[0].to_ego, first.views[0].to_ego, atol=1e-9)
    np.testing.assert_allclose(raw.views[0].intrinsics, first.views[0].intrinsics)
    assert raw.views[0].size == (1224, 370)
    assert raw.points().shape == first.points().shape
    (day / "calib_velo_to_cam.txt").write_text("R: 1 2 3")
    with pytest.raises(DataError, match="must give R with 9 numbers"):
        next(iter(kitti_raw(drive, ("02",))))
