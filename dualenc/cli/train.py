"""Commands that train: train, launch, engine-json."""

from __future__ import annotations

import atexit
import gc
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dualenc.api.runs import tasks_of
from dualenc.api.runs import train as run
from dualenc.cli import names
from dualenc.cli.app import AllowPipe, Debug, Overrides, app
from dualenc.cli.finished import print_finished
from dualenc.config import Recipe, dump_yaml, load_recipe, pair_name, phase_recipes
from dualenc.errors import ConfigError


@app.command()
def train(
    recipe: Annotated[
        str,
        typer.Argument(help="A recipe: YAML file, or a name from dualenc list recipes.", autocompletion=names.recipes),
    ],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print what would run; reads no samples but for --probe, a few labels and batch plans.",
        ),
    ] = False,
    measure: Annotated[
        bool, typer.Option("--probe", help="With --dry-run: take two steps and print the memory and time they took.")
    ] = False,
    profile: Annotated[
        int | None,
        typer.Option("--profile", min=1, help="After 3 steps, measure where the time of N steps goes: profile.md."),
    ] = None,
    allow_pipe: AllowPipe = False,
    debug: Debug = False,
) -> None:
    """Train a recipe; the same command again resumes from its newest checkpoint."""
    said = [*(overrides or []), *(["data.allow_pipe=true"] if allow_pipe else [])]
    with _uncollected():
        loaded = _loaded(recipe, said)
        if measure and not dry_run:
            raise ConfigError("--probe belongs to --dry-run: write dualenc train RECIPE --dry-run --probe")
        if profile is not None and dry_run:
            raise ConfigError("--profile measures real steps: leave out --dry-run")
        if dry_run:
            atexit.register(gc.freeze)  # or Python would look at all of torch's objects once more when it ends: 0.6 s
            _checked(loaded)
            if os.environ.get("RANK", "0") == "0":
                print_plan(loaded)
    if dry_run:
        if measure:
            print_probe(loaded)
    else:
        run_dir = run(loaded, profile=profile)
        if os.environ.get("RANK", "0") == "0":
            print_finished(run_dir, loaded.eval.tasks)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without garbage collection: an import of torch makes a million objects that stay, and looking at them again and
    again is a tenth of the start."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _loaded(recipe: str, overrides: list[str]) -> Recipe:
    from dualenc.model.start_from import completed

    return load_recipe(recipe, overrides, completed)


def _checked(recipe: Recipe) -> None:
    from dualenc.train.check import check_recipe

    check_recipe(recipe)
    tasks_of(recipe)


def print_plan(recipe: Recipe) -> None:
    """--dry-run: the resolved recipe, parameter counts, samples and steps."""
    from dualenc.data.batches import prepare
    from dualenc.data.shards.index import build_plan, open_sources
    from dualenc.data.values import check_values
    from dualenc.encoders import batch_norm_notes
    from dualenc.losses import build_loss
    from dualenc.model import build_bundle
    from dualenc.train.build import add_heads, total_steps
    from dualenc.train.check import check_length
    from dualenc.train.loop import run_folder
    from dualenc.train.memory import memory_lines
    from dualenc.train.phases import Span, timeline
    from dualenc.train.probe import standing_memory
    from dualenc_data_tools.glance import glance

    console = Console()
    console.print(dump_yaml(recipe), highlight=False, markup=False)
    bundle = build_bundle(recipe)
    for m, part in recipe.modalities.items():
        if part.lora is not None:
            bundle.model.add_adapters(m, part.lora)
    loss = build_loss(recipe.loss)
    add_heads(loss, bundle, recipe.seed)
    table = Table("part", "parameters", "trained", title=f"{recipe.name}: model", title_justify="left")
    rows = [*bundle.model.towers.items(), ("whole model", bundle.model)]
    for name, module in rows:
        count = sum(p.numel() for p in module.parameters())
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        table.add_row(name, f"{count:,}", f"{trained:,}")
    console.print(table)
    for note in batch_norm_notes(bundle.model.trained_towers()):
        console.print(note, highlight=False, markup=False)
    print_rates(console, bundle.model, recipe)
    print_pipes(console, recipe)
    sets = open_sources(recipe.data)
    per_pass = build_plan(recipe.data, sets, recipe.seed).samples_per_pass
    if recipe.data.batches is not None:
        composed = prepare(recipe.data, recipe.batch.size, recipe.seed)
        per_pass = composed.samples_per_pass
        for line in composed.describe():
            console.print(line, highlight=False, markup=False)
    for s in sets:
        if s.chosen is not None:
            told = f"source {s.source}, {s.chosen.told(sum(s.counts))}"
            console.print(told, highlight=False, markup=False, soft_wrap=True)
    console.print(f"samples per epoch: {per_pass:,}", highlight=False)
    last = timeline(recipe)[-1] if recipe.phases else Span.whole(recipe, total_steps(recipe, per_pass))
    steps, seen = last.total, last.total_samples
    sizes = sorted({one.batch.size for one in phase_recipes(recipe)})
    of = " or ".join(f"{size:,}" for size in sizes)
    passes = f" ({seen / per_pass:.2f} epochs)"
    console.print(f"steps: {steps:,} of {of} samples = {seen:,} samples{passes}", highlight=False)
    check_length(recipe, steps)
    if recipe.phases:
        print_phases(console, recipe)
    check_data(recipe, bundle)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    console.print(standing_memory(bundle.model, recipe, ranks), highlight=False, markup=False)
    for line in memory_lines(loss, bundle, per_pass, ranks):
        console.print(line, highlight=False, markup=False)
    check_values(recipe.data, sets)
    for note in glance(recipe, sets):
        console.print(note, highlight=False, markup=False)
    console.print(
        f"run folder: {run_folder(recipe)}; pairs: {', '.join(map(pair_name, recipe.pairs))}", highlight=False
    )


def print_phases(console: Console, recipe: Recipe) -> None:
    """Where each phase begins, what it trains and what it changes; its batch plan if that is another one."""
    from dualenc.data.batches import prepare
    from dualenc.train.phases import check_models, timeline
    from dualenc.train.resume import differences

    spans = timeline(recipe)
    before = spans[0].recipe.model_dump(mode="json")
    for span, (parameters, trained) in zip(spans, check_models(recipe), strict=True):
        now = span.recipe.model_dump(mode="json")
        changes = [f"{k} = {new!r} (was {old!r})" for k, old, new in differences("", before, now)]
        where = f"phase {span.number} from step {span.start:,} ({span.samples:,} samples) to {span.stop:,}"
        said = f"{where}: trains {trained:,} of {parameters:,} parameters{'; ' if changes else ''}{'; '.join(changes)}"
        console.print(said, highlight=False, markup=False)
        if span.number and span.data_phase == span.number and span.recipe.data.batches is not None:
            for line in prepare(span.recipe.data, span.recipe.batch.size, span.data_seed).describe():
                console.print(line, highlight=False, markup=False)
        before = now


def print_probe(recipe: Recipe) -> None:
    """--probe: two real steps, on every rank of a launcher; rank 0 says what they took."""
    from dualenc.train.probe import probe

    measured = probe(recipe)
    if os.environ.get("RANK", "0") == "0":
        Console().print(measured.said(), highlight=False, markup=False, soft_wrap=True)


def print_pipes(console: Console, recipe: Recipe) -> None:
    """Print the shell commands that reading the data would run."""
    from dualenc.data.shards.remote import is_pipe

    for source in recipe.data.sources:
        for url in [source.shards] if isinstance(source.shards, str) else source.shards:
            if is_pipe(url.strip()):
                state = "runs" if recipe.data.allow_pipe else "needs data.allow_pipe=true to run"
                console.print(f"source {source.name} {state} {url.strip()[5:]!r}", highlight=False, markup=False)


def check_data(recipe: Recipe, bundle: Any) -> None:
    """Check the settings of the sources as the loader does: members, pairs, what can be mixed."""
    from dualenc.data.dataset import check_mix, members_of

    for i in range(len(recipe.data.sources)):
        members_of(recipe.data, i, bundle.inputs, recipe.pairs)
    check_mix(recipe.data, bundle.inputs, recipe.pairs)


def print_rates(console: Console, model: Any, recipe: Recipe) -> None:
    """Print the peak learning rate of every group of parameters."""
    from dualenc.engine.optim import parameter_groups

    table = Table("group", "parameters", "lr", "weight decay", title="learning rates", title_justify="left")
    for g in parameter_groups(model, recipe.optim):
        count = sum(p.numel() for p in g["params"])
        table.add_row(g["role"], f"{count:,}", f"{g['lr']:.3g}", f"{g['weight_decay']:g}")
    console.print(table)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def launch(
    ctx: typer.Context,
    nproc: Annotated[
        int, typer.Option("--nproc", min=1, help="Processes on this machine: one per GPU, or any number on CPU.")
    ] = 1,
    max_restarts: Annotated[
        int,
        typer.Option("--max-restarts", min=0, help="How often to restart from the newest checkpoint after a crash."),
    ] = 0,
) -> None:
    """Start a command on several ranks: dualenc launch --nproc 2 train RECIPE [key=value …]."""
    if not ctx.args:
        raise ConfigError(
            "dualenc launch: give the command to start, for example: dualenc launch --nproc 2 train RECIPE"
        )
    from dualenc.distributed.launch import launch as start

    raise typer.Exit(start([sys.executable, "-m", "dualenc", *ctx.args], nproc, max_restarts))


@app.command("engine-json")
def engine_json(
    recipe: Annotated[str, typer.Argument(help="A recipe: YAML file, or a name from dualenc list recipes.")],
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option("--ranks", help="World size: number of ranks over all machines.")] = 1,
    debug: Debug = False,
) -> None:
    """Print the DeepSpeed configuration of a recipe (for inspection: the trainer generates it itself)."""
    from dualenc.engine.deepspeed_engine import deepspeed_json
    from dualenc.model.start_from import completed

    loaded = load_recipe(recipe, overrides or [], completed)
    if loaded.engine.kind != "deepspeed":
        raise ConfigError(
            f"engine.kind is {loaded.engine.kind}, which has no DeepSpeed configuration; add engine.kind=deepspeed"
        )
    print(json.dumps(deepspeed_json(loaded.engine, loaded.optim, ranks), indent=2))
