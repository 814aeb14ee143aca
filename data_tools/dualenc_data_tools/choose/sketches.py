"""Sketches of texts and audio clips, and which of many are near each other, however many there are.

**Texts**: MinHash (Broder 1997) of 4-grams of characters, by datasketch: 64 numbers of 32 bits. Two texts are near if
at least 48 of their 64 numbers agree, an estimate of Jaccard 0.75. Pairs are found in 16 bands of 4 numbers, one of
which two texts of Jaccard 0.75 share in 99.8 % of cases.

**Audio**: pairs of spectral peaks (Wang 2003, "An Industrial-Strength Audio Search Algorithm"): the clip at 8 kHz, a
spectrogram of 1,024-sample windows every 128, its peaks (larger than all within 12 bins and 14 windows), each with up
to 5 that follow within 2 s: 9 + 9 bits of frequency and 6 of time. Two clips are near if, at one offset in time (to 64
ms), they share at least 6 pairs and 15 % of those of the clip that has fewer. Of 100 clips each of ESC-10, Asterisk's
prompts and FSDD's digits, re-encoded as Ogg Vorbis at 60 % of the level, 100 %, 99 % and 100 % are found; of those
without their first fifth 89 %, 89 % and 78 %; and no two of the originals are taken for each other.

Memory is 256 bytes a text and up to 1.5 kB a clip, in flat arrays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dualenc.data.order import Ints
from dualenc.errors import ConfigError
from dualenc_data_tools.choose.pairs import runs
from dualenc_data_tools.sounds import open_sound
from dualenc_data_tools.sources.source import BadMedia

NUMBERS, BANDS, GRAM = 64, 16, 4
AGREE = 48
RATE, WINDOW, HOP = 8000, 1024, 128
PEAK_BINS, PEAK_STEPS, FOLLOWING, LAST_STEP = 12, 14, 5, 126
PAIRS = 256
"""Most pairs of peaks kept of a clip: those between the loudest peaks."""
SHARED, SHARE, SLACK = 6, 0.15, 4
RUN = 64
"""Items with the same bits that each is compared with; more of them are silence or boilerplate."""


class Sketches(Protocol):
    """Sketches of n items of one modality."""

    def put(self, i: int, raw: Any) -> None:
        """Take the sketch of item i. Raises BadMedia: it cannot be decoded."""
        ...

    def near_pairs(self) -> Iterator[tuple[Ints, Ints]]:
        """Pairs of near items; one may come more than once."""
        ...


class TextSketches:
    """MinHash of texts; of several captions: of all of them together."""

    def __init__(self, n: int) -> None:
        try:
            from datasketch import MinHash
        except ImportError as e:
            raise ConfigError("near texts need datasketch: pip install 'dualenc[tools]'") from e
        self._minhash: Any = MinHash
        self.numbers: NDArray[np.uint32] = np.zeros((n, NUMBERS), np.uint32)
        self.there = np.zeros(n, bool)

    def put(self, i: int, raw: Any) -> None:
        """As :meth:`Sketches.put`."""
        grams = grams_of(raw)
        if grams:
            self.numbers[i] = next(self._minhash.generator([grams], num_perm=NUMBERS, seed=1)).hashvalues
            self.there[i] = True

    def near_pairs(self) -> Iterator[tuple[Ints, Ints]]:
        """As :meth:`Sketches.near_pairs`."""
        rows = np.flatnonzero(self.there)
        yield from _equal_rows(rows, self.numbers[rows])
        width = NUMBERS // BANDS
        for band in range(BANDS):
            part = np.ascontiguousarray(self.numbers[rows, band * width : (band + 1) * width])
            key = part.view(np.dtype((np.void, part.shape[1] * 4))).ravel()
            for a, b in runs(np.unique(key, return_inverse=True)[1].reshape(-1), RUN):
                a, b = rows[a], rows[b]
                sure = (self.numbers[a] == self.numbers[b]).sum(1) >= AGREE
                yield a[sure], b[sure]


def grams_of(raw: Any) -> list[bytes]:
    """The different 4-grams of a text, or of several, with case and spaces folded; a shorter text is one gram."""
    texts = raw if isinstance(raw, list) else [raw]
    said = [" ".join((t.decode("utf-8", "replace") if isinstance(t, bytes) else str(t)).lower().split()) for t in texts]
    grams = {t[i : i + GRAM] for t in said if t for i in range(max(1, len(t) - GRAM + 1))}
    return sorted(g.encode("utf-8", "replace") for g in grams)


def _equal_rows(rows: Ints, numbers: NDArray[np.uint32]) -> Iterator[tuple[Ints, Ints]]:
    """Every row with the first one that has the same numbers, so that boilerplate is not compared with itself."""
    if not len(rows):
        return
    whole = np.ascontiguousarray(numbers).view(np.dtype((np.void, numbers.shape[1] * 4))).ravel()
    _, first, of = np.unique(whole, return_index=True, return_inverse=True)
    of = of.reshape(-1)
    yield rows[first[of]], rows


class SoundSketches:
    """Pairs of spectral peaks of clips."""

    def __init__(self, n: int) -> None:
        self._hashes: list[NDArray[np.uint32]] = [np.zeros(0, np.uint32)] * n
        self._times: list[NDArray[np.uint16]] = [np.zeros(0, np.uint16)] * n

    def put(self, i: int, raw: Any) -> None:
        """As :meth:`Sketches.put`."""
        sound = open_sound(raw)
        seconds = min(sound.seconds, 120.0)
        try:
            wave = sound.read(0, int(seconds * sound.rate), RATE)
        except ValueError as e:
            raise BadMedia("broken sound", str(e)) from e
        self._hashes[i], self._times[i] = peak_pairs(np.asarray(wave, np.float32))

    def near_pairs(self) -> Iterator[tuple[Ints, Ints]]:
        """As :meth:`Sketches.near_pairs`."""
        counts = np.array([len(h) for h in self._hashes], np.int64)
        hashes = np.concatenate(self._hashes) if len(counts) else np.zeros(0, np.uint32)
        times = np.concatenate(self._times).astype(np.int64) if len(counts) else np.zeros(0, np.int64)
        clip = np.repeat(np.arange(len(counts)), counts)
        found: list[NDArray[np.int64]] = []
        for a, b in runs(hashes.astype(np.int64), RUN):
            other = clip[a] != clip[b]
            a, b = a[other], b[other]
            swap = clip[a] > clip[b]
            a, b = np.where(swap, b, a), np.where(swap, a, b)
            found.append(np.stack([clip[a], clip[b], times[b] - times[a]], 1))
        if not found:
            return
        every = np.concatenate(found)
        for phase in (0, SLACK // 2):  # the windows of a cut clip begin elsewhere, so offsets vary by one or two
            triples, shared = np.unique(
                np.stack([every[:, 0], every[:, 1], (every[:, 2] + phase) // SLACK], 1), axis=0, return_counts=True
            )
            fewer = np.minimum(counts[triples[:, 0]], counts[triples[:, 1]])
            sure = (shared >= SHARED) & (shared >= SHARE * fewer)
            yield triples[sure, 0], triples[sure, 1]


def peak_pairs(wave: NDArray[np.float32]) -> tuple[NDArray[np.uint32], NDArray[np.uint16]]:
    """Hashes [p] of pairs of peaks of a clip [T] at 8 kHz, and at which window [p] each begins."""
    if len(wave) < WINDOW:
        wave = np.pad(wave, (0, WINDOW - len(wave)))
    frames = np.lib.stride_tricks.sliding_window_view(wave, WINDOW)[::HOP]
    power = np.abs(np.fft.rfft(frames * np.hanning(WINDOW).astype(np.float32), axis=1))[:, : WINDOW // 2]
    level = np.log(power + 1e-6)
    highest = level
    for axis, reach in ((0, PEAK_STEPS), (1, PEAK_BINS)):
        padded = np.pad(highest, [(reach, reach) if k == axis else (0, 0) for k in (0, 1)], constant_values=-np.inf)
        highest = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1, axis).max(-1)
    peak = (level == highest) & (level > np.median(level) + 1) & (power > 1e-2 * power.max())
    step, tone = np.nonzero(peak)
    out: list[tuple[float, int, int]] = []
    for i in range(len(step)):
        after = np.flatnonzero((step > step[i]) & (step <= step[i] + LAST_STEP))[:FOLLOWING]
        for j in after.tolist():
            code = (int(tone[i]) << 15) | (int(tone[j]) << 6) | int(step[j] - step[i]) // 2
            loud = float(min(level[step[i], tone[i]], level[step[j], tone[j]]))
            out.append((-loud, int(step[i]), code))
    kept = sorted(sorted(out)[:PAIRS], key=lambda p: (p[1], p[2]))
    return np.array([p[2] for p in kept], np.uint32), np.array([min(p[1], 65535) for p in kept], np.uint16)


SKETCHES: dict[str, type[TextSketches] | type[SoundSketches]] = {"text": TextSketches, "audio": SoundSketches}
"""Modality → sketches of its items; images have theirs in :mod:`dualenc_data_tools.choose.fingerprints`."""


def joined(parts: Sequence[Any]) -> Any:
    """Sketches one after another, all of one kind."""
    first = parts[0]
    if isinstance(first, TextSketches):
        texts = TextSketches(0)
        texts.numbers = np.concatenate([p.numbers for p in parts])
        texts.there = np.concatenate([p.there for p in parts])
        return texts
    sounds = SoundSketches(0)
    for p in parts:
        sounds._hashes += p._hashes
        sounds._times += p._times
    return sounds
