"""InfoNCE and sigmoid on a block of rows × a block of columns, a tile of logits at a time.

Three functions, on torch (here) and as Triton kernels (``triton_kernels``), say what a block adds to the value and
to the gradients. ``sweeps`` puts blocks together, over ranks too. All work in both directions at once: the tile
that gives row i its softmax over columns gives column j its softmax over rows, so no product is computed twice in a
sweep. Nothing of size B·N exists, only one tile and its copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

INF = float("inf")


class Stats:
    """Statistics of n rows (or columns) so far; blocks are added one by one.

    Attributes:
        data: [4, n], one tensor that can be sent; the others are its rows.
        pos, neg: [n] the largest logit of a positive and of a negative; −inf where none was seen.
        z: [n] Σ exp(logit − m) with m = max(pos, neg) (the online softmax of arXiv 1805.02867).
        at_pos: [n] Σ of the positives' logits.
    """

    def __init__(self, data: Tensor) -> None:
        self.data = data
        self.pos, self.neg, self.z, self.at_pos = data[0], data[1], data[2], data[3]

    @classmethod
    def empty(cls, n: int, like: Tensor) -> Stats:
        """Nothing seen yet."""
        data = like.new_zeros(4, n)
        data[:2] = -INF
        return cls(data)

    def of(self, s: slice) -> Stats:
        """Some of the rows, as a view."""
        return Stats(self.data[:, s])

    def raise_to(self, pos: Tensor, neg: Tensor) -> Tensor:
        """Take in new largest logits, rescale ``z`` to them, and return the new m [n]."""
        before = torch.maximum(self.pos, self.neg)
        torch.maximum(self.pos, pos, out=self.pos)
        torch.maximum(self.neg, neg, out=self.neg)
        m = torch.maximum(self.pos, self.neg)
        self.z.mul_((before - m).exp_())
        return m

    def lse(self) -> Tensor:
        """log Σ exp(logit) [n]."""
        return torch.maximum(self.pos, self.neg) + self.z.log()

    def hits(self) -> Tensor:
        """How many rows have a positive above every negative (a tie, as of collapsed features, is a miss)."""
        return (self.pos > self.neg).sum().to(self.z.dtype)


@dataclass(slots=True)
class FeatureBlock:
    """Features that take part, with what belongs to each.

    Attributes:
        x: [n, D] features; ids: [n] pair ids.
        terms: for InfoNCE's gradient three of [n], with u the upstream gradient of a row's term of the value:
            u · (1 − ε) / number of positives; the logsumexp of the row's logits; u. Else none.
    """

    x: Tensor
    ids: Tensor
    terms: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self.x)

    def part(self, s: slice) -> FeatureBlock:
        """Some of the rows, as a view."""
        return FeatureBlock(self.x[s], self.ids[s], tuple(t[s] for t in self.terms))


class PositiveColumns:
    """Column positions of each row's positives, found by sorting the column ids once."""

    def __init__(self, column_ids: Tensor) -> None:
        self.sorted, self.order = torch.sort(column_ids)

    def count(self, row_ids: Tensor) -> Tensor:
        """How many columns have each row's id [B]."""
        return torch.searchsorted(self.sorted, row_ids, right=True) - torch.searchsorted(self.sorted, row_ids)

    def of(self, row_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Every (row, column) with equal ids, as two index tensors [P]."""
        first = torch.searchsorted(self.sorted, row_ids)
        count = torch.searchsorted(self.sorted, row_ids, right=True) - first
        row = torch.repeat_interleave(torch.arange(len(row_ids), device=row_ids.device), count)
        start_of_row = torch.cumsum(count, 0) - count
        within = torch.arange(len(row), device=row.device) - start_of_row[row]
        return row, self.order[first[row] + within]


def tile_shape(rows: int, columns: int, element_size: int, tile_mb: float) -> tuple[int, int]:
    """Rows and columns of a tile of at most ``tile_mb`` MiB (at least 16 × 16), four times as wide as it is high."""
    entries = max(tile_mb * 2**20 / element_size, 256)
    width = min(max(int((4 * entries) ** 0.5), 16), max(columns, 1))
    return min(max(int(entries / width), 16), max(rows, 1)), width


def info_nce_stats(
    rows: FeatureBlock, columns: FeatureBlock, scale: Tensor, of_rows: Stats, of_columns: Stats, mb: float
) -> None:
    """Add this block's logits to both statistics (in place).

    Args:
        rows: [R, D]; columns: [n, D]; scale: [1]; of_rows: R of them; of_columns: n of them; mb: MiB of a tile.
    """
    scratch = Scratch(rows.x)
    for i, j, row, column, logits in positive_tiles(rows, columns, scale, None, mb, scratch):
        of_row, of_column = of_rows.of(i), of_columns.of(j)
        at_positive = logits[row, column]
        of_row.at_pos.index_add_(0, row, at_positive)
        of_column.at_pos.index_add_(0, column, at_positive)
        m_row, m_column = _take_maxima(logits, row, column, at_positive, of_row, of_column)
        e = torch.sub(logits, m_row[:, None], out=scratch.get(1, logits.shape)).exp_()
        of_row.z += e.sum(1)
        of_column.z += logits.sub_(m_column).exp_().sum(0)


def info_nce_grad(
    rows: FeatureBlock,
    columns: FeatureBlock,
    scale: Tensor,
    smooth: float,
    grad_rows: Tensor,
    grad_columns: Tensor,
    mb: float,
) -> Tensor:
    """Add this block's gradients of the features (in place); returns its gradient of the scale, a scalar.

    The gradient at logit l_ij is u_i (softmax_j − t_ij) + u_j (softmax_i − t_ji).

    Args:
        rows: [R, D]; columns: [n, D], both with their terms.
        smooth: ε / |V|. grad_rows: [R, D]; grad_columns: [n, D]. The others as in :func:`info_nce_stats`.
    """
    grad_scale = rows.x.new_zeros(())
    scratch = Scratch(rows.x)
    for i, j, row, column, logits in positive_tiles(rows, columns, scale, None, mb, scratch):
        R, C = rows.part(i), columns.part(j)
        (target_row, lse_row, u_row), (target_column, lse_column, u_column) = R.terms, C.terms
        g = torch.sub(logits, lse_row[:, None], out=scratch.get(1, logits.shape)).exp_().mul_(u_row[:, None])
        g.addcmul_(logits.sub_(lse_column).exp_(), u_column)
        if smooth:
            g.sub_(smooth * u_row[:, None]).sub_(smooth * u_column)
        g[row, column] -= target_row[row] + target_column[column]
        grad_scale += add_gradients(g, R.x, C.x, scale, grad_rows[i], grad_columns[j])
    return grad_scale


def sigmoid_block(
    rows: FeatureBlock,
    columns: FeatureBlock,
    scale: Tensor,
    bias: Tensor,
    stats: tuple[Stats, Stats] | None,
    grads: tuple[Tensor, Tensor] | None,
    mb: float,
) -> Tensor:
    """The block's Σ −log σ(z·logit), and that sum's gradients of scale and bias: [3].

    Args:
        rows: [R, D]; columns: [n, D]; scale, bias: [1]; mb: MiB of a tile.
        stats: of R rows and n columns to add to (``pos`` and ``neg``, for top-1); None: the sum is not needed either.
        grads: gradients of the features, [R, D] and [n, D], to add to; None: no gradient is needed.
    """
    sums = rows.x.new_zeros(3)
    for i, j, row, column, logits in positive_tiles(rows, columns, scale, bias, mb, Scratch(rows.x)):
        at_positive = logits[row, column]
        if stats is not None:
            _take_maxima(logits, row, column, at_positive, stats[0].of(i), stats[1].of(j))
        logits[row, column] = -at_positive  # now −z·logit: terms are softplus of it, gradients its σ
        if stats is not None:
            sums[0] += nn.functional.softplus(logits).sum()
        if grads is not None:
            g = logits.sigmoid_()
            g[row, column] *= -1
            sums[1] += add_gradients(g, rows.x[i], columns.x[j], scale, grads[0][i], grads[1][j])
            sums[2] += g.sum()
    return sums


class Scratch:
    """Memory for tiles that is reused: fresh pages for every tile cost as much as its exponentials."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.kept: dict[int, Tensor] = {}

    def get(self, slot: int, shape: tuple[int, ...]) -> Tensor:
        """An uninitialised [h, w]; the slot's previous tile is overwritten."""
        n = shape[0] * shape[1]
        if slot not in self.kept or self.kept[slot].numel() < n:
            self.kept[slot] = self.like.new_empty(n)
        return self.kept[slot][:n].view(shape)


def tiles(
    rows: FeatureBlock, columns: FeatureBlock, scale: Tensor, bias: Tensor | None, mb: float, scratch: Scratch
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows, columns and logits of one tile after the other; the logits are overwritten by the next tile's."""
    height, width = tile_shape(len(rows), len(columns), rows.x.element_size(), mb)
    for c in range(0, len(columns), width):
        j = slice(c, min(c + width, len(columns)))
        for r in range(0, len(rows), height):
            i = slice(r, min(r + height, len(rows)))
            logits = scratch.get(0, (i.stop - i.start, j.stop - j.start))
            scaled, C = rows.x[i] * scale, columns.x[j].T
            if bias is None:
                torch.mm(scaled, C, out=logits)
            else:
                torch.addmm(bias, scaled, C, out=logits)
            yield i, j, logits


def positive_tiles(
    rows: FeatureBlock, columns: FeatureBlock, scale: Tensor, bias: Tensor | None, mb: float, scratch: Scratch
) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor]]:
    """As ``tiles``, with the row and column numbers in the tile [P] of each positive before the logits."""
    start = -1
    for i, j, logits in tiles(rows, columns, scale, bias, mb, scratch):
        if j.start != start:
            start, positives = j.start, PositiveColumns(columns.ids[j])
        yield i, j, *positives.of(rows.ids[i]), logits


def _take_maxima(
    logits: Tensor, row: Tensor, column: Tensor, at_positive: Tensor, of_row: Stats, of_column: Stats
) -> tuple[Tensor, Tensor]:
    """Raise the statistics (views) to this tile's largest logits; ``logits`` is left as it was."""
    logits[row, column] = -INF
    pos = torch.full_like(of_row.pos, -INF).scatter_reduce_(0, row, at_positive, "amax")
    m_row = of_row.raise_to(pos, logits.amax(1))
    pos = torch.full_like(of_column.pos, -INF).scatter_reduce_(0, column, at_positive, "amax")
    m_column = of_column.raise_to(pos, logits.amax(0))
    logits[row, column] = at_positive
    return m_row, m_column


def add_gradients(g: Tensor, R: Tensor, C: Tensor, scale: Tensor, grad_rows: Tensor, grad_columns: Tensor) -> Tensor:
    """From the gradient at a tile's logits [h, w] to that of the features (in place) and of the scale (returned)."""
    by_row = g @ C
    grad_columns.addmm_(g.T, R * scale)
    grad_rows.addcmul_(by_row, scale)
    return (by_row * R).sum()
