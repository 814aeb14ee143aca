"""Which CUDA device a rank takes, by what the launcher shows it."""

from __future__ import annotations

import pytest
import torch

from dualenc.distributed.devices import NAMES, check_device, check_precision, device_of_rank, resolve_device
from dualenc.distributed.world import _bound_by_slurm
from dualenc.errors import ConfigError

STEP = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "3"}


@pytest.mark.parametrize(
    ("env", "bound"),
    [
        ({}, False),
        (STEP, False),  # srun without a binding: every task sees all devices
        ({**STEP, "SLURM_GPUS_PER_TASK": "1"}, True),
        ({**STEP, "SLURM_TRES_PER_TASK": "gres/gpu:1"}, True),
        ({**STEP, "SLURM_GPUS_PER_TASK": "4", "TORCHELASTIC_RUN_ID": "x"}, False),  # torchrun inside that task
        ({"SLURM_GPUS_PER_TASK": "1"}, False),
    ],
)
def test_srun_may_show_each_task_its_own_devices(env: dict[str, str], bound: bool) -> None:
    assert _bound_by_slurm(env) is bound


def test_the_device_is_what_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    """``srun --gpus-per-task=1``: local rank 3 sees one device, and takes it."""
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert device_of_rank("auto", 3, 4, bound=True) == torch.device("cuda", 0)
    assert taken == [torch.device("cuda", 0)]
    with pytest.raises(ConfigError, match="Local rank 3 has no GPU: this machine has 1"):
        device_of_rank("cuda", 3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "unknown device 'gpu'; use auto, cpu, cuda, mps or xpu"),
        ("cuda", r"engine\.device is cuda, but torch sees no CUDA device; use auto or cpu"),
        ("mps", r"engine\.device is mps, but torch sees no Apple GPU \(MPS\); use auto or cpu"),
        ("xpu", r"engine\.device is xpu, but torch sees no Intel GPU \(XPU\); use auto or cpu"),
    ],
)
def test_a_device_that_is_not_there_is_refused(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for there in (torch.cuda, torch.backends.mps, torch.xpu):
        monkeypatch.setattr(there, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=message):
        check_device(name)
    with pytest.raises(ConfigError, match=message.replace(r"engine\.", "")):
        resolve_device(name)
    assert resolve_device("auto") == device_of_rank("auto", 0) == torch.device("cpu")


@pytest.mark.parametrize("name", ["mps", "xpu"])
def test_one_rank_trains_on_mps_and_xpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert name in NAMES
    for there in (torch.backends.mps, torch.xpu):
        monkeypatch.setattr(there, "is_available", lambda: True)
    assert device_of_rank(name, 0) == resolve_device(name) == torch.device(name)
    with pytest.raises(ConfigError, match=f"{name} trains on one rank only, and 2 were started"):
        device_of_rank(name, 0, 2)


def test_a_precision_the_device_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown --precision 'fp8'; use fp32, bf16, fp16"):
        check_precision("fp8", torch.device("cpu"))
    with pytest.raises(ConfigError, match="--precision fp16 needs a GPU"):
        check_precision("fp16", torch.device("cpu"))
