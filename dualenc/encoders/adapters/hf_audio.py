"""Audio towers of the transformers library: CLAP's HTSAT, Whisper's encoder, AST, wav2vec 2.0, w2v-BERT.

Each is told apart by its ``model_type``; the input it was made with comes from its preprocessor_config.json, or from
that architecture's usual one.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dualenc.encoders.adapters.hf_towers import switch_checkpointing
from dualenc.encoders.audio_front import FrontEnd, Heard
from dualenc.encoders.tower import Tower
from dualenc.errors import ConfigError

TYPES = ("clap_audio_model", "whisper", "audio-spectrogram-transformer", "wav2vec2", "wav2vec2-bert")
_KALDI_FLOOR = 1.192092955078125e-07  # 2^-23
_SPEECH_S = 20.0  # no limit of the architecture: what fits a training step
# What HTSAT's first batch norm finds in log-mels; released weights bring their own.
_DB_MEAN, _DB_STD = -40.0, 25.0


def audio_defaults(arch: Any, pre: Mapping[str, Any]) -> dict[str, Any]:
    """The ``input`` that a model was made with.

    Args:
        arch: its configuration.
        pre: preprocessor_config.json; what it leaves out is as transformers' extractor of that model has it.

    Raises:
        ConfigError: for an architecture that is not one of :data:`TYPES`.
    """
    kind = _type(arch)
    rate = int(pre.get("sampling_rate", 48_000 if kind == "clap_audio_model" else 16_000))
    make = {
        "clap_audio_model": _clap,
        "whisper": _whisper,
        "audio-spectrogram-transformer": _ast,
        "wav2vec2": _wav2vec2,
        "wav2vec2-bert": _w2v_bert,
    }[kind]
    return {"rate": rate, "long": "crop", "pad": "none", **make(arch, pre, rate)}


def _clap(arch: Any, pre: Mapping[str, Any], rate: int) -> dict[str, Any]:
    fused = bool(arch.enable_fusion)
    padding = str(pre.get("padding", "repeatpad"))
    features = {
        "n_fft": int(pre.get("fft_window_size", 1024)),
        "hop": int(pre.get("hop_length", 480)),
        "mels": int(pre.get("feature_size", arch.num_mel_bins)),
        "f_min": float(pre.get("frequency_min", 0)),
        "f_max": float(pre.get("frequency_max", 14_000)),
        # The fused models were trained on torchaudio's filters, the others on librosa's.
        "mel_scale": "htk" if fused else "slaney",
        "mel_norm": not fused,
        "log": "db",
        "floor": 1e-10,
        "mean": 0.0,
        "std": 1.0,
    }
    return {
        "max_s": float(pre.get("max_length_s", 10)),
        "pad": padding if padding in ("repeat", "repeatpad") else "zeros",
        "long": "fusion" if fused else "crop",
        "features": features,
    }


def _whisper(arch: Any, pre: Mapping[str, Any], rate: int) -> dict[str, Any]:
    features = {
        "n_fft": int(pre.get("n_fft", 400)),
        "hop": int(pre.get("hop_length", 160)),
        "drop_last": True,
        "mels": int(pre.get("feature_size", arch.num_mel_bins)),
        "f_min": 0.0,
        "f_max": 8000.0,
        "log": "log10",
        "span": 8.0,
        "mean": -4.0,
        "std": 4.0,
    }
    # Whisper knows no mask: it was trained on 30 s filled with silence. A shorter max_s cuts its places accordingly.
    seconds = arch.max_source_positions * 2 * features["hop"] / rate
    return {"max_s": seconds, "pad": "zeros", "eval_crop": "start", "features": features}


def _kaldi(window: str, mels: int, rate: int) -> dict[str, Any]:
    return {
        "n_fft": 512,
        "win": 400,
        "hop": 160,
        "window": window,
        "center": False,
        "remove_dc": True,
        "preemphasis": 0.97,
        "mels": mels,
        "f_min": 20.0,
        "f_max": float(rate // 2),
        "mel_scale": "kaldi",
        "mel_norm": False,
        "log": "ln",
        "floor": _KALDI_FLOOR,
    }


def _ast(arch: Any, pre: Mapping[str, Any], rate: int) -> dict[str, Any]:
    frames = int(pre.get("max_length", arch.max_length))
    normal = bool(pre.get("do_normalize", True))
    features = {
        **_kaldi("hann_symmetric", int(pre.get("num_mel_bins", arch.num_mel_bins)), rate),
        "frames": frames,
        "mean": float(pre.get("mean", -4.2677393)) if normal else 0.0,
        "std": 2 * float(pre.get("std", 4.5689974)) if normal else 1.0,
    }
    return {"max_s": ((frames - 1) * 160 + 400) / rate, "eval_crop": "start", "features": features}


def _w2v_bert(arch: Any, pre: Mapping[str, Any], rate: int) -> dict[str, Any]:
    features = {
        **_kaldi("povey", int(pre.get("num_mel_bins", 80)), rate),
        "scale": 32768.0,
        "normalize": "bins",
        "stack": int(pre.get("stride", 2)),
        "mean": 0.0,
        "std": 1.0,
    }
    return {"max_s": _SPEECH_S, "eval_crop": "start", "features": features}


def _wav2vec2(arch: Any, pre: Mapping[str, Any], rate: int) -> dict[str, Any]:
    normal = bool(pre.get("do_normalize", True))
    features = {"kind": "waveform", "normalize": "waveform" if normal else "none"}
    return {"max_s": _SPEECH_S, "eval_crop": "start", "features": features}


def _type(arch: Any) -> str:
    if arch.model_type not in TYPES:
        raise ConfigError(f"hf: {arch.model_type!r} is not a supported audio tower; use one of {', '.join(TYPES)}.")
    return str(arch.model_type)


# --- building ----------------------------------------------------------------------------------------------------


def settled(arch: Any, describe: Mapping[str, Any]) -> Any:
    """``arch`` (changed in place) without randomness that dualenc does not seed, and with positions for ``max_s`` only.

    LayerDrop and the masking inside wav2vec 2.0 leave parameters without gradient and draw from numpy's global
    generator; SpecAugment is the input's.
    """
    if describe["kind"] != "audio":
        raise ConfigError(f"hf: {_type(arch)} is a tower for audio, not for {describe['kind']}.")
    for name in ("layerdrop", "encoder_layerdrop", "mask_time_prob", "mask_feature_prob"):
        if name in arch.to_dict():
            setattr(arch, name, 0.0)
    config = describe["config"]
    places = whisper_places(arch, config) if _type(arch) == "whisper" else 0
    if places and places > arch.max_source_positions:
        raise ConfigError(
            f"input.max_s: {config['max_s']:g} s need {places} positions; the tower has {arch.max_source_positions}."
        )
    return arch


def whisper_places(arch: Any, config: Mapping[str, Any]) -> int:
    """Positions after the second convolution, which halves the frames."""
    frames: int = round(config["max_s"] * config["rate"]) // int(config["features"]["hop"])
    return -(-frames // 2)


def random_audio(arch: Any) -> nn.Module:
    """The architecture with random weights, fp32; of Whisper the encoder."""
    if _type(arch) == "whisper":
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        return WhisperEncoder(arch)
    import transformers

    if arch.model_type == "clap_audio_model":
        net: nn.Module = transformers.ClapAudioModel(arch)
        settle_batch_norm(net)
        return net
    build: Any = transformers.AutoModel.from_config
    built: nn.Module = build(arch)
    return built


def settle_batch_norm(net: nn.Module) -> None:
    """HTSAT does not normalise its input otherwise: start from typical statistics of log-mels."""
    encoder = htsat(net)
    encoder.batch_norm.running_mean.fill_(_DB_MEAN)
    encoder.batch_norm.running_var.fill_(_DB_STD**2)


def htsat(net: Any) -> Any:
    """The encoder inside a CLAP audio model, with or without its projection."""
    return (net.audio_model if "audio_model" in dict(net.named_children()) else net).audio_encoder


def cut_places(net: nn.Module, arch: Any, config: Mapping[str, Any]) -> None:
    """Keep of Whisper's sinusoidal positions those that ``max_s`` needs; in place."""
    places = whisper_places(arch, config)
    if places < arch.max_source_positions:
        kept: Tensor = net.embed_positions.weight[:places].detach()  # type: ignore[union-attr, index, assignment]
        shorter = nn.Embedding(places, kept.shape[1]).requires_grad_(False)
        shorter.weight.copy_(kept)
        net.embed_positions = shorter
        net.max_source_positions = arch.max_source_positions = places  # type: ignore[assignment]


class HFAudio(Tower):
    """Front-end, a transformers audio model, pooling, head.

    Args:
        pooling: ``model``: what the model itself gives as one vector; ``mean``: of the frames that are sound.
    """

    def __init__(self, net: nn.Module, arch: Any, head: nn.Module, pooling: str, describe: Mapping[str, Any]) -> None:
        super().__init__()
        offered = {"clap_audio_model": ("model",), "audio-spectrogram-transformer": ("model", "mean")}
        if pooling not in offered.get(_type(arch), ("mean",)):
            raise ConfigError(
                f"pooling: {pooling!r} is not available for {arch.model_type}; use "
                f"{' or '.join(offered.get(arch.model_type, ('mean',)))}."
            )
        self.front, self.net, self.head, self.pooling = FrontEnd(describe), net, head, pooling
        self.kind = _type(arch)
        if self.kind == "clap_audio_model" and arch.enable_fusion:
            fuse_without_branch(net)
        # Group norm runs over time, so padding would change the features: see _speech.
        self.apart = arch.to_dict().get("feat_extract_norm") == "group"

    def pooled(self, x: Mapping[str, Tensor]) -> Tensor:
        """``{"wave": [n, T], "length": int64 [n], …}`` → [n, W]."""
        pooled, states, mask = self._run(self.front(x))
        if pooled is None:
            assert states is not None
            assert mask is not None
            weights = mask.unsqueeze(-1).to(states.dtype)
            pooled = (states * weights).sum(1) / weights.sum(1).clamp(min=1)
        return pooled

    def _run(self, heard: Heard) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """One vector per clip, or frames and a mask of those that are not padding."""
        values, mask = heard.values, heard.mask
        if self.kind == "clap_audio_model":
            views = values if values.ndim == 4 else values[:, None]
            out = self.net(input_features=views, is_longer=heard.longer[:, None])
            return out.audio_embeds if "audio_embeds" in out else out.pooler_output, None, None
        if self.kind == "whisper":
            out = self.net(values.transpose(1, 2))
            return None, out.last_hidden_state, mask[:, ::2]
        if self.kind == "audio-spectrogram-transformer":
            out = self.net(values)
            states = out.last_hidden_state
            return out.pooler_output if self.pooling == "model" else states.mean(1), None, None
        if self.kind == "wav2vec2-bert":
            out = self.net(input_features=values, attention_mask=mask.long())
            return None, out.last_hidden_state, mask
        return (None, *self._speech(values, mask))

    def _speech(self, wave: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """wav2vec 2.0: waveforms → frames and a mask of those that are not padding.

        Where its convolutions are group-normed over time, clips of one length run together and padding comes after.
        """
        net: Any = self.net
        length = mask.sum(1)
        count = net._get_feat_extract_output_lengths(length)
        if not self.apart:
            out = net(wave, attention_mask=mask.long())
            states: Tensor = out.last_hidden_state
            return states, torch.arange(states.shape[1], device=wave.device) < count[:, None]
        frames = wave.new_zeros(len(wave), int(count.max()), net.config.conv_dim[-1])
        for n in sorted(set(length.tolist())):
            rows = (length == n).nonzero().flatten()
            found = net.feature_extractor(wave[rows, :n]).transpose(1, 2)
            padded = nn.functional.pad(found, (0, 0, 0, frames.shape[1] - found.shape[1]))
            frames = frames.to(found.dtype).index_copy(0, rows, padded)
        real = torch.arange(frames.shape[1], device=wave.device) < count[:, None]
        hidden, _ = net.feature_projection(frames)
        states = net.encoder(hidden, attention_mask=real).last_hidden_state
        return states, real

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """transformers' own switch; CLAP does not have one."""
        net: Any = self.net
        if net.supports_gradient_checkpointing:  # of every PreTrainedModel
            switch_checkpointing(self.net, enable)


def fuse_without_branch(net: nn.Module) -> None:
    """Run CLAP's fusion on every clip and take it where the clip is longer than the tower's window.

    transformers runs it on the longer ones only: a batch without any would leave parameters without a gradient on one
    rank. The numbers are the same.
    """
    encoder = htsat(net)
    encoder.patch_embed.forward = types.MethodType(_fused_patches, encoder.patch_embed)
    encoder.enable_fusion = False  # the encoder itself would make indices of ``is_longer``; the mask comes below
    encoder.register_forward_pre_hook(_hand_down, with_kwargs=True)


def _hand_down(encoder: Any, args: Any, kwargs: Any) -> None:
    encoder.patch_embed.longer = kwargs["is_longer"].flatten()


def _fused_patches(self: Any, views: Tensor, is_longer_idx: Any = None) -> Tensor:
    """Views as pictures [n, 4, S, S] → patches [n, P, W]; ``self`` is a ClapAudioPatchEmbed."""
    whole: Tensor = self.proj(views[:, :1])
    n = len(views)
    local = self.mel_conv2d(views[:, 1:].flatten(0, 1)[:, None])
    # Three crops side by side, [n, W, H, 3 · w], filled up to the width of the whole.
    local = local.unflatten(0, (n, 3)).permute(0, 2, 3, 1, 4).flatten(3)
    local = nn.functional.pad(local, (0, whole.shape[-1] - local.shape[-1]))
    out = torch.where(self.longer[:, None, None, None], self.fusion_model(whole, local), whole)
    if self.flatten:
        out = out.flatten(2).transpose(1, 2)
    normed: Tensor = self.norm(out)
    return normed
