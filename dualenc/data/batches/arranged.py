"""What a batch plan is, and the arithmetic that most of them share: an epoch as a line of samples cut into batches.

A plan arranges the samples of *one* source; :class:`dualenc.data.batches.composed.Composed` gives whole batches to the
sources in their shares. Nothing here knows ranks or workers, and nothing is replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from dualenc.config import Component, Section, settings_as
from dualenc.data.batches.facts import Facts
from dualenc.data.order import Ints, SourceOrder, Words, derive_key, hashed, mix64, permute
from dualenc.errors import ConfigError
from dualenc.registry import Registry

Remainder = Literal["mix", "leave_out"]


class BatchPlan:
    """Composes the batches of one source.

    Subclasses set ``Config`` and define :meth:`batch`; most derive from :class:`Arranged` instead. An instance must be
    a pure function of its arguments: on other ranks, in workers and after a restart it gives the same batches.

    Args:
        config: of the class ``Config``.
        order: the source's own order: its name, shard counts, n and key.
        size: samples of a global batch.
        facts: what the plan may ask about the samples of the source: values and ids by sample number.
        which: the source's number in the recipe.

    Attributes:
        per_epoch: samples of one epoch of the source; fewer than n if the plan leaves some out.
        scattered: whether a batch takes samples from anywhere in the source, whatever the shards they are in.
    """

    Config: ClassVar[type[Section]] = Section
    scattered: ClassVar[bool] = True

    def __init__(self, config: Any, order: SourceOrder, size: int, facts: Facts, which: int) -> None:
        self.config, self.order, self.size, self.which = config, order, size, which
        self.per_epoch = order.n

    def batch(self, k: int, slots: Ints) -> tuple[Ints, Ints]:
        """The samples of the source's k-th batch in ``slots``: numbers in the source (its shards end to end, in the
        order of their list), and the epoch of each."""
        raise NotImplementedError

    def describe(self) -> str:
        """The plan and its counts, as --dry-run prints them."""
        return f"batches of {self.size:,}, {self.order.n:,} samples"

    def token(self) -> str:
        """A digest of what the plan read, besides its settings."""
        return ""


batch_plans: Registry[Any] = Registry("batch plan", "dualenc.batch_plans", needs=("Config", "batch", "describe"))
"""Name → a class like :class:`BatchPlan`."""


def chosen_batches(batches: Component) -> tuple[Callable[..., BatchPlan], Any]:
    """The class that ``data.batches`` names, and its settings.

    Raises:
        ConfigError: an unknown plan, with the nearest, or a setting it refuses.
    """
    try:
        factory = batch_plans[batches.name]
    except ConfigError as e:
        raise ConfigError(f"data.batches: {e}") from e
    return factory, settings_as(factory.Config, batches.settings, "data.batches")


class Arranged(BatchPlan):
    """A plan whose epoch is a line of ``per_epoch`` samples, the first ``whole`` batches of which belong together.

    The line is cut into batches and these are shuffled. Where an epoch is no multiple of the batch, its first and last
    samples share a batch with the neighbouring epochs; they are taken from the end of the line, after the ``whole``
    batches, and so every sample is seen once an epoch.

    Subclasses set ``whole`` and ``per_epoch`` and define :meth:`line`.
    """

    whole = 0

    def line(self, epoch: int, at: Ints) -> Ints:
        """The samples at places ``at`` of the epoch's line."""
        raise NotImplementedError

    def whole_in(self, epoch: int) -> int:
        """How many batches of the epoch's line belong together."""
        return self.whole

    def batch(self, k: int, slots: Ints) -> tuple[Ints, Ints]:
        q = k * self.size + slots
        epochs = q // self.per_epoch
        sample = np.empty_like(q)
        for one in np.unique(epochs).tolist():
            here = epochs == one
            sample[here] = self.line(one, self._places(one, q[here] - one * self.per_epoch))
        return sample, epochs

    def _places(self, epoch: int, p: Ints) -> Ints:
        """Where place ``p`` of the epoch is on its line: a bijection of range(per_epoch)."""
        n, size = self.per_epoch, self.size
        head = min(-epoch * n % size, n)  # in a batch with the end of the epoch before
        batches, tail = divmod(n - head, size)
        whole = min(self.whole_in(epoch), batches)
        if n - whole * size < head + tail:
            whole -= 1
        of = (p - head) // size
        body = (p >= head) & (of < batches)
        out = np.where(p < head, whole * size + p, p)
        shuffled = permute(derive_key(self.order.key, 3, epoch), batches, of[body])
        j = (p[body] - head) % size
        out[body] = np.where(shuffled < whole, shuffled * size + j, shuffled * size + head + j)
        return out


def group_starts(labels: Ints) -> tuple[Ints, Ints, Ints]:
    """Samples sorted by label, the labels in that order, and where each group starts, with n at the end."""
    order = np.argsort(labels, kind="stable")
    values, starts = np.unique(labels[order], return_index=True)
    return order, values, np.append(starts, len(labels)).astype(np.int64)


_ROUNDS = 8


def within(key: int, epoch: int, groups: Ints, i: Ints, sizes: Ints) -> Ints:
    """Place ``i`` of each group's own permutation in an epoch: :func:`dualenc.data.order.permute`'s network with a key
    and a size for every element."""
    size, keys = sizes[groups], hashed(derive_key(key, 4, epoch), groups)
    bits = np.ceil(np.log2(np.maximum(size, 2))).astype(np.int64)  # exact: sizes are below 2^40
    low = (bits // 2).astype(np.uint64)
    ones = np.uint64(1)
    low_mask, high_mask = (ones << low) - ones, (ones << (bits - bits // 2).astype(np.uint64)) - ones
    out = i.astype(np.uint64)
    todo = np.flatnonzero(size > 1)
    while len(todo):
        x, k, down = out[todo], keys[todo], low[todo]
        left, right = x >> down, x & low_mask[todo]
        for turn in range(_ROUNDS):
            left = left ^ (mix64(right + _round_key(k, 2 * turn)) & high_mask[todo])
            right = right ^ (mix64(left + _round_key(k, 2 * turn + 1)) & low_mask[todo])
        x = (left << down) | right
        out[todo] = x
        todo = todo[x >= size[todo].astype(np.uint64)]
    return out.astype(np.int64)


def _round_key(keys: Words, turn: int) -> Words:
    return mix64(keys ^ mix64(keys + np.uint64(turn)))


def remainder_field() -> Any:
    """The setting of plans whose groups are no multiples of what they take at once."""
    return Field(
        default="mix",
        description="mix: what remains of the groups is put into mixed batches: an epoch has every sample once; "
        "leave_out: an epoch is without it, other samples in each",
    )


def check_enough(count: int, what: str, order: SourceOrder, size: int) -> None:
    """Refuse a plan that would compose no batch at all.

    Raises:
        ConfigError: naming the source.
    """
    if count <= 0:
        raise ConfigError(
            f"data.batches: source {order.name!r} has no {what}, and remainder: leave_out leaves all of its "
            f"{order.n:,} samples out of batches of {size:,}; use remainder: mix or a smaller batch.size"
        )


def quantiles(sizes: Sequence[int] | Ints) -> str:
    """Smallest, middle and largest of some counts."""
    ordered = np.sort(np.asarray(sizes))
    return f"{ordered[0]:,} / {ordered[len(ordered) // 2]:,} / {ordered[-1]:,}"
