"""The Triton kernels against the torch tiles: value, gradients and metrics. Run in a process of its own.

    TRITON_INTERPRET=1 python tests/losses/_triton_cases.py cpu     # Triton's interpreter
    python tests/losses/_triton_cases.py cuda

prints the largest difference of each case.
"""

from __future__ import annotations

import sys

import torch

from dualenc.losses.blockwise import tiled
from dualenc.losses.blockwise import triton_kernels as triton_tiled
from dualenc.losses.blockwise.sweeps import How
from dualenc.losses.info_nce import info_nce
from dualenc.losses.sigmoid import sigmoid_loss

torch.set_num_threads(1)


def case(
    kind: str, n: int, dim: int, smoothing: float, scale: float, device: str, blocks: object
) -> list[torch.Tensor]:
    """Loss, metrics and gradients; several tiles, several positives, absent rows."""
    g = torch.Generator().manual_seed(n)
    a, b = (torch.nn.functional.normalize(torch.randn(n, dim, generator=g), dim=-1).to(device) for _ in "ab")
    ids = torch.randint(-1, max(n * 3 // 4, 1), (n,), generator=g).to(device)
    s, t = torch.tensor([scale], device=device), torch.tensor([-scale / 2], device=device)
    inputs = [x.requires_grad_() for x in (a, b, s, t)]
    how = How(0.01, False, blocks)  # type: ignore[arg-type]
    out = info_nce(a, b, ids, s, smoothing, how) if kind == "info_nce" else sigmoid_loss(a, b, ids, s, t, how)
    wanted = inputs[:3] if kind == "info_nce" else inputs
    return [out.value.detach(), *out.metrics.values(), *torch.autograd.grad(3 * out.value, wanted)]


def main(device: str) -> int:
    worst = 0.0
    for kind, n, dim, smoothing, scale in (
        ("info_nce", 1, 16, 0.0, 10.0),
        ("info_nce", 70, 40, 0.0, 10.0),
        ("info_nce", 131, 150, 0.1, 100.0),
        ("sigmoid", 70, 40, 0.0, 10.0),
        ("sigmoid", 131, 150, 0.0, 100.0),
        *([("info_nce", 3000, 512, 0.1, 30.0), ("sigmoid", 3000, 512, 0.0, 30.0)] if device == "cuda" else []),
    ):
        got, want = (case(kind, n, dim, smoothing, scale, device, m) for m in (triton_tiled, tiled))
        off = max(float((x - y).abs().max() / y.abs().max().clamp(min=1)) for x, y in zip(got, want, strict=True))
        print(f"{kind} n={n} D={dim} smoothing={smoothing} scale={scale}: {off:.1e}")
        worst = max(worst, off) if off == off else float("inf")
    return 0 if worst <= 1e-5 else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
