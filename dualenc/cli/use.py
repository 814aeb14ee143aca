"""Commands that use a model on the user's files: classify, compress, index, search."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from dualenc.cli.app import Debug, DeviceOption, app
from dualenc.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dualenc.api.search_index import Hit

ModelArgument = Annotated[str, typer.Argument(help="A MODEL, as in dualenc eval.")]
ModalityOption = Annotated[
    str | None, typer.Option("--modality", help="Modality of the files; default: by file extension.")
]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, help="Number of items encoded at once.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object per line and result.")]


@app.command()
def classify(
    model: ModelArgument,
    files: Annotated[list[str], typer.Argument(help="Images, audio …: files, URLs, or folders of them.")],
    names: Annotated[
        str, typer.Option("--names", help='Class names, comma-separated ("cat,dog"), or a .txt file with one per line.')
    ],
    templates: Annotated[
        list[str] | None,
        typer.Option(
            "--templates",
            help="Prompt template, such as 'a photo of a {}.'; may be repeated; or a .txt file with one per line.",
        ),
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="How many classes to show per file.")] = 3,
    modality: ModalityOption = None,
    batch_size: BatchOption = 64,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    debug: Debug = False,
) -> None:
    """Zero-shot classification of files: which of the names fits each best.

    Exit code 3 if a file could not be read; the others are still classified.
    """
    classes = _words(names, "--names")
    worded = [t for text in templates or [] for t in (_lines(text, "--templates") if _is_list(text) else [text])]
    from dualenc.api.model import load_model

    loaded = load_model(model, device)
    options: dict[str, Any] = {"modality": modality, "batch_size": batch_size, "progress": _shown(as_json)}
    done = loaded.classify(files, classes, worded or None, skip=True, **options)
    if as_json:
        for item, row in zip(done.items, done.top(len(classes)), strict=True):
            print(json.dumps({"file": item, "name": row[0][0], "probabilities": dict(row)}, ensure_ascii=False))
    else:
        shown = min(top, len(classes))
        table = Table(Column("file", overflow="fold"), *_columns(shown))
        for item, row in zip(done.items, done.top(shown), strict=True):
            table.add_row(escape(str(item)), *(cell for name, p in row for cell in (escape(name), f"{100 * p:.1f}")))
        Console().print(table)
    _end(done.skipped)


@app.command()
def search(
    model: ModelArgument,
    folder: Annotated[str, typer.Argument(help="A folder of images, audio …, or one that dualenc index wrote.")],
    query: Annotated[str, typer.Argument(help='What to look for: "a red bike".')],
    k: Annotated[int, typer.Option("-k", min=1, help="How many files to show.")] = 5,
    modality: ModalityOption = None,
    batch_size: BatchOption = 64,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    debug: Debug = False,
) -> None:
    """Find the files of a folder, or the items of an index, that a text describes best.

    Exit code 3 if a file could not be read; the others are still searched.
    """
    if "://" not in folder and not Path(folder).expanduser().exists():
        raise DataError(f"There is no folder {folder}.")
    from dualenc.api.model import load_model

    loaded = load_model(model, device)
    if (Path(folder).expanduser() / "index.json").is_file():
        found = loaded.search_index(Path(folder).expanduser(), query, k)
        _show_hits(found.hits, query, found.total, found.modality, as_json)
        return
    index = loaded.index(folder, modality=modality, batch_size=batch_size, progress=_shown(as_json))
    hits = loaded.search(index, query, k) if len(index) else []
    _show_hits(hits, query, len(index), index.modality, as_json)
    _end(index.skipped)


@app.command("index")
def index_(
    features: Annotated[Path, typer.Argument(help="Features that dualenc embed wrote.")],
    out: Annotated[Path, typer.Option("--out", help="Output folder.")],
    modality: Annotated[
        str | None, typer.Option("--modality", help="Modality of the items; default: the only one there is.")
    ] = None,
    dim: Annotated[
        int | None, typer.Option("--dim", min=1, help="Keep the first dimensions only (Matryoshka).")
    ] = None,
    precision: Annotated[
        str, typer.Option("--precision", help="float, int8 (a byte a dimension) or binary (a bit a dimension).")
    ] = "float",
    kind: Annotated[
        str, typer.Option("--kind", help="exact, or hnsw: a graph that usearch searches (the index extra).")
    ] = "exact",
    debug: Debug = False,
) -> None:
    """Build a search index of stored features; dualenc search MODEL INDEX "words" reads it."""
    from dualenc.features.disk_index import build_index
    from dualenc.features.store import FeatureStore
    from dualenc.terminal import say

    names = list(FeatureStore(features).description.modalities)
    if modality is None and len(names) != 1:
        raise ConfigError(f"--modality: {features} holds {', '.join(names)}; choose one")
    index = build_index(features, out, modality or names[0], dim, precision, kind)
    bytes_each = index.gallery.bytes / max(len(index), 1)
    said = {"out": str(out), "items": len(index), **{k: index.about[k] for k in ("dim", "precision", "kind")}}
    say(json.dumps({**said, "bytes_per_item": bytes_each}))


@app.command()
def compress(
    model: ModelArgument,
    task: Annotated[str, typer.Option("--task", help="A retrieval task: its name or YAML file.")],
    out: Annotated[Path, typer.Option("--out", help="Output folder for compression.json and compression.html.")],
    dims: Annotated[str, typer.Option("--dims", help="Widths, comma-separated; the full one is added.")] = "",
    batch_size: BatchOption = 64,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Do not read or write the feature cache.")] = False,
    device: DeviceOption = "auto",
    debug: Debug = False,
) -> None:
    """Measure retrieval with compressed features: every width at float, int8 and binary, with rescoring."""
    from dualenc.api.runs import resolve_tasks
    from dualenc.cli.evaluate import feature_cache
    from dualenc.distributed.world import close_world, init_world
    from dualenc.terminal import say
    from dualenc_evals.studies.compression import compression, markdown

    try:
        widths = [int(d) for d in dims.split(",") if d.strip()]
    except ValueError as e:
        raise ConfigError(f"--dims: {dims!r} is not a list of widths; write for example 32,64,128") from e
    (chosen,) = resolve_tasks([task])
    world = init_world(device, 600, None)
    try:
        cache = None if no_cache else feature_cache()
        done = compression(model, chosen, widths, out, world, str(world.device), batch_size, cache)
        if world.rank == 0:
            say(markdown(done))
    finally:
        close_world(world)


def _show_hits(hits: Sequence[Hit], query: str, total: int, modality: str, as_json: bool) -> None:
    if as_json:
        for hit in hits:
            print(json.dumps({"file": hit.item, "cosine": hit.score}, ensure_ascii=False))
    else:
        title = f"{escape(query)}: best of {total:,} {modality} files"
        table = Table(
            Column("cosine", justify="right"), Column("file", overflow="fold"), title=title, title_justify="left"
        )
        for hit in hits:
            table.add_row(f"{hit.score:.4f}", escape(str(hit.item)))
        Console().print(table)


def _columns(shown: int) -> Sequence[Column]:
    ranks = ["best"] + [f"no. {i}" for i in range(2, shown + 1)]
    return [c for rank in ranks for c in (Column(rank), Column("%", justify="right"))]


def _shown(as_json: bool) -> bool:
    """Whether to show a progress bar: only on a terminal."""
    return sys.stderr.isatty() and not as_json


def _is_list(text: str) -> bool:
    return text.endswith(".txt") and "{}" not in text


def _words(text: str, option: str) -> list[str]:
    words = _lines(text, option) if _is_list(text) else [w.strip() for w in text.split(",") if w.strip()]
    if len(words) < 2:
        raise ConfigError(f'{option}: {text!r} names {len(words)} class(es); give two or more, such as "cat,dog"')
    return words


def _lines(path: str, option: str) -> list[str]:
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"{option}: there is no file {path}")
    return [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]


def _end(skipped: Mapping[str | int, str]) -> None:
    """Print what could not be read; the exit code is then that of a DataError."""
    stderr = Console(stderr=True)
    for item, why in skipped.items():
        stderr.print(f"[yellow]not read:[/] {escape(str(item))}: {escape(why)}", highlight=False, soft_wrap=True)
    if skipped:
        raise typer.Exit(DataError.exit_code)
