"""A command line of ``python -m open_clip_train.main`` → a recipe, and what became of each of its flags."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dualenc.data.shards.names import expand
from dualenc.encoders.adapters.open_clip import OpenClipConfig, architecture
from dualenc.errors import ConfigError
from dualenc.importing import shared_flags as shared
from dualenc.importing.draft import Draft
from dualenc.importing.flags import Given, read_command, read_params
from dualenc.importing.open_clip_flags import LEFT_OUT, TABLE

PROGRAM = "open_clip"
HUB = "hf-hub:"


def read(argv: Sequence[str], params: Path | None) -> Given:
    """The flags of a command line, or of a run's params.txt."""
    return read_params(params, TABLE, PROGRAM) if params is not None else read_command(argv, TABLE, PROGRAM)


def translate(given: Given, gpus: int | None = None) -> Draft:
    """The recipe that trains what the command line trains.

    Args:
        gpus: number of processes, where the command line does not say it.

    Raises:
        ConfigError: the command line trains what a recipe cannot: CoCa's captioner, int8, another optimizer.
    """
    _refuse(given)
    draft = Draft()
    shared.logs(given, draft, given["log_every_n_steps"], given["wandb_project_name"])
    draft.set("description", f"{given['model']} from an open_clip command line")
    _model(given, draft)
    _loss(given, draft)
    tables = _is_csv(given)
    samples = _data(given, draft, tables)
    size = shared.batch(given, draft, gpus, given["accum_freq"])
    shared.gather(given, draft, size)
    shared.budget(given, draft, size, samples, None if tables else given["workers"])
    _optimizer(given, draft)
    _schedule(given, draft, size)
    _engine(given, draft)
    shared.saving(given, draft, keep_all=not given["delete_previous_checkpoint"])
    if "delete_previous_checkpoint" in given:
        draft.note("--delete-previous-checkpoint", "taken", "checkpoint.keep: 1")
    _evaluation(given, draft)
    _start(given, draft)
    shared.left_out(given, draft, LEFT_OUT)
    return draft


def _refuse(given: Given) -> None:
    """What no recipe can train."""
    if "coca" in given["model"].lower():
        raise ConfigError(
            f"--model {given['model']}: CoCa also trains a captioning decoder, which dualenc does not have; its two "
            "towers alone are trained with the text tower and image size of, for example, --model ViT-L-14"
        )
    if given["use_bnb_linear"]:
        raise ConfigError(
            "--use-bnb-linear: there is no int8 training; leave it out (engine.precision: bf16 halves memory)"
        )
    if given["dataset_type"] == "synthetic":
        raise ConfigError(
            "--dataset-type synthetic: a recipe needs data; dualenc train quickstart --dry-run --probe times two steps"
        )
    if given["train_data"] is None:
        raise ConfigError(
            "--train-data is missing: this command line only evaluates; write dualenc eval open_clip:NAME/TAG "
            "--tasks TASK"
        )


# --- model -------------------------------------------------------------------------------------------------------


def _model(given: Given, draft: Draft) -> None:
    name = given["model"]
    if name.startswith(HUB):
        repo = name.removeprefix(HUB)
        draft.set("checkpoint.init_from", f"hf:{repo}", "The model and its weights; keys under modalities change them.")
        draft.whole = False
        draft.note(given.shown("model"), "taken", f"checkpoint.init_from: hf:{repo}")
    else:
        name = name.replace("/", "-")
        cfg = architecture(name, OpenClipConfig())
        draft.set("modalities", {m: {"encoder": {"name": f"open_clip/{name}"}} for m in ("image", "text")})
        draft.set("embed_dim", cfg["embed_dim"], f"{name}'s own: then no projection is added to open_clip's.")
        draft.note(given.shown("model"), "taken", f"modalities.*.encoder: open_clip/{name}")
        if cfg.get("init_logit_bias") is not None and not given["siglip"]:
            draft.set("logit_scale", {"init": 10.0, "bias": float(cfg["init_logit_bias"])})
    _resized(given, draft)
    _image_input(given, draft)
    _locks(given, draft)
    if given["force_quick_gelu"]:
        for m in ("image", "text"):
            draft.set(f"modalities.{m}.encoder.quick_gelu", True)
        draft.note("--force-quick-gelu", "taken", "modalities.*.encoder.quick_gelu: true")
    if given["force_patch_dropout"] is not None:
        draft.set("modalities.image.encoder.patch_dropout", given["force_patch_dropout"])
        draft.note(given.shown("force_patch_dropout"), "taken", "modalities.image.encoder.patch_dropout")
    if name.startswith("RN") or "use_bn_sync" in given:
        flag = "--use-bn-sync" if "use_bn_sync" in given else f"(batch norms of {name})"
        draft.note(
            flag,
            "different",
            "batch norms keep their running statistics (encoder.freeze_bn): statistics of a GPU's own rows would make "
            "the gradient depend on the number of GPUs. Train such a model from scratch with another tower, or from "
            "weights",
        )


def _resized(given: Given, draft: Draft) -> None:
    """``--force-image-size``, ``--force-context-length``."""
    sizes = given["force_image_size"]
    if sizes:
        if len(set(sizes)) > 1:
            raise ConfigError(f"--force-image-size {sizes[0]} {sizes[1]}: images are square here; give one number")
        draft.set("modalities.image.input.size", sizes[0])
        draft.note(given.shown("force_image_size"), "taken", "modalities.image.input.size")
    context = given["force_context_length"]
    if context is not None:
        draft.set("modalities.text.input.context_length", context)
        draft.note(given.shown("force_context_length"), "taken", "modalities.text.input.context_length")


def _image_input(given: Given, draft: Draft) -> None:
    for flag, key in (("image_mean", "mean"), ("image_std", "std"), ("image_resize_mode", "resize")):
        if given[flag] is not None:
            draft.set(f"modalities.image.input.{key}", given[flag])
            draft.note(given.shown(flag), "taken", f"modalities.image.input.{key}")
    filtered = given["image_interpolation"]
    if filtered == "random":
        draft.note("--image-interpolation random", "different", "one filter for all images: bicubic")
    elif filtered is not None:
        draft.set("modalities.image.input.interpolation", filtered)
        draft.note(given.shown("image_interpolation"), "taken", "modalities.image.input.interpolation")
    _augment(given, draft)


def _augment(given: Given, draft: Draft) -> None:
    """``--aug-cfg``; without it both crop 90 to 100 % of the area."""
    cfg = dict(given["aug_cfg"])
    if not cfg:
        return
    augment: dict[str, Any] = {}
    if "scale" in cfg:
        augment["scale"] = list(cfg.pop("scale"))
    if cfg.get("ratio") is not None:
        augment["ratio"] = list(cfg.pop("ratio"))
    timm = bool(cfg.pop("use_timm", False))
    jitter, p = cfg.pop("color_jitter", None), cfg.pop("color_jitter_prob", None)
    grey = cfg.pop("gray_scale_prob", None)
    if (jitter is not None and (p or timm)) or grey:
        four = [jitter] * 3 + [0.0] if isinstance(jitter, float | int) else [*(jitter or ()), 0, 0, 0, 0][:4]
        names = ("brightness", "contrast", "saturation", "hue")
        colour = dict(zip(names, map(float, four), strict=True))
        augment["colour"] = {**colour, "p": 1.0 if timm else p or 0.0, "grayscale_p": grey or 0.0}
    for key, value in augment.items():
        draft.set(f"modalities.image.input.augment.{key}", value)
    left = " ".join(sorted(cfg))
    why = f"modalities.image.input.augment{f'; {left}: there is none' if left else ''}"
    draft.note(given.shown("aug_cfg"), "different" if left else "taken", why)


def _locks(given: Given, draft: Draft) -> None:
    """``--lock-image`` and ``--lock-text``: open_clip counts the projection as the last group."""
    for m, flag, groups in (
        ("image", "lock_image", "lock_image_unlocked_groups"),
        ("text", "lock_text", "lock_text_unlocked_layers"),
    ):
        unlocked = given[groups]
        if not given[flag]:
            if groups in given:
                draft.note(
                    given.shown(groups), "left out", f"without --{flag.replace('_', '-')} it does nothing there too"
                )
            continue
        written = given.shown(flag) + (f" {given.shown(groups)}" if unlocked else "")
        if not unlocked:
            draft.set(f"modalities.{m}.lock", True, "LiT: the tower and its projection stay as they are.")
            said = f"modalities.{m}.lock: true; a timm tower's projection, which open_clip would go on training, too"
            draft.note(written, "taken", said)
        else:
            blocks = max(unlocked - 1, 1)
            draft.set(f"modalities.{m}.lock", {"unlocked_groups": blocks})
            exact = unlocked > 1
            why = f"modalities.{m}.lock.unlocked_groups: {blocks}; there the projection counts as a group, too"
            draft.note(
                written, "taken" if exact else "different", why if exact else f"{why}, and trains a block with it"
            )
    if "lock_image_freeze_bn_stats" in given:
        draft.note("--lock-image-freeze-bn-stats", "taken", "a locked tower's batch norms never move")


def _loss(given: Given, draft: Draft) -> None:
    if given["siglip"]:
        draft.set("loss", {"name": "sigmoid"})
        draft.set("logit_scale", {"init": 10.0, "bias": -10.0})
        draft.note("--siglip", "taken", "loss: sigmoid, logit_scale: {init: 10, bias: -10}")
    else:
        draft.set("loss", {"name": "info_nce"})
    teacher, weights = given["distill_model"], given["distill_pretrained"]
    if teacher and weights:
        draft.set(
            "distill", {"teachers": [{"model": f"open_clip:{teacher}/{weights}"}], "terms": [{"name": "soft_labels"}]}
        )
        draft.note(
            f"{given.shown('distill_model')} {given.shown('distill_pretrained')}",
            "taken",
            "distill: the same cross-entropy with the teacher's rows of similarities, added to the loss",
        )
    elif teacher or weights:
        name = "distill_model" if teacher else "distill_pretrained"
        draft.note(given.shown(name), "left out", "open_clip distils only with both flags, model and weights")


# --- data --------------------------------------------------------------------------------------------------------


def _is_csv(given: Given) -> bool:
    path = given["train_data"].split("::")[0]
    return bool(given["dataset_type"] == "csv") or (given["dataset_type"] == "auto" and path.endswith((".csv", ".tsv")))


def _data(given: Given, draft: Draft, tables: bool) -> int | None:
    """``data``; how many samples an epoch has, where that is known."""
    draft.set("data.workers", given["workers"])
    if "workers" in given:
        draft.note(given.shown("workers"), "taken", "data.workers, per rank in both")
    if "dataset_type" in given:
        draft.note(given.shown("dataset_type"), "taken", "data.sources")
    samples: int | None = given["train_num_samples"]
    if tables:
        samples = _table(given, draft) or samples
    else:
        _shards(given, draft)
        for flag in ("csv_separator", "csv_img_key", "csv_caption_key"):
            if flag in given:
                draft.note(given.shown(flag), "left out", "there is no csv")
    if "train_num_samples" in given:
        how = "it is only used for the length of the run: the index counts the samples"
        draft.note(given.shown("train_num_samples"), "taken", how)
    if given["dataset_resampled"]:
        draft.set("data.sampling", "with_replacement")
        draft.note("--dataset-resampled", "taken", "data.sampling: with_replacement; samples are drawn, not shards")
    return samples


def _table(given: Given, draft: Draft) -> int | None:
    """A csv is packed first; the number of its rows if it is on this machine."""
    path = Path(given["train_data"])
    separator = given["csv_separator"]
    quoted = "\\t" if separator == "\t" else separator
    build = (
        f"dualenc shards build csv --out shards path={path} image={given['csv_img_key']} "
        f"caption={given['csv_caption_key']} 'delimiter=\"{quoted}\"'"
    )
    draft.set("data.sources", [{"name": path.stem or "train", "shards": "./shards/train-*.tar"}])
    draft.comments["data.sources.0.shards"] = f"Training reads shards. Pack the table once:\n    {build}"
    for name in ("csv_separator", "csv_img_key", "csv_caption_key"):
        if name in given:
            draft.note(given.shown(name).replace("\t", "\\t"), "taken", "a setting of dualenc shards build csv")
    draft.note(
        given.shown("train_data"),
        "different",
        f"training reads shards; pack the table once: {build} (paths start in the csv's folder; root=FOLDER says "
        "another)",
    )
    if not path.is_file():
        return None
    with path.open(encoding="utf-8", newline="") as f:
        return max(sum(1 for _ in csv.reader(f, delimiter=separator)) - 1, 0)


def _shards(given: Given, draft: Draft) -> None:
    urls = given["train_data"].split("::")
    factors = given["train_data_upsampling_factors"]
    if factors is None:
        draft.set("data.sources", [{"name": "train", "shards": urls[0] if len(urls) == 1 else urls}])
    else:
        weights = factors.split("::")
        if len(weights) != len(urls):
            raise ConfigError(
                f"--train-data-upsampling-factors {factors}: {len(weights)} factors for {len(urls)} sources; give "
                "one each"
            )
        # A shard of a source is drawn that many times as often; here a weight is the share of a whole source.
        shares = [float(w) * len(expand(u)) for w, u in zip(weights, urls, strict=True)]
        draft.set(
            "data.sources",
            [
                {"name": f"train{i}", "shards": u, "weight": w}
                for i, (u, w) in enumerate(zip(urls, shares, strict=True))
            ],
        )
        draft.comments["data.sources.0.weight"] = (
            "Number of shards × upsampling factor: the source's share of the samples."
        )
        draft.note(given.shown("train_data_upsampling_factors"), "taken", "data.sources.*.weight: shards × factor")
    draft.note(
        given.shown("train_data"),
        "taken",
        "data.sources; dualenc shards index SHARDS counts them once, and the whole stream is shuffled, not a buffer",
    )
    if any(u.strip().startswith("pipe:") for u in urls):
        draft.set("data.allow_pipe", True, "The shards come from shell commands; an s3:// URL needs none.")


# --- optimizer, schedule, engine ---------------------------------------------------------------------------------


def _optimizer(given: Given, draft: Draft) -> None:
    shared.adamw(given, draft, given["model"])
    opt = given["opt"].lower()
    if opt not in ("adamw", "timm/adamw", "timm/sgd", "timm/muon"):
        raise ConfigError(
            f"--opt {given['opt']}: optim.name is adamw, muon or sgd; train with --opt adamw, or write a recipe of "
            "your own"
        )
    if opt != "adamw":
        name = opt.removeprefix("timm/")
        draft.set("optim.name", name)
        if given["momentum"] is not None:
            draft.set("optim.momentum", given["momentum"])
        draft.note(given.shown("opt"), "different", f"optim.name: {name}, torch's own instead of timm's")
    elif "opt" in given:
        draft.note(given.shown("opt"), "taken", "optim.name: adamw")
    if "momentum" in given:
        used = opt != "adamw"
        draft.note(
            given.shown("momentum"), "taken" if used else "left out", "optim.momentum" if used else "AdamW has none"
        )
    clip = given["grad_clip_norm"]
    draft.set(
        "optim.clip_grad_norm", clip, "" if clip else "No gradient clipping, as there; dualenc's own default is 1.0."
    )
    if clip:
        draft.note(given.shown("grad_clip_norm"), "taken", "optim.clip_grad_norm, of the exact gradient's norm")


def _schedule(given: Given, draft: Draft, size: shared.BatchSize) -> None:
    names = {"cosine": "cosine", "const": "constant", "const-cooldown": "constant_cooldown"}
    name = given["lr_scheduler"]
    draft.set("schedule.name", names.get(name, "cosine"))
    shared.warmup(given, draft, size)
    if given["skip_scheduler"]:
        for flag in ("lr_scheduler", "epochs_cooldown", "lr_cooldown_end", "lr_cooldown_power"):
            if flag in given:
                draft.note(given.shown(flag), "left out", "--skip-scheduler keeps the learning rate constant")
        return
    if name not in names:
        raise ConfigError(f"--lr-scheduler {name}: open_clip has cosine, const and const-cooldown")
    if "lr_scheduler" in given:
        draft.note(given.shown("lr_scheduler"), "taken", f"schedule.name: {names[name]}")
    if name == "const-cooldown":
        _cooldown(given, draft, size)
    else:
        for flag in ("epochs_cooldown", "lr_cooldown_end", "lr_cooldown_power"):
            if flag in given:
                draft.note(given.shown(flag), "left out", "only --lr-scheduler const-cooldown has a cool-down")


def _cooldown(given: Given, draft: Draft, size: shared.BatchSize) -> None:
    epochs = given["epochs_cooldown"]
    if epochs is None:
        raise ConfigError("--lr-scheduler const-cooldown needs --epochs-cooldown, the length of the cool-down")
    if draft.steps_per_epoch is None:
        raise ConfigError("--epochs-cooldown: how many samples an epoch has is not known; add --train-num-samples N")
    steps = epochs * draft.steps_per_epoch
    draft.set("schedule.cooldown_samples", steps * size.batch, f"The last {steps:,} steps.")
    draft.set("schedule.cooldown_shape", "linear")
    end, peak = given["lr_cooldown_end"], draft.raw["optim"]["lr"]
    if not 0 <= end <= peak:
        raise ConfigError(f"--lr-cooldown-end {end:g}: a cool-down ends between 0 and the peak, {peak:g}")
    draft.set("schedule.final", end / peak)
    draft.note(given.shown("epochs_cooldown"), "taken", f"schedule.cooldown_samples: {steps * size.batch:,}")
    if "lr_cooldown_end" in given:
        draft.note(given.shown("lr_cooldown_end"), "taken", "schedule.final, as a share of the peak")
    if "lr_cooldown_power" in given:
        linear = given["lr_cooldown_power"] == 1
        why = "schedule.cooldown_shape: linear" + ("" if linear else "; sqrt is 1 − √t, other powers are not offered")
        draft.note(given.shown("lr_cooldown_power"), "taken" if linear else "different", why)


def _engine(given: Given, draft: Draft) -> None:
    shared.precision(given, draft)
    for flag, key in (("grad_checkpointing", "grad_checkpointing"), ("torchcompile", "compile")):
        if given[flag]:
            draft.set(f"engine.{key}", True)
            draft.note(given.shown(flag), "taken", f"engine.{key}: true")
    if "device" in given:
        device = given["device"].partition(":")[0]
        draft.set("engine.device", device if device in ("cpu", "cuda") else "auto")
        draft.note(given.shown("device"), "taken", "engine.device")
    if "wandb_project_name" in given:
        draft.note(given.shown("wandb_project_name"), "taken", "tracking.wandb_project, if it reports to W&B")
    if "log_every_n_steps" in given:
        draft.note(given.shown("log_every_n_steps"), "taken", "tracking.log_every")


# --- where it starts, what it is measured on ---------------------------------------------------------------------


def _evaluation(given: Given, draft: Draft) -> None:
    tasks = [t for flag, t in (("imagenet_val", "imagenet1k"), ("imagenet_v2", "imagenetv2")) if given[flag]]
    for flag, task in (("imagenet_val", "imagenet1k"), ("imagenet_v2", "imagenetv2")):
        if given[flag]:
            draft.note(
                given.shown(flag),
                "different",
                f"task {task} reads the published shards of CLIP benchmark in $DUALENC_DATA, not a folder of images: "
                "set "
                f"eval.tasks: [{task}] where they are, or write a task of that folder: dualenc task new --data "
                f"{given[flag]}",
            )
    if given["val_data"]:
        draft.note(
            given.shown("val_data"),
            "different",
            f"write a retrieval task of it and name that in eval.tasks: dualenc task new --data '{given['val_data']}'",
        )
    if draft.steps_per_epoch is not None and (tasks or given["val_data"]):
        every = given["zeroshot_frequency"] if tasks else given["val_frequency"]
        draft.set(
            "eval.every_steps", max(every, 1) * draft.steps_per_epoch, "For the tasks that you name in eval.tasks."
        )
    for flag in ("zeroshot_frequency", "val_frequency"):
        if flag in given:
            draft.note(given.shown(flag), "taken", "eval.every_steps, once eval.tasks names a task")


def _start(given: Given, draft: Draft) -> None:
    tag, name = given["pretrained"], given["model"].replace("/", "-")
    resized = bool(given["force_image_size"]) or given["force_context_length"] is not None
    if tag and given["model"].startswith(HUB):
        draft.note(given.shown("pretrained"), "left out", "a model of the Hub brings its weights")
    elif tag and resized:
        for m in ("image", "text"):
            draft.set(f"modalities.{m}.encoder.pretrained", tag)
            draft.set(f"modalities.{m}.encoder.resize_positions", True)
        draft.note(
            given.shown("pretrained"),
            "different",
            "both towers start from it with their positions resized; the logit scale starts at logit_scale.init",
        )
    elif tag:
        draft.set("checkpoint.init_from", f"open_clip:{name}/{tag}", "Towers, logit scale and bias of these weights.")
        if given["force_quick_gelu"] or "quick" in name or tag == "openai":
            for m in ("image", "text"):
                draft.raw["modalities"][m]["encoder"]["quick_gelu"] = True
        draft.note(given.shown("pretrained"), "taken", f"checkpoint.init_from: open_clip:{name}/{tag}")
    if given["pretrained_image"]:
        draft.note(
            "--pretrained-image",
            "left out",
            "only timm's weights of the image tower: write modalities.image.encoder: {name: timm/NAME, pretrained: "
            "true}",
        )
    if given["resume"]:
        draft.note(
            given.shown("resume"),
            "left out",
            "a recipe resumes from its own newest checkpoint; to go on from open_clip's, add --checkpoint epoch_N.pt "
            "in "
            "front of the --",
        )
