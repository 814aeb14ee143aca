"""Sensor geometry: poses, pinhole cameras, and the effect of transforms on both.

Frames, in metres: *ego* has x forward, y left, z up; a *camera* x right, y down, z forward. A pose "a → b" is a matrix
[4, 4] that takes points of a to points of b. Pixels are counted as OpenCV does: the centre of the first is (0, 0), so
an image of width W reaches from −½ to W − ½.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from dualenc.errors import DataError

F64 = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

MIN_DEPTH = 0.5
"""Metres in front of the camera below which a point is not seen."""
_ORTHONORMAL = 1e-3
_SINGULAR = 1e-6


def inverse(matrix: F64) -> F64:
    """The inverse of a matrix: the pose b → a of a pose a → b."""
    return np.asarray(np.linalg.inv(matrix), dtype=np.float64)


def rotation_of(quaternion: Any) -> F64:
    """[3, 3] from a quaternion w, x, y, z of any length."""
    w, x, y, z = np.asarray(quaternion, dtype=np.float64) / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def pose(rotation: Any, translation: Any) -> F64:
    """[4, 4] from a rotation [3, 3] and a translation [3]."""
    out = np.eye(4)
    out[:3, :3], out[:3, 3] = rotation, translation
    return out


def moved(points: F64, by: F64) -> F64:
    """``points [n, 3]`` taken by the pose ``by [4, 4]``."""
    return np.asarray(points @ by[:3, :3].T + by[:3, 3])


def split_projection(projection: F64) -> tuple[F64, F64]:
    """``P [3, 4]`` = K [I | t] as the intrinsics K [3, 3] and the pose [4, 4] that carries the shift t.

    KITTI's P2 is relative to another camera than the one it projects into; with the shift in the pose, K alone
    describes the camera. A singular K is returned as is, without a shift: :func:`checked_intrinsics` rejects it.
    """
    K = projection[:, :3]
    regular = abs(np.linalg.det(K)) > _SINGULAR
    return K, pose(np.eye(3), np.linalg.solve(K, projection[:, 3]) if regular else np.zeros(3))


def project(points: F64, to_camera: F64, intrinsics: F64) -> tuple[F64, F64]:
    """Pixels [n, 2] and depths [n] of ``points [n, 3]``; pixels mean nothing where the depth is not positive."""
    uvw = moved(points, to_camera) @ intrinsics.T
    depth = uvw[:, 2]
    return uvw[:, :2] / np.where(np.abs(depth) < _SINGULAR, _SINGULAR, depth)[:, None], depth


def seen(uv: F64, depth: F64, size: tuple[int, int]) -> Bools:
    """[n]: which pixels [n, 2] are in an image of (width, height) and at least ``MIN_DEPTH`` ahead."""
    return np.asarray((depth > MIN_DEPTH) & (uv >= 0).all(1) & (uv < np.array(size)).all(1))


# --- what transforms do ------------------------------------------------------------------------------------------


def cut_and_resized(intrinsics: F64, box: tuple[float, float, float, float], size: tuple[int, int]) -> F64:
    """K of the image cropped to ``box`` (left, top, right, bottom: edges, as PIL counts them) and resized to ``size``
    (width, height)."""
    sx, sy = size[0] / (box[2] - box[0]), size[1] / (box[3] - box[1])
    # A pixel's centre is half a pixel right of its edge, before and after.
    tx, ty = (0.5 - box[0]) * sx - 0.5, (0.5 - box[1]) * sy - 0.5
    return np.asarray(np.array([[sx, 0, tx], [0, sy, ty], [0, 0, 1]]) @ intrinsics)


def mirrored(intrinsics: F64, width: int) -> F64:
    """K of the image flipped left to right: its focal length becomes negative, no pose changes."""
    return np.asarray(np.array([[-1.0, 0, width - 1.0], [0, 1, 0], [0, 0, 1]]) @ intrinsics)


def ground_motion(
    rng: np.random.Generator, rotate_deg: float, scale: tuple[float, float], flip_x: bool, flip_y: bool
) -> F64:
    """A random linear map [4, 4] of the scene: rotated about z by up to ± ``rotate_deg``, scaled, mirrored."""
    turn = np.deg2rad(rng.uniform(-rotate_deg, rotate_deg))
    c, s = np.cos(turn), np.sin(turn)
    signs = [-1.0 if allowed and rng.random() < 0.5 else 1.0 for allowed in (flip_x, flip_y)]
    turned = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]]) @ np.diag([*signs, 1.0])
    return pose(turned * rng.uniform(*scale), np.zeros(3))


# --- checks ------------------------------------------------------------------------------------------------------


def checked_intrinsics(value: Any, what: str) -> F64:
    """``value`` as a pinhole camera's matrix [3, 3].

    Raises:
        DataError: of another shape, not finite, or singular.
    """
    K = _numbers(value, (3, 3), f"{what}: intrinsics")
    if not np.allclose(K[2], [0, 0, 1], atol=1e-6):
        raise DataError(f"{what}: the intrinsics' last row must be 0 0 1, got {K[2].tolist()}")
    if abs(np.linalg.det(K)) < _SINGULAR or min(abs(K[0, 0]), abs(K[1, 1])) < _SINGULAR:
        raise DataError(f"{what}: singular intrinsics (focal lengths {K[0, 0]:g} and {K[1, 1]:g}): pixels have no ray")
    return K


def checked_pose(value: Any, what: str) -> F64:
    """``value`` as a rigid pose [4, 4].

    Raises:
        DataError: of another shape, not finite, or not a rotation and a translation.
    """
    out = _numbers(value, (4, 4), f"{what}: pose")
    R = out[:3, :3]
    if not np.allclose(R @ R.T, np.eye(3), atol=_ORTHONORMAL) or not np.allclose(out[3], [0, 0, 0, 1]):
        raise DataError(f"{what}: the pose must be a rotation and a translation")
    return out


def _numbers(value: Any, shape: tuple[int, ...], what: str) -> F64:
    try:
        out = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as e:
        raise DataError(f"{what} must be {' × '.join(map(str, shape))} numbers") from e
    if out.shape != shape:
        raise DataError(f"{what} must be {' × '.join(map(str, shape))} numbers, got {list(out.shape)}")
    if not np.isfinite(out).all():
        raise DataError(f"{what} has numbers that are not finite")
    return out
