"""Whether an audio file is complete, judged by the length that its container states.

libsndfile decodes what is left of a truncated file without an error. WAV, AIFF, AU and W64 state the size of their
sample data; an Ogg stream ends with a flagged page.
"""

from __future__ import annotations

_W64_DATA = b"data\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a"
_STREAMED = 0xFFFFFFFF  # written by programs that do not know the length in advance
_END_OF_STREAM = 0x04


def missing_bytes(raw: bytes) -> int:
    """How many bytes of sample data are missing at the end; 0 where the file is complete or says nothing (a stream).

    Ogg states no total: there, 1 stands for "the last page is missing".
    """
    if raw[:4] in (b"RIFF", b"RF64") and raw[8:12] == b"WAVE":
        return _riff(raw)
    if raw[:4] == b"FORM" and raw[8:12] in (b"AIFF", b"AIFC"):
        return _chunks(raw, b"SSND", "big")
    if raw[:4] == b".snd":
        start, size = (int.from_bytes(raw[i : i + 4], "big") for i in (4, 8))
        return 0 if size == _STREAMED else max(0, start + size - len(raw))
    if raw[:4] == b"riff":
        return _w64(raw)
    if raw[:4] == b"OggS":
        return int(not _ogg_ends(raw))
    return 0


def _riff(raw: bytes) -> int:
    large = None
    if raw[:4] == b"RF64" and raw[12:16] == b"ds64":
        large = int.from_bytes(raw[28:36], "little")  # dataSize, EBU Tech 3306
    return _chunks(raw, b"data", "little", large)


def _chunks(raw: bytes, wanted: bytes, order: str, large: int | None = None) -> int:
    """Bytes by which the chunk ``wanted`` reaches beyond the end of the file. Chunks start at even offsets."""
    at = 12
    while at + 8 <= len(raw):
        kind, size = raw[at : at + 4], int.from_bytes(raw[at + 4 : at + 8], "big" if order == "big" else "little")
        if kind == wanted:
            if size == _STREAMED:
                size = 0 if large is None else large
            return max(0, at + 8 + size - len(raw))
        at += 8 + size + size % 2
    return 0


def _w64(raw: bytes) -> int:
    """Sony Wave64: chunks with names of 16 bytes and sizes of 8, which count the 24 bytes of both; 8 bytes aligned."""
    at = 40
    while at + 24 <= len(raw):
        kind, size = raw[at : at + 16], int.from_bytes(raw[at + 16 : at + 24], "little")
        if kind == _W64_DATA:
            return max(0, at + size - len(raw))
        if size < 24:
            return 0
        at += (size + 7) // 8 * 8
    return 0


def _ogg_ends(raw: bytes) -> bool:
    """Whether the last page is complete and has the end-of-stream flag (RFC 3533), whatever follows it."""
    at = raw.rfind(b"OggS")
    while at >= 0:
        if at + 27 <= len(raw):
            table = raw[at + 27 : at + 27 + raw[at + 26]]
            if raw[at + 4] == 0 and len(table) == raw[at + 26]:
                whole = at + 27 + len(table) + sum(table) <= len(raw)
                return whole and bool(raw[at + 5] & _END_OF_STREAM)
        at = raw.rfind(b"OggS", 0, at)
    return False
