"""The Triton kernels: same numbers as the torch tiles, and machine code for GPUs that are not here."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _shared import PYTHONPATH

from dualenc.config import Component
from dualenc.errors import ConfigError
from dualenc.losses import build_loss

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(script: str, *arguments: str, **variables: str) -> str:
    environment = os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"} | variables
    done = subprocess.run(
        [sys.executable, str(HERE / script), *arguments], env=environment, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_triton
def test_in_the_interpreter_the_kernels_equal_the_torch_tiles() -> None:
    assert run("_triton_cases.py", "cpu", TRITON_INTERPRET="1").count("n=") == 5


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_the_gpu_the_kernels_equal_the_torch_tiles() -> None:
    assert run("_triton_cases.py", "cuda").count("n=") == 7


@needs_triton
@pytest.mark.slow
def test_the_kernels_compile_for_a100_and_h100() -> None:
    assert run("_triton_compile.py", "80", "90").count(" bytes") == 12


def test_triton_without_cuda_is_explained() -> None:
    loss = build_loss(Component(name="sigmoid", impl="triton"))
    with pytest.raises(ConfigError, match=r"loss\.impl is triton, but the features are on cpu .* write auto or tiled"):
        loss(torch.eye(2), torch.eye(2), torch.arange(2), torch.ones(1), None)
