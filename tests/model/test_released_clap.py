"""A ClapModel in transformers' layout: features of real clips against the library's own. Random weights, real code."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _shared import DATA as SHARED_DATA
from test_released_models import randomise

from dualenc.model import load_model

AUDIO = SHARED_DATA / "audio_text"
AUDIO_CONFIG = {
    "spec_size": 256,
    "patch_embeds_hidden_size": 16,
    "hidden_size": 64,
    "depths": [1, 1, 2],
    "num_attention_heads": [2, 2, 2],
    "num_hidden_layers": 3,
}
TEXT_CONFIG = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
}

Clips = list[tuple[bytes, str]]


@pytest.fixture(scope="module")
def clips() -> Clips:
    """Real clips with captions: 8 kHz speech of about a second, 44.1 kHz sounds of five, stamps of odd lengths."""
    out = []
    for name, field in (("esc10_folds123", "label"), ("asterisk", "transcript"), ("tuxpaint", "caption")):
        folder = AUDIO / name
        if not folder.is_dir():
            pytest.skip(f"needs the clips under {folder}")
        rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
        out += [((folder / r["audio"]).read_bytes(), str(r[field])) for r in rows[5:8]]
    return out


def write_clap(folder: Path, fused: bool) -> tuple[Any, Any, Any]:
    """A small ClapModel with its extractor and a RoBERTa tokenizer, as save_pretrained writes them."""
    import transformers as tf

    torch.manual_seed(0)
    more = {"enable_fusion": True, "fusion_type": "aff_2d"} if fused else {}
    model = tf.ClapModel(
        tf.ClapConfig(audio_config={**AUDIO_CONFIG, **more}, text_config=TEXT_CONFIG, projection_dim=24)
    )
    randomise(model)
    norm = model.audio_model.audio_encoder.batch_norm
    norm.running_mean.fill_(-40)
    norm.running_var.fill_(500)
    model.eval().save_pretrained(folder)
    extractor = tf.ClapFeatureExtractor(truncation="fusion" if fused else "rand_trunc")
    extractor.save_pretrained(folder)
    symbols = ["<s>", "<pad>", "</s>", "<unk>", *map(chr, range(33, 127)), *map(chr, range(161, 173))]
    symbols += [*map(chr, range(174, 256)), *map(chr, range(256, 324)), "th", "ing"]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(dict.fromkeys(symbols))}))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\n")
    tokenizer = tf.RobertaTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=38)
    tokenizer.save_pretrained(folder)
    return model, extractor, tokenizer


def wave_of(raw: bytes, rate: int) -> Any:
    """The independent way: decode all, mean, resample."""
    import soundfile
    import soxr

    x, own = soundfile.read(io.BytesIO(raw), dtype="float32", always_2d=True)
    return soxr.resample(x.mean(axis=1), own, rate)


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_a_clap_folder_gives_transformers_features(
    tmp_path: Path, clips: Clips, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, extractor, tokenizer = write_clap(tmp_path / "m", fused)
    waves = [wave_of(x, 48_000) for x, _ in clips]
    if fused:  # one clip longer than ten seconds; the extractor's dice replaced by the middle that evaluation takes
        long = np.concatenate([wave_of(x, 48_000) for x, _ in clips[:3]])
        file = io.BytesIO()
        import soundfile

        soundfile.write(file, long, 48_000, format="WAV", subtype="FLOAT")
        clips, waves = [*clips, (file.getvalue(), "all of it")], [*waves, long]
        monkeypatch.setattr(np.random, "choice", lambda r: r[len(r) // 2])
    heard = extractor(waves, sampling_rate=48_000, return_tensors="pt")
    words = tokenizer([t for _, t in clips], padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        sounds = model.get_audio_features(**heard).pooler_output
        texts = model.get_text_features(**words).pooler_output

    bundle = load_model(f"hf:{tmp_path / 'm'}")
    ours = bundle.save(tmp_path / "ours")
    for one in (bundle, load_model(str(ours))):
        embedder = one.embedder()
        audio, text = embedder.embed("audio", [x for x, _ in clips], 4), embedder.embed("text", [t for _, t in clips])
        print("audio", float((audio - sounds).abs().max()), "text", float((text - texts).abs().max()))
        assert (audio - sounds).abs().max() <= 1e-5
        assert (text - texts).abs().max() <= 1e-5
    assert audio.std(0).mean() > 1e-2  # the clips are told apart at all
    assert embedder.logit_scale("audio-text") == pytest.approx(model.logit_scale_a.exp().item(), rel=1e-6)
    assert bundle.inputs["audio"].config.long == ("fusion" if fused else "crop")  # type: ignore[attr-defined]


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_a_clap_folder_to_ours_and_back(tmp_path: Path, clips: Clips, fused: bool) -> None:
    """transformers → ours → transformers: every tensor bit for bit, both temperatures too, the same features."""
    from safetensors.torch import load_file
    from transformers import AutoFeatureExtractor, AutoTokenizer, ClapModel

    from dualenc.model.export.export import export

    model, _, _ = write_clap(tmp_path / "m", fused)
    model.logit_scale_t.data.add_(0.25)
    model.save_pretrained(tmp_path / "m")
    ours = load_model(str(tmp_path / "m"))
    out = export(ours, "hf", tmp_path / "hf")
    one, two = load_file(tmp_path / "m" / "model.safetensors"), load_file(out / "model.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.equal(v, two[k]) and v.shape == two[k].shape for k, v in one.items())

    theirs = ClapModel.from_pretrained(out).eval()
    heard = AutoFeatureExtractor.from_pretrained(out)(
        [wave_of(x, 48_000) for x, _ in clips], sampling_rate=48_000, return_tensors="pt"
    )
    if fused:  # none is longer than ten seconds; the extractor then throws dice for one to be called so
        heard["is_longer"] = torch.zeros_like(torch.as_tensor(heard["is_longer"]))
    words = AutoTokenizer.from_pretrained(out)(
        [t for _, t in clips], padding=True, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        sounds = theirs.get_audio_features(**heard).pooler_output
        texts = theirs.get_text_features(**words).pooler_output
    again = load_model(str(out))
    for bundle in (ours, again):
        embedder = bundle.embedder()
        assert (embedder.embed("audio", [x for x, _ in clips], 4) - sounds).abs().max() <= 1e-5
        assert (embedder.embed("text", [t for _, t in clips]) - texts).abs().max() <= 1e-5
    state = ours.model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in again.model.state_dict().items())


def test_a_graph_of_fusion_is_refused_and_a_rate_of_ours_cannot_be_edited(tmp_path: Path) -> None:
    from dualenc.errors import CheckpointError, ConfigError
    from dualenc.model.export.export import export

    write_clap(tmp_path / "m", True)
    model = load_model(str(tmp_path / "m"))
    pytest.importorskip("onnxscript")
    with pytest.raises(ConfigError, match=r"modalities.audio: input.long: fusion takes crops.*safetensors"):
        export(model, "onnx", tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()
    path = model.save(tmp_path / "ours") / "dualenc.json"
    said = json.loads(path.read_text())
    said["modalities"]["audio"]["input"]["config"]["rate"] = 44_100
    path.write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match=r"modalities.audio.input.config.rate"):
        load_model(str(tmp_path / "ours"))


@pytest.mark.parametrize(
    ("key", "value", "field"), [("sampling_rate", 44_100, "sampling_rate"), ("hop_length", 441, "features")]
)
def test_an_edited_sample_rate_or_hop_is_refused(tmp_path: Path, key: str, value: int, field: str) -> None:
    from dualenc.errors import CheckpointError
    from dualenc.model.export.export import export

    write_clap(tmp_path / "m", False)
    out = export(load_model(str(tmp_path / "m")), "hf", tmp_path / "hf")
    path = out / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(CheckpointError, match=field):
        load_model(str(out))
