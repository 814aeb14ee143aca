"""open_clip's causal text transformer on batches cut to their longest caption, or packed without padding."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dualenc.encoders.packing import Packing, attend, attend_last, pack


class PackedAttention(nn.MultiheadAttention):
    """Multi-head attention that also takes packed rows: then ``attn_mask`` is their :class:`Packing`."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **more: Any) -> Any:  # type: ignore[override]
        """As ``nn.MultiheadAttention``; packed [T, W] → [T, W], in the last block [n, W]."""
        if not isinstance(attn_mask, Packing):
            return super().forward(query, key, value, attn_mask=attn_mask, **more)
        dropout = self.dropout if self.training else 0.0
        weight, bias, width = self.in_proj_weight, self.in_proj_bias, self.embed_dim
        if attn_mask.last:
            q = nn.functional.linear(query[attn_mask.ends], weight[:width], bias[:width])
            kv = nn.functional.linear(query, weight[width:], bias[width:])
            k, v = torch.unflatten(kv, 1, (2, self.num_heads, -1)).unbind(1)
            y = attend_last(torch.unflatten(q, 1, (self.num_heads, -1)), k, v, attn_mask, dropout)
        else:
            qkv = nn.functional.linear(query, weight, bias)
            q, k, v = torch.unflatten(qkv, 1, (3, self.num_heads, -1)).unbind(1)
            y = attend(q, k, v, attn_mask, dropout)
        return nn.functional.linear(y, self.out_proj.weight, self.out_proj.bias), None


@functools.cache
def text_classes() -> tuple[type[nn.Module], type[nn.Module]]:
    """open_clip's TextTransformer, whose causal mask is cut to the batch's length (upstream adds it uncut) and which
    takes packed rows, and its block that does."""
    from open_clip.transformer import ResidualAttentionBlock, TextTransformer

    class PackedBlock(ResidualAttentionBlock):  # type: ignore[misc]
        def forward(self, q_x: Tensor, k_x: Any = None, v_x: Any = None, attn_mask: Any = None) -> Tensor:
            if not isinstance(attn_mask, Packing):
                out: Tensor = super().forward(q_x, k_x, v_x, attn_mask)
                return out
            normed = self.ln_1(q_x)
            x = q_x[attn_mask.ends] if attn_mask.last else q_x
            x = x + self.ls_1(self.attn(normed, normed, normed, attn_mask=attn_mask)[0])
            y: Tensor = x + self.ls_2(self.mlp(self.ln_2(x)))
            return y

    class CutTextTransformer(TextTransformer):  # type: ignore[misc]
        def _embeds(self, text: Tensor) -> tuple[Tensor, Tensor | None]:
            x, mask = super()._embeds(text)
            return x, mask if mask is None else mask[..., : x.shape[1], : x.shape[1]]

        def forward(self, text: Tensor, packed: bool = False) -> Tensor:
            if not packed:
                out: Tensor = super().forward(text)
                return out
            is_end = text == self.eos_id if self.pool_type == "eos" else text
            packing = pack(is_end.int().argmax(1) + 1, text.shape[1])
            dtype = self.transformer.get_cast_dtype()
            x = self.token_embedding(text.reshape(-1)[packing.tokens]).to(dtype)
            x = x + self.positional_embedding.to(dtype)[packing.positions]
            *first, last = self.transformer.resblocks
            recompute = self.transformer.grad_checkpointing
            for block, at in [*((b, packing) for b in first), (last, packing.in_last_block())]:
                x = checkpoint(block, x, None, None, at, use_reentrant=False) if recompute else block(x, attn_mask=at)
            y: Tensor = self.ln_final(x)[packing.back]
            if self.text_projection is None:
                return y
            y = self.text_projection(y) if isinstance(self.text_projection, nn.Linear) else y @ self.text_projection
            return y

    return CutTextTransformer, PackedBlock


def take_packed(net: nn.Module) -> bool:
    """Turn an open_clip TextTransformer, in place, into one that takes cut batches; whether it takes packed ones, too.

    Packing needs a causal mask and nothing else, one pooled token, and open_clip's usual blocks.
    """
    from open_clip.transformer import ResidualAttentionBlock

    cut, packed_block = text_classes()
    net.__class__ = cut
    blocks: Any = net.transformer.resblocks  # type: ignore[union-attr]
    usual = all(type(b) is ResidualAttentionBlock and type(b.attn) is nn.MultiheadAttention for b in blocks)
    causal = net.attn_mask is not None and net.cls_emb is None and not net.use_pad_mask
    if not (usual and causal and net.pool_type in ("argmax", "eos")):
        return False
    for block in blocks:
        block.__class__ = packed_block
        block.attn.__class__ = PackedAttention
    return True
