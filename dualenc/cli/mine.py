"""dualenc mine: clusters and neighbours of stored features for batch plans, exemplars for replay, the modality gap."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dualenc.cli.app import Debug, app
from dualenc.terminal import PatientConsole

mine_app = typer.Typer(
    help="Find clusters, neighbours and exemplars for later runs, in stored features.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(mine_app, name="mine")

Features = Annotated[
    list[Path],
    typer.Argument(help="Folders that dualenc embed MODEL SHARDS wrote; of several models, their features end to end."),
]
Modalities = Annotated[
    str,
    typer.Option("--modalities", help="Comma-separated; default: all that are stored, with the mean of their cosines."),
]


@mine_app.command("clusters")
def clusters(
    features: Features,
    out: Annotated[Path, typer.Option("--out", help="File to write.")] = Path("clusters.safetensors"),
    number: Annotated[int, typer.Option("--clusters", min=1, help="Number of clusters.")] = 10,
    modalities: Modalities = "",
    seed: Annotated[int, typer.Option("--seed", help="Of the first centres.")] = 0,
    debug: Debug = False,
) -> None:
    """Write the k-means cluster of every sample, for data.batches: {name: clusters, files: FILE}."""
    from dualenc.features.mining import mine_clusters

    sizes = mine_clusters(features, _words(modalities), number, out, seed)
    said = f"{sum(sizes):,} samples in {len(sizes):,} clusters of {sizes[-1]:,} to {sizes[0]:,}"
    PatientConsole().print(f"{out}: {said}", highlight=False, markup=False, soft_wrap=True)


@mine_app.command("neighbors")
def neighbors(
    features: Features,
    out: Annotated[Path, typer.Option("--out", help="File to write.")] = Path("neighbors.safetensors"),
    k: Annotated[int, typer.Option("-k", min=1, help="Neighbours of each sample.")] = 32,
    max_cosine: Annotated[
        float, typer.Option("--max-cosine", help="Leave out neighbours above this cosine: near-duplicates.")
    ] = 1.0,
    modalities: Modalities = "",
    debug: Debug = False,
) -> None:
    """Write the nearest samples of every sample, for data.batches: {name: hard_negatives, files: FILE}, or bags."""
    from dualenc.features.mining import mine_neighbors

    n, mean = mine_neighbors(features, _words(modalities), k, out, max_cosine)
    said = f"{n:,} samples, {k} neighbours each; mean cosine to the nearest {mean:.3f}"
    PatientConsole().print(f"{out}: {said}", highlight=False, markup=False, soft_wrap=True)


@mine_app.command("exemplars")
def exemplars(
    shards: Annotated[list[str], typer.Argument(help="Shards: paths, brace patterns, URLs.")],
    out: Annotated[str, typer.Option("--out", help="Name of the selection (data.sources.N.selection), or its path.")],
    label: Annotated[str, typer.Option("--label", help="The class of a sample: json:KEY, or the ending of a member.")],
    k: Annotated[int, typer.Option("-k", min=1, help="Samples of each class.")] = 10,
    features: Annotated[
        list[Path] | None,
        typer.Option("--features", help="Choose by herding on what dualenc embed MODEL SHARDS wrote; else by chance."),
    ] = None,
    modalities: Modalities = "",
    seed: Annotated[int, typer.Option("--seed", help="Of the draw.")] = 0,
    debug: Debug = False,
) -> None:
    """Write a selection of a few samples of every class, to be replayed while later classes are learned."""
    from dualenc.features.exemplars import keep_exemplars

    path, counts = keep_exemplars(shards, label, k, out, features or [], _words(modalities), seed)
    said = f"{sum(counts):,} samples of {len(counts):,} classes, {counts[-1]:,} to {counts[0]:,} of each"
    PatientConsole().print(f"{path}: {said}", highlight=False, markup=False, soft_wrap=True)


@mine_app.command("gap")
def gap(
    features: Annotated[Path, typer.Argument(help="Folder that dualenc embed MODEL SHARDS wrote.")],
    modalities: Annotated[str, typer.Option("--modalities", help="Two, comma-separated; default: those stored.")] = "",
    debug: Debug = False,
) -> None:
    """Print how far apart two modalities are, and the noise that trains a head on one of them for the other (CLOSE)."""
    from dualenc.features.mining import measure_gap

    found = measure_gap(features, _words(modalities))
    said = f"{found.pairs:,} pairs in {found.dim} dimensions: mean cosine {found.cosine:.3f}"
    said += f", means {found.distance:.3f} apart"
    use = f"input.noise: {found.noise:.3f} (w = {found.w:.4f})"
    for line in (said, use):
        PatientConsole().print(line, highlight=False, markup=False, soft_wrap=True)


def _words(text: str) -> list[str]:
    return [w.strip() for w in text.split(",") if w.strip()]
