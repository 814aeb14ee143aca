"""The losses as functions of two sets of features, for a training loop of your own.

Under DDP (plain, accelerate's, Lightning's), FSDP2 or DeepSpeed the features of all ranks are contrasted, and the
gradient that the wrapper averages over ranks is that of one process on the whole batch. Three lines are the whole
change to a loop::

    image, text = model(images, captions)                              # [B, D] each
    loss = dualenc.losses.info_nce(image, text, logit_scale=model.log_scale.exp())
    loss.backward()

A learned temperature has to be a parameter of the wrapped module like every other, so that its gradient is averaged.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize as unit

from dualenc.distributed.world import rank, world_size
from dualenc.errors import ConfigError
from dualenc.losses.cwcl import cwcl as cwcl_rows
from dualenc.losses.info_nce import info_nce as info_nce_rows
from dualenc.losses.loss import TiledConfig
from dualenc.losses.mse import mse as mse_rows
from dualenc.losses.sigmoid import sigmoid_loss

Impl = Literal["auto", "plain", "tiled", "triton"]


def info_nce(
    a: Tensor,
    b: Tensor,
    logit_scale: Tensor | float,
    ids: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    normalize: bool = True,
    impl: Impl = "auto",
) -> Tensor:
    """Symmetric InfoNCE, CLIP's loss (arXiv 2103.00020), over the batch of all ranks.

    Args:
        a: [B, D] features of this rank's pairs, of any floating type; computed in fp32. B is equal on all ranks.
        b: [B, D] features of the other modality.
        logit_scale: multiplies the cosines (itself, not its logarithm), a number or [1]; CLIP learns its logarithm from
            log(1 / 0.07).
        ids: [B] int64; rows with equal ids, here or on another rank, are positives of each other, −1 takes no part.
            Default: every row is a pair of its own.
        label_smoothing: in [0, 1).
        normalize: L2-normalise the features first; False: they already are.
        impl: ``auto`` never holds the [N, N] logits once the global batch N is 2048 or more.

    Returns:
        A scalar. Its mean over ranks is the loss of the global batch, and the mean over ranks of its gradients the
        gradient of that loss.

    Raises:
        ConfigError: ``a`` and ``b`` are not both [B, D]; ``impl: triton`` where it cannot run.
        DualencError: B or D differs between ranks.
    """
    with _fp32(a):
        a, b, ids, scale = _prepared(a, b, ids, logit_scale, normalize)
        how = TiledConfig.model_validate({"impl": impl}).choose(len(a) * world_size(), a.device)
        return info_nce_rows(a, b, ids, scale, label_smoothing, how).value


def sigmoid(
    a: Tensor,
    b: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    ids: Tensor | None = None,
    *,
    normalize: bool = True,
    impl: Impl = "auto",
) -> Tensor:
    """SigLIP's loss (arXiv 2303.15343) over the batch of all ranks.

    Args:
        logit_scale: a number or [1]; SigLIP begins with 10.
        logit_bias: a number or [1]; SigLIP begins with −10.

    The other arguments, the result and what is raised are those of :func:`info_nce`.
    """
    with _fp32(a):
        a, b, ids, scale = _prepared(a, b, ids, logit_scale, normalize)
        bias = None if logit_bias is None else _one(logit_bias, a)
        how = TiledConfig.model_validate({"impl": impl}).choose(len(a) * world_size(), a.device)
        return sigmoid_loss(a, b, ids, scale, bias, how).value


def cwcl(
    a: Tensor,
    b: Tensor,
    logit_scale: Tensor | float,
    frozen_a: Tensor | None = None,
    frozen_b: Tensor | None = None,
    ids: Tensor | None = None,
    *,
    sharpen: float = 1.0,
    normalize: bool = True,
) -> Tensor:
    """Continuously weighted contrastive loss (Srinivasa et al., NeurIPS 2023) for a tower matched to a frozen one.

    Args:
        frozen_a: [B, W] embeddings by the frozen encoder of that side, before any learned projection.
        frozen_b: [B, W] the same of the other side; give at least one of the two.
        sharpen: exponent of the weights; 1 is the paper's.

    The other arguments, the result and what is raised are those of :func:`info_nce`.
    """
    with _fp32(a):
        a, b, ids, scale = _prepared(a, b, ids, logit_scale, normalize)
        fa, fb = (None if f is None else unit(f.detach().float(), dim=-1) for f in (frozen_a, frozen_b))
        how = TiledConfig.model_validate({}).choose(len(a) * world_size(), a.device)
        return cwcl_rows(a, b, ids, scale, (fa, fb), sharpen, how).value


def mse(a: Tensor, b: Tensor, ids: Tensor | None = None, *, normalize: bool = True) -> Tensor:
    """Mean squared distance of a pair's features, as LidarCLIP (arXiv 2212.06858) matches a tower to a frozen one.

    Arguments, the result and what is raised are those of :func:`info_nce`.
    """
    with _fp32(a):
        a, b, ids, _ = _prepared(a, b, ids, 1.0, normalize)
        return mse_rows(a, b, ids).value


def _fp32(a: Tensor) -> torch.autocast:
    """Autocast would take the logits in bf16: 8 bits are too few for a softmax over thousands of them."""
    return torch.autocast(a.device.type, enabled=False)


def _prepared(
    a: Tensor, b: Tensor, ids: Tensor | None, logit_scale: Tensor | float, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features fp32 [B, D], ids [B] and scale [1] as the losses take them."""
    if a.ndim != 2 or a.shape != b.shape:
        raise ConfigError(f"a loss compares two sets of features [B, D], got {list(a.shape)} and {list(b.shape)}")
    a, b = a.float(), b.float()
    if normalize:
        a, b = unit(a, dim=-1), unit(b, dim=-1)
    if ids is None:
        ids = torch.arange(len(a), device=a.device) + rank() * len(a)
    elif ids.shape != (len(a),):
        raise ConfigError(f"ids: shape {list(ids.shape)} does not match {len(a)} rows of features; give one id per row")
    return a, b, ids.to(a.device), _one(logit_scale, a)


def _one(value: Tensor | float, like: Tensor) -> Tensor:
    """A number or a tensor of one element as fp32 [1]."""
    return torch.as_tensor(value, dtype=torch.float32, device=like.device).reshape(1)
