"""The ``dualenc`` command: the one place that joins training, evaluation and data tools.

Exit codes: 0 done; 1 other errors; 2 recipe or command line; 3 data; 4 checkpoint; 5 diverged; 130 stopped and saved.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Column, Table

from dualenc import __version__
from dualenc.config import Recipe, dump_yaml, load_recipe, pair_name
from dualenc.errors import ConfigError, DualencError, did_you_mean

app = typer.Typer(
    help="Train, evaluate and use dual encoders of any pair of modalities.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
shards_app = typer.Typer(help="Build, index, check and look at webdataset shards.", no_args_is_help=True)
app.add_typer(shards_app, name="shards")

RECIPES = Path("recipes")
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value, dotted: optim.lr=1e-3 data.sources.0.shards=my-{000..009}.tar")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")]


def main() -> None:
    """Entry point. Errors meant for a person are one line on stderr; ``--debug`` shows the traceback."""
    sys.argv[1:] = take_launcher_arguments(sys.argv[1:])
    debug = "--debug" in sys.argv
    if not debug:  # torch's C++ warnings come once per rank, before torch is loaded is the only time to say so
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.basicConfig(
        level=logging.INFO if debug else logging.WARNING,
        format="%(name)s: %(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_time=False, show_path=False)],
    )
    try:
        app(standalone_mode=True)
    except DualencError as e:
        if debug:
            raise
        Console(stderr=True).print(f"[bold red]error:[/] {_escape(str(e))}", highlight=False, soft_wrap=True)
        raise SystemExit(e.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


def take_launcher_arguments(argv: list[str]) -> list[str]:
    """The deepspeed launcher puts ``--local_rank=N`` before the script's own arguments: it goes to LOCAL_RANK."""
    kept = []
    for arg in argv:
        if arg.startswith(("--local_rank=", "--local-rank=")):
            os.environ.setdefault("LOCAL_RANK", arg.split("=", 1)[1])
        else:
            kept.append(arg)
    return kept


@app.callback(invoke_without_command=True)
def _version(
    ctx: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        print(f"dualenc {__version__}")
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())
        raise typer.Exit(2)


# --- training ----------------------------------------------------------------------------------------------------


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe: YAML file.")],
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run; read no samples.")] = False,
    debug: Debug = False,
) -> None:
    """Train a recipe; started again, it goes on from its newest save."""
    loaded = load_recipe(recipe, overrides or [])
    if dry_run:
        print_plan(loaded)
        return
    from dualenc.train.loop import train as run

    tasks = resolve_tasks(loaded.eval.tasks)
    run(loaded, evaluate_with(tasks) if tasks else None)


def evaluate_with(tasks: list[Any]) -> Any:
    """The evaluation the loop calls: it knows tasks, the loop knows none."""

    seen: dict[Any, Any] = {}  # a run evaluates the same files again and again

    def evaluate(embedder: Any, world: Any) -> dict[str, float]:
        from evals.harness import evaluate as run_tasks

        results = run_tasks(embedder, tasks, world=world, progress=False, details=False, seen=seen)
        return {f"{name}/{k}": v for name, r in results["tasks"].items() for k, v in r["metrics"].items()}

    return evaluate


def resolve_tasks(names: list[str]) -> list[Any]:
    """Task names or YAML files → tasks; a wrong name is an error before the first step, not after the last."""
    from evals.tasks import load_task

    return [load_task(n) for n in names if n]


def print_plan(recipe: Recipe) -> None:
    """--dry-run: the resolved recipe, parameter counts, samples and steps."""
    from dualenc.bundle import build_bundle
    from dualenc.data.shards import samples_per_pass
    from dualenc.train.loop import run_folder, total_steps

    resolve_tasks(recipe.eval.tasks)
    console = Console()
    console.print(dump_yaml(recipe), highlight=False, markup=False)
    bundle = build_bundle(recipe)
    table = Table("part", "parameters", "trained", title=f"{recipe.name}: model", title_justify="left")
    rows = [*bundle.model.towers.items(), ("whole model", bundle.model)]
    for name, module in rows:
        count = sum(p.numel() for p in module.parameters())
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        table.add_row(name, f"{count:,}", f"{trained:,}")
    console.print(table)
    needs_index = recipe.budget.passes is not None
    try:
        per_pass = samples_per_pass(recipe.data)
    except DualencError as e:
        console.print(f"samples a pass: not known ({e})", highlight=False, markup=False)
        per_pass = 0
    if per_pass:
        console.print(f"samples a pass: {per_pass:,}", highlight=False)
    if per_pass or not needs_index:
        steps = total_steps(recipe, per_pass)
        seen = steps * recipe.batch.size
        passes = f" ({seen / per_pass:.2f} passes)" if per_pass else ""
        console.print(f"steps: {steps:,} of {recipe.batch.size:,} samples = {seen:,} samples{passes}", highlight=False)
    console.print(
        f"run folder: {run_folder(recipe)}; pairs: {', '.join(map(pair_name, recipe.pairs))}", highlight=False
    )


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def launch(
    ctx: typer.Context,
    nproc: Annotated[
        int, typer.Option("--nproc", min=1, help="Processes on this machine (one a GPU, or several on a CPU).")
    ] = 1,
    max_restarts: Annotated[
        int, typer.Option("--max-restarts", min=0, help="Start again this often after a crash, from the last save.")
    ] = 0,
) -> None:
    """Start a command on several ranks: dualenc launch --nproc 2 train RECIPE [key=value …]."""
    if not ctx.args:
        raise ConfigError("dualenc launch: say what to start, for example: dualenc launch --nproc 2 train RECIPE")
    from dualenc.distributed.launch import launch as start

    raise typer.Exit(start([sys.executable, "-m", "dualenc", *ctx.args], nproc, max_restarts))


@app.command("engine-json")
def engine_json(
    recipe: Annotated[Path, typer.Argument(help="A recipe: YAML file.")],
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option("--ranks", help="Number of ranks over all machines.")] = 1,
    debug: Debug = False,
) -> None:
    """Print the configuration that DeepSpeed is given for a recipe (to look at: the trainer generates it itself)."""
    from dualenc.engine.deepspeed import deepspeed_json

    loaded = load_recipe(recipe, overrides or [])
    if loaded.engine.kind != "deepspeed":
        raise ConfigError(f"engine.kind is {loaded.engine.kind}, which has no such file; add engine.kind=deepspeed")
    print(json.dumps(deepspeed_json(loaded.engine, loaded.optim, ranks), indent=2))


# --- evaluation --------------------------------------------------------------------------------------------------


@app.command("eval")
def eval_(
    model: Annotated[
        str,
        typer.Argument(
            help="Run folder, checkpoint folder, open_clip:NAME[/TAG], hf:REPO, or a local folder of either."
        ),
    ],
    tasks: Annotated[str, typer.Option("--tasks", help="Task names, comma between.")] = "",
    task: Annotated[list[Path] | None, typer.Option("--task", help="A task's YAML file; may be repeated.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Where results.json goes.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Items embedded at once.")] = 64,
    cache: Annotated[
        Path | None,
        typer.Option("--cache", help="Folder where features are kept. Default: $DUALENC_CACHE, else in ~/.cache."),
    ] = None,
    no_cache: Annotated[
        bool,
        typer.Option("--no-cache", help="Neither keep features nor look for kept ones."),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after a kill: finished tasks are taken from --out as they are.")
    ] = False,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    seed: Annotated[int, typer.Option("--seed", help="Of bootstrap intervals and the examples shown.")] = 0,
    debug: Debug = False,
) -> None:
    """Zero-shot evaluation of any model on any task.

    Features are kept by content (weights, data, batch size) and found by the next run; --no-cache turns that off.
    """
    from dualenc.bundle import load_model
    from dualenc.distributed.world import close_world, init_world
    from evals.harness import evaluate, print_table

    chosen = resolve_tasks([*(n.strip() for n in tasks.split(",")), *map(str, task or [])])
    if not chosen:
        raise ConfigError("dualenc eval: name tasks, --tasks A,B or --task FILE.yaml; dualenc list tasks shows them")
    world = init_world(device, 600, None)
    try:
        embedder = load_model(model, device=str(world.device)).embedder()
        results = evaluate(
            embedder,
            chosen,
            world=world,
            out=out,
            cache_dir=None if no_cache else cache or feature_cache(),
            batch_size=batch_size,
            seed=seed,
            progress=world.rank == 0,
            resume=resume,
        )
        if world.rank == 0:
            print_table(results)
            if out is not None:
                Console().print(f"written: {out}", highlight=False, soft_wrap=True)
    finally:
        close_world(world)


def feature_cache() -> Path:
    """Where features are kept: $DUALENC_CACHE, else dualenc/ in the user's cache folder. Safe to delete at any time."""
    root = os.environ.get("DUALENC_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(root) if root else base / "dualenc") / "features"


@app.command()
def embed(
    model: Annotated[str, typer.Argument(help="A MODEL, as in dualenc eval.")],
    shards: Annotated[str, typer.Argument(help="Shards: path, brace pattern or URL; none with --recipe.")] = "",
    out: Annotated[Path, typer.Option("--out", help="Folder for the features.")] = Path("features"),
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", help="Write teacher features of this recipe's data, as its student draws it."),
    ] = None,
    views: Annotated[int, typer.Option("--views", min=1, help="With --recipe: augmented views of a sample.")] = 1,
    plain: Annotated[
        str, typer.Option("--plain", help="With --recipe: modalities without augmentation, comma between.")
    ] = "",
    dtype: Annotated[str, typer.Option("--dtype", help="With --recipe: fp16, int8 or fp32.")] = "fp16",
    modalities: Annotated[
        str, typer.Option("--modalities", help="Which to embed, comma between; default: all the model has.")
    ] = "",
    batch_size: Annotated[int, typer.Option("--batch-size")] = 64,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    debug: Debug = False,
) -> None:
    """Write the features of every sample: of some shards, or as a teacher's cache beside a recipe's data."""
    from dualenc.bundle import load_model

    if (recipe is None) == (not shards):
        raise ConfigError("dualenc embed: name shards, or --recipe RECIPE for a teacher's cache, not both")
    if recipe is None:
        from dualenc.bundle.embed_shards import embed_shards

        done = embed_shards(load_model(model, device=device), shards, out, words(modalities), batch_size)
    else:
        from dualenc.distill.cache import write_cache

        done = write_cache(
            load_model(model, device=device),
            load_recipe(recipe),
            out,
            views,
            words(plain),
            dtype=dtype,
            batch_size=batch_size,
        )
    print(json.dumps(done, indent=1))


def words(text: str) -> list[str]:
    """A comma-separated list."""
    return [w.strip() for w in text.split(",") if w.strip()]


@app.command()
def compare(
    models: Annotated[list[str], typer.Argument(help="MODELs as in dualenc eval: the teacher, then students.")],
    tasks: Annotated[str, typer.Option("--tasks", help="Task names or YAML files, comma between.")] = "",
    out: Annotated[Path, typer.Option("--out", help="The HTML page; a .json of that name beside it.")] = Path(
        "compare.html"
    ),
    threads: Annotated[int, typer.Option("--threads", min=1, help="CPU threads of the timed forwards.")] = 1,
    debug: Debug = False,
) -> None:
    """Teacher against students: held-out numbers by recipe over seeds, size, FLOPs, measured speed."""
    from evals.compression import compare as run
    from evals.compression import markdown

    print(markdown(run(models, resolve_tasks(words(tasks)), out, threads=threads)))
    Console(stderr=True).print(f"page: {out}", highlight=False, soft_wrap=True)


@app.command("export")
def export_(
    model: Annotated[str, typer.Argument(help="A MODEL, as in dualenc eval.")],
    layout: Annotated[str, typer.Option("--format", help="hf, open_clip, onnx or safetensors.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; must not hold anything yet.")],
    results: Annotated[
        Path | None, typer.Option("--results", help="results.json for the model card; default: the run's own.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Write a model for other libraries, with a model card beside it."""
    from dualenc.bundle import load_model
    from dualenc.bundle.export import export

    folder = export(load_model(model), layout, out, model, results)
    Console().print(f"written: {folder}", highlight=False, soft_wrap=True)


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="A run folder; or several results.json (or folders that hold one) to compare."),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Default: report.html in the run, else compare.html")
    ] = None,
    debug: Debug = False,
) -> None:
    """Write one self-contained HTML page: about a run (its curves too), or comparing several models.

    dualenc report runs/NAME; dualenc report A.json B.json … --out page.html
    """
    from evals.compare import write_comparison
    from evals.report import write_report

    for run in runs:
        if not run.exists():
            raise ConfigError(f"There is no {run}. {did_you_mean(run.name, _names(run.parent))}")
    if len(runs) == 1 and runs[0].is_dir():
        page = write_report(runs[0], out)
    else:
        page = write_comparison(runs, out or Path("compare.html"))
    Console().print(f"report: {page}", highlight=False, soft_wrap=True)


def _names(parent: Path) -> list[str]:
    return [p.name for p in parent.iterdir()] if parent.is_dir() else []


# --- shards ------------------------------------------------------------------------------------------------------


@shards_app.command("build", context_settings={"ignore_unknown_options": True})
def shards_build(
    source: Annotated[str, typer.Argument(help="Layout of the source: folder, jsonl, csv, parquet, hf, quickstart.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the shards and their index.")],
    options: Annotated[
        list[str] | None, typer.Argument(help="Settings of that layout, key=value: path=captions.jsonl split=train")
    ] = None,
    debug: Debug = False,
) -> None:
    """Pack a data set into webdataset shards with an index."""
    from data_tools.build import build, print_report

    print_report(build(source, out, key_values(options or [])))


def key_values(items: list[str]) -> dict[str, Any]:
    """``a.b=3`` items as a nested mapping, values read as YAML."""
    from dualenc.config import apply_override

    raw: dict[str, Any] = {}
    for item in items:
        apply_override(raw, item, {})
    return raw


@shards_app.command("index")
def shards_index(
    shards: Annotated[list[str], typer.Argument(help="Shards: paths, brace patterns, URLs.")],
    out: Annotated[Path | None, typer.Option("--out", help="Default: index.json beside local shards.")] = None,
    debug: Debug = False,
) -> None:
    """Count the samples of every shard and write the index that training reads."""
    from rich.progress import Progress

    from dualenc.data.shards import build_index, expand, load_index

    urls = expand(shards)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("indexing", total=len(urls))
        path = build_index(urls, out, progress=lambda done, total: bar.update(task, completed=done, total=total))
    index = load_index(str(path))
    Console().print(f"{index.total:,} samples in {len(index.shards)} shards: {path}", highlight=False, soft_wrap=True)


@shards_app.command("check")
def shards_check(
    shards: Annotated[list[str], typer.Argument(help="Shards: paths, brace patterns, URLs.")],
    debug: Debug = False,
) -> None:
    """Read and decode every sample once; exit code 3 if something is broken."""
    from data_tools.check import check, print_check

    result = check(shards)
    print_check(result)
    if not result.ok:
        raise typer.Exit(3)


@shards_app.command("view")
def shards_view(
    shards: Annotated[list[str], typer.Argument(help="Shards: paths, brace patterns, URLs.")],
    out: Annotated[Path, typer.Option("--out", help="The HTML page to write.")] = Path("shards.html"),
    n: Annotated[int, typer.Option("--n", help="How many samples to show.")] = 48,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    debug: Debug = False,
) -> None:
    """Write a page that shows samples as pictures with their captions."""
    from data_tools.view import view

    Console().print(f"page: {view(shards, out, n=n, seed=seed)}", highlight=False, soft_wrap=True)


# --- what there is -----------------------------------------------------------------------------------------------


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help="recipes, encoders, losses, terms or tasks")], debug: Debug = False
) -> None:
    """List what can be named in a recipe or on the command line."""
    listings = {"recipes": _recipes, "encoders": _encoders, "losses": _losses, "terms": _terms, "tasks": _tasks}
    if what not in listings:
        raise ConfigError(f"dualenc list: cannot list {what!r}. {did_you_mean(what, listings)}")
    listings[what]()


def _recipes() -> None:
    if not RECIPES.is_dir():
        raise ConfigError(
            f"There is no folder {RECIPES} here; recipes stand in the repository: run this at its top level"
        )
    table = Table(Column("recipe", overflow="fold"), "what it trains")
    for path in sorted(p for p in RECIPES.rglob("*.yaml") if "launch" not in p.parts):  # launchers' own files there
        try:
            table.add_row(str(path), load_recipe(path).description)
        except ConfigError as e:
            table.add_row(str(path), f"[red]cannot be used:[/] {escape(str(e))}")
    Console().print(table)


def _encoders() -> None:
    from dualenc.encoders import list_encoders

    for family, names in list_encoders().items():
        Console().print(f"[bold]{family}/[/] {', '.join(names)}", highlight=False)


def _losses() -> None:
    from dualenc.losses import losses

    _classes("loss", losses)


def _terms() -> None:
    from dualenc.distill import terms

    _classes("distillation term", terms)


def _classes(what: str, known: Any) -> None:
    table = Table(what, "what it is")
    for name in known:
        table.add_row(name, (known[name].__doc__ or "").strip().split("\n")[0])
    Console().print(table)


def _tasks() -> None:
    from evals.tasks import list_tasks

    table = Table("task", "kind", "what it measures")
    for task in list_tasks():
        table.add_row(task.name, task.kind, task.description)
    Console().print(table)
