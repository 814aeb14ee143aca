"""What a forward and backward of a model keeps alive, as a function of the micro-batch.

The model runs on fake tensors: torch's own operators say what shape they would give, nothing is computed and nothing
allocated. An operator's output counts from when it is made until it is freed, so recomputation, autocast's copies of
weights and the temporaries of the backward count as they do in a run. Two small micro-batches give, for each moment, a
constant and a part that grows with the micro-batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dualenc.config import Recipe
from dualenc.data.batch import map_tensors
from dualenc.data.modalities import ModalityInput
from dualenc.encoders import DualEncoder
from dualenc.engine.protocol import apply_memory_and_compile, protect_outputs
from dualenc.plan.live import LiveBytes
from dualenc.plan.weights import build_on
from dualenc.plan.widest_rows import widest

logger = logging.getLogger(__name__)

SIZES = (2, 4)
"""The micro-batches that are tried."""

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Timeline:
    """Moments of one forward and backward, in order.

    Attributes:
        fixed, each: [n] bytes alive besides weights and their gradients: ``fixed + each · micro-batch``.
        done: [n] elements of parameters whose gradient is complete.
        forward: how many of the moments are in the forward.
        kept: bytes alive between forward and backward: constant, and for each sample.
        features: elements of a sample's outputs: features and what else has a row.
        batch: bytes of a sample's inputs.
        real: whether the model had to be run on real numbers.
    """

    fixed: F64
    each: F64
    done: F64
    forward: int
    kept: tuple[float, float]
    features: int
    batch: int
    real: bool = False

    def peak(self, micro: int, gradients: Callable[[F64], F64]) -> float:
        """The most bytes alive at once, with those of the gradients that ``gradients`` says are held once ``done``
        elements are complete."""
        return float((self.fixed + self.each * micro + gradients(self.done)).max(initial=0.0))

    def after_forward(self, micro: int) -> float:
        """Bytes kept for the backward."""
        return self.kept[0] + self.kept[1] * micro


def timeline(recipe: Recipe) -> tuple[Timeline, DualEncoder]:
    """The moments of a recipe's model, and the model.

    An encoder whose operators depend on values (sparse points) cannot run on fake tensors: then the model is built and
    run for real, on the CPU.

    Raises:
        ConfigError: as building the run's model does.
    """
    try:
        model, inputs = build_on("meta", recipe)
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with fake:
            model.to_empty(device="cpu")
        return _measured(recipe, model, inputs, fake), model
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as e:
        logger.info("no plan on fake tensors (%s): running the model", str(e).splitlines()[:1])
    model, inputs = build_on("cpu", recipe)
    return _measured(recipe, model, inputs, None), model


def _measured(
    recipe: Recipe, model: DualEncoder, inputs: dict[str, ModalityInput], fake: FakeTensorMode | None
) -> Timeline:
    protect_outputs(model)
    left_out = {"compile": False, "float8": False}  # what they save is not known here
    apply_memory_and_compile(model, recipe.engine.model_copy(update=left_out), torch.device("cpu"))
    runs = []
    for size in SIZES:
        rows = {m: widest(x, size) for m, x in inputs.items()}
        bytes_of_rows = sum(x.numel() * x.element_size() for x in tensors_in(rows))
        if fake is not None:
            rows = map_tensors(rows, fake.from_tensor)
        runs.append((_run(model, rows, recipe, fake), bytes_of_rows))
    (small, _), (large, batch) = runs
    low, high = SIZES
    if len(small.live) == len(large.live):
        each = (large.live - small.live) / (high - low)
        fixed = small.live - low * each
    else:  # the operators depend on the batch: what the larger one kept grows with it
        each, fixed = large.live / high, np.zeros_like(large.live)
    growth = (large.kept - small.kept) / (high - low)
    return Timeline(
        fixed,
        each,
        large.done,
        large.forward,
        (small.kept - low * growth, growth),
        large.features // high,
        batch // high,
        real=fake is None,
    )


@dataclass(slots=True)
class _Run:
    live: F64
    done: F64
    forward: int
    kept: float
    features: int


def _run(model: nn.Module, rows: Any, recipe: Recipe, fake: FakeTensorMode | None) -> _Run:
    moments: list[tuple[int, int]] = []
    done = 0

    def arrived(p: Tensor) -> None:  # the engine says where a gradient then is
        nonlocal done
        done += p.numel()
        p.grad = None

    live = LiveBytes(lambda n: moments.append((n, done)))
    live.ignore([*model.parameters(), *model.buffers(), *tensors_in(rows)])
    with ExitStack() as held:
        for p in model.parameters():
            if p.requires_grad:
                hook = p.register_post_accumulate_grad_hook(arrived)  # type: ignore[no-untyped-call]
                held.callback(hook.remove)
        if fake is not None:
            held.enter_context(fake)
        held.enter_context(live)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.engine.precision == "bf16"):
            out = model(rows)
        forward, kept = len(moments), live.live
        outputs = [x for group in out.values() for x in group.values()]
        features = sum(x.numel() for x in outputs if x.ndim > 1)
        total = torch.stack([(x * torch.ones_like(x)).sum() for x in outputs if x.requires_grad]).sum()
        del out, outputs
        total.backward()  # type: ignore[no-untyped-call]
    return _Run(
        np.array([n for n, _ in moments], np.float64),
        np.array([d for _, d in moments], np.float64),
        forward,
        kept,
        features,
    )


def tensors_in(x: Any) -> list[Tensor]:
    """The tensors of a nested mapping."""
    if isinstance(x, Tensor):
        return [x]
    return [t for v in x.values() for t in tensors_in(v)] if isinstance(x, dict) else []
