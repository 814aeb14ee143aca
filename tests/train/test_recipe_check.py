"""What --dry-run finds: everything that would end the run, in one sentence with the key in it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from _runs import RECIPE, SMALL

from dualenc.cli import main
from dualenc.config import dump_yaml, load_recipe
from dualenc.errors import ConfigError
from dualenc.train.build import total_steps
from dualenc.train.loop import train
from dualenc.train.resume import fingerprint

WRONG = [
    (2, "loss.name=info_nec", "Did you mean 'info_nce'?"),
    (2, "loss.label_smoothing=7", "loss.label_smoothing"),
    (2, "distill={teachers: [{model: runs/nowhere}], terms: [{name: dcd}]}", "distill.teachers.0.model: There is no"),
    (3, "distill={teachers: [{cache: nowhere}], terms: [{name: dcd}]}", "distill.teachers.0.cache: there is no folder"),
    (2, "distill={look_ahead: {}, terms: [{name: dcdd}]}", "Did you mean 'dcd'?"),
    (2, "checkpoint.init_from=runs/nowhere", "checkpoint.init_from: There is no model"),
    (2, "checkpoint.init_from=hf:nobody/nothing", "checkpoint.init_from: hf/nobody/nothing: there is no such folder"),
    (2, "checkpoint.init_from=hf:///", "checkpoint.init_from: hf"),
    (2, "checkpoint.init_from=open_clip:ViT-B-23/openai", "checkpoint.init_from: There is no open_clip model"),
    (2, "checkpoint.init_from=open_clip:ViT-B-32/opnai", "checkpoint.init_from: open_clip:ViT-B-32/opnai"),
    (2, "checkpoint.init_from=laion_clap:no.pt", "checkpoint.init_from: laion_clap:no.pt: there is no such file"),
    (2, "checkpoint.init_from=/", "checkpoint.init_from: / has no model"),
    (
        2,
        "distill={teachers: [{model: 'hf:nobody/nothing'}], terms: [{name: dcd}]}",
        "distill.teachers.0.model: hf/nobody/nothing",
    ),
    (
        2,
        "modalities.image.init_from='open_clip:ViT-B-32/laion2b_e16#image'",
        "modalities.image.init_from: open_clip:ViT-B-32/laion2b_e16: its weights",
    ),
    (4, "checkpoint.resume=runs/nowhere", "checkpoint.resume: there is no folder"),
    (2, "eval.tasks=[quickstart_val_clipartt]", "There is no task"),
    (2, "modalities.image.encoder.what=1", "modalities.image.encoder.what"),
    (3, "data.sources.0.shards=nowhere-{000..001}.tar", "nowhere-000.tar"),
    (2, "engine.device=cuda", "torch sees no CUDA device"),
    (2, "schedule.warmup_samples=1000000", "the learning rate would never reach its peak"),
    (2, "optim.lr=.inf", "optim.lr"),
    (2, "optim.betas=[0.9, 1.0]", "optim.betas.1"),
    (2, "logit_scale={init: 200, max: 100}", "init (200) is above max (100)"),
    (2, "modalities.image.input.std=[0.3, 0.3, 0]", "modalities.image.input.std.2"),
    (2, "pairs=[[image, text], [text, image]]", "['text', 'image'] is listed twice"),
    (2, "pairs=[[image, text], [image, text]]", "['image', 'text'] is listed twice"),
    (2, "data.sources.0.members={imagee: [webp]}", "Did you mean 'image'?"),
]


@pytest.mark.parametrize(("code", "item", "words"), WRONG)
def test_dry_run_finds(
    code: int, item: str, words: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    items = [*SMALL, "schedule.warmup_samples=0", "budget.steps=4", item]
    monkeypatch.setattr(sys, "argv", ["dualenc", "train", str(RECIPE), "--dry-run", *items])
    with pytest.raises(SystemExit) as ended:
        main()
    said = " ".join(capfd.readouterr().err.split())
    assert ended.value.code == code, said
    assert words in said
    assert "Traceback" not in said


def test_a_released_model_is_found_without_its_weights_being_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the Hub's cache, in a folder, by a tag: the weights there are no weights, and nobody looks."""
    from dualenc.encoders.released import find_released as found

    sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
    from test_released_models import write_hf

    folder = tmp_path / "models--openai--clip-vit-base-patch32" / "snapshots" / ("0" * 40)
    write_hf(folder, "clip")
    (folder / "model.safetensors").write_bytes(b"none")
    (folder.parents[1] / "refs").mkdir()
    (folder.parents[1] / "refs" / "main").write_text(folder.name)
    tagged = tmp_path / "models--laion--CLIP-ViT-B-32-laion2B-s34B-b79K"
    (tagged / "snapshots" / folder.name).mkdir(parents=True)
    (tagged / "refs").mkdir()
    (tagged / "refs" / "main").write_text(folder.name)
    (tagged / "snapshots" / folder.name / "open_clip_model.safetensors").write_bytes(b"none")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found.find_released("hf:openai/clip-vit-base-patch32")
    found.find_released(f"hf:{folder}")
    found.find_released("open_clip:ViT-B-32/laion2b_s34b_b79k")
    found.find_released("open_clip:ViT-B-32")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=f"hf:{folder} has no weights within reach: none of model.safetensors"):
        found.find_released(f"hf:{folder}")


def test_a_budget_on_the_command_line_replaces_the_recipes(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"base: {RECIPE}\nbudget: {{steps: 7}}\noptim: {{ema_samples: 100}}\n")
    assert load_recipe(mine).budget.steps == 7
    budget = load_recipe(mine, ["budget.samples=640"]).budget
    assert (budget.steps, budget.samples, budget.passes) == (None, 640, None)
    assert load_recipe(mine, ["budget={passes: 2}"]).budget.passes == 2
    assert load_recipe(mine, ["optim.trajectory={}"]).optim.ema_samples is None
    over = tmp_path / "over.yaml"
    over.write_text("base: mine.yaml\nbudget: {samples: 64}\n")
    assert load_recipe(over).budget.model_dump() == {"steps": None, "samples": 64, "passes": None}
    with pytest.raises(ConfigError, match="exactly one of steps, samples, epochs"):
        load_recipe(mine, ["budget.samples=640", "budget.steps=3"])
    both = tmp_path / "both.yaml"
    both.write_text(f"base: {RECIPE}\nbudget: {{steps: 7, samples: 9}}\n")
    with pytest.raises(ConfigError, match="exactly one of steps, samples, epochs"):
        load_recipe(both)


def test_epochs_is_another_name_for_passes(tmp_path: Path) -> None:
    """One key under two names, never both; what is written down stays ``passes``, as in older runs."""
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"base: {RECIPE}\nbudget: {{epochs: 3}}\n")
    as_before = tmp_path / "as_before.yaml"
    as_before.write_text(f"base: {RECIPE}\nbudget: {{passes: 3}}\n")
    for recipe in (
        load_recipe(mine),
        load_recipe(RECIPE, ["budget.epochs=3"]),
        load_recipe(mine, ["budget.steps=null"]),
    ):
        assert recipe == load_recipe(as_before)
        assert dump_yaml(recipe) == dump_yaml(load_recipe(as_before))
        assert fingerprint(recipe) == fingerprint(load_recipe(as_before))
        assert total_steps(recipe, 320) == 3 * 320 // recipe.batch.size
    assert "epochs" not in dump_yaml(load_recipe(mine))
    assert load_recipe(mine, ["budget.passes=2"]).budget.passes == 2  # the later one replaces, under either name
    assert load_recipe(as_before, ["budget.epochs=2"]).budget.passes == 2
    written = tmp_path / "written.yaml"  # a run's recipe.yaml has every key, most of them null
    written.write_text(dump_yaml(load_recipe(RECIPE)))
    assert load_recipe(written, ["budget.epochs=2"]).budget.model_dump() == {
        "steps": None,
        "samples": None,
        "passes": 2,
    }
    mine.write_text(f"base: {RECIPE}\nbudget: {{passes: null, epochs: 2}}\n")
    assert load_recipe(mine).budget.passes == 2
    mine.write_text(f"base: {RECIPE}\nbudget: {{passes: 3, epochs: 3}}\n")
    for path, items in ((mine, []), (RECIPE, ["budget.passes=2", "budget.epochs=2"])):
        with pytest.raises(ConfigError, match="budget: epochs and passes are two names of one key; give only one"):
            load_recipe(path, items)
    with pytest.raises(ConfigError, match="exactly one of steps, samples, epochs"):
        load_recipe(RECIPE, ["budget.epochs=2", "budget.steps=9"])
    with pytest.raises(ConfigError, match=r"budget\.epochs: .*greater than 0, got -1 \(in the command line\)"):
        load_recipe(RECIPE, ["budget.epochs=-1"])
    with pytest.raises(ConfigError, match=r"budget\.epoch: unknown key .*Did you mean 'epochs'\?"):
        load_recipe(RECIPE, ["budget.epoch=2"])


def test_resuming_with_another_rate_says_so_and_keeps_the_old_recipe(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    quick = [*SMALL, "data.workers=0", "batch.size=16", f"out={tmp_path}"]
    train(load_recipe(RECIPE, [*quick, "budget.steps=2", "optim.lr=1e-3"]))
    train(load_recipe(RECIPE, [*quick, "budget.steps=3", "optim.lr=1e-3"]))
    assert list(tmp_path.glob("recipe-*.yaml")) == []
    assert "Changed since" not in capfd.readouterr().err
    train(load_recipe(RECIPE, [*quick, "budget.steps=4", "optim.lr=0.002", "schedule.name=cosine"]))
    said = " ".join(capfd.readouterr().err.split())
    assert (
        "Changed since the last start: optim.lr = 0.002 (was 0.001); schedule.name = 'cosine' (was 'constant')" in said
    )
    assert load_recipe(tmp_path / "recipe-0000000003.yaml").optim.lr == 1e-3
    assert load_recipe(tmp_path / "recipe.yaml").optim.lr == 0.002
