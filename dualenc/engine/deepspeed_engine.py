"""DeepSpeed ZeRO 0–3.

What is different here from the usual set-up, and why (each is a test):

* gradient_accumulation_steps is always 1 and the accumulation boundary is set by hand: DeepSpeed then divides by
  nothing, for any number of backwards per step (``no_sync`` is refused under ZeRO 2 and 3).
* The optimizer is torch's, passed in: the same update as under the other engines, and nothing to compile.
* bf16 is torch's autocast over fp32 weights; ``bf16.enabled`` would cast the temperature too. Gradients are reduced in
  fp32.
* The shared-memory op is switched off on the CPU: it is for inference, and building it takes a minute and a compiler.
* Weights, moving averages and optimizer state are collected by name through ``shards`` and ``state``: a checkpoint does
  not depend on the stage or the number of ranks.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dualenc.checkpoint.ranges import Piece, Stored
from dualenc.config import EngineConfig, Optim
from dualenc.distributed.world import World, ensure_group
from dualenc.engine import held as shards
from dualenc.engine import state
from dualenc.engine.optim import build_optimizers, is_fused, set_lr_factor, stepping_if
from dualenc.engine.protocol import (
    Outputs,
    Stepped,
    apply_memory_and_compile,
    check_shapes,
    make_contiguous,
    protect_outputs,
)
from dualenc.errors import ConfigError

STEPS_PER_PRINT = 10**9


class DeepSpeedEngine:
    """See :class:`dualenc.engine.protocol.Engine`.

    Args:
        config: the recipe's ``engine``.
        optim: the recipe's ``optim``.
        model: whole, with the same weights on all ranks; it is changed in place.
        world: from ``init_world``.

    Raises:
        ConfigError: if deepspeed is not installed, or settings do not go together.
    """

    def __init__(self, config: EngineConfig, optim: Optim, model: nn.Module, world: World) -> None:
        _refuse(config, optim)
        check_shapes(model)
        protect_outputs(model)
        self.world, self.device, self.module = world, world.device, model
        self.config, self.optim, self.stage = config, optim, config.zero_stage
        self.lr = optim.lr
        apply_memory_and_compile(model, config, world.device)
        deepspeed = import_deepspeed(world)
        model.to(world.device)
        make_contiguous(model)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        fused = is_fused(optim, world.device, offloaded=config.offload_optimizer)
        (optimizer,) = build_optimizers(model, optim, fused=fused)
        self._engine: Any = deepspeed.initialize(
            model=model, optimizer=optimizer, config=deepspeed_json(config, optim, world.world_size)
        )[0]
        model.train()

    # --- the step ---------------------------------------------------------------------------------------------

    def forward(self, inputs: Mapping[str, Any]) -> Outputs:
        """Run the model through DeepSpeed's engine, which collects ZeRO-3's weights and applies autocast."""
        return cast(Outputs, self._engine(inputs))

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Tell DeepSpeed whether this backward completes the step's gradient."""
        self._engine.set_gradient_accumulation_boundary(last)
        try:
            yield
        finally:
            self._engine.set_gradient_accumulation_boundary(True)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``."""
        self._engine.backward(loss)

    def step(self) -> Stepped:
        """Clip, update unless the gradient norm is not finite, clear the gradients."""
        if self.stage == 0:
            return self._step_unsharded()
        self._engine.step()
        overflow = self._engine.optimizer.overflow  # set for a norm that is not finite, in fp32 too
        norm = torch.as_tensor(self._engine.get_global_grad_norm(), device=self.device)
        return Stepped(norm.detach(), torch.as_tensor(overflow, dtype=torch.bool, device=self.device))

    def _step_unsharded(self) -> Stepped:
        """ZeRO 0 computes no norm and checks nothing: both are done here, and its own clipping is off."""
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        if self.optim.clip_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters.values(), self.optim.clip_grad_norm, norm)
        finite = torch.isfinite(norm)
        with stepping_if(finite, [self._torch_optimizer]) as step:
            if step:
                self._engine.step()
            else:
                self._engine.zero_grad()
                self._engine.optimizer.zero_grad()
        return Stepped(norm.detach(), ~finite)

    def set_lr_factor(self, factor: float) -> None:
        """Set every group's learning rate to ``factor`` times its peak."""
        self.lr = self.optim.lr * factor
        set_lr_factor(self._torch_optimizer.param_groups, factor)

    def train(self) -> None:
        """Training mode."""
        self._engine.train()

    def eval(self) -> None:
        """Evaluation mode."""
        self._engine.eval()

    @property
    def _torch_optimizer(self) -> torch.optim.Optimizer:
        optimizer = self._engine.optimizer
        return cast(torch.optim.Optimizer, optimizer if self.stage == 0 else optimizer.optimizer)

    # --- weights ----------------------------------------------------------------------------------------------

    def model_state(self) -> dict[str, Tensor]:
        """Whole weights and buffers by name on the CPU of rank 0."""
        out = {}
        for name, x in self.module.state_dict(keep_vars=True).items():
            whole = shards.full(x, shards.local(x))
            if self.world.rank == 0:
                out[name] = whole.cpu().clone()
        return out

    def model_pieces(self) -> list[Piece]:
        """The part of weights and buffers that this rank writes; nothing is collected."""
        parts = {name: (x, shards.local(x)) for name, x in self.module.state_dict(keep_vars=True).items()}
        return shards.own(parts, self.world.rank, self.world.world_size)

    @torch.no_grad()
    def load_model_state(self, saved: Stored) -> None:
        """Set weights and buffers; only this rank's part is read."""
        for _, x, piece in shards.read_all(self.module.state_dict(keep_vars=True), saved):
            shards.local(x).copy_(piece)
            if self.stage == 3 and x.requires_grad:  # the optimizer's own copy
                flat, start, size, _ = self._flat(x)
                flat.narrow(0, start, size).copy_(piece)
        if self.stage in (1, 2):
            self._engine.optimizer.refresh_fp32_params()
        # only ZeRO 3's optimizer has them
        persistent = getattr(self._engine.optimizer, "persistent_parameters", [])
        if persistent:
            persistent[0].all_gather(persistent)

    # --- optimizer state --------------------------------------------------------------------------------------

    def optimizer_state(self) -> state.State:
        """Whole optimizer state by parameter name."""
        whole = self._whole if self.stage else lambda _, x: x
        return state.collect(self.optim.name, self.parameters, self._state_of, whole, self.world.rank == 0)

    def optimizer_pieces(self) -> tuple[list[Piece], dict[str, Any]]:
        """The part of the optimizer state that this rank writes; nothing is collected."""
        if self.stage == 0:
            dealt = (self.world.rank, self.world.world_size)
            return state.cut(self.optim.name, self.parameters, self._state_of, shards.piece, dealt)

        def piece(name: str, p: Tensor, value: Tensor) -> Piece:
            start, size, at = self._held(p)
            return Piece(name, tuple(shards.shape(p)), at, value.narrow(0, start, size))

        return state.cut(self.optim.name, self.parameters, self._state_of, piece, None)

    def _state_of(self, p: Tensor) -> Mapping[str, Any]:
        """The parameter's state as this rank has it: whole (ZeRO 0), or that of the flat tensor it is part of."""
        key = p if self.stage == 0 else self._flat(p)[0]
        return cast(Mapping[str, Any], self._torch_optimizer.state.get(key, {}))

    def _whole(self, p: Tensor, value: Tensor) -> Tensor:
        """ZeRO 3 gathers equal pieces; ZeRO 1 and 2 cut anywhere, so pieces are laid into zeros and summed."""
        _, start, size, at = self._flat(p)
        piece = value.narrow(0, start, size)
        if self.stage == 3:
            return shards.gather_partitions(p, piece)
        out = torch.zeros(p.numel(), dtype=value.dtype, device=self.device)
        out[at : at + size] = piece.to(self.device)
        dist.all_reduce(out)
        return out.view_as(p)

    def _flat(self, p: Any) -> tuple[Tensor, int, int, int]:
        """Where a parameter lives: (flat fp32 tensor of this rank, start in it, length, start within the parameter)."""
        zero = self._engine.optimizer
        if self.stage == 3:
            group, start, size = zero.grad_position[zero.get_param_id(p)]
            return zero.fp32_partitioned_groups_flat[group], start, size, dist.get_rank() * p.ds_tensor.numel()
        flat = zero.single_partition_of_fp32_groups[self._group_of(p)]
        mapping = p._hp_mapping
        if mapping is None:  # all of it is on other ranks
            return flat, 0, 0, 0
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        return flat, here.start, here.numel, there.start

    def _group_of(self, p: Tensor) -> int:
        groups = self._engine.optimizer.bit16_groups
        return next(i for i, group in enumerate(groups) if any(q is p for q in group))

    def _held(self, p: Tensor) -> tuple[int, int, int]:
        """As :meth:`_flat`, without the tensor and without ZeRO 3's padding: (start in it, length, start within p)."""
        _, start, size, at = self._flat(p)
        whole = shards.shape(p).numel()
        at = min(at, whole)
        return start, min(size, whole - at), at

    def load_optimizer_state(self, saved: Stored, info: Mapping[str, Any]) -> None:
        """Set the optimizer state that any engine saved; only this rank's part is read."""
        shapes = {k: shards.shape(p) for k, p in self.parameters.items()}
        fields = state.check(self.optim.name, shapes, saved, info)
        for key, p in self.parameters.items():
            scalars = state.scalars_of(key, info)
            if key in fields or scalars:
                self._load(p, saved, fields.get(key, {}), scalars)

    def _load(self, p: Tensor, saved: Stored, fields: state.Fields, scalars: Mapping[str, float]) -> None:
        optimizer = self._torch_optimizer
        group = optimizer.param_groups[0]  # fused or not is the same for all groups
        if self.stage == 0:
            entry: dict[str, Any] = {
                k: shards.read(p, saved, name).to(p.device, p.dtype, copy=True) for k, name in fields.items()
            }
            optimizer.state[p] = entry | {k: state.step_tensor(v, group, p.device) for k, v in scalars.items()}
            return
        flat, (start, size, at) = self._flat(p)[0], self._held(p)
        entry = optimizer.state[flat]
        for field, name in fields.items():
            if field not in entry:
                entry[field] = torch.zeros_like(flat)
            if size:
                entry[field].narrow(0, start, size).copy_(saved.read(name, at, at + size))
        for field, value in scalars.items():
            entry[field] = state.step_tensor(value, group, flat.device)


def deepspeed_json(config: EngineConfig, optim: Optim, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a recipe; no separate DeepSpeed file is needed."""
    clip = optim.clip_grad_norm or 0.0
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.offload_params:
        zero["offload_param"] = {"device": "cpu"}
    out: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed asks for it and only counts samples with it
        "train_batch_size": world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip if config.zero_stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": STEPS_PER_PRINT,
    }
    if config.precision == "bf16":
        out["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    json.dumps(out)
    return out


def import_deepspeed(world: World) -> Any:
    """Import deepspeed for this world's device and give it the process group.

    Raises:
        ConfigError: if it is not installed.
    """
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, module="deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        import deepspeed
    except ModuleNotFoundError as e:
        if e.name != "deepspeed":
            raise
        raise ConfigError("engine.kind: deepspeed needs the extra: pip install 'dualenc[deepspeed]'") from e
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    logger.addFilter(_not_about_our_optimizer)
    if world.device.type == "cpu":
        # set by DeepSpeed's build; a wheel built without operators has no such table
        ops = getattr(deepspeed.ops, "__compatible_ops__", {})
        if "deepspeed_shm_comm" in ops:
            ops["deepspeed_shm_comm"] = False
    ensure_group(world)
    for key, value in {"RANK": world.rank, "LOCAL_RANK": world.local_rank, "WORLD_SIZE": world.world_size}.items():
        os.environ.setdefault(key, str(value))  # without them it looks for MPI
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, dist_init_required=False, verbose=False)
    return deepspeed


def _not_about_our_optimizer(record: logging.LogRecord) -> bool:
    """DeepSpeed warns about every optimizer but its own; torch's are tested here under every stage."""
    return "untested optimizer" not in record.getMessage()


def _refuse(config: EngineConfig, optim: Optim) -> None:
    if optim.name == "muon":
        raise ConfigError(
            "optim.name: muon needs whole matrices, but ZeRO cuts them into flat pieces; "
            "use adamw, or engine.kind: accelerate"
        )
    if config.offload_params and config.zero_stage != 3:
        raise ConfigError(f"engine.offload_params needs zero_stage: 3, got {config.zero_stage}")
    if config.offload_optimizer and config.zero_stage == 0:
        raise ConfigError("engine.offload_optimizer needs zero_stage 1, 2 or 3, got 0")
    if config.precision == "fp16":
        raise ConfigError("engine.precision: fp16 needs engine.kind: accelerate; with deepspeed use bf16 or fp32")
    if config.parallel != "auto":
        raise ConfigError(
            f"engine.parallel: {config.parallel} needs engine.kind: accelerate; for deepspeed set engine.zero_stage"
        )
