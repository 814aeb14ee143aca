"""Which parameters of a model have weight decay."""

from __future__ import annotations

from torch import nn


def decay_groups(module: nn.Module) -> tuple[list[str], list[str], list[str]]:
    """Names of trained parameters: (with weight decay, without, logit scale and bias).

    Weight decay is for matrices and convolutions only. Vectors (gains and biases of norms, layer scale) and learned
    positions, class tokens and queries have none, as in CLIP's and timm's recipes; nor have the model's own scale and
    bias, which are a group of their own (a tower may have parameters of that name too, as Swin v2's attention has).

    Only names and shapes are looked at, so the groups are the same before and after an engine cuts the parameters.
    """
    decay, no_decay, scale = [], [], []
    for name, p in module.named_parameters():
        if not p.requires_grad:
            continue
        if name.partition(".")[0] in ("logit_scale", "logit_bias"):
            scale.append(name)
        elif sum(length > 1 for length in p.shape) < 2 or _is_embedding(name):
            no_decay.append(name)
        else:
            decay.append(name)
    return decay, no_decay, scale


_EMBEDDINGS = (
    "positional_embedding",
    "position_embedding",
    "position_embeddings",
    "pos_embed",
    "positions",
    "class_embedding",
    "cls_token",
    "cls_emb",
    "reg_token",
    "mask_token",
    "prompt_tokens",
    "query",
    "latent",
    "probe",
    "relative_position_bias_table",
)


def _is_embedding(name: str) -> bool:
    """Positions, class tokens and pooling queries: parameters themselves, or the weight of an nn.Embedding of them."""
    parts = name.split(".")
    own = parts[-2] if parts[-1] == "weight" and len(parts) > 1 else parts[-1]
    # A linear layer may be called "query" (BERT); the bare parameter of that name is a token.
    return own in _EMBEDDINGS and not (parts[-1] == "weight" and own in ("query", "latent"))
