"""Captions without padding: the real tokens of a batch one after another, for causal text towers.

A tower that pools one token of each row, and whose tokens see only those before them, needs nothing beyond that token.
So its blocks run on [T, W], T the sum of the lengths, instead of [n, L, W]; only attention looks at rows. All blocks
run once for a batch, whatever its lengths, so engines that gather weights at each call are served as well. In the last
block only the pooled tokens are needed: it takes queries, and runs its MLP, for those alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Packing:
    """How n rows of different lengths, T tokens together, are laid out one after another.

    Attributes:
        tokens: int64 [T]: places in the flattened [n · L] rows.
        positions: int64 [T]: places within the row.
        ends: int64 [n]: the last token of each row, in the order of packing.
        back: int64 [n]: where row i of the batch is in the order of packing.
        runs: (rows, length) of neighbours of equal length, or None: attention then pads the rows to ``shape``.
        shape: (n, L) of the batch.
        last: the block is the tower's last.
    """

    tokens: Tensor
    positions: Tensor
    ends: Tensor
    back: Tensor
    runs: tuple[tuple[int, int], ...] | None
    shape: tuple[int, int]
    last: bool = False

    def in_last_block(self) -> Packing:
        """The same for the tower's last block, which answers with the rows' last tokens [n, W]."""
        return replace(self, last=True)


def can_pack(ids: Tensor, anywhere: bool) -> bool:
    """Whether the rows can be packed: a real batch on a CPU, or ``anywhere``, outside of compiled code.

    Elsewhere than on a CPU the sum of the lengths has to be read back from the device.
    """
    # Fake tensors, which an export runs on, and those on meta have no values.
    if type(ids) is not Tensor or ids.device.type == "meta" or len(ids) < 2:
        return False
    if torch.compiler.is_compiling():
        return False
    return ids.device.type == "cpu" or anywhere


def pack(lengths: Tensor, longest: int, by_length: bool | None = None) -> Packing:
    """Lay out rows of ``lengths`` int64 [n], padded to ``longest`` before.

    Args:
        by_length: rows of equal length become neighbours, so that attention needs no padding either. Otherwise it pads
            to the batch's longest: the same few kernels for any lengths. Default: on a CPU.
    """
    n, device = len(lengths), lengths.device
    if by_length is None:
        by_length = device.type == "cpu"
    order = torch.argsort(lengths, stable=True) if by_length else torch.arange(n, device=device)
    lengths = lengths[order]
    ends = lengths.cumsum(0)
    total = int(ends[-1])
    firsts = (ends - lengths).repeat_interleave(lengths, output_size=total)
    positions = torch.arange(total, device=device) - firsts
    rows = order.repeat_interleave(lengths, output_size=total)
    back = torch.empty_like(order)
    back[order] = torch.arange(n, device=device)
    runs = None
    if by_length:
        found, counts = torch.unique_consecutive(lengths, return_counts=True)
        runs = tuple(zip(counts.tolist(), found.tolist(), strict=True))
    return Packing(rows * longest + positions, positions, ends - 1, back, runs, (n, longest))


def attend(q: Tensor, k: Tensor, v: Tensor, packing: Packing, dropout: float = 0.0, causal: bool = True) -> Tensor:
    """Attention within each row: query, key and value [T, heads, W / heads] → [T, W]."""
    if packing.runs is None:
        mask = None if causal else _within(packing, q.device)
        q, k, v = (_padded(x, packing) for x in (q, k, v))
        y = _attention(q, k, v, mask, dropout, causal)
        return y.flatten(2).flatten(0, 1)[packing.tokens]
    out = []
    # split and not slices: the gradient of every slice would be a tensor as large as the whole.
    cells = [n * length for n, length in packing.runs]
    for *parts, run in zip(*(torch.split(x, cells) for x in (q, k, v)), packing.runs, strict=True):
        q, k, v = (torch.unflatten(x, 0, run) for x in parts)
        y = _attention(q, k, v, None, dropout, causal)
        out.append(y.flatten(2).flatten(0, 1))
    return torch.cat(out)


def attend_last(q: Tensor, k: Tensor, v: Tensor, packing: Packing, dropout: float = 0.0) -> Tensor:
    """Attention of the last token of each row to all of its row: queries [n, heads, W / heads], key and value
    [T, heads, W / heads] → [n, W]."""
    query = q.unsqueeze(1)
    if packing.runs is None:
        keys, values = _padded(k, packing), _padded(v, packing)
        return _attention(query, keys, values, _within(packing, q.device), dropout, False).flatten(1)
    out = []
    cells, rows = [n * length for n, length in packing.runs], [n for n, _ in packing.runs]
    parts = zip(torch.split(query, rows), torch.split(k, cells), torch.split(v, cells), packing.runs, strict=True)
    for mine, keys, values, run in parts:
        y = _attention(mine, torch.unflatten(keys, 0, run), torch.unflatten(values, 0, run), None, dropout, False)
        out.append(y.flatten(1))
    return torch.cat(out)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool) -> Tensor:
    """[n, L, heads, W / heads] → the same."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
    return y.transpose(1, 2)


def _padded(x: Tensor, packing: Packing) -> Tensor:
    """[T, …] → [n, L, …], zeros after each row's end."""
    n, longest = packing.shape
    whole = x.new_zeros(n * longest, *x.shape[1:]).index_copy(0, packing.tokens, x)
    return whole.view(n, longest, *x.shape[1:])


def _within(packing: Packing, device: torch.device) -> Tensor:
    """bool [n, 1, 1, L]: the places of each row that hold tokens."""
    n, longest = packing.shape
    there = torch.zeros(n * longest, dtype=torch.bool, device=device).index_fill(0, packing.tokens, True)
    return there.view(n, 1, 1, longest)
