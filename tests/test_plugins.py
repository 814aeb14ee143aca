"""Parts from outside: a package that nothing here knows of brings a modality with its tower, a loss, a term, a source,
a plan and a task kind, and goes through packing, training, launching, resuming, evaluation, distillation and export."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _plugin_jobs import NAMES, Server, difference, environment, install, lay, recipe, task, write_series
from _shared import ROOT
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent / "distributed"))
from _spawn import spawn

from dualenc import plugins
from dualenc.distill import terms
from dualenc.errors import CheckpointError, ConfigError
from dualenc.losses import losses as losses_
from dualenc.registry import Registry

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]
JOBS = Path(__file__).with_name("_plugin_jobs.py")
FORMS = ("entry", "plugins", "reference")
ACCELERATE = ["--config_file", str(ROOT / "recipes" / "launch" / "accelerate.yaml"), "--num_processes", "2"]


class Place:
    """A folder with the package, shards and recipes; ``run`` starts dualenc in it as a person would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.installed = install(folder / "installed")
        self.laid = lay(folder / "laid")
        write_series(folder / "csv")
        self.shards = str(folder / "shards" / "train-*.tar")
        for form in FORMS:
            recipe(folder, self.shards, form)
            task(folder, self.shards, form)

        self.servers: dict[str, Server] = {}

    def package(self, form: str) -> Path:
        return self.installed if form == "entry" else self.laid

    def start(self, form: str, *arguments: str) -> subprocess.Popen[str]:
        """A process of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "dualenc", *arguments],
            env=environment(self.package(form)),
            cwd=self.folder,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, form: str | None, *arguments: str, code: int = 0, path: str = "", **env: str) -> str:
        """What a command says; ``form``: with which package, None: without it."""
        which = "none" if form is None else self.package(form).name
        if which not in self.servers:
            self.servers[which] = Server(self.folder, *([] if form is None else [self.package(form)]))
        got, said = self.servers[which].run(list(arguments), env, path)
        assert got == code, said
        return " ".join(said.split())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    made = Place(tmp_path_factory.mktemp("plugins"))
    said = made.run("entry", "shards", "build", "series_csv", "--out", "shards", "path=csv", "shard_samples=20")
    assert "48 samples" in said
    yield made
    for server in made.servers.values():
        server.close()


@pytest.fixture(scope="module")
def runs(place: Place) -> dict[str, Path]:
    """The same run with its parts named in each of the three ways."""
    for form in FORMS:
        place.run(form, "train", f"{form}.yaml", f"out={place.folder}/run_{form}")
    return {form: place.folder / f"run_{form}" for form in FORMS}


def weights(run: Path, step: int = 6) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:010d}" / "model" / "model.safetensors")


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [r["loss"] for r in rows if "loss" in r]


def description(run: Path) -> dict[str, Any]:
    path = run / "checkpoints" / "step-0000000006" / "model" / "dualenc.json"
    said: dict[str, Any] = json.loads(path.read_text())
    return said


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- one run, three ways of naming ---------------------------------------------------------------------------------


def test_a_run_is_the_same_however_its_parts_are_named(place: Place, runs: dict[str, Path]) -> None:
    rows = [json.loads(line) for line in (runs["entry"] / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "loss" in r] == [1, 2, 3, 4, 5, 6]
    first = json.loads((runs["entry"] / "samples-rank0.jsonl").read_text().splitlines()[0])["samples"]
    assert first[0].endswith("/005")  # the package's own plan begins at sample 5 and goes on as they lie
    assert first[1].endswith("/006")
    for form in ("plugins", "reference"):
        assert same(weights(runs[form]), weights(runs["entry"])), form


def test_a_checkpoint_says_which_plugins_it_needs(runs: dict[str, Path]) -> None:
    known = {"distribution": "dualenc-series", "version": "0.3.0"}
    assert description(runs["entry"])["plugins"] == {"dualenc_series.series": known}
    assert description(runs["plugins"])["plugins"] == {"dualenc_series.register": {"version": "0.3.0"}}
    assert description(runs["reference"])["plugins"] == {"dualenc_series.series": {"version": "0.3.0"}}
    assert description(runs["reference"])["modalities"]["series"]["encoder"]["name"] == NAMES["encoder"][1]


def test_a_killed_run_goes_on_bit_for_bit(place: Place) -> None:
    form = "plugins"
    longer = ["train", f"{form}.yaml", "budget.steps=60", "checkpoint.every_steps=10", "checkpoint.keep=9"]
    place.run(form, *longer, f"out={place.folder}/whole_{form}")
    killed = place.folder / f"killed_{form}"
    process = place.start(form, *longer, f"out={killed}")
    deadline = time.monotonic() + 240
    while not (killed / "checkpoints" / "step-0000000010" / "manifest.json").is_file():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert "Resuming from" in place.run(form, *longer, f"out={killed}")
    assert same(weights(killed, 60), weights(place.folder / f"whole_{form}", 60))


def test_launched_ranks_have_the_plugin(place: Place, runs: dict[str, Path]) -> None:
    form = "plugins"
    out = place.folder / f"launched_{form}"
    place.run(form, "launch", "--nproc", "2", "train", f"{form}.yaml", f"out={out}", "optim.name=sgd")
    assert weights(out).keys() == weights(runs[form]).keys()


def test_torchrun_has_the_plugin_by_the_environment_too(place: Place) -> None:
    """Nothing in this recipe says who brings its names."""
    text = (place.folder / "plugins.yaml").read_text().replace("plugins: [dualenc_series.register]\n", "")
    (place.folder / "unsaid.yaml").write_text(text)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = environment(place.laid, DUALENC_PLUGINS="dualenc_series.register")
    arguments = ["-m", "dualenc", "train", "unsaid.yaml", f"out={place.folder}/torchrun"]
    done = subprocess.run(
        [*command, *arguments], env=env, cwd=place.folder, text=True, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "There is no plan 'as_it_lies'" in place.run("plugins", "train", "unsaid.yaml", code=2)
    place.run("plugins", "train", "unsaid.yaml", "--dry-run", "--plugins", "dualenc_series.register")


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "engine"),
    [
        (["accelerate", "launch", *ACCELERATE, "-m", "dualenc"], "accelerate"),
        pytest.param(["deepspeed", "--num_gpus", "2", "--module", "dualenc"], "deepspeed", marks=pytest.mark.extra),
    ],
    ids=["accelerate", "deepspeed"],
)
def test_other_launchers_have_the_plugin(place: Place, launcher: list[str], engine: str) -> None:
    """The loss of two ranks under it is that of two ranks under dualenc launch."""
    program, *options = launcher
    more = ["optim.name=sgd", "budget.steps=3"]
    out = place.folder / f"by_{program}"
    found = Path(sys.executable).parent
    env = environment(place.laid, PATH=f"{found}:{os.environ['PATH']}")
    command = [str(found / program), *options, "train", "plugins.yaml", *more, f"engine.kind={engine}", f"out={out}"]
    done = subprocess.run(command, env=env, cwd=place.folder, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((out / "environment.json").read_text())["world_size"] == 2
    one = place.folder / f"alone_{program}"
    place.run("plugins", "train", "plugins.yaml", *more, f"out={one}")
    assert losses(out) == pytest.approx(losses(one), abs=1e-5)


def test_workers_that_are_spawned_make_the_same_batches(place: Place) -> None:
    for form in ("reference",):
        command = [sys.executable, "-c", "from _plugin_jobs import first_batches as f\nif __name__ == '__main__': f()"]
        env = environment(place.package(form))
        done = subprocess.run([*command, f"{form}.yaml"], env=env, cwd=place.folder, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        fork, spawned = (line.split() for line in done.stdout.splitlines())
        assert (fork[0], spawned[0]) == ("fork", "spawn")
        assert len(fork) == 3
        assert fork[1:] == spawned[1:]


# --- the gradient --------------------------------------------------------------------------------------------------

SGD = ["optim.name=sgd", "optim.lr=0.05", "optim.weight_decay=0", "budget.steps=3", "data.workers=0"]
SGD += [
    "modalities.text.length_groups=false"
]  # padded as on a GPU: the gradient of norm.bias cancels to its last digits


def test_two_ranks_and_micro_batches_train_what_one_process_trains(place: Place, runs: dict[str, Path]) -> None:
    """With the loss, tower and plan of the package; then with its distillation term too."""
    term = f"distill={{teachers: [{{model: {runs['entry']}}}], terms: [{{name: same_cosines, weight: 3}}]}}"
    got: dict[str, list[dict[str, torch.Tensor]]] = {"loss": [], "term": []}
    for n, micros in ((1, [None]), (2, [None, 3])):
        names = [(what, micro) for what in got for micro in micros]
        parts = [
            [*SGD, f"out={place.folder}/exact_{what}_{n}_{micro}"]
            + ([f"batch.micro={micro}"] if micro else [])
            + ([term] if what == "term" else [])
            for what, micro in names
        ]
        given = {"path": str(place.installed), "recipe": str(place.folder / "entry.yaml"), "parts": parts}
        for (what, _), state in zip(names, spawn(JOBS, "trained", n, given, timeout_s=300)[0], strict=True):
            got[what].append(state)
    apart = {what: [difference(x, one) for x in others] for what, (one, *others) in got.items()}
    assert all(len(x) == 2 for x in apart.values())
    assert max(v for x in apart.values() for v, _ in x) <= 1e-5, apart
    for what in got:
        lines = (place.folder / f"exact_{what}_2_3" / "metrics.jsonl").read_text().splitlines()
        rows = [r for r in map(json.loads, lines) if "loss" in r]
        assert [r["grad_norm"] > 1e-3 for r in rows] == [True] * 3
        assert ("distill_same_cosines/series-text" in rows[0]) == (what == "term")


# --- after training ------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_evaluated_with_the_kind_of_the_plugin(place: Place, runs: dict[str, Path]) -> None:
    found = {}
    for form in FORMS:
        out = place.folder / f"results_{form}.json"
        place.run(form, "eval", f"run_{form}", "--task", f"task_{form}.yaml", "--out", str(out), "--no-cache",
                  *(["--plugins=dualenc_series"] if form == "reference" else []))  # fmt: skip
        result = json.loads(out.read_text())
        found[form] = result["tasks"][f"task_{form}"]["metrics"]
        assert set(result["model"]["plugins"]) == set(description(runs[form])["plugins"])
    assert set(found["entry"]) == {"two_choices_score"}
    assert found["entry"] == found["plugins"] == found["reference"]


def test_export_and_interpolation(place: Place, runs: dict[str, Path]) -> None:
    place.run("entry", "export", "run_entry", "--format", "safetensors", "--out", "exported")
    assert same(load_file(place.folder / "exported" / "model.safetensors"), weights(runs["entry"]))
    one, two = (f"e{i}.json" for i in (1, 2))
    for model, out in (("run_entry", one), ("exported", two)):
        place.run("entry", "eval", model, "--task", "task_entry.yaml", "--out", out, "--no-cache")
    first, second = (json.loads((place.folder / n).read_text())["tasks"] for n in (one, two))
    assert first["task_entry"].pop("in_training")["count"] == 0  # a run says what it was trained on
    assert first == second  # an export does not, and is otherwise the same
    for layout, why in (
        ("hf", "transformers has no dual encoder"),
        ("onnx", "there are graphs of image, text, audio, series towers"),
    ):
        said = place.run("entry", "export", "run_entry", "--format", layout, "--out", f"as_{layout}", code=2)
        assert "safetensors" in said
        assert why in said or "has no gauge" in said
    place.run("entry", "interpolate", "run_entry/checkpoints/step-0000000003", "run_entry", "--out", "between",
              "--keep", "0.5")  # fmt: skip
    made = load_file(next((place.folder / "between").rglob("model.safetensors")))
    ends = [weights(runs["entry"], step)["towers.series.head.weight"] for step in (3, 6)]
    assert torch.allclose(made["towers.series.head.weight"], (ends[0] + ends[1]) / 2)


def test_embeddings(place: Place, runs: dict[str, Path]) -> None:
    place.run("entry", "embed", "run_entry", place.shards, "--out", "features")


@pytest.mark.parametrize(
    ("what", "name", "module"),
    [
        ("losses", "hinge", "dualenc_series.hinge"),
        ("terms", "same_cosines", "dualenc_series.same_cosines"),
        ("sources", "series_csv", "dualenc_series.series_csv"),
        ("encoders", "gauge_cnn", "dualenc_series.series"),
        ("tasks", "two_choices", "dualenc_series.two_choices"),
    ],
)
def test_lists_say_where_a_part_comes_from(place: Place, what: str, name: str, module: str) -> None:
    wide = {"COLUMNS": "200"}
    said = place.run("entry", "list", what, **wide)
    assert name in said
    assert module in said
    said = place.run("plugins", "list", what, "--plugins", "dualenc_series.register", **wide)
    assert name in said
    assert "dualenc_series.register" in said
    assert name not in place.run(None, "list", what, **wide)


def test_a_page_of_shards_shows_a_modality_by_its_preview(place: Place) -> None:
    place.run("entry", "shards", "view", place.shards, "--out", str(place.folder / "page.html"), "--n", "3")
    page = (place.folder / "page.html").read_text()
    assert page.count("3 channels of 96 values, from -1") == 3
    place.run(None, "shards", "view", place.shards, "--out", str(place.folder / "bare.html"), "--n", "3")
    assert "channels" not in (place.folder / "bare.html").read_text()


SOURCE = """
import hashlib, sys
from pathlib import Path
from dualenc.data.sources import iter_source
from dualenc.data.shards.index import expand
from dualenc_data_tools.build import build
from dualenc_evals.catalog import parse_task
from dualenc_evals.read.rows import Rows
from dualenc_evals.read.shards import read_rows

kind, out = sys.argv[1:]
both = ["series", "text"]
given = dict(iter_source(kind, {"path": "csv"}, both))
task = {"name": "x", "kind": "retrieval", "modalities": both, "source": {"kind": kind, "path": "csv"}}
rows = read_rows(parse_task(task)).rows
assert {r.id: {m: r.contents[m][0].read() for m in both} for r in rows} == given
report = build(kind, out, path="csv", shard_samples=20, progress=False)
print(report.samples, report.dropped, hashlib.sha256(b"".join(p.read_bytes() for p in report.shards)).hexdigest())
print(type(given["012.csv"]["series"]).__name__, given["012.csv"]["text"])
"""


def test_a_source_serves_packing_tasks_and_embedding(place: Place) -> None:
    """One module; the same bytes however it is named, but for how a modality that nobody registered is packed."""
    said = []
    for form, at in (("entry", 0), ("reference", 1)):
        command = [sys.executable, "-c", SOURCE, NAMES["source"][at], str(place.folder / f"packed_{form}")]
        env = environment(place.package(form))
        done = subprocess.run(command, env=env, cwd=place.folder, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert said[0].startswith("48 {} ")
    assert "bytes a swing of 5 Hz along x, number 12" in said[0]
    shards = [sorted((place.folder / f).glob("*.tar")) for f in ("shards", "packed_entry", "packed_reference")]
    assert [p.read_bytes() for p in shards[0]] == [p.read_bytes() for p in shards[1]]
    assert len(shards[2]) == 3
    unknown = place.run(None, "shards", "build", NAMES["source"][1], "--out", "no", "path=csv", code=2)
    assert "there is no module 'dualenc_series'" in unknown
    assert "There is no source 'series_csw'. Did you mean 'series_csv'?" in place.run(
        "entry", "shards", "build", "series_csw", "--out", "no", "path=csv", code=2
    )


# --- what is refused -----------------------------------------------------------------------------------------------


def test_what_is_missing_is_said_in_one_sentence(place: Place, runs: dict[str, Path]) -> None:
    said = place.run(None, "train", "plugins.yaml", code=2)
    assert "plugins.yaml) names the plugin 'dualenc_series.register', but there is no module 'dualenc_series'" in said
    assert "PYTHONPATH" in said
    said = place.run(None, "train", "reference.yaml", code=2)
    assert "plan 'dualenc_series.as_it_lies:AsItLies', but there is no module 'dualenc_series'" in said
    assert "There is no plan 'as_it_lies'" in place.run(None, "train", "entry.yaml", code=2)
    said = place.run(None, "eval", "run_entry", "--task", "task_entry.yaml", code=2)
    assert "kind: unknown kind of task 'two_choices' (in task_entry.yaml)" in said
    said = place.run(None, "export", "run_entry", "--format", "safetensors", "--out", "never", code=4)
    assert "needs the plugin 'dualenc_series.series', which is not installed; pip install dualenc-series==0.3.0" in said
    said = place.run("reference", "train", "reference.yaml", "loss.name=dualenc_series.hinge:Hing", code=2)
    assert "dualenc_series.hinge has no 'Hing'. Did you mean 'Hinge'?" in said
    assert not (place.folder / "never").exists()


def test_a_checkpoint_has_nothing_imported_that_nobody_allowed(place: Place, runs: dict[str, Path]) -> None:
    export = ["export", "run_plugins", "--format", "safetensors", "--out"]
    said = place.run("plugins", *export, "asked", code=4)
    assert "importing it would run its code. If you trust it, add --plugins dualenc_series.register" in said
    place.run("plugins", *export, "by_option", "--plugins", "dualenc_series.register")
    place.run("plugins", *export, "by_package", DUALENC_PLUGINS="dualenc_series")


@pytest.mark.parametrize("where", ["plugins", "kind", "encoder"])
def test_a_strangers_checkpoint_runs_no_module_of_its_choice(place: Place, runs: dict[str, Path], where: str) -> None:
    """``evil`` lies where it could be imported, as anything on the path does."""
    folder = place.folder / f"stranger_{where}"
    place.run("entry", "export", "run_entry", "--format", "safetensors", "--out", str(folder))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\nThing = print\n")
    path = folder / "dualenc.json"
    said = json.loads(path.read_text())
    if where == "plugins":
        said["plugins"]["evil"] = {}
    elif where == "kind":
        said["modalities"]["series"]["kind"] = "evil:Thing"
    else:
        said["modalities"]["series"]["encoder"]["name"] = "evil:Thing"
    path.write_text(json.dumps(said))
    export = ["export", str(folder), "--format", "safetensors", "--out", "no"]
    answer = place.run("entry", *export, code=4, path=str(folder))
    assert "needs the plugin 'evil', and importing it would run its code" in answer
    assert not (folder / "ran").exists()


def test_parts_of_the_interpreter_are_no_parts_of_a_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(plugins.ENV, raising=False)
    monkeypatch.setattr(plugins, "_allowed", set())
    with pytest.raises(CheckpointError, match="run its code"):
        plugins.import_recorded({}, ["os:system"], "runs/x")
    with pytest.raises(CheckpointError, match="not the name of a plugin module"):
        plugins.import_recorded({"../x": {}}, [], "runs/x")
    with pytest.raises(CheckpointError, match="no_such_package"):
        plugins.import_recorded({"no_such_package.a": {}}, [], "runs/x")


# --- the registry --------------------------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module on the path, and two distributions that bring parts of it."""
    (tmp_path / "small_parts.py").write_text("class A:\n    Config = 1\n\nclass B:\n    pass\n")
    for name, lines in (
        ("one", "a=small_parts:A\nboth=small_parts:A\nlame=small_parts:B"),
        ("two", "both=small_parts:B"),
    ):
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[dualenc.test_parts]\n{lines}\nown=small_parts:B\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv(plugins.ENV, raising=False)
    monkeypatch.setattr(plugins, "_allowed", set())
    monkeypatch.delitem(sys.modules, "small_parts", raising=False)
    plugins.entry_points.cache_clear()
    yield "small_parts"
    plugins.entry_points.cache_clear()
    sys.modules.pop("small_parts", None)
    os.environ.pop(plugins.ENV, None)


def test_entry_points_are_imported_when_they_are_first_needed(module: str) -> None:
    parts: Registry[Any] = Registry("part", "dualenc.test_parts", needs=("Config",))
    own = type("Own", (), {"Config": 1})
    parts.register("own")(own)
    assert list(parts) == ["a", "both", "lame", "own"]
    assert parts["own"] is own  # what is registered is not replaced by an entry point
    assert parts.source("a") == module
    assert module not in sys.modules
    assert parts["a"].Config == 1
    assert parts.origin("a") == module
    with pytest.raises(
        ConfigError, match=r"'both' is provided by one 1.0 and by two 1.0; choose with small_parts:A or"
    ):
        parts["both"]
    assert parts["small_parts:A"].Config == 1
    with pytest.raises(ConfigError, match="part 'lame' has no 'Config'"):
        parts["lame"]
    with pytest.raises(ConfigError, match="Did you mean 'lame'"):
        parts["lamm"]


def test_a_part_has_to_be_of_its_class(module: str) -> None:
    Path(sys.path[0], "half_parts.py").write_text("class A:\n    Config = 1\n")
    for registry, base in ((losses_, "dualenc.losses.Loss"), (terms, "dualenc.distill.Term")):
        with pytest.raises(ConfigError, match=rf"'half_parts:A' must be a class that derives from {base}"):
            registry["half_parts:A"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.sampling=as_it_lie", "data.sampling: There is no plan 'as_it_lie'. Did you mean 'as_it_lies'?"),
        ("data.sampling={name: as_it_lies, begin: 3}", "data.sampling.begin"),
        ("loss.name=hinges", "There is no loss 'hinges'. Did you mean 'hinge'?"),
        ("loss.margins=1", "loss.margins"),
    ],
)
def test_a_dry_run_refuses_what_training_would(place: Place, override: str, words: str) -> None:
    assert words in place.run("entry", "train", "entry.yaml", "--dry-run", override, code=2)


def test_a_plugin_that_lacks_a_package_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needy.py").write_text("import a_package_nobody_has\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="needs the package 'a_package_nobody_has'; it is not installed"):
        plugins.import_plugins(["needy"], "plugins (in x.yaml)")
    with pytest.raises(ZeroDivisionError):  # a bug of the plugin, shown whole
        plugins.import_plugins(["broken"], "plugins (in x.yaml)")
    with pytest.raises(ConfigError, match=r"plugins \(in x.yaml\): 'a-b' is not a module name"):
        plugins.import_plugins(["a-b"], "plugins (in x.yaml)")
    with pytest.raises(ConfigError, match="write a list of modules"):
        plugins.named_in({"plugins": "mypkg"}, "x.yaml")
