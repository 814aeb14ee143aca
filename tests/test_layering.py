"""The layers of docs/architecture.md, enforced: every import (lazy ones too) points downward."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import dualenc

ROOT = Path(__file__).parents[1]

# Higher number = higher layer; equal numbers of different packages must not import each other.
LAYERS = {
    "dualenc.errors": 0,
    "dualenc.registry": 0,
    "dualenc.plugins": 0,
    "dualenc.shipped": 0,
    "dualenc.files": 0,
    "dualenc.versions": 0,
    "dualenc.seeds": 0,
    "dualenc.terminal": 0,
    "dualenc.flop_counter": 0,
    "dualenc.config": 0,
    "dualenc": 0,
    "dualenc.distributed": 1,
    "dualenc.pages": 1,
    "dualenc.data": 2,
    "dualenc.encoders": 2,
    "dualenc.checkpoint": 2,
    "dualenc.model": 3,
    "dualenc.memory": 3,
    "dualenc.losses": 4,
    "dualenc.features": 4,
    "dualenc.engine": 5,
    "dualenc.distill": 5,
    "dualenc.train": 6,
    "dualenc.plan": 6,
    "dualenc_evals": 6,
    "dualenc_data_tools": 6,
    "dualenc.api": 7,
    "dualenc.importing": 7,
    "dualenc.compare": 7,
    "dualenc.mteb": 7,
    "dualenc.sentence_transformers": 8,
    "dualenc.cli": 8,
    "benchmarks": 9,
    "dualenc.__main__": 9,
}
BOTTOM = {p for p, layer in LAYERS.items() if layer == 0}

# dualenc/__init__.py names these for people's scripts and loads them when they are used; nothing in here goes that way.
FACE = {name for name in dualenc.__all__ if name != "__version__"}

# Packages that may be imported below these folders only.
ONLY_IN = {
    "accelerate": ("dualenc/engine",),
    "deepspeed": ("dualenc/engine",),
    "webdataset": ("dualenc/data", "data_tools", "benchmarks"),
    "PIL": ("dualenc/data", "data_tools", "benchmarks"),
    "soundfile": ("dualenc/data", "data_tools", "benchmarks"),
    "soxr": ("dualenc/data", "data_tools"),
    "open_clip": ("dualenc/encoders", "dualenc/data/modalities/tokenizing.py", "benchmarks"),
    "timm": ("dualenc/encoders",),
    "peft": ("dualenc/encoders",),
    "sentence_transformers": ("dualenc/sentence_transformers.py",),
    "mteb": ("dualenc/mteb.py", "benchmarks"),
    "transformers": ("dualenc/encoders", "dualenc/data/modalities/tokenizing.py", "benchmarks"),
    "jinja2": ("dualenc/pages", "evals/dualenc_evals/pages"),
    "ray": ("data_tools/dualenc_data_tools/packing/on_ray.py",),
    "datasketch": ("data_tools/dualenc_data_tools/choose/sketches.py",),
    "typer": ("dualenc/cli",),
    "argparse": ("dualenc/cli", "benchmarks"),
    "pickle": (),
}

FILES = sorted(p for top in ("dualenc", "evals", "data_tools", "benchmarks") for p in (ROOT / top).rglob("*.py"))


def imported(path: Path) -> list[tuple[int, str]]:
    """Every module named by an import statement or ``importlib.import_module`` literal in ``path``."""
    out = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            out += [(node.lineno, a.name) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write absolute imports"
            out += [(node.lineno, f"{node.module}.{a.name}") for a in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module" and node.args:
            arg = node.args[0]
            if isinstance(arg, ast.Constant):
                out.append((node.lineno, str(arg.value)))
    return out


def package_of(module: str) -> str | None:
    """The layer a dotted module belongs to."""
    parts = module.split(".")
    if parts[0] not in ("dualenc", "dualenc_evals", "dualenc_data_tools", "benchmarks"):
        return None
    two = ".".join(parts[:2])
    if two in LAYERS:
        return two
    return parts[0] if parts[0] in LAYERS else None


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] in ("evals", "data_tools") else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downward(path: Path) -> None:
    me = package_of(module_name(path))
    assert me is not None, f"{path} stands in no layer"
    if module_name(path) == "dualenc":
        assert {name.rpartition(".")[2] for _, name in imported(path) if name.startswith("dualenc.")} == FACE
        return
    for line, name in imported(path):
        assert name.removeprefix("dualenc.") not in FACE - {"losses", "train"}, (
            f"{path}:{line}: import it from its file"
        )
        other = package_of(name)
        if other is None or other == me or (me in BOTTOM and other in BOTTOM):
            continue
        assert LAYERS[other] < LAYERS[me], f"{path}:{line}: {me} must not import {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_libraries_stay_in_their_rooms(path: Path) -> None:
    rel = path.relative_to(ROOT).as_posix()
    for line, name in imported(path):
        rooms = ONLY_IN.get(name.split(".")[0])
        if rooms is not None:
            assert rel.startswith(rooms) if rooms else False, (
                f"{rel}:{line}: {name} may be imported in {rooms or 'no file'} only"
            )


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 520, f"{path}: {text.count(chr(10))} lines; find the seam"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 85, f"{path}:{node.lineno}: {node.name} has {length} lines"


def test_the_walk_sees_an_upward_edge(tmp_path: Path) -> None:
    bad = tmp_path / "x.py"
    bad.write_text("def f():\n    from dualenc.train import loop\n")
    assert imported(bad) == [(2, "dualenc.train.loop")]
    assert package_of("dualenc.train.loop") == "dualenc.train"
    assert LAYERS["dualenc.train"] > LAYERS["dualenc.losses"]


def module_level(path: Path) -> set[str]:
    """Modules of ours that ``path`` imports when it is itself imported."""
    named: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            named |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            named |= {f"{node.module}.{a.name}" for a in node.names} | {str(node.module)}
    return named


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Packages' ``__init__`` aside, which import what they name again."""
    modules = {module_name(p): p for p in FILES if p.name != "__init__.py"}
    left = {m: {x for x in module_level(p) if x in modules and x != m} for m, p in modules.items()}
    while free := [m for m, needs in left.items() if not needs & left.keys()]:
        for m in free:
            del left[m]
    assert left == {}, f"a circle among {sorted(left)}"


def test_attributes_are_declared_not_asked_for_by_name() -> None:
    """``getattr(x, "name", default)`` stands where a library's object may lack it, and nowhere for parts of ours."""
    asked = [
        f"{p.relative_to(ROOT)}:{n.lineno}"
        for p in FILES
        for n in ast.walk(ast.parse(p.read_text(encoding="utf-8")))
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "getattr"
        if len(n.args) > 1 and isinstance(n.args[1], ast.Constant)
    ]
    assert len(asked) <= 15, asked


def test_one_reader_of_tars_and_one_writer_of_whole_files() -> None:
    """Training, evaluation and tools read shards through dualenc/data/shards; only the quickstart's own packages from
    npm and Debian are opened as archives."""
    tars = [p for p in FILES if any(name.split(".")[0] == "tarfile" for _, name in imported(p))]
    assert [p.name for p in tars] == ["quickstart.py"]
    replacing = [p.relative_to(ROOT).as_posix() for p in FILES if "os.replace(" in p.read_text(encoding="utf-8")]
    # A download is renamed when it is complete; until then it stays, and is continued after a failure.
    assert replacing == ["dualenc/data/shards/remote.py", "dualenc/files.py"]
