"""dualenc shards build, index, check, filter, select, report, view."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer
import typer.core
from rich.console import Console

from dualenc.cli import names
from dualenc.cli.app import Debug, app, key_values
from dualenc.config import load_recipe
from dualenc.errors import ConfigError

shards_app = typer.Typer(
    help="Build, index, check, filter and view webdataset shards.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(shards_app, name="shards")


class BuildCommand(typer.core.TyperCommand):
    """``shards build SOURCE --help`` also lists the settings of SOURCE."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta["dualenc.source"] = next((a for a in args if not a.startswith("-")), None)
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        source = ctx.meta.get("dualenc.source")
        if source is not None:
            write_settings(source, formatter)
        else:
            formatter.write_paragraph()
            formatter.write_text("The settings of a source: dualenc shards build SOURCE --help")


def write_settings(source: str, formatter: Any) -> None:
    """The settings of a source, its own first, with their defaults.

    Raises:
        ConfigError: an unknown source, with the nearest.
    """
    from dualenc_data_tools.sources import SourceConfig, sources

    kind = sources[source]
    every = set(SourceConfig.model_fields)
    fields = kind.config.model_fields
    own = sorted((n for n in fields if n not in every), key=lambda n: not fields[n].is_required())
    formatter.write_paragraph()
    formatter.write_text(f"{source}: {kind.about}")
    for title, names_of in (
        (f"Settings of {source}", own),
        ("Settings of every source", [n for n in fields if n in every]),
    ):
        rows = [(setting_name(n, fields[n]), described(fields[n])) for n in names_of]
        if rows:
            with formatter.section(title):
                formatter.write_dl(rows, col_max=26)


def setting_name(name: str, field: Any) -> str:
    """``name=DEFAULT``, or ``name=…`` where it must be given."""
    default = field.get_default(call_default_factory=True)
    if field.is_required():
        return f"{name}=…"
    plain = (
        default
        if isinstance(default, dict | list)
        else {True: "true", False: "false", None: "null"}.get(default, default)
    )
    return f"{name}={plain if len(str(plain)) <= 12 else '…'}"


def described(field: Any) -> str:
    """What a setting is; its choices where it says no more."""
    choices = [str(c) for c in get_args(field.annotation) if isinstance(c, str)]
    text = field.description or ""
    return text if text or not choices else " | ".join(choices)


@shards_app.command("build", cls=BuildCommand, context_settings={"ignore_unknown_options": True})
def shards_build(
    source: Annotated[
        str,
        typer.Argument(
            help=f"{', '.join(names.SOURCES)}, a plugin's source, or a YAML file with a build: section. "
            "SOURCE --help shows its settings.",
            autocompletion=names.sources,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Output folder for the shards and their index.")],
    options: Annotated[
        list[str] | None, typer.Argument(help="Settings of the source, key=value: path=captions.jsonl split=train")
    ] = None,
    engine: Annotated[str, typer.Option("--engine", help="local, or ray: on a Ray cluster.")] = "local",
    address: Annotated[
        str,
        typer.Option(
            "--address",
            help="Of the Ray cluster; auto: a running one, else one on this machine; local: always one started here.",
        ),
    ] = "auto",
    debug: Debug = False,
) -> None:
    """Pack a data set into webdataset shards with an index. A stopped build goes on with the same command."""
    from dualenc_data_tools.build import build, of_file, print_report

    given = key_values(options or [])
    if source.endswith((".yaml", ".yml")):
        source, settings = of_file(source)
        given = {**settings, **given}
    print_report(build(source, out, given, engine=engine, address=address))


@shards_app.command("index")
def shards_index(
    shards: Annotated[list[str], typer.Argument(help="Shards: paths, brace patterns, URLs.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for index.json. Default: the folder of local shards.")
    ] = None,
    headers_only: Annotated[
        bool, typer.Option("--headers-only", help="Skip the checksums of members: faster, but training checks less.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Count the samples of every shard and write the index that training reads."""
    from rich.progress import Progress

    from dualenc.data.shards.index import build_index, expand, load_index

    urls = expand(shards)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("indexing", total=len(urls))
        path = build_index(
            urls,
            out,
            contents=not headers_only,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    index = load_index(str(path))
    Console().print(f"{index.total:,} samples in {len(index.shards)} shards: {path}", highlight=False, soft_wrap=True)


@shards_app.command("check")
def shards_check(
    shards: Annotated[
        list[str] | None, typer.Argument(help="Shards: paths, brace patterns, URLs; leave out with --recipe.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="Check the sources of this recipe, with its members and pairs.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Read and decode every sample once, as training would; exit code 3 if anything is broken or unusable."""
    from dualenc_data_tools.check import check, check_recipe, print_check

    if (recipe is None) == (not shards):
        raise ConfigError("dualenc shards check: give either shards or --recipe RECIPE, which checks its sources")
    result = check_recipe(load_recipe(recipe)) if recipe is not None else check(shards or [])
    print_check(result)
    if not result.ok:
        raise typer.Exit(3)


@shards_app.command("filter")
def shards_filter(
    shards: Annotated[list[str], typer.Argument(help="Shards: paths, brace patterns, URLs.")],
    names_of: Annotated[
        list[str],
        typer.Option("--with", help="A filter; may be repeated. dualenc list filters shows all and their settings."),
    ],
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A setting, FILTER.key=value: clip_score.model=runs/mine")
    ] = None,
    debug: Debug = False,
) -> None:
    """Score every sample and keep the scores beside the shards; nothing is left out yet (dualenc shards select)."""
    from dualenc_data_tools.choose.filter import run_filters
    from dualenc_data_tools.choose.tables import print_scores

    print_scores(run_filters(shards, names_of, key_values(settings or [])))


@shards_app.command("select")
def shards_select(
    words: Annotated[
        list[str],
        typer.Argument(help="SHARDS, then an expression: top 30% by clip_score and caption_rules minus duplicates"),
    ],
    out: Annotated[str, typer.Option("--out", help="Name of the selection (data.sources.N.selection), or its path.")],
    debug: Debug = False,
) -> None:
    """Write the samples that an expression selects as a selection beside the shards, which stay as they are."""
    from dualenc_data_tools.choose.select import select

    count = next((i for i, w in enumerate(words) if ".tar" not in w and not w.startswith("pipe:")), len(words))
    if not 0 < count < len(words):
        raise ConfigError(
            "dualenc shards select: give shards and then an expression: 'data/*.tar' top 30% by clip_score"
        )
    path, chosen, total, weight = select(words[:count], " ".join(words[count:]), out)
    Console().print(
        f"{chosen:,} of {total:,} samples, {weight:,.1f} per epoch: {path}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


@shards_app.command("duplicates")
def shards_duplicates(
    shards: Annotated[list[str], typer.Argument(help="Shards: paths, brace patterns, URLs.")],
    out: Annotated[
        str, typer.Option("--out", help="Name of the selection that keeps one of each group, or its path.")
    ] = "distinct",
    of: Annotated[
        str | None, typer.Option("--of", help="image, audio or text; default: the first that the samples have.")
    ] = None,
    near: Annotated[
        bool, typer.Option("--near", help="Find near texts (MinHash) and clips (spectral peaks), too; images always.")
    ] = False,
    features: Annotated[
        Path | None, typer.Option("--features", help="Features of these shards (dualenc embed): close ones are near.")
    ] = None,
    min_cosine: Annotated[
        float, typer.Option("--min-cosine", min=0, max=1, help="Cosine from which features are close.")
    ] = 0.95,
    debug: Debug = False,
) -> None:
    """Find samples whose item is equal (decoded) or, for images, near; write a selection without the repeats."""
    from dualenc_data_tools.choose.duplicates import ByFeatures, duplicates
    from dualenc_data_tools.choose.tables import print_duplicates

    by = ByFeatures(features, min_cosine) if features is not None else None
    print_duplicates(duplicates(shards, out, of, near, by))


@shards_app.command("contamination")
def shards_contamination(
    shards: Annotated[list[str], typer.Argument(help="Shards: paths, brace patterns, URLs.")],
    tasks: Annotated[str, typer.Option("--tasks", help="Evaluation tasks: names or YAML files, comma-separated.")],
    out: Annotated[
        str, typer.Option("--out", help="Name of the selection without the samples found, or its path.")
    ] = "uncontaminated",
    report: Annotated[
        Path | None, typer.Option("--report", help="Write every hit as a JSON line: task, item, sample, kind.")
    ] = None,
    near: Annotated[bool, typer.Option("--near", help="Compare texts and near clips, too.")] = False,
    debug: Debug = False,
) -> None:
    """Find samples that occur, equal or near, among the items of evaluation tasks; write a selection without them."""
    from dualenc.api.contamination import items_of, write_hits
    from dualenc_data_tools.choose.duplicates import contamination
    from dualenc_data_tools.choose.tables import print_hits

    items = items_of([t for t in tasks.split(",") if t], near)
    hits, selection, total = contamination(shards, items, out)
    if report is not None:
        write_hits(report, hits)
    print_hits(hits, items, selection, total)


@shards_app.command("report")
def shards_report(
    shards: Annotated[list[str], typer.Argument(help="Shards: paths, brace patterns, URLs.")],
    out: Annotated[Path, typer.Option("--out", help="HTML page to write.")] = Path("shards-report.html"),
    looked: Annotated[int, typer.Option("--looked-at", min=1, help="How many samples are measured.")] = 2000,
    sheet: Annotated[int, typer.Option("--sheet", min=0, help="Samples on the contact sheet.")] = 36,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the random choice of samples.")] = 0,
    debug: Debug = False,
) -> None:
    """Write an HTML page about shards: contact sheet, distributions, scores at their quantiles, duplicates, filters."""
    from dualenc_data_tools.shard_report import shard_report

    page = shard_report(shards, out, looked, sheet, seed)
    Console().print(f"page: {page}", highlight=False, markup=False, soft_wrap=True)


@shards_app.command("view")
def shards_view(
    shards: Annotated[list[str], typer.Argument(help="Shards: paths, brace patterns, URLs.")],
    out: Annotated[Path, typer.Option("--out", help="HTML page to write.")] = Path("shards.html"),
    n: Annotated[int, typer.Option("--n", help="How many samples to show.")] = 48,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the random choice of samples.")] = 0,
    select: Annotated[
        str, typer.Option("--select", help="Show only these: an expression as of dualenc shards select.")
    ] = "",
    debug: Debug = False,
) -> None:
    """Write an HTML page that shows samples with their captions."""
    from dualenc_data_tools.view import view

    Console().print(f"page: {view(shards, out, n=n, seed=seed, select=select)}", highlight=False, soft_wrap=True)
