"""Commands that use a model: eval, embed, interpolate, export."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dualenc.api.runs import resolve_tasks
from dualenc.cli import names
from dualenc.cli.app import AllowPipe, Debug, DeviceOption, Precision, app, key_values
from dualenc.config import load_recipe
from dualenc.errors import ConfigError, did_you_mean
from dualenc.terminal import PatientConsole, say

if TYPE_CHECKING:
    from dualenc.distributed.world import World
    from dualenc.model import Bundle


@app.command("eval")
def eval_(
    model: Annotated[
        str,
        typer.Argument(
            help="Run folder, checkpoint folder, open_clip:NAME[/TAG], hf:REPO, or a local folder of either.",
            autocompletion=names.models,
        ),
    ],
    tasks: Annotated[
        str,
        typer.Option(
            "--tasks",
            help="Task names, YAML files, or mteb:NAME (the mteb extra), comma-separated.",
            autocompletion=names.tasks,
        ),
    ] = "",
    task: Annotated[list[Path] | None, typer.Option("--task", help="A task's YAML file; may be repeated.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Where to write results.json.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Number of items embedded at once.")] = 64,
    cache: Annotated[
        Path | None,
        typer.Option("--cache", help="Feature cache folder. Default: $DUALENC_CACHE, else in ~/.cache."),
    ] = None,
    no_cache: Annotated[
        bool,
        typer.Option("--no-cache", help="Do not read or write the feature cache."),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume: take finished tasks from --out as they are.")
    ] = False,
    device: DeviceOption = "auto",
    precision: Precision = "fp32",
    seed: Annotated[int, typer.Option("--seed", help="Seed of the bootstrap intervals and of the examples shown.")] = 0,
    debug: Debug = False,
) -> None:
    """Zero-shot evaluation of any model on any task.

    Features are cached by content (weights, data, batch size) and reused by later runs; --no-cache turns that off.
    """
    from dualenc.distributed.world import close_world, init_world
    from dualenc.model import load_model
    from dualenc_evals.harness import evaluate, print_table
    from dualenc_evals.overlap import training_sources

    asked = [*_names(tasks), *map(str, task or [])]
    elsewhere = [n for n in asked if n.startswith("mteb:")]
    chosen = resolve_tasks([n for n in asked if n not in elsewhere])
    if not chosen and not elsewhere:
        raise ConfigError(
            "dualenc eval: give tasks with --tasks A,B or --task FILE.yaml; dualenc list tasks shows them"
        )
    world = init_world(device, 600, None)
    try:
        bundle = load_model(model, device=str(world.device))
        kept = None if no_cache else cache or feature_cache()
        if elsewhere:
            _mteb(bundle, elsewhere, out, world, kept, batch_size, precision)
        if not chosen:
            return
        results = evaluate(
            bundle.embedder(precision=precision),
            chosen,
            world=world,
            out=out,
            cache_dir=kept,
            batch_size=batch_size,
            seed=seed,
            progress=world.rank == 0,
            resume=resume,
            training=training_sources(model),
        )
        if world.rank == 0:
            print_table(results, PatientConsole())
            if out is not None:
                PatientConsole().print(f"written: {out}", highlight=False, soft_wrap=True)
    finally:
        close_world(world)


def _names(listed: str) -> list[str]:
    """Names that commas separate, except those in parentheses: ``mteb:MTEB(eng, v2)`` is one."""
    names, depth = [""], 0
    for c in listed:
        depth += (c == "(") - (c == ")")
        if c == "," and depth == 0:
            names.append("")
        else:
            names[-1] += c
    return [n.strip() for n in names]


def _mteb(
    bundle: Bundle,
    tasks: list[str],
    out: Path | None,
    world: World,
    cache: Path | None,
    batch_size: int,
    precision: str,
) -> None:
    """mteb's tasks: its own JSON files go to a folder ``mteb`` beside ``out``."""
    from dualenc.mteb import evaluate_mteb

    folder = Path("mteb") if out is None else out.parent / "mteb"
    root = os.environ.get("DUALENC_DATA")
    data = None if root is None else Path(root) / "mteb"
    scores = evaluate_mteb(bundle, tasks, folder, world, cache, batch_size, data, precision)
    if world.rank == 0:
        rows = [(t, split, f"{100 * v:.2f}") for t, by in scores.items() for split, v in by.items()]
        say("| mteb task | split | main score, % |\n|---|---|---|\n" + "\n".join(f"| {' | '.join(r)} |" for r in rows))
        PatientConsole().print(f"written: {folder}", highlight=False, soft_wrap=True)


def feature_cache() -> Path:
    """The feature cache: $DUALENC_CACHE, else dualenc/ in the user's cache folder. Safe to delete at any time."""
    root = os.environ.get("DUALENC_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(root) if root else base / "dualenc") / "features"


@app.command()
def embed(
    model: Annotated[str, typer.Argument(help="A MODEL, as in dualenc eval.")],
    shards: Annotated[
        str,
        typer.Argument(
            help="Shards: path, brace pattern or URL; or a source with its settings: folder path=photos; "
            "leave out with --recipe."
        ),
    ] = "",
    settings: Annotated[
        list[str] | None, typer.Argument(help="Settings of the source, key=value, as in dualenc shards build.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Output folder for the features.")] = Path("features"),
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", help="Write teacher features of this recipe's data, with the student's augmentation."),
    ] = None,
    views: Annotated[int, typer.Option("--views", min=1, help="With --recipe: augmented views per sample.")] = 1,
    plain: Annotated[
        str, typer.Option("--plain", help="With --recipe: modalities without augmentation, comma-separated.")
    ] = "",
    dtype: Annotated[str, typer.Option("--dtype", help="fp32, fp16 or int8. Default: fp32; with --recipe fp16.")] = "",
    layout: Annotated[
        str,
        typer.Option(
            "--format",
            help="safetensors; parquet also writes a table for every safetensors file, npy an array for each modality.",
        ),
    ] = "safetensors",
    modalities: Annotated[
        str, typer.Option("--modalities", help="Modalities to embed, comma-separated; default: all of the model's.")
    ] = "",
    batch_size: Annotated[int, typer.Option("--batch-size", help="Number of items embedded at once.")] = 64,
    dim: Annotated[
        int | None,
        typer.Option("--dim", min=1, help="Keep the first dimensions only, of a model trained with loss matryoshka."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace other features in --out.")] = False,
    device: DeviceOption = "auto",
    precision: Precision = "fp32",
    allow_pipe: AllowPipe = False,
    debug: Debug = False,
) -> None:
    """Write the features of every sample: of given shards, or of a recipe's data as a teacher's cache.

    The same command again keeps finished shards. Several ranks share the work:
    dualenc launch --nproc 2 embed MODEL SHARDS. A data set that is not in shards is read as dualenc shards build
    reads it: dualenc embed MODEL folder path=photos, dualenc embed MODEL jsonl path=captions.jsonl.
    """
    from dualenc.data.shards.index import refuse_pipes
    from dualenc.distill.teachers.cache import write_cache
    from dualenc.distributed.world import close_world, init_world
    from dualenc.features.of_shards import embed_shards
    from dualenc.features.of_source import embed_source
    from dualenc.model import load_model

    _check_embed(layout, shards, recipe, dim)
    world = init_world(device, _PATIENCE_S, None)
    try:
        bundle = load_model(model, device=str(world.device))
        how = (batch_size, dtype or "fp32", world, overwrite, dim, precision)
        if recipe is not None:
            done = write_cache(
                bundle,
                load_recipe(recipe, ["data.allow_pipe=true"] if allow_pipe else []),
                out,
                views,
                words(plain),
                dtype=dtype or "fp16",
                batch_size=batch_size,
                world=world,
                overwrite=overwrite,
                precision=precision,
            )
        elif settings:
            done = embed_source(bundle, shards, key_values(settings), out, words(modalities), *how)
        else:
            refuse_pipes(shards, allow_pipe, "--allow-pipe")
            done = embed_shards(bundle, shards, out, words(modalities), *how)
        _also(layout, out, world)
        if world.rank == 0:
            say(json.dumps(done, indent=1))
    finally:
        close_world(world)


def _check_embed(layout: str, shards: str, recipe: Path | None, dim: int | None) -> None:
    if (recipe is None) == (not shards):
        raise ConfigError("dualenc embed: give either shards or --recipe RECIPE, which writes a teacher's cache")
    if layout not in ("safetensors", "parquet", "npy"):
        raise ConfigError(f"unknown --format {layout!r}; use safetensors, parquet or npy")
    if recipe is not None and dim is not None:
        raise ConfigError("--dim: a teacher's cache holds whole features; leave out --recipe or --dim")


def _also(layout: str, out: Path, world: World) -> None:
    """The other files that --format asks for."""
    from dualenc.features.arrow import write_npy, write_parquet
    from dualenc.features.store import FeatureStore

    if layout == "parquet":
        write_parquet(FeatureStore(out), world)
    elif layout == "npy":
        write_npy(FeatureStore(out), world)


_PATIENCE_S = 7 * 86400.0
"""How long a rank that is done with its shards waits for the others."""


def words(text: str) -> list[str]:
    """A comma-separated list."""
    return [w.strip() for w in text.split(",") if w.strip()]


@app.command()
def interpolate(
    a: Annotated[str, typer.Argument(help="A MODEL, as in dualenc eval: the one fine-tuning started from.")],
    b: Annotated[str, typer.Argument(help="A MODEL of the same architecture: the fine-tuned one.")],
    out: Annotated[
        Path, typer.Option("--out", help="Output folder for interpolate.json, interpolate.html and the model.")
    ],
    alphas: Annotated[str, typer.Option("--alphas", help="Shares of B, comma-separated.")] = ",".join(
        f"{i / 10:g}" for i in range(11)
    ),
    tasks: Annotated[
        str,
        typer.Option("--tasks", help="Task names or YAML files: the first is the source task, the others are targets."),
    ] = "",
    keep: Annotated[
        float | None, typer.Option("--keep", help="Save the model at this alpha in --out, which is then a MODEL.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Number of items embedded at once.")] = 64,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Do not read or write the feature cache.")] = False,
    device: DeviceOption = "auto",
    precision: Precision = "fp32",
    debug: Debug = False,
) -> None:
    """Evaluate weights between two models, (1 - alpha) A + alpha B (WiSE-FT)."""
    from dualenc.distributed.world import close_world, init_world
    from dualenc_evals.studies.interpolation import interpolate as run
    from dualenc_evals.studies.interpolation import markdown

    chosen = resolve_tasks(words(tasks))
    if not chosen and keep is None:
        raise ConfigError(
            "dualenc interpolate: give tasks to evaluate (--tasks A,B), an alpha to keep (--keep 0.5), or both"
        )
    try:
        shares = [float(x) for x in words(alphas)] if chosen else [float(keep or 0)]
    except ValueError as e:
        raise ConfigError(f"--alphas: {alphas!r} is not a list of numbers; write for example 0,0.5,1") from e
    world = init_world(device, 600, None)
    try:
        cache = None if no_cache else feature_cache()
        done = run(a, b, shares, chosen, out, keep, world, str(world.device), batch_size, cache, precision)
        if world.rank == 0:
            if chosen:
                say(markdown(done))
            PatientConsole(stderr=True).print(f"written: {out}", highlight=False, soft_wrap=True)
    finally:
        close_world(world)


@app.command()
def regions(
    model: Annotated[
        str, typer.Argument(help="A MODEL with a bird's-eye-view tower, or a recipe for its untrained model.")
    ],
    data: Annotated[str, typer.Option("--data", help="nuscenes:FOLDER[:TABLES] or kitti:FOLDER/training.")],
    out: Annotated[Path, typer.Option("--out", help="JSON file to write.")],
    skip: Annotated[int, typer.Option("--skip", help="How many keyframes at the beginning not to evaluate.")] = 0,
    limit: Annotated[
        int | None, typer.Option("--limit", help="How many keyframes after them to evaluate; default: all.")
    ] = None,
    labels: Annotated[bool, typer.Option("--labels", help="Train probes on the skipped keyframes.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the views, and of an untrained model.")] = 0,
    device: DeviceOption = "auto",
    debug: Debug = False,
) -> None:
    """Evaluate a bird's-eye-view map: region retrieval, object matching over time, and probes on the frozen map."""
    from dualenc.data.driving.keyframes import kitti_object, nuscenes
    from dualenc.model import build_bundle, load_model
    from dualenc_evals.harness import write_json
    from dualenc_evals.studies.region_probes import evaluate_regions

    kind, _, rest = data.partition(":")
    folder, _, tables = rest.partition(":")
    if kind not in ("nuscenes", "kitti") or not folder:
        raise ConfigError(f"unknown --data {data!r}; use nuscenes:FOLDER[:TABLES] or kitti:FOLDER/training")
    keys = list(nuscenes(folder, tables or None) if kind == "nuscenes" else kitti_object(folder))
    asked = keys[skip : None if limit is None else skip + limit]
    if not asked:
        raise ConfigError(f"--skip {skip} --limit {limit} leaves no keyframe: {folder} has {len(keys)}")
    if model.endswith((".yaml", ".yml")):
        bundle = build_bundle(load_recipe(model, [f"seed={seed}"])).to(device)
    else:
        bundle = load_model(model, device=device)
    done = evaluate_regions(bundle.embedder(), asked, keys[:skip] if labels else (), seed)
    write_json(out, {"model": model, "data": data, "skip": skip, "seed": seed, **done})
    for name, value in done["metrics"].items():
        say(f"{name}\t{100 * value:.1f} %")


@app.command()
def robustness(
    model: Annotated[str, typer.Argument(help="A MODEL with cameras and LiDAR, as in dualenc eval.")],
    tasks: Annotated[
        str, typer.Option("--tasks", help="Tasks on kitti or nuscenes: names or YAML files, comma-separated.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Output folder for robustness.json and robustness.html.")],
    kinds: Annotated[
        str, typer.Option("--kinds", help="Sensor failures to test, comma-separated.")
    ] = "beams,pictures,turned_deg,fog",
    batch_size: Annotated[int, typer.Option("--batch-size", help="Number of items embedded at once.")] = 64,
    device: DeviceOption = "auto",
    debug: Debug = False,
) -> None:
    """Evaluate tasks with missing LiDAR beams, black images, a wrong calibration, and fog."""
    from dualenc.distributed.world import close_world, init_world
    from dualenc_evals.studies.robustness import LEVELS, markdown
    from dualenc_evals.studies.robustness import robustness as run

    for kind in words(kinds):
        if kind not in LEVELS:
            raise ConfigError(f"--kinds: unknown failure {kind!r}. {did_you_mean(kind, LEVELS)}")
    world = init_world(device, 600, None)
    try:
        done = run(model, resolve_tasks(words(tasks)), out, words(kinds), world, str(world.device), batch_size)
        if world.rank == 0:
            say(markdown(done))
            PatientConsole(stderr=True).print(f"written: {out}", highlight=False, soft_wrap=True)
    finally:
        close_world(world)


_CALIBRATION = 256
"""Files of a modality that int8 graphs are calibrated with."""


def calibration_items(bundle: Bundle, folder: Path) -> dict[str, list[bytes]]:
    """Modality → the first files of a folder that are of it, by their extensions; texts are lines of .txt files.

    Raises:
        ConfigError: there is no such folder.
    """
    from dualenc.api.items import endings

    if not folder.is_dir():
        raise ConfigError(f"--int8: there is no folder {folder}")
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    found: dict[str, list[bytes]] = {}
    for m, source in bundle.inputs.items():
        mine = tuple(f".{e}" for e in endings(source))
        found[m] = [p.read_bytes() for p in files if p.name.lower().endswith(mine)][:_CALIBRATION]
    return found


@app.command("export")
def export_(
    model: Annotated[str, typer.Argument(help="A MODEL, as in dualenc eval.")],
    layout: Annotated[str, typer.Option("--format", help="hf, open_clip, sentence-transformers, onnx or safetensors.")],
    out: Annotated[Path, typer.Option("--out", help="Output folder; must be new or empty.")],
    results: Annotated[
        Path | None, typer.Option("--results", help="results.json for the model card; default: the run's.")
    ] = None,
    push: Annotated[
        str | None, typer.Option("--push", help="ORG/NAME on the Hugging Face Hub: upload the folder there.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push: create the repository as private.")] = False,
    int8: Annotated[
        Path | None,
        typer.Option("--int8", help="With --format onnx: int8 graphs too, calibrated on the files of this folder."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Export a model for other libraries, with a model card; --push uploads it."""
    from dualenc.model import load_model
    from dualenc.model.export.export import export
    from dualenc.model.export.push import check_repository, push_folder

    if push is not None:
        check_repository(push)
    if int8 is not None and layout != "onnx":
        raise ConfigError(f"--int8 {int8}: only --format onnx has int8 graphs")
    bundle = load_model(model)
    calibration = {} if int8 is None else calibration_items(bundle, int8)
    folder = export(bundle, layout, out, model, results)
    PatientConsole().print(f"written: {folder}", highlight=False, soft_wrap=True)
    if int8 is not None:
        from dualenc.model.export.onnx_int8 import write_int8

        for m, cosine in write_int8(bundle, folder, calibration).items():
            say(f"{m}.int8.onnx: mean cosine {cosine:.4f} with the features of {m}.onnx on the files of {int8}")
    if push is not None:
        PatientConsole().print(push_folder(folder, push, private), highlight=False, soft_wrap=True)
