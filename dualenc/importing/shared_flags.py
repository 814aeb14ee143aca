"""What open_clip's and LAION-CLAP's trainers have in common, whose options are of one descent: batch, length of the
run, optimizer, precision, logs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dualenc.errors import ConfigError
from dualenc.importing.draft import Draft
from dualenc.importing.flags import Given


@dataclass(frozen=True)
class BatchSize:
    """How many samples a step has.

    Attributes:
        each: samples per process and micro-batch, ``--batch-size``.
        world: processes.
        accumulated: ``--accum-freq``.
    """

    each: int
    world: int
    accumulated: int = 1

    @property
    def batch(self) -> int:
        """The global batch, of which a step is one."""
        return self.each * self.world * self.accumulated


def batch(given: Given, draft: Draft, gpus: int | None, accumulated: int = 1) -> BatchSize:
    """``batch``: per-GPU batch × GPUs × accumulation.

    Raises:
        ConfigError: one of them is not above 0.
    """
    world = gpus or given.world
    size = BatchSize(given["batch_size"], world or 1, accumulated)
    if min(size.each, size.world, size.accumulated) < 1:
        raise ConfigError(f"{given.program}: --batch-size, --gpus and --accum-freq must be 1 or more")
    factors = f"{size.each:,} per GPU × {size.world:,} GPU{'s' if size.world > 1 else ''}"
    factors += f" × {accumulated} accumulated" if accumulated > 1 else ""
    draft.set(
        "batch.size",
        size.batch,
        f"The global batch: {factors}. It stays this on any number of GPUs; only memory changes.",
    )
    draft.note(given.shown("batch_size"), "taken", f"batch.size: {size.batch:,}, the global batch ({factors})")
    if world is None:
        draft.note(
            "(number of GPUs)",
            "different",
            f"neither --gpus nor a launcher says it, so one is assumed and the global batch is {size.batch:,}; with N "
            "GPUs it was N times that: write --gpus N in front of the --",
        )
    if accumulated > 1:
        draft.set("batch.micro", size.each)
        draft.note(
            given.shown("accum_freq"),
            "different",
            f"batch.micro: {size.each:,} bounds the memory in the same way, and is exact: open_clip takes the loss "
            "of the "
            f"whole batch {accumulated} times and so multiplies the gradient of the logit scale by {accumulated}",
        )
    return size


# --- the gradient ------------------------------------------------------------------------------------------------


def gather(given: Given, draft: Draft, size: BatchSize) -> None:
    """``--local-loss`` and ``--gather-with-grad``: there is one gather here, with the exact gradient."""
    local, grad, world = given["local_loss"], given["gather_with_grad"], size.world
    flags = " ".join(f for f, on in (("--local-loss", local), ("--gather-with-grad", grad)) if on)
    if world == 1:
        if flags:
            draft.note(
                flags, "left out", "on one GPU there is nothing to gather; on several the gradient is exact here"
            )
    elif grad:
        draft.note(flags, "taken", "the gradient is that of one process on the whole batch, as it always is here")
    elif local:
        draft.note(
            flags,
            "different",
            "without --gather-with-grad this gradient lacks what other GPUs' losses say of one's own features and "
            "points "
            "elsewhere; here it is that of one process on the whole batch. Expect another (better) curve",
        )
    else:
        draft.note(
            "(neither --local-loss nor --gather-with-grad)",
            "different",
            f"the towers' gradient was 1/{world} of the true one, the logit scale's was whole; here both are those "
            "of one "
            "process on the whole batch. AdamW hides the factor but for eps and gradient clipping",
        )


def precision(given: Given, draft: Draft) -> None:
    """``engine.precision``: fp32 or bf16 autocast."""
    said = given["precision"]
    bf16 = said != "fp32"
    draft.set("engine.precision", "bf16" if bf16 else "fp32")
    flag = given.shown("precision") + ("" if "precision" in given else " (its default)")
    if said in ("amp_bf16", "amp_bfloat16", "fp32"):
        draft.note(flag, "taken", f"engine.precision: {'bf16' if bf16 else 'fp32'}")
    elif said in ("bf16", "pure_bf16"):
        draft.note(flag, "different", "bf16 is autocast here: weights, optimizer state and features stay fp32")
    else:
        draft.note(
            flag,
            "different",
            "there is no fp16 here: bf16 autocast needs no loss scaling, and its range does not overflow. On GPUs "
            "before Ampere, which lack it, set engine.precision: fp32",
        )


# --- how long, how fast ------------------------------------------------------------------------------------------


def steps_per_epoch(samples: int | None, size: BatchSize, workers: int | None) -> int | None:
    """Steps an epoch of the other trainer has.

    Args:
        workers: of its loader, for shards: every worker reads the same number of batches, so an epoch is rounded up
            to a multiple of them. None for a csv: an epoch is rounded down.
    """
    if samples is None:
        return None
    if workers is None:
        batches = math.ceil(samples / size.world) // size.each
    else:
        batches = math.ceil(math.ceil(samples / (size.each * size.world)) / max(workers, 1)) * max(workers, 1)
    return batches // size.accumulated


def budget(given: Given, draft: Draft, size: BatchSize, samples: int | None, workers: int | None) -> None:
    """``budget``: in steps where the number of samples is known, else in epochs of the data that are found."""
    per_epoch = draft.steps_per_epoch = steps_per_epoch(samples, size, workers)
    epochs = given["epochs"]
    flag = given.shown("epochs") + ("" if "epochs" in given else " (its default)")
    if per_epoch is None:
        draft.set("budget.epochs", epochs, "Epochs of what the index of the shards counts.")
        draft.note(flag, "taken", f"budget.epochs: {epochs}, of the samples that the shards' index counts")
        return
    if per_epoch < 1:
        raise ConfigError(
            f"{given.program}: {samples:,} samples are less than one global batch of {size.batch:,}; lower --batch-size"
        )
    steps = per_epoch * epochs
    draft.set(
        "budget.steps",
        steps,
        f"{epochs} × {per_epoch:,} steps of {size.batch:,} = {steps * size.batch:,} samples; {given.program} calls "
        f"{samples:,} samples an epoch.",
    )
    draft.note(flag, "taken", f"budget.steps: {steps:,} ({per_epoch:,} an epoch), {steps * size.batch:,} samples")


def warmup(given: Given, draft: Draft, size: BatchSize) -> None:
    """``schedule.warmup_samples``."""
    steps = given["warmup"]
    flag = given.shown("warmup") + ("" if "warmup" in given else " (its default)")
    if given["skip_scheduler"]:
        draft.set("schedule", {"name": "constant", "warmup_samples": 0})
        draft.note("--skip-scheduler", "taken", "schedule.name: constant, without a warm-up")
        if "warmup" in given:
            draft.note(flag, "left out", "--skip-scheduler switches the warm-up off as well")
        return
    draft.set(
        "schedule.warmup_samples",
        steps * size.batch,
        f"{steps:,} steps. Step s of the warm-up has lr · s / {steps:,} here, lr · (s + 1) / {steps:,} there."
        if steps
        else "",
    )
    draft.note(
        flag, "taken", f"schedule.warmup_samples: {steps * size.batch:,} ({steps:,} steps), one step later there"
    )
    total = draft.raw["budget"].get("steps")
    if total is not None and steps >= total:
        draft.note(
            flag,
            "different",
            f"the run has {total:,} steps and would never leave the warm-up; dualenc train refuses that: lower "
            "schedule.warmup_samples",
        )


# --- optimizer ---------------------------------------------------------------------------------------------------


def adamw_defaults(model: str) -> Mapping[str, float]:
    """What both trainers take for values that are not given: CLIP's paper has two sets."""
    if "vit" in model.lower():
        return {"lr": 5e-4, "beta1": 0.9, "beta2": 0.98, "eps": 1e-6}
    return {"lr": 5e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}


def adamw(given: Given, draft: Draft, model: str) -> None:
    """``optim``: AdamW with the values given, else the program's defaults for that model."""
    usual = adamw_defaults(model)
    value = {k: usual[k] if given[k] is None else given[k] for k in usual}
    absent = [f"--{k} {v:g}" for k, v in usual.items() if given[k] is None]
    draft.set("optim.name", "adamw")
    draft.set(
        "optim.lr",
        value["lr"],
        f"Not on the command line, its default for {model}: {', '.join(absent)}." if absent else "",
    )
    draft.set("optim.betas", [value["beta1"], value["beta2"]])
    draft.set("optim.eps", value["eps"])
    draft.set("optim.weight_decay", given["wd"])
    for name, key in (("lr", "lr"), ("beta1", "betas"), ("beta2", "betas"), ("eps", "eps"), ("wd", "weight_decay")):
        if name in given:
            draft.note(given.shown(name), "taken", f"optim.{key}")
    draft.note(
        "(weight decay)",
        "different",
        "positions and class tokens of more than one dimension are decayed there and not here; norms, biases and the "
        "logit scale are decayed in neither",
    )


# --- logs and checkpoints ----------------------------------------------------------------------------------------


def saving(given: Given, draft: Draft, keep_all: bool) -> None:
    """``checkpoint``: epochs as steps."""
    every, per_epoch = given["save_frequency"], draft.steps_per_epoch
    if per_epoch is None or every < 1:
        if "save_frequency" in given:
            draft.note(given.shown("save_frequency"), "different", "checkpoint.every_minutes: 15 instead of epochs")
        return
    draft.set(
        "checkpoint.every_steps", every * per_epoch, f"Every {every} epochs there." if every > 1 else "An epoch there."
    )
    draft.set("checkpoint.every_minutes", None)
    draft.set("checkpoint.keep", max(math.ceil(given["epochs"] / every), 1) if keep_all else 1)
    if "save_frequency" in given:
        draft.note(given.shown("save_frequency"), "taken", f"checkpoint.every_steps: {every * per_epoch:,}")


def logs(given: Given, draft: Draft, every: int | None, project: str | None) -> None:
    """``name``, ``out``, ``tracking``, ``seed``."""
    name = given["name"] or "imported"
    draft.set("name", name)
    if "name" in given:
        draft.note(given.shown("name"), "taken", "name")
    if "logs" in given:
        if str(given["logs"]).lower() == "none":
            draft.note(given.shown("logs"), "left out", f"a run always writes its folder, here runs/{name}")
        else:
            out = f"{str(given['logs']).rstrip('/')}/{name}"
            draft.set("out", out)
            draft.note(given.shown("logs"), "taken", f"out: {out}")
    draft.set("seed", given["seed"])
    if "seed" in given:
        draft.note(given.shown("seed"), "different", "seed: the same number draws other weights and another data order")
    if every is not None:
        draft.set("tracking.log_every", every)
    wanted = str(given["report_to"] or "")
    for tool in ("tensorboard", "wandb"):
        if tool in wanted or "all" in wanted:
            draft.set(f"tracking.{tool}", True)
    if "report_to" in given:
        draft.note(given.shown("report_to"), "taken", "tracking; metrics.jsonl is always written")
    if project is not None and draft.raw.get("tracking", {}).get("wandb"):
        draft.set("tracking.wandb_project", project)


def left_out(given: Given, draft: Draft, reasons: Mapping[str, str]) -> None:
    """A note for every flag that has no counterpart."""
    for name, why in reasons.items():
        if name in given:
            draft.note(given.shown(name), "left out", why)
