"""Which CUDA device a rank takes, by what the launcher shows it."""

from __future__ import annotations

import pytest
import torch

from dualenc.distributed.world import _bound_by_slurm, _device
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
    assert _device("auto", 3, bound=True) == torch.device("cuda", 0)
    assert taken == [torch.device("cuda", 0)]
    with pytest.raises(ConfigError, match="Local rank 3 has no GPU: this machine has 1"):
        _device("cuda", 3)
