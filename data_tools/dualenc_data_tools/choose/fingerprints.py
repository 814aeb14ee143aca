"""Fingerprints of items, and which of many are equal or near each other.

**Exact**: 64 bits of BLAKE2b over the decoded content: pixels of an image whatever file format holds them, samples of
a clip, a text with case and spaces folded. **Near**, for images: difference hashes of 8 × 8 and 16 × 16 cells (1 where
the next cell is brighter) and the mean colours of 4 × 4 cells. Two images are near if at most 5 of the 64 bits, 40 of
the 256 bits, and no colour by more than 12 of 255, differ. Of 600 photos of 112 px that were shrunk by a fifth and
written as JPEG of quality 60, 97 % stay within 5 bits, 99 % within 32 of 256; any two of them differ in 9 and 72.

Memory is 98 bytes an item, in flat arrays. Near pairs are found through 56 tables: 64 bits in 8 bands, of which two
that differ in 5 bits share at least 3 whole. So no such pair is missed, unless over ``RUN`` items share those bits.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualenc.data.order import Ints
from dualenc_data_tools import images, sounds
from dualenc_data_tools.choose.sketches import Sketches
from dualenc_data_tools.choose.sketches import joined as joined_sketches
from dualenc_data_tools.sources.source import BadMedia

Bits = NDArray[np.uint64]
BANDS = (8,) * 8
SHARED = 3
NEAR_BITS, NEAR_FINE, NEAR_COLOUR = 5, 40, 12
RUN = 256
"""Items with the same bits in three bands that each is compared with; more of them are all but blank images."""


@dataclass(frozen=True, slots=True)
class Print:
    """The fingerprint of one item. ``fine`` [5]: 64 bits and 4 × 64 bits; ``colour`` [48]. Both None for other items
    than images."""

    exact: int
    fine: Bits | None = None
    colour: NDArray[np.uint8] | None = None


def of_image(raw: bytes) -> Print:
    """Raises BadMedia: it cannot be decoded."""
    from PIL import Image

    image = images.decode(images.open_picture(raw))
    exact = _digest(repr(image.size).encode() + image.tobytes())
    grey = image.convert("L")
    words = []
    for cells in (8, 16):
        small = np.asarray(grey.resize((cells + 1, cells), Image.Resampling.BOX), np.int16)
        words.append(np.packbits(small[:, 1:] > small[:, :-1]).view(">u8").astype(np.uint64))
    colour = np.asarray(image.resize((4, 4), Image.Resampling.BOX), np.uint8).reshape(-1)
    return Print(exact, np.concatenate(words), colour)


def of_audio(raw: bytes) -> Print:
    """Raises BadMedia: it cannot be decoded."""
    return Print(int.from_bytes(sounds.digest(sounds.open_sound(raw)), "little"))


def of_text(value: Any) -> Print:
    """Of one caption or a list of them."""
    texts = value if isinstance(value, list) else [value]
    words = [t.decode("utf-8", "replace") if isinstance(t, bytes) else str(t) for t in texts]
    return Print(_digest("\n".join(sorted(" ".join(t.lower().split()) for t in words)).encode("utf-8", "replace")))


PRINTS: dict[str, Callable[[Any], Print]] = {"image": of_image, "audio": of_audio, "text": of_text}
"""Modality → fingerprint of a raw item."""


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


class Prints:
    """Fingerprints of n items as arrays; an item that cannot be decoded takes part in no pair.

    Args:
        sketches: of near texts or clips (:mod:`dualenc_data_tools.choose.sketches`); near images need none.
    """

    def __init__(self, n: int, sketches: Sketches | None = None) -> None:
        self.sketches = sketches
        self.exact: Bits = np.zeros(n, np.uint64)
        self.fine: Bits = np.zeros((n, 5), np.uint64)
        self.colour = np.zeros((n, 48), np.uint8)
        self.there = np.zeros(n, bool)
        self.near = np.zeros(n, bool)

    def __len__(self) -> int:
        return len(self.exact)

    def put(self, i: int, of: str, raw: Any) -> str:
        """Take the fingerprint of item i; why there is none, or ''."""
        try:
            got = PRINTS[of](raw)
        except BadMedia as e:
            return f"{e.reason}: {e.detail}"
        self.exact[i], self.there[i] = got.exact, True
        if self.sketches is not None:
            self.sketches.put(i, raw)
        if got.fine is not None and got.colour is not None:
            self.fine[i], self.colour[i], self.near[i] = got.fine, got.colour, True
        return ""

    @classmethod
    def joined(cls, parts: Sequence[Prints]) -> Prints:
        """One after another."""
        out = cls(0)
        for name in ("exact", "fine", "colour", "there", "near"):
            setattr(out, name, np.concatenate([getattr(p, name) for p in parts]))
        if all(p.sketches is not None for p in parts):
            out.sketches = joined_sketches([p.sketches for p in parts])
        return out

    def equal_pairs(self) -> Iterator[tuple[Ints, Ints]]:
        """Pairs with the same exact fingerprint: each item and the next that has it."""
        rows = np.flatnonzero(self.there)
        order = rows[np.argsort(self.exact[rows], kind="stable")]
        same = self.exact[order[1:]] == self.exact[order[:-1]]
        yield order[:-1][same], order[1:][same]

    def near_pairs(self) -> Iterator[tuple[Ints, Ints]]:
        """Pairs of near items; one may come more than once."""
        if self.sketches is not None:
            yield from self.sketches.near_pairs()
            return
        rows = np.flatnonzero(self.near)
        whole = np.concatenate([self.fine[rows].view(np.uint8), self.colour[rows]], 1)
        signature = whole.view(np.dtype((np.void, whole.shape[1]))).ravel()
        _, kept, of = np.unique(signature, return_index=True, return_inverse=True)
        yield rows[kept[of]], rows  # equal ones once, so that many blank images are not compared with each other
        rows = rows[kept]
        code = self.fine[rows, 0]
        for mask in _masks():
            key = code & np.uint64(mask)
            order = np.argsort(key, kind="stable")
            key = key[order]
            here = np.arange(len(key))
            for ahead in range(1, RUN + 1):
                here = here[here + ahead < len(key)]
                here = here[key[here] == key[here + ahead]]
                if not len(here):
                    break
                close = popcount(code[order[here]] ^ code[order[here + ahead]]) <= NEAR_BITS
                a, b = rows[order[here[close]]], rows[order[here[close] + ahead]]
                if len(a):
                    sure = self._alike(a, b)
                    yield a[sure], b[sure]

    def _alike(self, a: Ints, b: Ints) -> NDArray[np.bool_]:
        fine = popcount(self.fine[a, 1:] ^ self.fine[b, 1:]).sum(1) <= NEAR_FINE
        colour = np.abs(self.colour[a].astype(np.int16) - self.colour[b]).max(1) <= NEAR_COLOUR
        alike: NDArray[np.bool_] = fine & colour
        return alike


def _masks() -> list[int]:
    """The bits of every three bands."""
    ends = np.cumsum(BANDS).tolist()
    bands = [((1 << end) - 1) ^ ((1 << (end - width)) - 1) for end, width in zip(ends, BANDS, strict=True)]
    return [a | b | c for a, b, c in itertools.combinations(bands, SHARED)]


def popcount(x: Bits) -> Ints:
    """Ones of each word (NumPy 1 has no bitwise_count)."""
    m1, m2, m4 = (np.uint64(m) for m in (0x5555555555555555, 0x3333333333333333, 0x0F0F0F0F0F0F0F0F))
    x = x - ((x >> np.uint64(1)) & m1)
    x = (x & m2) + ((x >> np.uint64(2)) & m2)
    x = (x + (x >> np.uint64(4))) & m4
    out: Ints = ((x * np.uint64(0x0101010101010101)) >> np.uint64(56)).astype(np.int64)
    return out


class EqualGroups:
    """Items joined by pairs; the first of a group, in stored order, stands for it."""

    def __init__(self, n: int) -> None:
        self.parent = np.arange(n)

    def join(self, pairs: Iterator[tuple[Ints, Ints]]) -> None:
        """Join the items of every pair."""
        for a, b in pairs:
            a, b = self.parent[a], self.parent[b]
            new = a != b
            for i, j in zip(a[new].tolist(), b[new].tolist(), strict=True):
                x, y = self._root(i), self._root(j)
                self.parent[max(x, y)] = min(x, y)

    def first(self) -> Ints:
        """Of every item, the first of its group."""
        while True:
            above = self.parent[self.parent]
            if np.array_equal(above, self.parent):
                return self.parent
            self.parent = above

    def _root(self, i: int) -> int:
        while self.parent[i] != i:
            self.parent[i] = self.parent[self.parent[i]]
            i = int(self.parent[i])
        return i
