"""LAION's CLAP files: a ClapModel written under the names of laion_clap, with all that their files hold besides, is
read back as the same tensors and the same features. Random weights; the names are those of the package itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_released_clap import AUDIO_CONFIG, TEXT_CONFIG, clips, wave_of, write_clap  # noqa: F401
from test_released_models import randomise

from dualenc.encoders.released.laion_clap import as_transformers
from dualenc.errors import CheckpointError, ConfigError
from dualenc.model import load_model
from dualenc.model.export.export import export

Clips = list[tuple[bytes, str]]
HEADS_OF_64 = {"hidden_size": 128, "intermediate_size": 96}  # RoBERTa's heads are 64 wide


def laion_names(model: Any) -> dict[str, torch.Tensor]:
    """What laion_clap's own state dict of this model would be."""
    out: dict[str, torch.Tensor] = {}
    qkv: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in model.state_dict().items():
        part, _, rest = name.partition(".")
        if part == "audio_model":
            rest = rest.removeprefix("audio_encoder.")
            words = rest.split(".")
            if words[:1] == ["batch_norm"]:
                rest = ".".join(["bn0", *words[1:]])
            elif "blocks" in words:
                head, tail = ".".join(words[:4]), words[4:]
                if tail[:2] == ["attention", "self"] and tail[2] in ("query", "key", "value"):
                    qkv.setdefault(f"audio_branch.{head}.attn.qkv.{tail[3]}", {})[tail[2]] = value
                    continue
                if tail[0] == "attention":
                    tail = ["attn", "proj", tail[-1]] if tail[1] == "output" else ["attn", *tail[2:]]
                elif tail[0] in ("intermediate", "output"):
                    tail = ["mlp", "fc1" if tail[0] == "intermediate" else "fc2", tail[-1]]
                else:
                    tail[0] = {"layernorm_before": "norm1", "layernorm_after": "norm2"}[tail[0]]
                rest = ".".join([head, *tail])
            out[f"audio_branch.{rest}"] = value
        elif part == "text_model":
            out[f"text_branch.{rest}"] = value
        elif part.endswith("_projection"):
            out[f"{part}.{ {'linear1': 0, 'linear2': 2}[rest.split('.')[0]] }.{rest.split('.')[1]}"] = value
        else:
            out[name] = value
    for name, parts in qkv.items():
        out[name] = torch.cat([parts[p] for p in ("query", "key", "value")])
    return out


def beside(fmin: float = 50.0, rate: int = 48_000) -> dict[str, torch.Tensor]:
    """Of such a file what is no part of an embedding."""
    from transformers.audio_utils import mel_filter_bank

    mel = mel_filter_bank(513, 64, fmin, 14_000, rate, norm="slaney", mel_scale="slaney")
    return {
        "audio_branch.spectrogram_extractor.stft.conv_real.weight": torch.zeros(513, 1, 1024),
        "audio_branch.logmel_extractor.melW": torch.tensor(mel).float(),
        "audio_branch.layers.2.blocks.1.attn_mask": torch.zeros(4, 64, 64),
        "audio_branch.tscam_conv.weight": torch.zeros(527, 64, 2, 3),
        "audio_branch.head.weight": torch.zeros(527, 527),
        "text_transform.sequential.0.weight": torch.zeros(24, 24),
        "audio_transform.sequential.0.weight": torch.zeros(24, 24),
    }


def save(path: Path, tensors: dict[str, torch.Tensor], more: Any = None) -> str:
    """As its training script does: a DistributedDataParallel's names, the epoch, a numpy number of the optimizer."""
    state = {f"module.{k}": v for k, v in tensors.items()}
    optimizer = {"state": {}, "param_groups": [{"lr": np.float64(1e-4)}]}
    torch.save({"epoch": 15, "name": "clap", "state_dict": state, "optimizer": optimizer, "more": more}, path)
    return f"laion_clap:{path}"


def build(folder: Path, fused: bool, **audio: Any) -> tuple[Any, Any, Any]:
    """A ClapModel of RoBERTa's proportions, the extractor as the released repositories have it, the tokenizer."""
    import transformers as tf

    _, _, tokenizer = write_clap(folder, fused)
    more = {"enable_fusion": True, "fusion_type": "aff_2d"} if fused else {}
    text = {**TEXT_CONFIG, **HEADS_OF_64, "layer_norm_eps": 1e-5}
    torch.manual_seed(1)
    config = tf.ClapConfig(audio_config={**AUDIO_CONFIG, **more, **audio}, text_config=text, projection_dim=24)
    model = tf.ClapModel(config)
    randomise(model)
    norm = model.audio_model.audio_encoder.batch_norm
    norm.running_mean.fill_(-40)
    norm.running_var.fill_(500)
    extractor = tf.ClapFeatureExtractor(truncation="fusion" if fused else "rand_trunc", frequency_min=50)
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (folder / name).unlink()
    return model.eval(), extractor, tokenizer


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_a_laion_file_gives_transformers_features(tmp_path: Path, clips: Clips, fused: bool) -> None:  # noqa: F811
    model, extractor, tokenizer = build(tmp_path, fused)
    spec = save(tmp_path / "best.pt", {**laion_names(model), **beside()})
    heard = extractor([wave_of(x, 48_000) for x, _ in clips], sampling_rate=48_000, return_tensors="pt")
    if fused:  # none is longer than ten seconds; the extractor throws dice for one to be called so
        heard["is_longer"] = torch.zeros_like(torch.as_tensor(heard["is_longer"]))
    words = tokenizer([t for _, t in clips], padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        sounds = model.get_audio_features(**heard).pooler_output
        texts = model.get_text_features(**words).pooler_output
    bundle = load_model(spec)
    ours = bundle.save(tmp_path / "ours")
    there = export(bundle, "hf", tmp_path / "hf")
    for one in (bundle, load_model(str(ours)), load_model(str(there))):
        embedder = one.embedder()
        audio, text = embedder.embed("audio", [x for x, _ in clips], 4), embedder.embed("text", [t for _, t in clips])
        print("audio", float((audio - sounds).abs().max()), "text", float((text - texts).abs().max()))
        assert (audio - sounds).abs().max() <= 1e-5
        assert (text - texts).abs().max() <= 1e-5
    assert audio.std(0).mean() > 1e-2
    assert embedder.logit_scale("audio-text") == pytest.approx(model.logit_scale_a.exp().item(), rel=1e-6)
    assert bundle.inputs["audio"].config.rate == 48_000  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "depths"),
    [
        pytest.param(96, [2, 2, 6, 2], id="tiny"),
        pytest.param(128, [2, 2, 12, 2], id="base", marks=pytest.mark.extra),
    ],
)
def test_htsat_s_released_sizes_tensor_by_tensor(tmp_path: Path, width: int, depths: list[int]) -> None:
    """HTSAT-tiny and HTSAT-base as released: nothing but the file's shapes says which."""
    shape = {"patch_embeds_hidden_size": width, "hidden_size": 8 * width, "depths": depths, "num_hidden_layers": 4}
    model, _, _ = build(tmp_path, False, **shape, num_attention_heads=[4, 8, 16, 32])
    config, state = as_transformers({**laion_names(model), **beside()}, "x")
    own = model.state_dict()
    assert state.keys() == own.keys()
    assert all(torch.equal(v, own[k]) for k, v in state.items())
    for k in ("hidden_size", "depths", "num_attention_heads", "num_mel_bins", "window_size", "mlp_ratio"):
        assert getattr(config.audio_config, k) == getattr(model.config.audio_config, k), k


def test_another_rate_another_tower_and_missing_tensors_are_refused(tmp_path: Path) -> None:
    model, _, _ = build(tmp_path, False)
    names = laion_names(model)
    with pytest.raises(CheckpointError, match=r"audio_branch.logmel_extractor.melW: .* 48000 Hz.*sample rate"):
        load_model(save(tmp_path / "rate.pt", {**names, **beside(rate=32_000)}))
    pann = {k: v for k, v in names.items() if not k.startswith("audio_branch.")}
    with pytest.raises(CheckpointError, match=r"HTSAT has .* this file has 'audio_branch.conv_block1.conv1.weight'"):
        load_model(save(tmp_path / "pann.pt", {**pann, "audio_branch.conv_block1.conv1.weight": torch.zeros(1)}))
    gone = {k: v for k, v in names.items() if k != "audio_projection.2.bias"}
    with pytest.raises(CheckpointError, match=r"1 tensors are missing, first 'towers.audio.*audio_projection.linear2"):
        load_model(save(tmp_path / "gone.pt", gone))
    with pytest.raises(CheckpointError, match=r"1 tensors do not exist in .*stranger"):
        load_model(save(tmp_path / "extra.pt", {**names, "audio_branch.stranger": torch.zeros(1)}))
    with pytest.raises(ConfigError, match="there is no such file"):
        load_model(f"laion_clap:{tmp_path / 'none.pt'}")
    alone = tmp_path / "alone"
    alone.mkdir()
    with pytest.raises(ConfigError, match=r"its tokenizer, FacebookAI/roberta-base, cannot be loaded"):
        load_model(save(alone / "x.pt", names))


class Payload:
    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["PAYLOAD"],)


def test_a_pickle_with_a_payload_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of numpy are let in beside the tensors; nothing else is."""
    monkeypatch.setenv("PAYLOAD", str(tmp_path / "executed"))
    spec = save(tmp_path / "x.pt", {"logit_scale_a": torch.zeros(())}, Payload())
    with pytest.raises(CheckpointError, match="refused; it has more than tensors"):
        load_model(spec)
    objects = save(tmp_path / "y.pt", {"logit_scale_a": torch.zeros(())}, np.array([Payload()], dtype=object))
    with pytest.raises(CheckpointError, match="refused; it has more than tensors"):
        load_model(objects)
    assert not (tmp_path / "executed").exists()
    torch.load(tmp_path / "x.pt", weights_only=False)  # the payload does work
    assert (tmp_path / "executed").exists()
