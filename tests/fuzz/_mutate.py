"""Seeded damage: the same number gives the same bytes, so a case that fails can be looked at again."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1)
WORDS = (b"0", b"-1", b"99999999999", b"1e309", b"NaN", b"null", b"[]", b"{}", b'""', b"true", b"\xed\xa0\x80", b"\x00")


def mutated(seed: int, samples: Sequence[bytes]) -> bytes:
    """One of ``samples``, damaged in one to four ways; half of the time near its beginning, where headers are."""
    rng = random.Random(seed)
    raw = bytearray(rng.choice(samples))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not raw:
            break
        near = min(len(raw), 512) if rng.random() < 0.5 else len(raw)
        rng.choice(WAYS)(rng, raw, rng.randrange(near), samples)
    return bytes(raw)


def flip(rng: random.Random, raw: bytearray, at: int, _: Sequence[bytes]) -> None:
    raw[at] ^= 1 << rng.randrange(8)


def overwrite(rng: random.Random, raw: bytearray, at: int, _: Sequence[bytes]) -> None:
    n = rng.choice((1, 2, 4, 16, 100))
    raw[at : at + n] = rng.randbytes(min(n, len(raw) - at))


def number(rng: random.Random, raw: bytearray, at: int, _: Sequence[bytes]) -> None:
    n = rng.choice((1, 2, 4, 8))
    value = rng.choice(EXTREMES) % (1 << (8 * n))
    raw[at : at + n] = value.to_bytes(n, rng.choice(("little", "big")))


def cut(rng: random.Random, raw: bytearray, at: int, _: Sequence[bytes]) -> None:
    del raw[at:]


def remove(rng: random.Random, raw: bytearray, at: int, _: Sequence[bytes]) -> None:
    del raw[at : at + rng.choice((1, 2, 8, 64, 1000))]


def repeat(rng: random.Random, raw: bytearray, at: int, _: Sequence[bytes]) -> None:
    n = rng.choice((1, 4, 64, 512))
    raw[at:at] = raw[at : at + n] * rng.choice((1, 2, 50))


def splice(rng: random.Random, raw: bytearray, at: int, samples: Sequence[bytes]) -> None:
    other = rng.choice(samples)
    start = rng.randrange(len(other) or 1)
    raw[at : at + rng.choice((0, 8, 64))] = other[start : start + rng.choice((4, 32, 512))]


def word(rng: random.Random, raw: bytearray, at: int, _: Sequence[bytes]) -> None:
    raw[at : at + rng.choice((0, 1, 4))] = rng.choice(WORDS)


WAYS: tuple[Callable[[random.Random, bytearray, int, Sequence[bytes]], None], ...] = (
    *(flip, flip, overwrite, number, number, cut, remove, repeat, splice, word),
)
