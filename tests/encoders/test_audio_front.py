"""Log-mel features against transformers' own extractors, on real clips, alone and in a batch with longer ones."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from _shared import DATA as SHARED_DATA
from torch import Tensor

from dualenc.data.modalities.audio import AudioConfig, AudioInput
from dualenc.encoders.adapters.hf_audio import audio_defaults
from dualenc.encoders.audio_front import FrontEnd, Heard, reflected

AUDIO = SHARED_DATA / "audio_text"
CLOSE = 1e-4

HTSAT = {"model_type": "clap_audio_model", "num_mel_bins": 64}
UNFUSED = SimpleNamespace(**HTSAT, enable_fusion=False)
FUSED = SimpleNamespace(**HTSAT, enable_fusion=True)
WHISPER = SimpleNamespace(model_type="whisper", num_mel_bins=80, max_source_positions=1500)
AST = SimpleNamespace(model_type="audio-spectrogram-transformer", num_mel_bins=128, max_length=1024)
W2V_BERT = SimpleNamespace(model_type="wav2vec2-bert")
WAV2VEC2 = SimpleNamespace(model_type="wav2vec2")


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    """Six environmental sounds of 5 s: a bark with silence after it, rain, … and two spoken words of odd lengths."""
    out = []
    for name, at in (("esc10_folds123", slice(0, 240, 40)), ("fsdd", slice(3, 5))):
        folder = AUDIO / name
        if not folder.is_dir():
            pytest.skip(f"needs the clips under {folder}")
        lines = (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()
        out += [(folder / json.loads(line)["audio"]).read_bytes() for line in lines[at]]
    return out


def test_an_equalizer_adds_decibels_to_bands(files: list[bytes]) -> None:
    source = AudioInput(AudioConfig(features={"mean": 0.0, "std": 1.0}))
    x = source.collate([source.eval(source.decode(raw)) for raw in files[:3]])
    front = FrontEnd(source.describe()).eval()
    plain, zero = front(x).values, front({**x, "equalizer": torch.zeros(3, 6)}).values
    assert torch.equal(plain, zero)
    ramp = torch.linspace(-6, 6, 6).expand(3, 6) * torch.tensor([[1.0], [0.5], [0.0]])
    heard = front({**x, "equalizer": ramp}).values
    loud = plain > -90  # the floor is -100 dB before and after
    want = torch.linspace(-6, 6, 64) * torch.tensor([1.0, 0.5, 0.0])[:, None, None]
    assert torch.allclose((heard - plain)[loud], want.expand_as(plain)[loud], atol=1e-3)
    assert heard.min() >= -100.001


def wave_of(raw: bytes, rate: int) -> Any:
    """The independent way: decode all, mean, resample."""
    import soundfile
    import soxr

    x, own = soundfile.read(io.BytesIO(raw), dtype="float32", always_2d=True)
    return soxr.resample(x.mean(axis=1), own, rate)


def hear(files: list[bytes], arch: Any, pre: dict[str, Any], **changed: Any) -> tuple[Heard, AudioInput]:
    """Our features of all files in one batch, with the settings we read from an extractor's own file."""
    source = AudioInput(AudioConfig(**{**audio_defaults(arch, pre), **changed}))
    rows = [source.eval(source.decode(x)) for x in files]
    return FrontEnd(source.describe()).eval()(source.collate(rows)), source


def said(extractor: Any) -> dict[str, Any]:
    return json.loads(extractor.to_json_string())  # type: ignore[no-any-return]


def far(ours: Tensor, theirs: Any) -> float:
    """Largest difference, printed: -s shows the numbers."""
    theirs = torch.as_tensor(np.asarray(theirs)).float()
    assert ours.shape == theirs.shape
    out = float((ours - theirs).abs().max())
    print(f"max |difference| {out:.2g}")
    return out


@pytest.mark.parametrize("arch", [UNFUSED, FUSED, WHISPER, AST, W2V_BERT], ids=lambda a: a.model_type)
def test_a_batch_in_one_call_is_its_clips_one_by_one(files: list[bytes], arch: Any) -> None:
    """What a GPU computes, here on the CPU: clips of several lengths, alone and padded to the longest."""
    source = AudioInput(AudioConfig(**audio_defaults(arch, {})))
    x = source.collate([source.eval(source.decode(raw)) for raw in files])
    front = FrontEnd(source.describe()).eval()
    one_by_one = front(x)
    front.one_by_one = False
    at_once = front(x)
    assert torch.equal(one_by_one.mask, at_once.mask)
    assert torch.equal(one_by_one.longer, at_once.longer)
    assert one_by_one.values.abs().max() > 0.1
    assert far(at_once.values, one_by_one.values) <= CLOSE


@pytest.mark.parametrize("padding", ["repeatpad", "repeat", "pad"])
def test_clap(files: list[bytes], padding: str) -> None:
    from transformers import ClapFeatureExtractor

    extractor = ClapFeatureExtractor(truncation="rand_trunc", padding=padding)
    ours, _ = hear(files, UNFUSED, said(extractor))
    theirs = extractor([wave_of(x, 48_000) for x in files], sampling_rate=48_000, return_tensors="np")
    assert far(ours.values[:, None], theirs["input_features"]) <= CLOSE
    assert not ours.longer.any()


def test_clap_fusion(files: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """A clip of 15 s and one a few samples over ten; the extractor's dice are replaced by the middle of each third."""
    import soundfile
    from transformers import ClapFeatureExtractor

    waves = [wave_of(x, 48_000) for x in files]
    waves += [np.concatenate(waves[:3]), np.concatenate([*waves[:2], waves[2][:100]])]
    raws = []
    for wave in waves:
        file = io.BytesIO()
        soundfile.write(file, wave, 48_000, format="WAV", subtype="FLOAT")
        raws.append(file.getvalue())
    monkeypatch.setattr(np.random, "choice", lambda r: r[len(r) // 2])
    extractor = ClapFeatureExtractor(truncation="fusion")
    ours, _ = hear(raws, FUSED, said(extractor))
    theirs = extractor(waves, sampling_rate=48_000, return_tensors="np")
    for view in range(4):
        print(
            "view",
            view,
            [
                f"{v:.2g}"
                for v in (ours.values[:, view] - torch.as_tensor(theirs["input_features"][:, view]))
                .abs()
                .amax((1, 2))
                .tolist()
            ],
        )
    assert ours.longer.tolist() == theirs["is_longer"][:, 0].tolist() == [False] * 8 + [True, False]
    assert far(ours.values, theirs["input_features"]) <= CLOSE


@pytest.mark.parametrize("mels", [80, 128])
def test_whisper(files: list[bytes], mels: int) -> None:
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=mels)
    ours, _ = hear(files, WHISPER, said(extractor))
    waves = [wave_of(x, 16_000) for x in files]
    theirs = extractor(waves, sampling_rate=16_000, return_tensors="np", return_attention_mask=True)
    assert far(ours.values.transpose(1, 2), theirs["input_features"]) <= CLOSE
    # They count a frame as sound that begins in it, we one that begins and has a whole hop.
    assert (ours.mask.sum(1) - torch.as_tensor(theirs["attention_mask"]).sum(1)).abs().max() <= 1


def test_ast(files: list[bytes]) -> None:
    from transformers import ASTFeatureExtractor

    extractor = ASTFeatureExtractor()
    ours, _ = hear(files, AST, said(extractor))
    theirs = extractor([wave_of(x, 16_000) for x in files], sampling_rate=16_000, return_tensors="np")
    assert far(ours.values, theirs["input_values"]) <= CLOSE


def test_w2v_bert(files: list[bytes]) -> None:
    from transformers import SeamlessM4TFeatureExtractor

    extractor = SeamlessM4TFeatureExtractor()
    ours, _ = hear(files, W2V_BERT, said(extractor))
    theirs = extractor([wave_of(x, 16_000) for x in files], sampling_rate=16_000, return_tensors="np")
    mask = torch.as_tensor(theirs["attention_mask"]).bool()
    n = min(mask.shape[1], ours.mask.shape[1])
    assert torch.equal(ours.mask[:, :n], mask[:, :n])
    real = mask[:, :n, None]
    assert far(ours.values[:, :n] * real, theirs["input_features"][:, :n] * real.numpy()) <= CLOSE


def test_wav2vec2(files: list[bytes]) -> None:
    from transformers import Wav2Vec2FeatureExtractor

    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    ours, _ = hear(files, WAV2VEC2, said(extractor))
    waves = [wave_of(x, 16_000) for x in files]
    theirs = extractor(waves, sampling_rate=16_000, padding=True, return_tensors="np")
    assert far(ours.values, theirs["input_values"]) <= CLOSE
    assert torch.equal(ours.mask, torch.as_tensor(theirs["attention_mask"]).bool())


@pytest.mark.parametrize("arch", [UNFUSED, WHISPER, AST, W2V_BERT, WAV2VEC2], ids=lambda a: a.model_type)
def test_alone_or_with_longer_clips(files: list[bytes], arch: Any) -> None:
    together, source = hear(files, arch, {})
    front = FrontEnd(source.describe()).eval()
    for i, raw in enumerate(files):
        alone = front(source.collate([source.eval(source.decode(raw))]))
        assert torch.equal(alone.mask[0], together.mask[i, : alone.mask.shape[1]])
        assert not together.mask[i, alone.mask.shape[1] :].any()
        real = alone.mask[0]
        assert (alone.values[0][real] - together.values[i, : len(real)][real]).abs().max() <= 1e-5


def test_training_is_close_to_evaluation(files: list[bytes]) -> None:
    """fp32 against fp64: the mean difference is far below anything a tower sees, the largest 0.1 dB."""
    source = AudioInput(AudioConfig(**audio_defaults(UNFUSED, {})))
    x = source.collate([source.eval(source.decode(raw)) for raw in files])
    front = FrontEnd(source.describe())
    difference = (front.train()(x).values - front.eval()(x).values).abs()
    print(f"fp32 against fp64: mean {float(difference.mean()):.2g} dB, largest {float(difference.max()):.2g} dB")
    assert difference.mean() < 1e-4
    assert difference.max() < 0.1


def test_spec_augment_covers_what_it_says(files: list[bytes]) -> None:
    source = AudioInput(AudioConfig(augment={"spec": {"freq_masks": 1, "time_masks": 1}}))
    front = FrontEnd(source.describe()).eval()
    clean = source.collate([source.eval(source.decode(files[0]))])
    spec = torch.tensor([[[0.25, 0.25], [0.5, 0.1]]])
    got, plain = front({**clean, "spec": spec}), front(clean)
    changed = got.values != plain.values
    bands, frames = changed.shape[2], changed.shape[1]
    assert changed[0, :, bands // 4 : bands // 2].float().mean() > 0.99
    assert changed[0, round(frames * 0.5) : round(frames * 0.6)].float().mean() > 0.99
    rest = changed[0].clone()
    rest[:, bands // 4 : bands // 2] = False
    rest[int(frames * 0.5) : int(frames * 0.6) + 1] = False
    assert not rest.any()
    fill = got.values[changed]
    assert float(fill.std()) < 1e-6
    assert float(fill[0]) == pytest.approx(float(plain.values.mean()), abs=1e-4)


def test_mirrors_as_numpy_does() -> None:
    for n in (1, 2, 5, 9):
        x = np.arange(n)
        theirs = np.pad(x, (7, 7), mode="reflect")
        at = torch.arange(-7, n + 7)[None]
        assert reflected(at, torch.tensor([n]))[0].tolist() == theirs.tolist()
