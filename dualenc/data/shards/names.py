"""Names of shards: expanded patterns, and short names that do not depend on where the shards are."""

from __future__ import annotations

import glob
import hashlib
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from dualenc.data.shards.listing import Texts
from dualenc.data.shards.remote import is_local, is_pipe, local_path
from dualenc.errors import DataError

_MOST_NAMES = 1_000_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"^(\d+)\.\.(\d+)(?:\.\.(\d+))?$")
_TAR = re.compile(r"[^\s/'\"=]+\.tar\b")


def expand(shards: str | Sequence[str]) -> list[str]:
    """All shard URLs that a pattern or a list of patterns names, in order.

    ``{000..012}``, ``{000..012..2}`` and ``{a,b}`` are expanded, also in URLs and ``pipe:`` commands; ``*`` and ``?``
    in local paths list the files that are there, sorted. Shell variables in a pipe (``${X}``) are left alone.

    Raises:
        DataError: if no shard is named, a glob finds no file, a shard is listed twice, or more than a million are.
    """
    out: list[str] = []
    for pattern in [shards] if isinstance(shards, str) else shards:
        named = _braces(pattern.strip())
        if not glob.has_magic(pattern):
            out += filter(None, named)
            continue
        for url in named:
            if is_local(url) and glob.has_magic(url) and not Path(local_path(url)).exists():
                found = sorted(glob.glob(local_path(url)))
                if not found:
                    raise DataError(f"No file matches {url}.")
                out += found
            elif url:
                out.append(url)
    if not out:
        raise DataError(f"{shards!r} names no shard.")
    seen: set[str] = set()
    if len(set(out)) < len(out):
        twice = next(url for url in out if url in seen or seen.add(url))  # type: ignore[func-returns-value]
        raise DataError(f"The shard {twice} is listed twice.")
    return out


def _braces(pattern: str) -> list[str]:
    """The pattern with every pair of braces expanded, the first varying slowest."""
    pieces: list[Sequence[str]] = []
    count, at = 1, 0
    for match in _BRACES.finditer(pattern):
        words = None if pattern[: match.start()].endswith("$") else _alternatives(match.group(1), pattern)
        if words is None:
            continue
        pieces += [[pattern[at : match.start()]], words]
        count, at = count * len(words), match.end()
        if count > _MOST_NAMES:
            raise DataError(
                f"{pattern} names {count:,} or more files, and at most {_MOST_NAMES:,} can be read together: "
                "write a narrower {FIRST..LAST}."
            )
    pieces.append([pattern[at:]])
    out = ["".join(words) for words in itertools.product(*pieces)]
    # Braces inside braces, {a,b{0..3}}: the inner ones have just been expanded, the outer ones are next.
    if len(pieces) == 1 or not any(_BRACES.search(p) for p in out[:1]):
        return out
    return list(dict.fromkeys(u for p in out for u in _braces(p)))


def _alternatives(inner: str, pattern: str) -> Sequence[str] | None:
    """What ``{inner}`` expands to; None where the braces mean something else."""
    run = _RANGE.match(inner)
    if run is None:
        return inner.split(",") if "," in inner else None
    first, last = run.group(1), run.group(2)
    if max(len(g) for g in run.groups() if g) > 18:
        raise DataError(f"{pattern}: the numbers in {{{inner[:60]}}} are too large to count files with.")
    step = int(run.group(3) or 1)
    if step == 0 or int(last) < int(first):
        raise DataError(f"{pattern}: {{{inner}}} is an empty range; write {{FIRST..LAST}} with FIRST ≤ LAST.")
    numbers = range(int(first), int(last) + 1, step)
    if len(numbers) > _MOST_NAMES:
        raise DataError(
            f"{pattern}: {{{inner}}} names {len(numbers):,} files, and at most {_MOST_NAMES:,} can be read together: "
            "write a narrower {FIRST..LAST}."
        )
    width = len(first) if len(first) == len(last) or first.startswith("0") else 0
    return [str(i).zfill(width) for i in numbers]


def short_names(urls: Sequence[str]) -> Texts:
    """A name for each shard, the same wherever the shards are: base name, with folders where those collide."""
    for depth in range(1, 8):
        names = Texts("/".join(_without_query(u).rsplit("/", depth)[-depth:]) for u in urls)
        if names.repeated() is None:
            return names
    return Texts(f"{_without_query(u).split('/')[-1]}-{hash_of(u)}" for u in urls)


def _without_query(url: str) -> str:
    """What names a shard: its path, or the archive that a command reads."""
    return (_TAR.findall(url) or [hash_of(url)])[-1] if is_pipe(url) else url.split("?")[0].rstrip("/")


def hash_of(text: str) -> str:
    """Twelve hexadecimal digits that stand for a URL in a file name."""
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
