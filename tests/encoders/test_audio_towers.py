"""Audio towers: the same clip, the same embedding; gradients; weights in transformers' layouts."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from _shared import DATA as SHARED_DATA
from _shared import PYTHONPATH
from _spawn import spawn

from dualenc.config import Component, EngineConfig, LogitScale, Optim
from dualenc.data.batch import Batch, map_tensors
from dualenc.data.modalities.audio import AudioConfig, AudioInput
from dualenc.distributed.world import World
from dualenc.encoders import DualEncoder, Tower, build_tower, check_input, input_defaults
from dualenc.encoders.dual_encoder import hidden_group
from dualenc.encoders.own.audio_transformer import hidden_places
from dualenc.errors import ConfigError

AUDIO = SHARED_DATA / "audio_text"

CONFIGS: dict[str, dict[str, Any]] = {
    "own": {"name": "own/audio_cnn", "widths": [8, 16]},
    "own-vgg": {"name": "own/audio_vgg", "widths": [8, 16, 16]},
    "own-transformer": {"name": "own/audio_transformer", "widths": [8, 8], "width": 16, "layers": 2},
    "clap": {
        "model_type": "clap_audio_model",
        "patch_embeds_hidden_size": 16,
        "hidden_size": 64,
        "depths": [1, 1, 1],
        "num_attention_heads": [2, 2, 2],
        "num_hidden_layers": 3,
    },
    "whisper": {
        "model_type": "whisper",
        "d_model": 32,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
    },
    "ast": {
        "model_type": "audio-spectrogram-transformer",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    },
    "wav2vec2": {
        "model_type": "wav2vec2",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "conv_dim": [32] * 7,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 2,
    },
    "w2v-bert": {
        "model_type": "wav2vec2-bert",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    },
}
CONFIGS["clap-fused"] = {**CONFIGS["clap"], "enable_fusion": True, "fusion_type": "aff_2d"}
CONFIGS["wav2vec2-layer"] = {
    **CONFIGS["wav2vec2"],
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "conv_bias": True,
}


def component(name: str) -> Component:
    config = CONFIGS[name]
    if "name" in config:
        return Component.model_validate(config)
    return Component.model_validate({"name": f"hf/{name}", "pretrained": False, "config": config})


def make(name: str, **changed: Any) -> tuple[AudioInput, Tower]:
    torch.manual_seed(0)
    defaults = input_defaults("audio", component(name))
    source = AudioInput(AudioConfig.model_validate({**defaults, **changed}))
    return source, build_tower("audio", component(name), source.describe(), 16)


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    """Spoken digits of half a second, a prompt, and a sound of five seconds."""
    out = []
    for name, count in (("fsdd", 2), ("asterisk", 1), ("esc10_folds123", 1)):
        folder = AUDIO / name / "audio"
        if not folder.is_dir():
            pytest.skip(f"needs the clips under {folder}")
        out += [p.read_bytes() for p in sorted(folder.iterdir())[:count]]
    return out


def rows(source: AudioInput, files: list[bytes]) -> list[Any]:
    return [source.eval(source.decode(x)) for x in files]


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_same_clip_alone_and_with_longer_ones(files: list[bytes], name: str) -> None:
    source, tower = make(name)
    tower.eval()
    batch = rows(source, files)
    with torch.no_grad():
        together = normalize(tower.encode(source.collate(batch)), dim=-1)
        alone = torch.cat([normalize(tower.encode(source.collate([r])), dim=-1) for r in batch])
    print(f"{name}: largest difference {float((together - alone).abs().max()):.2g}")
    assert (together - alone).abs().max() <= 1e-5
    assert together.std(0).max() > 1e-3


@pytest.mark.parametrize("name", list(CONFIGS))
def test_every_weight_gets_a_gradient_and_the_component_builds_it_again(files: list[bytes], name: str) -> None:
    source, tower = make(name)
    tower.train()
    x = source.collate(rows(source, files[:2]))
    tower.encode(x).square().sum().backward()
    without = [n for n, p in tower.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    again = build_tower("audio", tower.component, source.describe(), 16)
    assert {k: v.shape for k, v in tower.state_dict().items()} == {k: v.shape for k, v in again.state_dict().items()}
    again.load_state_dict(tower.state_dict())
    with torch.no_grad():
        assert torch.equal(tower.eval().encode(x), again.eval().encode(x))


@pytest.mark.parametrize("name", ["whisper", "ast", "wav2vec2", "wav2vec2-layer", "w2v-bert"])
def test_released_weights_give_the_model_s_own_states(tmp_path: Path, files: list[bytes], name: str) -> None:
    """A folder of save_pretrained; the library's own forward on one clip at a time."""
    import soundfile
    import soxr
    import transformers as tf

    config = tf.AutoConfig.for_model(**CONFIGS[name])
    torch.manual_seed(1)
    if name == "whisper":
        config.update({"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 64, "vocab_size": 100})
        config.update({"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1})
    model = tf.AutoModel.from_config(config).eval()
    model.save_pretrained(tmp_path)
    extractor = {
        "whisper": tf.WhisperFeatureExtractor,
        "ast": tf.ASTFeatureExtractor,
        "w2v-bert": tf.SeamlessM4TFeatureExtractor,
    }.get(name, tf.Wav2Vec2FeatureExtractor)()
    extractor.save_pretrained(tmp_path)
    part = Component.model_validate({"name": f"hf/{tmp_path}", "head": "none"})
    source = AudioInput(AudioConfig.model_validate(input_defaults("audio", part)))
    tower = build_tower("audio", part, source.describe(), 32).eval()
    with torch.no_grad():
        ours = tower.encode(source.collate(rows(source, files)))
        for i, raw in enumerate(files):
            x, rate = soundfile.read(io.BytesIO(raw), dtype="float32", always_2d=True)
            wave = soxr.resample(x.mean(axis=1), rate, 16_000)
            given = extractor(wave, sampling_rate=16_000, return_tensors="pt")
            given.pop("attention_mask", None) if name.startswith("wav2vec2") else None
            if name == "whisper":
                states = model.encoder(given["input_features"]).last_hidden_state[0]
                theirs = states[: -(-(len(wave) // 160) // 2)].mean(0)
            elif name == "w2v-bert":
                states = model(**given).last_hidden_state[0]
                theirs = states[given["attention_mask"][0].bool()].mean(0)
            else:
                out = model(**given)
                theirs = out.pooler_output[0] if name == "ast" else out.last_hidden_state[0].mean(0)
            assert (ours[i] - theirs).abs().max() <= 1e-4, i
            assert (normalize(ours[i], dim=0) - normalize(theirs, dim=0)).abs().max() <= 1e-5, i
    described = AudioInput(AudioConfig.model_validate({**source.config.model_dump(), "rate": 8_000 * 4})).describe()
    with pytest.raises(ConfigError, match=r"input\.rate: the weights .* were made with 16000, got 32000"):
        check_input("audio", part, described)
    changed = source.describe()
    if changed["config"]["features"]["kind"] == "mel":
        changed["config"]["features"]["hop"] = 200
        with pytest.raises(ConfigError, match=r"features\.hop: .* 160, got 200"):
            check_input("audio", part, changed)


def test_whisper_is_not_padded_to_thirty_seconds_unless_asked(files: list[bytes]) -> None:
    source, tower = make("whisper", max_s=6.0)
    assert tower.net.embed_positions.weight.shape[0] == 300  # type: ignore[union-attr]
    assert tower.encode(source.collate(rows(source, files))).shape == (4, 16)
    with pytest.raises(ConfigError, match=r"input.max_s: 40 s need 2000 positions; the tower has 1500"):
        make("whisper", max_s=40.0)


PRINT = """
import sys, torch, pathlib
sys.path.insert(0, sys.argv[1])
import test_audio_towers as t
torch.set_num_threads(1)
files = [p.read_bytes() for p in sorted((t.AUDIO / "esc10_folds123" / "audio").iterdir())[:3]]
source, tower = t.make("own", max_s=3.0)
with torch.no_grad():
    print(tower.eval().encode(source.collate(t.rows(source, files))).double().flatten().tolist())
"""


def test_two_processes_give_the_same_embedding(files: list[bytes]) -> None:
    """Clips of 5 s cropped to 3: the crop of evaluation is always the same (LAION-AI/CLAP#60: cos 0.30)."""
    run = [sys.executable, "-c", PRINT, str(Path(__file__).parent)]
    env = os.environ | {"PYTHONPATH": PYTHONPATH}
    first, second = (subprocess.run(run, env=env, capture_output=True, text=True, check=True).stdout for _ in range(2))
    a, b = ([json.loads(line) for line in text.splitlines() if line.startswith("[")] for text in (first, second))
    assert len(a[0]) == 3 * 16
    for x, y in zip(a, b, strict=True):
        assert np.abs(np.array(x) - np.array(y)).max() <= 1e-5


# --- the gradient contract ---------------------------------------------------------------------------------------


def two_sources(files: list[bytes]) -> tuple[DualEncoder, Batch, dict[str, Any]]:
    """Slots 0 and 2 have audio, the others pictures (of nothing); also a dummy row of each."""
    from dualenc.data.modalities import modalities

    torch.manual_seed(0)
    source, tower = make("own", augment={"spec": {}})
    text = modalities["text"](modalities["text"].Config(tokenizer="clip-bpe:600", context_length=8))
    image = modalities["image"](modalities["image"].Config(size=32))
    parts = {
        "text": Component.model_validate({"name": "own/transformer", "width": 16, "layers": 1, "heads": 2}),
        "image": Component.model_validate({"name": "own/convnet", "widths": [8, 16]}),
    }
    towers = {
        "audio": tower,
        "text": build_tower("text", parts["text"], text.describe(), 16),
        "image": build_tower("image", parts["image"], image.describe(), 16),
    }
    model = DualEncoder(towers, [("audio", "text"), ("image", "text")], LogitScale())
    heard = [source.train(source.decode(x), np.random.default_rng(i)) for i, x in enumerate(files[:2])]
    pixels = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    words = ("zero", "a cat", "one", "a dog", "a tree", "a house")
    inputs = {
        "audio": source.collate(heard),
        "image": pixels,
        "text": text.collate([text.eval([w]) for w in words]),
    }
    at = {"audio": torch.tensor([0, 2]), "image": torch.tensor([1, 3, 4, 5]), "text": torch.arange(6)}
    dummies = {"audio": source.collate([source.dummy()]), "image": pixels[:1], "text": text.collate([text.dummy()])}
    return model, Batch(6, inputs, at, torch.arange(6), [f"s/{i}" for i in range(6)]), dummies


def gradients(world: World, engine: dict[str, Any], micro: int | None = None) -> dict[str, Tensor]:
    """What one step of SGD takes off the weights; this rank has every ``world_size``-th slot."""
    from dualenc.engine import build_engine
    from dualenc.losses import build_loss
    from dualenc.train.step import train_step

    folder = AUDIO / "fsdd" / "audio"
    model, batch, dummies = two_sources([p.read_bytes() for p in sorted(folder.iterdir())[:2]])
    inputs, at = {}, {}
    for m, r in batch.rows.items():
        mine = torch.nonzero(r % world.world_size == world.rank).flatten()
        at[m] = r[mine] // world.world_size
        inputs[m] = map_tensors(batch.inputs[m], lambda t, mine=mine: t[mine]) if len(mine) else dummies[m]
    share = slice(world.rank, None, world.world_size)
    batch = Batch(len(batch.keys[share]), inputs, at, batch.ids[share], batch.keys[share])
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optim = Optim(name="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, clip_grad_norm=None)
    built = build_engine(EngineConfig.model_validate(engine), optim, model, world)
    pairs = [("audio", "text"), ("image", "text")]
    train_step(built, batch, pairs, build_loss(Component(name="info_nce")), micro)
    return {n: before[n] - p for n, p in built.model_state().items()}


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert any(n.startswith("towers.audio.") and g.abs().max() > 1e-4 for n, g in want.items())
    for name, g in want.items():
        assert (g - got[name]).abs().max() <= 1e-5 * max(1.0, float(g.abs().max())), name


def test_micro_batches_without_audio_change_no_gradient(files: list[bytes]) -> None:
    """Chunks of two slots: the last has no audio and borrows a row as its dummy."""
    same(gradients(World(), {}, 2), gradients(World(), {}))


@pytest.mark.dist
@pytest.mark.parametrize(
    "engine", [{"parallel": "ddp"}, {"parallel": "fsdp2"}, {"kind": "deepspeed", "zero_stage": 3}], ids=str
)
def test_a_rank_without_audio_changes_no_gradient(files: list[bytes], engine: dict[str, Any]) -> None:
    """Rank 1 of 2 draws no clip at all."""
    same(spawn(Path(__file__), "gradients", 2, {"engine": engine})[0], gradients(World(), {}))


# --- hidden places -----------------------------------------------------------------------------------------------


def test_hidden_places_are_spans_within_the_clip() -> None:
    starts = torch.rand(40, 3, generator=torch.Generator().manual_seed(0))
    count = torch.arange(1, 41)
    at, there = hidden_places(starts, count, 5)
    for i, n in enumerate(count.tolist()):
        want: list[int] = []
        for s in starts[i].tolist():
            first = int(s * max(n - 4, 1))
            want += [k for k in range(first, first + 5) if k < n and k not in want]
        assert at[i][there[i]].tolist() == want
        assert (at[i] < n).all()


def test_what_is_hidden_is_not_heard() -> None:
    """Another sound in the middle of a hidden span changes what the convolutions say there and nothing else."""
    torch.manual_seed(0)
    wanted = Component.model_validate({**CONFIGS["own-transformer"], "masked": True})
    source = AudioInput(AudioConfig.model_validate({"rate": 16_000, "augment": {"hide": 1}}))
    tower = build_tower("audio", wanted, source.describe(), 12).eval()
    wave = 0.1 * torch.randn(2, 32_000)
    x = {"wave": wave, "length": torch.tensor([32_000, 24_000]), "hide": torch.tensor([[0.4], [0.6]])}
    at, there = hidden_places(x["hide"], torch.tensor([26, 19]), 5)
    assert there.all()
    middle = int(at[0, 2]) * 4 * 320  # four frames a token, 320 samples a frame
    other = {**x, "wave": wave.clone()}
    other["wave"][0, middle - 100 : middle + 100] = 0.5
    with torch.no_grad():
        one, two = tower(x), tower(other)
        seen = tower({k: v for k, v in x.items() if k != "hide"})
    assert one["masked_target"].shape == one["masked_context"].shape == one["masked_last"].shape == (2, 5, 12)
    changed = (one["masked_target"] - two["masked_target"]).abs().amax(2)
    assert changed[0, 2] > 1e-3
    assert changed[1].max() == 0
    for name in ("features", "pooled", "masked_context", "masked_last"):
        assert torch.equal(one[name], two[name]), name
    assert not torch.allclose(seen["features"], one["features"])
    assert seen.keys() == {"features", "pooled"}
    heard = tower.front(x)
    first = int(at[1, 3]) * 4
    assert torch.equal(one["masked_patch"][1, 3], heard.values[1, first : first + 4].flatten())


def test_hidden_states_leave_out_what_is_beyond_a_clip() -> None:
    source, tower = make("own-transformer")
    model = DualEncoder({"audio": tower}, [], LogitScale()).eval()
    waves = [0.1 * torch.randn(n) for n in (9_000, 16_000)]
    two, one = (source.collate([{"wave": w} for w in some]) for some in (waves, waves[:1]))
    model.keep_hidden([0.5, 1.0], 6, {"audio": two})
    with torch.no_grad():
        together, alone = (model({"audio": x})[hidden_group(0.5)]["audio"] for x in (two, one))
    assert (together[0] - alone[0]).abs().max() <= 1e-5
