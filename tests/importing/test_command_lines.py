"""Published command lines, written anew from their documented flags, against open_clip's own objects: global batch,
learning rate at several steps, number of parameters; and that no flag is passed over in silence."""

from __future__ import annotations

import argparse
import math
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
import yaml
from open_clip_train import params, scheduler
from transformers import ClapAudioConfig, ClapAudioModelWithProjection
from typer.testing import CliRunner

from dualenc.cli import app
from dualenc.config import Recipe, load_recipe
from dualenc.encoders import build_tower
from dualenc.encoders.adapters.open_clip import OpenClipConfig, architecture
from dualenc.engine import lr_factor
from dualenc.errors import ConfigError
from dualenc.importing import clap_flags, from_clap, from_open_clip, open_clip_flags
from dualenc.importing.draft import Draft
from dualenc.importing.flags import read_command
from dualenc.model.bundle import resolve_input

LINES: dict[str, tuple[int, str]] = {
    "CC12M, RN50": (
        8,
        "--train-data '/data/cc12m/{00000..01242}.tar' --train-num-samples 10968539 --dataset-type webdataset "
        "--model RN50 "
        "--batch-size 128 --epochs 32 --lr 1e-3 --wd 0.1 --warmup 10000 --workers 8 --save-frequency 1",
    ),
    "LAION-400M, ViT-B/32": (
        128,
        "--save-frequency 1 --report-to tensorboard --train-data '/data/laion400m/{00000..41455}.tar' --dataset-type "
        "webdataset --train-num-samples 413000000 --warmup 2000 --batch-size=256 --epochs=32 --lr 5e-4 --workers=8 "
        "--model "
        "ViT-B-32 --name B32-400M --seed 0 --local-loss --gather-with-grad",
    ),
    "LAION-2B, ViT-H/14": (
        824,
        "--train-data '/data/laion2b/{00000..231349}.tar' --train-num-samples 135646078 --dataset-type webdataset "
        "--dataset-resampled --warmup 2000 --batch-size 96 --epochs 256 --lr 5e-4 --beta1 0.9 --beta2 0.98 --wd 0.2 "
        "--workers 8 --report-to wandb --model ViT-H-14 --precision amp_bfloat16 --local-loss --gather-with-grad "
        "--grad-checkpointing --ddp-static-graph --delete-previous-checkpoint --save-most-recent --log-every-n-steps 1",
    ),
    "WebLI-like, SigLIP B/16": (
        16,
        "--model ViT-B-16-SigLIP --siglip --train-data '/data/pairs/{00000..09999}.tar' --train-num-samples 100000000 "
        "--batch-size 1024 --epochs 9 --lr 1e-3 --beta2 0.95 --wd 1e-4 --warmup 20000 --precision amp_bf16 --workers 6 "
        "--loss-dist-impl reduce --torchcompile",
    ),
    "LiT, ViT-B/16": (
        4,
        "--model ViT-B-16 --pretrained openai --force-quick-gelu --lock-image --lock-image-freeze-bn-stats "
        "--train-data "
        "'/data/cc3m/{00000..00331}.tar' --train-num-samples 2905954 --batch-size 256 --epochs 5 --lr 1e-3 --wd 0.2 "
        "--warmup 500 --precision fp32 --workers 4",
    ),
    "CC3M from a csv, RN50": (
        4,
        "--save-frequency 1 --zeroshot-frequency 1 --report-to tensorboard --train-data cc3m.csv --csv-img-key "
        "filepath "
        "--csv-caption-key title --csv-separator , --imagenet-val /data/imagenet/val --warmup 50 --batch-size 2 "
        "--lr=1e-3 "
        "--wd=0.1 --epochs=30 --workers=8 --model RN50",
    ),
    "DataComp-like mixture, ViT-L/14, const-cooldown": (
        64,
        "--model ViT-L-14 --train-data '/a/{000..009}.tar::/b/{000..029}.tar' --train-data-upsampling-factors 2::0.5 "
        "--dataset-resampled --train-num-samples 10000000 --epochs 10 --lr-scheduler const-cooldown "
        "--epochs-cooldown 2 "
        "--lr-cooldown-end 1e-5 --lr 1e-3 --batch-size 256 --warmup 500 --wd 0.2 --beta2 0.95 --precision pure_bf16 "
        "--grad-clip-norm 1.0 --remote-sync s3://bucket/logs",
    ),
    "ConvNeXt-Base-W with accumulation and augmentation": (
        8,
        "--model convnext_base_w --train-data '/data/{0000..0999}.tar' --train-num-samples 13000000 --batch-size 64 "
        "--accum-freq 4 --epochs 3 --lr 1e-3 --warmup 100 --grad-clip-norm 5 --aug-cfg 'scale=(0.33, 1.0)' "
        "'color_jitter=(0.32, 0.32, 0.32, 0.08)' color_jitter_prob=0.8 gray_scale_prob=0.2 --precision amp_bf16",
    ),
    "distilled from ViT-L/14, constant": (
        8,
        "--model ViT-S-32 --train-data '/data/{0000..0999}.tar' --train-num-samples 3000000 --batch-size 256 "
        "--epochs 4 "
        "--distill-model ViT-L-14 --distill-pretrained openai --lr-scheduler const --warmup 300 --lr 5e-4",
    ),
}


def imported(name: str) -> tuple[argparse.Namespace, Draft, Recipe]:
    gpus, line = LINES[name]
    argv = shlex.split(line)
    draft = from_open_clip.translate(from_open_clip.read(argv, None), gpus)
    return params.parse_args(argv), draft, draft.recipe()


@pytest.fixture(autouse=True)
def cc3m(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = "".join(f"{i:04}.jpg,picture {i}\n" for i in range(203))
    Path("cc3m.csv").write_text(f"filepath,title\n{rows}", encoding="utf-8")


def total_steps(args: argparse.Namespace, gpus: int) -> int:
    """As its loaders count."""
    if args.train_data.endswith(".csv"):
        batches = -(-203 // gpus) // args.batch_size
    else:
        whole = -(-args.train_num_samples // (args.batch_size * gpus))
        batches = -(-whole // args.workers) * args.workers
    return batches // args.accum_freq * args.epochs


@pytest.mark.parametrize("name", LINES)
def test_batch_length_and_learning_rate_are_open_clips(name: str) -> None:
    args, _, recipe = imported(name)
    gpus = LINES[name][0]
    size = args.batch_size * gpus * args.accum_freq
    total = total_steps(args, gpus)
    assert recipe.batch.size == size
    assert recipe.budget.steps == total
    assert recipe.optim.betas == (args.beta1, args.beta2)
    assert (recipe.optim.eps, recipe.optim.weight_decay) == (args.eps, args.wd)
    assert recipe.optim.clip_grad_norm == args.grad_clip_norm
    assert recipe.schedule.warmup_samples == args.warmup * size
    optimizer = SimpleNamespace(param_groups=[{}])
    its: Any = {
        "cosine": lambda: scheduler.cosine_lr(optimizer, args.lr, args.warmup, total),
        "const": lambda: scheduler.const_lr(optimizer, args.lr, args.warmup, total),
        "const-cooldown": lambda: scheduler.const_lr_cooldown(
            optimizer,
            args.lr,
            args.warmup,
            total,
            total // args.epochs * args.epochs_cooldown,
            1.0,
            args.lr_cooldown_end,
        ),
    }[args.lr_scheduler]()
    assert args.warmup < total
    for step in {0, args.warmup // 2, args.warmup - 1, args.warmup, (args.warmup + total) // 2, total - 3, total - 1}:
        seen = (step + 1 if step < args.warmup else step) * size  # the warm-up is a step ahead there
        ours = recipe.optim.lr * lr_factor(seen, total * size, recipe.schedule)
        assert ours == pytest.approx(its(step), rel=1e-9, abs=1e-12), step


@pytest.mark.parametrize("name", LINES)
def test_parameters_are_open_clips(name: str) -> None:
    args, _, recipe = imported(name)
    cfg = architecture(args.model, OpenClipConfig())
    with torch.device("meta"):
        text = dict(cfg["text_cfg"])
        custom = cfg.get("custom_text", False) or "hf_model_name" in text
        cls = open_clip.CustomTextCLIP if custom else open_clip.CLIP
        bias = recipe.logit_scale.bias
        its = cls(cfg["embed_dim"], cfg["vision_cfg"], text, init_logit_bias=bias)
        described = {
            "image": {
                "config": {"size": cfg["vision_cfg"].get("image_size", 224), "mean": (0.5,) * 3, "std": (0.5,) * 3}
            },
            "text": {
                "config": {"context_length": text.get("context_length", 77)},
                "tokenizer": {"vocab_size": text.get("vocab_size", 49408), "pad_id": 0},
            },
        }
        towers = {
            m: build_tower(m, part.encoder, {"kind": m, **described[m]}, recipe.embed_dim, m)
            for m, part in recipe.modalities.items()
        }
    scalars = 1 + (bias is not None)
    assert sum(p.numel() for p in its.parameters()) == scalars + sum(
        p.numel() for t in towers.values() for p in t.parameters()
    )
    locked = {m: bool(part.lock) for m, part in recipe.modalities.items()}
    assert locked == {"image": args.lock_image, "text": args.lock_text}


def test_what_each_line_says_that_differs() -> None:
    def different(name: str) -> str:
        return " | ".join(f"{n.flag}: {n.why}" for n in imported(name)[1].notes if n.became == "different")

    assert "1/8 of the true one" in different("CC12M, RN50")
    assert "running statistics" in different("CC12M, RN50")
    assert "no fp16" in different("CC12M, RN50")
    assert "true one" not in different("LAION-400M, ViT-B/32")
    assert "multiplies the gradient of the logit scale by 4" in different(
        "ConvNeXt-Base-W with accumulation and augmentation"
    )
    assert "dualenc shards build csv" in different("CC3M from a csv, RN50")
    recipe = imported("DataComp-like mixture, ViT-L/14, const-cooldown")[2]
    assert [s.weight for s in recipe.data.sources] == [20.0, 15.0]
    assert recipe.data.sampling == "with_replacement"
    assert imported("LiT, ViT-B/16")[2].checkpoint.init_from == "open_clip:ViT-B-16/openai"
    distilled = imported("distilled from ViT-L/14, constant")[2].distill
    assert distilled is not None
    assert distilled.teachers[0].model == "open_clip:ViT-L-14/openai"
    colour = imported("ConvNeXt-Base-W with accumulation and augmentation")[2].modalities["image"].input["augment"]
    assert colour["scale"] == [0.33, 1.0]
    assert colour["colour"] == {
        "brightness": 0.32,
        "contrast": 0.32,
        "saturation": 0.32,
        "hue": 0.08,
        "p": 0.8,
        "grayscale_p": 0.2,
    }


def test_clap() -> None:
    line = (
        "--amodel HTSAT-tiny --tmodel roberta --datasetpath /data/clap --datasetnames Clotho audiocaps "
        "--datasetinfos train "
        "--train-num-samples 52000 --batch-size 96 --lr 1e-4 --wd 0.0 --epochs 45 --warmup 3200 --precision fp32 "
        "--use-bn-sync --optimizer adam --workers 6"
    )
    with pytest.raises(ConfigError, match="write adamw or sgd"):
        from_clap.translate(from_clap.read(shlex.split(line), None), 4)
    draft = from_clap.translate(from_clap.read(shlex.split(line.replace("adam ", "adamw ")), None), 4)
    recipe = draft.recipe()
    batches = math.ceil(math.ceil(52000 / (96 * 4)) / 6) * 6
    assert (recipe.batch.size, recipe.budget.steps) == (384, batches * 45)
    assert recipe.optim.betas == (0.9, 0.999)
    audio = recipe.modalities["audio"]
    described = resolve_input("audio", audio)[1].describe()
    with torch.device("meta"):
        tower = build_tower("audio", audio.encoder, described, 512, "audio")
        its = ClapAudioModelWithProjection(ClapAudioConfig(projection_dim=512))
    assert sum(p.numel() for p in tower.parameters()) == sum(p.numel() for p in its.parameters())
    assert audio.input["features"]["hop"] == 480


# --- no flag in silence ------------------------------------------------------------------------------------------


def test_the_table_is_open_clips_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[argparse.ArgumentParser] = []

    def keep(self: argparse.ArgumentParser, args: Any) -> Any:
        found.append(self)
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", keep)
    with pytest.raises(SystemExit):
        params.parse_args([])
    actions = {a.dest: a for a in found[0]._actions if a.dest != "help"}
    assert actions.keys() == open_clip_flags.TABLE.keys()
    kinds = {"count": int, "number": float, "text": str, "words": str, "numbers": float, "counts": int, "pairs": None}
    for name, flag in open_clip_flags.TABLE.items():
        action = actions[name]
        assert action.default == flag.default, name
        if flag.kind == "switch":
            assert action.nargs == 0, name
        else:
            assert action.type in (kinds[flag.kind], None), name
            assert (action.nargs in ("+", "*")) == (flag.kind in ("numbers", "counts", "words", "pairs")), name


VALUES = {
    "text": "x",
    "count": "3",
    "number": "0.5",
    "numbers": "0.5 0.5 0.5",
    "counts": "64",
    "words": "x",
    "pairs": "scale=(0.5,1)",
}
OWN = {
    "opt": "adamw",
    "lr_scheduler": "const",
    "dataset_type": "webdataset",
    "precision": "bf16",
    "device": "cpu:0",
    "image_interpolation": "bilinear",
    "image_resize_mode": "squash",
    "model": "ViT-B-32",
    "report_to": "wandb",
    "train_data_upsampling_factors": "2.0",
    "csv_separator": ";",
    "train_data": "b.tar",
    "logs": "l",
    "amodel": "HTSAT-base",
    "lr_cooldown_end": "1e-5",
    "tmodel": "bert",
    "optimizer": "sgd",
    "data_filling": "repeat",
    "data_truncating": "rand_trunc",
    "train_ipc": "x",
}
NEEDS = {
    "csv_separator": "--train-data a.csv",
    "csv_img_key": "--train-data a.csv",
    "csv_caption_key": "--train-data a.csv",
    "lock_image_unlocked_groups": "--lock-image",
    "lock_text_unlocked_layers": "--lock-text",
    "epochs_cooldown": "--lr-scheduler const-cooldown",
    "lr_cooldown_end": "--lr-scheduler const-cooldown --epochs-cooldown 1",
    "lr_cooldown_power": "--lr-scheduler const-cooldown --epochs-cooldown 1",
    "enable_fusion": "--data-truncating fusion",
}
REFUSED = {"use_bnb_linear"}


@pytest.mark.parametrize(
    ("program", "table", "base"),
    [
        (from_open_clip, open_clip_flags.TABLE, "--model ViT-B-32 --train-data a.tar --train-num-samples 99999"),
        (
            from_clap,
            clap_flags.TABLE,
            "--amodel HTSAT-tiny --tmodel roberta --datasetnames A --train-num-samples 99999",
        ),
    ],
    ids=["open_clip", "clap"],
)
def test_something_is_said_of_every_flag(program: Any, table: Any, base: str) -> None:
    for name, flag in table.items():
        value = "" if flag.kind == "switch" else OWN.get(name, VALUES[flag.kind])
        argv = shlex.split(f"{base} {NEEDS.get(name, '')} --{name.replace('_', '-')} {value}")
        if name in REFUSED:
            continue
        draft = program.translate(program.read(argv, None), 2)
        said = " ".join(n.flag for n in draft.notes)
        assert f"--{name.replace('_', '-')}" in said, name
        if draft.whole:
            draft.recipe()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--model coca_ViT-B-32 --train-data a.tar", "captioning decoder"),
        ("--model ViT-B-32 --trian-data a.tar", "Did you mean 'train-data'"),
        ("--model ViT-B-32 --train-data a.tar --opt timm/lion", "optim.name is adamw, muon or sgd"),
        ("--model ViT-B-33 --train-data a.tar", "ViT-B-32"),
        ("--model ViT-B-32", "--train-data is missing"),
        ("--model ViT-B-32 --train-data a.tar --batch-size many", "--batch-size takes numbers"),
        ("--model ViT-B-32 --train-data a.tar --use-bnb-linear x", "int8"),
    ],
)
def test_what_no_recipe_can_train_is_refused_with_a_sentence(line: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
        from_open_clip.translate(from_open_clip.read(shlex.split(line), None))


def test_the_command_writes_a_recipe_that_loads_and_takes_a_launcher_in_front(tmp_path: Path) -> None:
    launcher = "torchrun --nnodes=2 --nproc-per-node 4 -m open_clip_train.main"
    line = f"{launcher} --model ViT-S-32 --train-data a.tar --batch-size 32"
    done = CliRunner().invoke(app, ["import", "open_clip", "--out", "r.yaml", "--", *shlex.split(line)])
    assert done.exit_code == 0, (done.output, done.exception)
    recipe = load_recipe("r.yaml")
    assert recipe.batch.size == 256
    assert recipe.budget.passes == 32
    text = Path("r.yaml").read_text(encoding="utf-8")
    assert f"#     open_clip {line}" in text
    again = CliRunner().invoke(app, ["import", "open_clip", "--out", "r.yaml", "--", *shlex.split(line)])
    assert "exists" in str(again.exception)


def test_params_txt_is_the_same_as_the_command_line(tmp_path: Path) -> None:
    gpus, line = LINES["ConvNeXt-Base-W with accumulation and augmentation"]
    args = params.parse_args(shlex.split(line))
    args.world_size, args.log_path = gpus, "./logs/x/out.log"
    file = tmp_path / "params.txt"
    file.write_text("".join(f"{k}: {v}\n" for k, v in sorted(vars(args).items())), encoding="utf-8")
    done = CliRunner().invoke(app, ["import", "open_clip", "--params", str(file)])
    assert done.exit_code == 0, done.exception
    whole = yaml.safe_load(done.stdout)
    assert Recipe.model_validate(whole) == imported("ConvNeXt-Base-W with accumulation and augmentation")[2]


def test_abbreviated_flags_and_negative_numbers_are_read_as_argparse_reads_them() -> None:
    given = read_command(["--train-d", "a.tar", "--batch-s", "3"], {"train_data": open_clip_flags.TABLE["train_data"],
                         "batch_size": open_clip_flags.TABLE["batch_size"]}, "open_clip")  # fmt: skip
    assert (given["train_data"], given["batch_size"]) == ("a.tar", 3)
