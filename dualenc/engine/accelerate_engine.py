"""One process, DDP and FSDP2.

accelerate places the model and wraps it for DDP. Its scheduler wrapper (which multiplies steps by the number of
processes) is not used, and FSDP2 is torch's own ``fully_shard``: accelerate's needs CUDA and one optimizer.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dualenc.checkpoint.ranges import Piece, Stored
from dualenc.config import EngineConfig, Optim
from dualenc.distributed.devices import DTYPES, autocast
from dualenc.distributed.world import World, ensure_group
from dualenc.engine import held as shards
from dualenc.engine import state
from dualenc.engine.loss_scale import LossScale
from dualenc.engine.optim import build_optimizers, is_fused, set_lr_factor, stepping_if
from dualenc.engine.protocol import (
    Outputs,
    Stepped,
    apply_memory_and_compile,
    check_shapes,
    make_contiguous,
    protect_outputs,
    repeated,
)
from dualenc.errors import ConfigError


class AccelerateEngine:
    """See :class:`dualenc.engine.protocol.Engine`.

    Args:
        config: the recipe's ``engine``.
        optim: the recipe's ``optim``.
        model: whole, with the same weights on all ranks; it is changed in place.
        world: from ``init_world``.
        find_unused: what ``engine.find_unused: auto`` means.

    Raises:
        ConfigError: for settings that do not go together.
    """

    def __init__(
        self, config: EngineConfig, optim: Optim, model: nn.Module, world: World, find_unused: bool = True
    ) -> None:
        _refuse(config)
        check_shapes(model)
        protect_outputs(model)
        self.world, self.device, self.module = world, world.device, model
        self.config, self.optim = config, optim
        self._find_unused = find_unused if config.find_unused == "auto" else config.find_unused
        self.lr = optim.lr
        apply_memory_and_compile(model, config, world.device)
        self._wrapped = self._shard() if config.parallel == "fsdp2" else self._prepare()
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        fused = is_fused(optim, world.device, sharded=config.parallel == "fsdp2")
        self.optimizers = build_optimizers(model, optim, fused=fused)
        self.scaler = LossScale(world.device) if config.precision == "fp16" else None
        model.train()

    # --- wrapping ---------------------------------------------------------------------------------------------

    def _prepare(self) -> nn.Module:
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.state import AcceleratorState, GradientState, PartialState

        for shared in (AcceleratorState, GradientState, PartialState):  # class-wide memory of an earlier engine
            shared._reset_state()
        # A tower may hold parameters that its forward never uses (poolers, …): such stay without gradient, as in one
        # process, instead of being waited for.
        ddp = DistributedDataParallelKwargs(find_unused_parameters=self._find_unused, gradient_as_bucket_view=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*OMP_NUM_THREADS.*")
            threads = torch.get_num_threads()
            accelerator = Accelerator(cpu=self.device.type == "cpu", mixed_precision="no", kwargs_handlers=[ddp])
            torch.set_num_threads(threads)  # the world has set them
        if accelerator.num_processes != self.world.world_size:
            raise ConfigError(
                f"accelerate sees {accelerator.num_processes} process(es), the launcher started "
                f"{self.world.world_size}: unset ACCELERATE_* variables, or start with torchrun"
            )
        return cast(nn.Module, accelerator.prepare_model(self.module))

    def _shard(self) -> nn.Module:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        ensure_group(self.world)
        self.module.to(self.device)
        make_contiguous(self.module)
        ranks, size = self.world.world_size, self.config.shard_size or self.world.world_size
        if ranks % size:
            raise ConfigError(f"engine.shard_size: {ranks} ranks cannot be parted into groups of {size}; use a divisor")
        if size == ranks:
            mesh = init_device_mesh(self.device.type, (ranks,))
        else:
            mesh = init_device_mesh(self.device.type, (ranks // size, size), mesh_dim_names=("replicate", "shard"))
        policy = _policy(self.config)
        for block in repeated(self.module):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        if policy != MixedPrecisionPolicy():
            # Towers apart from the temperature, which stays fp32 on every way.
            for tower in dict(self.module.named_children())["towers"].children():
                fully_shard(tower, mesh=mesh, mp_policy=policy)
        return cast(nn.Module, fully_shard(self.module, mesh=mesh))

    # --- the step ---------------------------------------------------------------------------------------------

    def forward(self, inputs: Mapping[str, Any]) -> Outputs:
        """Run the model; without grad, bypass DDP, whose buffer broadcast would wait for ranks with fewer batches."""
        unwrap = not torch.is_grad_enabled() and self.config.parallel != "fsdp2"
        try:
            with self._autocast():
                return cast(Outputs, (self.module if unwrap else self._wrapped)(inputs))
        except RuntimeError as e:
            if "Expected to have finished reduction in the prior iteration" not in str(e):
                raise
            raise ConfigError(
                "engine.find_unused: a parameter that had a gradient before had none in the last step, so the model's "
                "layers depend on the data; write engine.find_unused: true"
            ) from e

    def _autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.device, self.config.precision)

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Switch reduction off for all but the last forward and backward of a step."""
        self._set_reduction(last)
        try:
            yield
        finally:
            self._set_reduction(True)

    def _set_reduction(self, on: bool) -> None:
        if isinstance(self._wrapped, FSDPModule):
            self._wrapped.set_requires_gradient_sync(on)
        elif isinstance(self._wrapped, DistributedDataParallel):
            self._wrapped.require_backward_grad_sync = on

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``; in fp16 times the loss scale, which :meth:`step` takes out."""
        (loss if self.scaler is None else self.scaler.scaled(loss)).backward()  # type: ignore[no-untyped-call]

    def step(self) -> Stepped:
        """Clip, update unless the gradient norm is not finite, clear the gradients."""
        for p in self.parameters.values():
            if p.grad is None:  # used by no forward: DeepSpeed gives it zeros, so weight decay acts on it; alike here
                p.grad = torch.zeros_like(p)
        if self.scaler is not None:
            self.scaler.unscale([shards.local(p.grad) for p in self.parameters.values() if p.grad is not None])
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if self.optim.clip_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters.values(), self.optim.clip_grad_norm, norm)
        finite = torch.isfinite(norm)
        if self.scaler is not None:
            self.scaler.update(finite)
        with stepping_if(finite, self.optimizers) as step:
            if step:
                for optimizer in self.optimizers:
                    optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return Stepped(norm.detach(), ~finite)

    def set_lr_factor(self, factor: float) -> None:
        """Set every group's learning rate to ``factor`` times its peak."""
        self.lr = self.optim.lr * factor
        for optimizer in self.optimizers:
            set_lr_factor(optimizer.param_groups, factor)

    def train(self) -> None:
        """Training mode; FSDP2 frees the weights it gathered for evaluation."""
        self._reshard()
        self._wrapped.train()

    def eval(self) -> None:
        """Evaluation mode."""
        self._wrapped.eval()

    def _reshard(self) -> None:
        for m in self.module.modules():
            if isinstance(m, FSDPModule):
                m.reshard()

    # --- state ------------------------------------------------------------------------------------------------

    def model_state(self) -> dict[str, Tensor]:
        """Whole weights and buffers by name on the CPU of rank 0."""
        self._reshard()
        out = {}
        for name, x in self.module.state_dict(keep_vars=True).items():
            whole = shards.full(x, shards.local(x))
            if self.world.rank == 0:
                out[name] = whole.cpu().clone()
        return out

    def model_pieces(self) -> list[Piece]:
        """The part of weights and buffers that this rank writes; nothing is collected."""
        self._reshard()
        parts = {name: (x, shards.local(x)) for name, x in self.module.state_dict(keep_vars=True).items()}
        return shards.own(parts, self.world.rank, self.world.world_size)

    @torch.no_grad()
    def load_model_state(self, saved: Stored) -> None:
        """Set weights and buffers; only this rank's part is read."""
        self._reshard()
        for _, x, part in shards.read_all(self.module.state_dict(keep_vars=True), saved):
            shards.local(x).copy_(part)

    def optimizer_state(self) -> state.State:
        """Whole optimizer state by parameter name."""

        def whole(p: Tensor, value: Tensor) -> Tensor:
            return value.full_tensor() if isinstance(value, DTensor) else value

        found = state.collect(self.optim.name, self.parameters, self._state_of(), whole, self.world.rank == 0)
        return found[0], self._with_scale(found[1])

    def optimizer_pieces(self) -> tuple[list[Piece], dict[str, Any]]:
        """The part of the optimizer state that this rank writes; nothing is collected."""

        def piece(name: str, p: Tensor, value: Tensor) -> Piece:
            return shards.piece(name, p, shards.local(value))

        dealt = None if self.config.parallel == "fsdp2" else (self.world.rank, self.world.world_size)
        pieces, info = state.cut(self.optim.name, self.parameters, self._state_of(), piece, dealt)
        return pieces, self._with_scale(info)

    def _with_scale(self, info: dict[str, Any]) -> dict[str, Any]:
        if self.scaler is not None:
            info["scalars"][LossScale.KEY] = self.scaler.state()
        return info

    def load_optimizer_state(self, saved: Stored, info: Mapping[str, Any]) -> None:
        """Set the optimizer state that any engine saved; only this rank's part is read."""
        shapes = {k: shards.shape(p) for k, p in self.parameters.items()}
        fields = state.check(self.optim.name, shapes, saved, info)
        owner = self._owners()
        if self.scaler is not None:
            self.scaler.load(state.scalars_of(LossScale.KEY, info))
        for key, p in self.parameters.items():
            tensors, scalars = fields.get(key, {}), state.scalars_of(key, info)
            optimizer, group = owner[p]
            if not tensors and not scalars:
                continue
            entry: dict[str, Any] = {field: _like(p, shards.read(p, saved, name)) for field, name in tensors.items()}
            entry |= {k: state.step_tensor(v, group, p.device) for k, v in scalars.items()}
            optimizer.state[p] = entry

    def _state_of(self) -> state.StateOf:
        owner = self._owners()
        return lambda p: owner[p][0].state.get(p, {})

    def _owners(self) -> dict[Tensor, tuple[torch.optim.Optimizer, dict[str, Any]]]:
        return {p: (o, g) for o in self.optimizers for g in o.param_groups for p in g["params"]}


def _policy(config: EngineConfig) -> MixedPrecisionPolicy:
    if config.gather_dtype == config.reduce_dtype == "fp32":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(
        param_dtype=None if config.gather_dtype == "fp32" else DTYPES[config.gather_dtype],
        reduce_dtype=DTYPES[config.reduce_dtype],
        cast_forward_inputs=False,  # autocast does that where an operator needs it
    )


def _like(p: Tensor, part: Tensor) -> Tensor:
    """``part`` placed like ``p``, of which it is this rank's part."""
    piece = part.to(device=p.device, dtype=p.dtype, copy=True)
    if not isinstance(p, DTensor):
        return piece
    return DTensor.from_local(piece, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def _refuse(config: EngineConfig) -> None:
    if config.offload_optimizer or config.offload_params:
        raise ConfigError("engine.offload_optimizer and engine.offload_params need engine.kind: deepspeed")
    if config.parallel != "fsdp2":
        for key, value in {"gather_dtype": "fp32", "reduce_dtype": "fp32", "shard_size": None}.items():
            if (found := config.model_dump()[key]) != value:
                raise ConfigError(f"engine.{key}: {found} needs engine.parallel: fsdp2")
    if config.gather_dtype == "bf16" and config.precision != "bf16":
        raise ConfigError("engine.gather_dtype: bf16 needs engine.precision: bf16")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ConfigError(
            "accelerate launch is configured for DeepSpeed; set engine.kind: deepspeed in the recipe instead"
        )
