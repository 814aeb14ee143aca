"""A command line of LAION-CLAP's trainer → a recipe, and what became of each of its flags."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dualenc.errors import ConfigError
from dualenc.importing import shared_flags as shared
from dualenc.importing.clap_flags import LEFT_OUT, TABLE
from dualenc.importing.draft import Draft
from dualenc.importing.flags import Given, read_command, read_params

PROGRAM = "laion_clap"
DIM = 512
HTSAT = {
    "HTSAT-tiny": {"patch_embeds_hidden_size": 96, "hidden_size": 768, "depths": [2, 2, 6, 2]},
    "HTSAT-base": {"patch_embeds_hidden_size": 128, "hidden_size": 1024, "depths": [2, 2, 12, 2]},
}
"""--amodel → what differs from transformers' ClapAudioConfig."""
TEXT = {"roberta": "roberta-base", "bert": "bert-base-uncased"}
FILLING = {"pad": "zeros", "repeat": "repeat", "repeatpad": "repeatpad"}


def read(argv: Sequence[str], params: Path | None) -> Given:
    """The flags of a command line, or of a run's params.txt."""
    return read_params(params, TABLE, PROGRAM) if params is not None else read_command(argv, TABLE, PROGRAM)


def translate(given: Given, gpus: int | None = None) -> Draft:
    """The recipe that trains what the command line trains.

    Args:
        gpus: number of processes, where the command line does not say it.

    Raises:
        ConfigError: it trains what a recipe cannot: an audio tower other than HTSAT, a loss on MLP outputs.
    """
    draft = Draft()
    shared.logs(given, draft, None, None)
    draft.set("description", f"{given['amodel']} and {given['tmodel']} from a LAION-CLAP command line")
    _model(given, draft)
    draft.set("loss", {"name": "info_nce"})
    _loss(given, draft)
    tables = _is_csv(given)
    samples = _data(given, draft, tables)
    size = shared.batch(given, draft, gpus)
    shared.gather(given, draft, size)
    shared.budget(given, draft, size, samples, None if tables else given["workers"])
    _optimizer(given, draft)
    draft.set("schedule.name", "cosine")
    shared.warmup(given, draft, size)
    shared.precision(given, draft)
    shared.saving(given, draft, keep_all=True)
    if given["resume"]:
        draft.note(
            given.shown("resume"), "left out", "use checkpoint.init_from: laion_clap:FILE.pt to start from its weights"
        )
    if "use_bn_sync" in given:
        draft.note(
            "--use-bn-sync", "different", "batch norms keep their running statistics; no row depends on another GPU's"
        )
    shared.left_out(given, draft, LEFT_OUT)
    return draft


def _model(given: Given, draft: Draft) -> None:
    if given["pretrained"]:
        draft.set("checkpoint.init_from", f"laion_clap:{given['pretrained']}", "Both towers and their inputs.")
        draft.whole = False
        draft.note(given.shown("pretrained"), "taken", f"checkpoint.init_from: laion_clap:{given['pretrained']}")
        for flag in ("amodel", "tmodel"):
            draft.note(given.shown(flag), "taken", "as the weights have it")
        return
    audio, text = given["amodel"], given["tmodel"]
    if audio not in HTSAT:
        raise ConfigError(f"--amodel {audio}: of CLAP's audio towers there are {', '.join(HTSAT)}; write one of them")
    if text not in TEXT:
        raise ConfigError(f"--tmodel {text}: write roberta or bert, or name another tower in modalities.text.encoder")
    fused = given["enable_fusion"]
    config = {"model_type": "clap_audio_model", **HTSAT[audio], "projection_dim": DIM, "enable_fusion": fused}
    encoder = {"name": f"hf/clap-{audio.lower()}", "config": config, "projection": True, "head": "none"}
    draft.set("modalities.audio", {"input": _audio_input(given, draft), "encoder": encoder})
    draft.comments["modalities.audio.encoder"] = "HTSAT with its projection, from random weights."
    draft.set(
        "modalities.text",
        {
            "input": {"context_length": 77},
            "encoder": {"name": f"hf/{TEXT[text]}", "pooling": "cls", "head": "mlp"},
        },
    )
    draft.set("embed_dim", DIM)
    draft.note(given.shown("amodel"), "taken", f"modalities.audio.encoder: {audio}, {DIM} dimensions")
    draft.note(
        given.shown("tmodel"),
        "different",
        f"modalities.text.encoder: hf/{TEXT[text]} with its released weights; its first token is projected by an MLP, "
        "without the pooler's extra layer",
    )
    draft.note(
        "(two logit scales)", "different", "CLAP learns one for each direction, starting alike; here a pair has one"
    )
    if given["freeze_text"]:
        draft.set("modalities.text.lock", "trunk", "The projection is trained.")
        draft.note("--freeze-text", "taken", "modalities.text.lock: trunk")
    if given["pretrained_audio"]:
        draft.note(
            given.shown("pretrained_audio"),
            "left out",
            "weights of HTSAT alone are not read; modalities.audio.init_from: laion_clap:FILE.pt takes a CLAP's",
        )


def _audio_input(given: Given, draft: Draft) -> dict[str, object]:
    fused, long, filling = given["enable_fusion"], given["data_truncating"], given["data_filling"]
    if filling not in FILLING:
        raise ConfigError(f"--data-filling {filling}: write pad, repeat or repeatpad")
    if long not in ("rand_trunc", "fusion"):
        raise ConfigError(f"--data-truncating {long}: write rand_trunc or fusion")
    if fused != (long == "fusion"):
        raise ConfigError("--enable-fusion and --data-truncating fusion belong together; give both or neither")
    for flag, key in (("data_filling", "pad"), ("data_truncating", "long"), ("enable_fusion", "long")):
        if flag in given:
            draft.note(given.shown(flag), "taken", f"modalities.audio.input.{key}")
    if "fusion_type" in given:
        aff = given["fusion_type"] == "aff_2d"
        draft.note(given.shown("fusion_type"), "taken" if aff else "different", "attentional feature fusion (aff_2d)")
    return {
        "rate": 48_000,
        "max_s": 10.0,
        "pad": FILLING[filling],
        "long": "fusion" if fused else "crop",
        "features": {
            "n_fft": 1024,
            "hop": 480,
            "mels": 64,
            "f_min": 50.0,
            "f_max": 14_000.0,
            "log": "db",
            "floor": 1e-10,
            # Its fused models see torchaudio's filters, the others librosa's; HTSAT's first batch norm normalises.
            "mel_scale": "htk" if fused else "slaney",
            "mel_norm": not fused,
            "mean": 0.0,
            "std": 1.0,
        },
    }


def _loss(given: Given, draft: Draft) -> None:
    if given["clap_mlploss"]:
        draft.note(
            "--clap-mlploss",
            "different",
            "the loss is on the projected features alone, not also on those of two further MLPs",
        )
    if given["kappa"]:
        draft.note(
            given.shown("kappa"),
            "different",
            "there is no such weighting; loss: {name: cwcl} weighs pairs by a locked tower",
        )


# --- data, optimizer ---------------------------------------------------------------------------------------------


def _is_csv(given: Given) -> bool:
    return given["dataset_type"] == "csv" or str(given["train_data"] or "").endswith((".csv", ".tsv"))


def _data(given: Given, draft: Draft, tables: bool) -> int | None:
    draft.set("data.workers", given["workers"])
    for name in ("workers", "dataset_type"):
        if name in given:
            draft.note(given.shown(name), "taken", "data")
    if given["dataset_proportion"] != 1:
        draft.note(given.shown("dataset_proportion"), "left out", "list fewer shards in data.sources")
    if "train_num_samples" in given:
        draft.note(given.shown("train_num_samples"), "taken", "for the length of the run; the index counts the samples")
    samples: int | None = given["train_num_samples"]
    if tables:
        path = given["train_data"]
        columns = f"audio={given['csv_img_key']} caption={given['csv_caption_key']}"
        build = f"dualenc shards build csv --out shards path={path} {columns}"
        draft.set("data.sources", [{"name": Path(path).stem, "shards": "./shards/train-*.tar"}])
        draft.comments["data.sources.0.shards"] = f"Training reads shards. Pack the table once:\n    {build}"
        draft.note(given.shown("train_data"), "different", f"training reads shards; pack the table once: {build}")
        for name in ("csv_separator", "csv_img_key", "csv_caption_key"):
            if name in given:
                draft.note(given.shown(name).replace("\t", "\\t"), "taken", "a setting of dualenc shards build csv")
        return samples
    names = given["datasetnames"] or []
    if not names:
        raise ConfigError(
            "--datasetnames is missing: name the folders of shards below --datasetpath, or a --train-data csv"
        )
    if given["train_data"]:
        draft.note(
            given.shown("train_data"), "left out", "of shards --datasetpath and --datasetnames say where they are"
        )
    for flag in ("csv_separator", "csv_img_key", "csv_caption_key"):
        if flag in given:
            draft.note(given.shown(flag), "left out", "there is no csv")
    splits = given["datasetinfos"] or ["train"]
    root = given["datasetpath"].rstrip("/")
    folders = [f"{root}/{n}/{s}" for n in names for s in splits]
    there = [f for f in folders if Path(f).is_dir()]  # as there: a data set need not have every split
    draft.set("data.sources", [{"name": "train", "shards": [f"{f}/*.tar" for f in there or folders]}])
    for flag in ("datasetpath", "datasetnames", "datasetinfos"):
        if flag in given:
            draft.note(given.shown(flag), "taken", "data.sources: DATASETPATH/NAME/INFO/*.tar")
    return samples


def _optimizer(given: Given, draft: Draft) -> None:
    if given["optimizer"].lower() not in ("adamw", "sgd"):
        raise ConfigError(f"--optimizer {given['optimizer']}: write adamw or sgd")
    shared.adamw(given, draft, given["amodel"])
    draft.set("optim.clip_grad_norm", None, "No gradient clipping, as there.")
    if given["optimizer"].lower() == "sgd":
        draft.set("optim.name", "sgd")
        if given["momentum"] is not None:
            draft.set("optim.momentum", given["momentum"])
    for flag in ("optimizer", "momentum"):
        if flag in given:
            draft.note(given.shown(flag), "taken", f"optim.{'name' if flag == 'optimizer' else flag}")
    if given["split_opt"]:
        new, old = given["lr_new"] or draft.raw["optim"]["lr"], given["lr_pretrained"] or draft.raw["optim"]["lr"]
        draft.set("optim.lr", new, "--split-opt: of everything but the text tower.")
        draft.set("optim.lr_scale", {"text": old / new})
        for flag, key in (("beta1_new", 0), ("beta2_new", 1)):
            if given[flag] is not None:
                draft.raw["optim"]["betas"][key] = given[flag]
        if given["eps_new"] is not None:
            draft.set("optim.eps", given["eps_new"])
        draft.set("optim.weight_decay", given["wd_new"])
        draft.note("--split-opt", "taken", f"optim.lr: {new:g}, optim.lr_scale.text: {old / new:g}")
    for flag in ("lr_new", "lr_pretrained", "beta1_new", "beta2_new", "eps_new", "wd_new"):
        if flag in given:
            said = "taken" if given["split_opt"] else "left out"
            draft.note(given.shown(flag), "taken" if said == "taken" else "left out", "with --split-opt")
