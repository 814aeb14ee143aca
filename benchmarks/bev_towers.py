"""Lift-splat and pillars against their textbook versions, in one run: same numbers, seconds and peak memory.

``python -m benchmarks.bev_towers SHARD``: SHARD holds keyframes (``dualenc shards build nuscenes …``). The textbook
lift-splat builds the whole frustum of features and keeps it for the backward; the textbook pillars are padded to the
fullest pillar. Memory is the peak of torch in forward and backward, above what it held before.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dualenc.data.modalities.camera import CameraConfig, CameraInput
from dualenc.data.modalities.lidar import LidarConfig, LidarInput
from dualenc.data.shards.reader import iter_samples
from dualenc.encoders.own.bev import BEVGrid, scatter_max
from dualenc.encoders.own.lift_splat import depth_bins, frustum, splat
from dualenc.errors import ConfigError, DataError, DualencError

ROUNDS = 3
BOX = (-50.0, -50.0, -5.0, 50.0, 50.0, 3.0)
CHANNELS, BINS, STRIDE = 64, 56, 8


def naive_splat(features: Tensor, weights: Tensor, cells: Tensor, size: int) -> Tensor:
    """The same as :func:`splat`, by the outer product of features and weights."""
    lifted = features[:, None, :] * weights[:, :, None]
    inside = cells.flatten() >= 0
    kept = lifted.flatten(0, 1)[inside]
    return kept.new_zeros(size, features.shape[1]).index_add(0, cells.flatten()[inside], kept)


def naive_pillars(features: Tensor, pillar: Tensor, size: int) -> Tensor:
    """The largest of each pillar's features by a table [pillars, fullest, C]."""
    used, inverse, counts = torch.unique(pillar, return_inverse=True, return_counts=True)
    order = inverse.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    place = torch.arange(len(order), device=order.device) - starts[inverse[order]]
    table = features.new_full((len(used), int(counts.max()), features.shape[1]), -torch.inf)
    table = table.index_put((inverse[order], place), features[order])
    return features.new_zeros(size, features.shape[1]).index_copy(0, used, table.amax(1))


def sparse_pillars(features: Tensor, pillar: Tensor, size: int) -> Tensor:
    """As own/pillars does it."""
    used, inverse = torch.unique(pillar, return_inverse=True)
    top = scatter_max(features, inverse, len(used))
    return features.new_zeros(size, features.shape[1]).index_copy(0, used, top)


def compare(shard: str, device: str) -> None:
    """Print seconds, memory and the largest difference of values and gradients of both pairs."""
    cameras = CameraInput(CameraConfig())
    # Returns from the car itself fill one pillar with thousands of points, which the padded table would pay for.
    lidar = LidarInput(LidarConfig(range=BOX, min_distance=2.0))
    wanted = {"camera": cameras.default_members[:1], "lidar": lidar.default_members[:1]}
    found = next((f for _, f in iter_samples(shard, wanted) if not isinstance(f, Exception)), None)
    if found is None or found.values.keys() != wanted.keys():
        raise DataError(f"{shard} holds no keyframe: build one with dualenc shards build nuscenes or kitti")
    rig = cameras.collate([cameras.eval(cameras.decode(found.values["camera"]))])
    sweep = lidar.collate([lidar.eval(lidar.decode(found.values["lidar"]))])
    torch.manual_seed(0)
    grid = BEVGrid.over(BOX, 0.5)
    height, width = cameras.config.size
    shape = (height // STRIDE, width // STRIDE)
    depths = depth_bins(2.0, 58.0, BINS)
    at = frustum(shape, (height, width), rig["intrinsics"], rig["extrinsics"], depths)
    cells = torch.where((at[..., 2] >= BOX[2]) & (at[..., 2] < BOX[5]), grid.index(at[..., :2]), -1).view(-1, BINS)
    features = torch.randn(len(cells), CHANNELS)
    weights = torch.randn(len(cells), BINS).softmax(1)
    pillar = grid.index(sweep["points"][0, :, :2])
    values = torch.randn(int((pillar >= 0).sum()), CHANNELS)
    to = torch.device(device)
    many = f"{rig['image'].shape[1]} images of {height}×{width}, {len(cells):,} places × {BINS} depths × {CHANNELS}"
    _report(f"lift-splat: {many}", naive_splat, splat, [features, weights], [cells], grid.cells, to)
    pillars = pillar[pillar >= 0]
    many = f"{len(values):,} points × {CHANNELS} in {len(torch.unique(pillars)):,} pillars"
    _report(f"pillars: {many}", naive_pillars, sparse_pillars, [values], [pillars], grid.cells, to)


def _report(
    title: str, naive: Callable[..., Tensor], own: Callable[..., Tensor], inputs: list[Tensor], more: list[Tensor],
    size: int, device: torch.device,
) -> None:  # fmt: skip
    print(title)
    results = {}
    for name, run in (("textbook", naive), ("dualenc", own)):
        leaves = [x.to(device).requires_grad_() for x in inputs]
        fixed = [x.to(device) for x in more]
        best, peak, out = float("inf"), 0, None
        for _ in range(ROUNDS):
            start = _now(device)
            out = _once(run, leaves, fixed, size)
            best = min(best, _now(device) - start)
        peak = _peak(lambda run=run, leaves=leaves, fixed=fixed: _once(run, leaves, fixed, size), device)  # type: ignore[misc]
        results[name] = (best, peak, out)
    slow, large, reference = results["textbook"]
    for name, (seconds, peak, out) in results.items():
        far = max(float((a - b).abs().max()) for a, b in zip(out or [], reference or [], strict=True))
        print(
            f"  {name:>9} {1000 * seconds:9.1f} ms ({slow / seconds:.2f} ×) {peak / 2**20:8.1f} MiB "
            f"({large / max(peak, 1):.1f} × less)  difference {far:.1g}"
        )


def _once(run: Callable[..., Tensor], leaves: list[Tensor], fixed: list[Tensor], size: int) -> list[Tensor]:
    y = run(*leaves, *fixed, size)
    return [y.detach(), *torch.autograd.grad((y * torch.linspace(-1, 1, y.shape[1], device=y.device)).sum(), leaves)]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def _peak(run: Callable[[], Any], device: torch.device) -> int:
    """Peak bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    held = most = 0
    for event in seen.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def main(arguments: list[str]) -> None:
    """Run the comparison on a shard; a second argument names the device."""
    if len(arguments) not in (1, 2):
        raise ConfigError("usage: python -m benchmarks.bev_towers SHARD.tar [cuda]")
    torch.set_num_threads(1)
    compare(arguments[0], arguments[1] if len(arguments) == 2 else "cpu")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DualencError as e:
        sys.exit(str(e))
